"""Tokens are compared by identity: the same id must be the same string."""

from __future__ import annotations

import json
import math
import re
import shlex

import pytest
import torch
from typer.testing import CliRunner

from proxytune import PromptError, ProxyTunedForCausalLM, VocabularyError, load_recipe
from proxytune.cli import app
from proxytune.recipe.vocabulary import compare
from support import tiny


class Words:
    """A tokenizer that is only its vocabulary."""

    def __init__(self, *tokens, **at):
        self.vocab = {token: index for index, token in enumerate(tokens)} | at

    def get_vocab(self):
        return self.vocab


ABCD = Words("a", "b", "c", "d")


def test_equal_tokenizers_are_shared():
    report = compare({"base": ABCD, "e": Words("a", "b", "c", "d")}, {"base": 4, "e": 4})
    assert (report.shared, report.extra, report.mismatches, report.unchecked) == (4, {}, [], [])
    report.raise_for_mismatch()


def test_extra_rows_are_counted_for_each_member():
    report = compare({"base": ABCD, "e": ABCD, "x": ABCD}, {"base": 16, "e": 10, "x": 4})
    assert report.shared == 4
    assert report.extra == {"base": 12, "e": 6}
    report.raise_for_mismatch()


def test_tokens_beyond_the_shared_width_may_differ():
    """32000 against 32016: what was added later is not mixed, so it need not agree."""
    report = compare({"base": Words("a", "b", "new"), "e": Words("a", "b", "other")}, {"base": 3, "e": 2})
    report.raise_for_mismatch()


def test_a_mismatch_names_the_first_ids_and_both_tokens():
    swapped = Words("a", "B", "C", "D")
    report = compare({"base": ABCD, "fine": ABCD, "e.expert": swapped}, {"base": 4, "fine": 4, "e.expert": 4})
    assert report.mismatches == [(1, "e.expert", "b", "B"), (2, "e.expert", "c", "C"), (3, "e.expert", "d", "D")]
    with pytest.raises(
        VocabularyError,
        match=r"member 'e\.expert' does not share the base's vocabulary \(3 ids differ\): id 1 is 'b' in the base and "
        r"'B'; id 2 is 'c' in the base and 'C'; id 3 is 'd'",
    ):
        report.raise_for_mismatch()


def test_only_a_few_ids_are_named():
    with pytest.raises(VocabularyError, match=r"\(100 ids differ\)") as caught:
        compare(
            {"base": Words(*map(str, range(100))), "e": Words(*(f"_{i}" for i in range(100)))}, {"base": 100, "e": 100}
        ).raise_for_mismatch()
    assert str(caught.value).count("id ") == 3


def test_the_first_bad_member_is_named():
    report = compare({"base": ABCD, "x": Words("a", "X"), "y": Words("Y", "b")}, {"base": 4, "x": 4, "y": 4})
    with pytest.raises(VocabularyError, match=r"member 'x'.*1 ids differ"):
        report.raise_for_mismatch()


def test_members_without_a_tokenizer_are_taken_on_trust_with_a_note():
    report = compare({"base": ABCD, "e": None}, {"base": 4, "e": 4, "x": 4})
    assert report.unchecked == ["e", "x"]


# -- in the composite -----------------------------------------------------------------------------------------
def test_loading_refuses_other_tokens_under_the_same_ids(tmp_path):
    strange = tiny.tokenizer(swap=("a", "b"))
    ids = sorted(strange.get_vocab()[token] for token in "ab")
    tiny.write_model(tmp_path / "anti", "qwen2", "small", 3, tokenizer_=strange)
    tiny.write_recipe(tmp_path / "recipe")
    with pytest.raises(VocabularyError, match=f"member 'expert.anti_expert'.*2 ids differ.*id {ids[0]} is 'a' in"):
        ProxyTunedForCausalLM.from_pretrained(tmp_path / "recipe")


def test_only_named_differences_are_accepted():
    words = {"base": ABCD, "e": Words("a", "B", "C", "d")}
    widths = {"base": 4, "e": 4}
    report = compare(words, widths, {"1": ["b", "B"]})
    assert report.mismatches == [(2, "e", "c", "C")]
    assert report.renamed == [(1, "e", "b", "B")]
    for other in ({"2": ["b", "B"]}, {"1": ["b", "X"]}, {"1": ["B", "X"]}):
        assert len(compare(words, widths, other).mismatches) == 2
    assert compare(words, widths, {"1": ["b", "x", "B"], "2": ["C", "c"]}).mismatches == []


