"""The builders and the oracle keep their promises; every other test rests on them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from support import tiny
from support.oracle import Oracle, assert_same_tokens


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_seeds_make_different_models_and_the_same_seed_the_same(family):
    ids = torch.tensor([[5, 6, 7, 8]])
    first, again, other = (tiny.model(family, "small", seed)(ids).logits for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.3, "the models must disagree clearly"


def test_models_survive_the_disk(tmp_path):
    place = tiny.write_model(tmp_path / "m", "gemma3", "small", 4)
    loaded = AutoModelForCausalLM.from_pretrained(place)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]])
    torch.testing.assert_close(loaded(ids).logits, tiny.gemma3("small", 4)(ids).logits)


def test_the_tokenizer_survives_text_and_disk(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for text in ("the question", "Ünïcode →\n\ttabs", " leading and trailing "):
        ids = AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
        assert ids[0] == tiny.BOS
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) <= tiny.VOCAB


def test_adapters_change_the_model(shelf):
    from peft import PeftModel

    ids = torch.tensor([[5, 6, 7, 8]])
    model = AutoModelForCausalLM.from_pretrained(shelf / "anti")
    plain = model(ids).logits
    assert (PeftModel.from_pretrained(model, shelf / "adapter")(ids).logits - plain).abs().mean() > 0.1


def test_the_oracle_loop_equals_its_padded_batch(trio):
    oracle = Oracle(trio.base, [("e", trio.expert, trio.anti_expert, 1.0)])
    rows = [[1, 5, 6, 7], [1, 9]]
    ids = torch.tensor([rows[0], [0, 0, *rows[1]]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    batch = oracle.batch_logits(ids, mask)
    for index, row in enumerate(rows):
        torch.testing.assert_close(batch[index, -1], oracle.logits(row, [])[-1], rtol=1e-4, atol=1e-4)


def test_a_clear_difference_is_one():
    clear, close = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0005])
    assert_same_tokens([1, 0], ([1, 1], [clear, close]))
    with pytest.raises(AssertionError, match="token 1 differs"):
        assert_same_tokens([1, 0], ([1, 1], [clear, clear]))
    with pytest.raises(AssertionError, match="token 1 differs"):
        assert_same_tokens([1], ([1, 1], [clear, clear]))