def test_the_message_shows_the_field_and_the_flag_that_accept_the_difference(tmp_path):
    strange = tiny.tokenizer(swap=("a", "b"))
    tiny.write_model(tmp_path / "anti", "qwen2", "small", 3, tokenizer_=strange)
    recipe = tiny.write_recipe(tmp_path / "recipe")
    with pytest.raises(VocabularyError) as caught:
        ProxyTunedForCausalLM.from_pretrained(recipe)
    field = re.search(r'put ("renamed_tokens": \{.*?\}) into', str(caught.value))[1]
    config = json.loads((recipe / "config.json").read_text())
    (recipe / "config.json").write_text(json.dumps({**config, **json.loads(f"{{{field}}}")}))
    model = ProxyTunedForCausalLM.from_pretrained(recipe)
    model.save_pretrained(tmp_path / "again")
    assert load_recipe(tmp_path / "again").renamed_tokens == json.loads(f"{{{field}}}")["renamed_tokens"]
    flag = shlex.split(re.search(r"say (--renamed-tokens .*) to proxytune new", str(caught.value))[1])
    members = [f"--{name}={tmp_path / path}" for name, path in (("base", "base"), ("expert", "expert"))]
    made = CliRunner().invoke(
        app, ["new", str(tmp_path / "new"), *members, f"--anti-expert={tmp_path / 'anti'}", *flag]
    )
    assert made.exit_code == 0, made.output
    checked = CliRunner().invoke(app, ["check", str(tmp_path / "new")])
    assert checked.exit_code == 0
    assert "the recipe accepts that" in " ".join(checked.output.split())


def test_models_in_memory_are_compared_by_the_tokenizers_given(trio, tokenizer):
    with pytest.raises(VocabularyError, match=r"'expert\.expert'"):
        ProxyTunedForCausalLM.from_members(
            trio.base,
            trio.expert,
            trio.anti_expert,
            tokenizer=tokenizer,
            tokenizers={"expert.expert": tiny.tokenizer(swap=("a", "b"))},
        )


@pytest.fixture(scope="module")
def unequal():
    """A base with 16 rows more than the anti-expert, whose logits would win if they could."""
    base = tiny.llama("base", 1, vocab_size=tiny.VOCAB + 16)
    with torch.no_grad():
        base.lm_head.weight[tiny.VOCAB :] *= 20
    return ProxyTunedForCausalLM.from_members(
        base, tiny.qwen2("small", 2, vocab_size=tiny.VOCAB + 64), tiny.qwen2("small", 3)
    )


@torch.no_grad()
def test_extra_rows_are_minus_infinity(unequal):
    logits = unequal(torch.tensor([[1, 5, 6]])).logits
    assert logits.shape[-1] == tiny.VOCAB + 16, "as wide as the base"
    assert (logits[..., tiny.VOCAB :] == -math.inf).all()
    assert torch.isfinite(logits[..., : tiny.VOCAB]).all()
    assert unequal.config.vocab_size == tiny.VOCAB + 16


@pytest.mark.parametrize("mode", [{}, {"do_sample": True, "top_k": 0}, {"num_beams": 3}], ids=str)
def test_extra_rows_are_never_chosen(unequal, mode):
    ids = torch.tensor([[1, 5, 6]])
    alone = unequal.base.generate(ids, do_sample=False, max_new_tokens=8, eos_token_id=None)
    assert int(alone.max()) >= tiny.VOCAB, "the base alone chooses one"
    torch.manual_seed(0)
    out = unequal.generate(ids, **{"do_sample": False, "eos_token_id": None, "max_new_tokens": 24, **mode})
    assert int(out.max()) < tiny.VOCAB


def test_a_prompt_id_that_a_member_lacks_is_refused(unequal):
    with pytest.raises(PromptError, match=rf"token id {tiny.VOCAB + 3}, but member 'expert\.anti_expert' has only"):
        unequal.generate(torch.tensor([[1, 5, tiny.VOCAB + 3]]), max_new_tokens=1)
    with pytest.raises(PromptError, match="token id"):
        unequal.generate(torch.tensor([[1, 5, -1]]), max_new_tokens=1)


def test_padding_beyond_a_members_vocabulary_is_no_prompt():
    """A base with an added pad token (32000): small members never read it, at the left or after the end."""
    base, expert, anti = tiny.llama(vocab_size=tiny.VOCAB + 8), tiny.llama("small", 1), tiny.llama("small", 2)
    pad = tiny.VOCAB + 7
    model = ProxyTunedForCausalLM.from_members(base, expert, anti)
    assert model.shared_vocab < pad
    ids = torch.tensor([[pad, pad, 7, 9, 11], [5, 40, 77, 102, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    quiet = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": pad}
    alone = model.generate(ids[1:], eos_token_id=None, **quiet)
    end = int(alone[0, 6])  # the second row ends after two tokens and is padded from there
    both = model.generate(ids, attention_mask=mask, eos_token_id=end, **quiet)
    first = model.generate(ids[:1, 2:], eos_token_id=end, **quiet)
    new = first.shape[1] - 3
    assert both[0, 5 : 5 + new].tolist() == first[0, 3:].tolist()
    with pytest.raises(PromptError, match=f"token id {pad}"):
        model(ids)
