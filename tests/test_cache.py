"""The one cache of all members: rollback beyond a sliding window, and rows that move together."""

from __future__ import annotations

import pytest
import torch

from proxytune import ProxyTunedForCausalLM
from proxytune.lanes.transformers import TransformersState
from support import tiny
from support.decoding import QUIET
from support.oracle import Oracle, assert_same_tokens

PROMPT = [1, *(20 + (7 * i) % 90 for i in range(2 * tiny.WINDOW + 3))]  # longer than any window
REPEATING = [1, *[40, 41, 42, 43, 44] * 5, 40, 41]

SLIDING = {
    "base slides": ("mistral", "llama", "qwen2"),
    "expert slides": ("llama", "mistral", "qwen2"),
    "anti-expert slides": ("qwen2", "llama", "gemma3"),
    "all slide": ("gemma3", "mistral", "gemma3"),
}


@pytest.fixture(scope="module", params=SLIDING)
def oracle(request):
    base, expert, anti_expert = SLIDING[request.param]
    return Oracle(
        tiny.model(base, "base", 1), [("e", tiny.model(expert, "small", 2), tiny.model(anti_expert, "mini", 3), 1.0)]
    )


@pytest.fixture(scope="module")
def model(oracle):
    return tiny.compose(oracle)


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:4]], ids=["beyond the window", "into the window"])
def test_greedy_beyond_the_window(oracle, model, prompt):
    out = model.generate(torch.tensor([prompt]), **QUIET, max_new_tokens=20)
    assert_same_tokens(out[0, len(prompt) :], oracle.greedy(prompt, 20))


def test_ragged_batch_across_the_window(oracle, model):
    rows = [PROMPT, PROMPT[:5], PROMPT[3:12]]
    out = model.generate(**tiny.padded(rows), **QUIET, max_new_tokens=10)
    for row, tokens in zip(rows, out[:, len(PROMPT) :]):
        assert_same_tokens(tokens, oracle.greedy(row, 10))


@pytest.mark.parametrize("draft", ["lookup", "assistant"])
@pytest.mark.parametrize("prompt", [REPEATING, REPEATING[:7]], ids=["beyond the window", "into the window"])
def test_rejected_drafts_are_rolled_back(oracle, model, draft, prompt):
    options = {
        "lookup": {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 1},  # one token that recurs is a match
        "assistant": {"assistant_model": tiny.llama("mini", 9)},
    }[draft]
    cropped = []
    cache = model.new_cache()
    crop = cache.crop
    cache.crop = lambda n: (cropped.append(n), crop(n))
    out = model.generate(torch.tensor([prompt]), **QUIET, max_new_tokens=24, past_key_values=cache, **options)
    assert_same_tokens(out[0, len(prompt) :], oracle.greedy(prompt, 24))
    assert any(cropped), "drafts were rejected"


@pytest.mark.parametrize("prompt", [REPEATING, REPEATING[:7]], ids=["beyond the window", "into the window"])
def test_a_composite_drafts_and_is_rolled_back(oracle, model, prompt, monkeypatch):
    """As the assistant of a model that often disagrees: each draft is what the mixture says after that text."""
    ids, drafted, generate = torch.tensor([prompt]), [], model.generate

    def noted(**kwargs):
        out = generate(**kwargs)
        drafted.append((kwargs["input_ids"][0].tolist(), out.sequences[0].tolist()))
        return out

    main = tiny.llama("base", 1)
    alone = main.generate(ids, **QUIET, max_new_tokens=20)
    monkeypatch.setattr(model, "generate", noted)
    assert torch.equal(main.generate(ids, **QUIET, max_new_tokens=20, assistant_model=model), alone)
    assert len(drafted) > 5, "drafts were rejected"
    for text, longer in drafted:
        assert_same_tokens(longer[len(text) :], oracle.greedy(text, len(longer) - len(text)))


@torch.no_grad()
def test_crop_is_as_if_never_read(oracle, model):
    """Read a prompt, then five columns too many, crop them, read others: the logits are the plain loop's."""
    cache = model.new_cache()
    cache.activate_past_recording()
    model(torch.tensor([PROMPT]), past_key_values=cache)
    for wrong, right in (([9, 9, 9, 9, 9], [30, 31]), ([8, 8], [32])):
        model(torch.tensor([wrong]), past_key_values=cache)
        cache.crop(-len(wrong))
        out = model(torch.tensor([right]), past_key_values=cache)
    expected = oracle.logits([*PROMPT, 30, 31, 32], [])[-1]
    torch.testing.assert_close(out.logits[0, -1], expected, rtol=1e-4, atol=1e-3)
    assert cache.get_seq_length() == len(PROMPT) + 3


@torch.no_grad()
def test_rows_are_repeated_and_chosen_for_every_member(oracle, model):
    rows = [PROMPT, [*PROMPT[:6], *PROMPT[8:10], *PROMPT[6:8], *PROMPT[10:]]]
    cache = model.new_cache()
    model(torch.tensor(rows), past_key_values=cache)
    cache.batch_repeat_interleave(2)  # rows 0 0 1 1
    cache.reorder_cache(torch.tensor([2, 0, 1, 3]))  # rows 1 0 0 1
    cache.batch_select_indices(torch.tensor([1, 3]))  # rows 0 1
    out = model(torch.tensor([[50], [60]]), past_key_values=cache)
    for index, (row, token) in enumerate(zip(rows, (50, 60))):
        expected = oracle.logits([*row, token], [])[-1]
        torch.testing.assert_close(out.logits[index, -1], expected, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_rows_of_two_seats_and_their_prompts_move_together(tokenizer):
    """One model under two prompts, ragged, is one lane of two blocks of rows."""
    base = tiny.gpt2("small", 1)
    prompts = {"base": [[1, 5, 6], [1, 7]], "e.expert": [[1, 30, 31, 32, 33], [1, 40, 41]]}
    experts = [{"name": "e", "expert": base, "expert_prompt": "Q: {prompt}"}]
    model = ProxyTunedForCausalLM.from_members(base, experts=experts, tokenizer=tokenizer)
    oracle, cache = Oracle(base, [("e", base, None, 1.0)]), model.new_cache()
    assert [len(lane.seats) for lane in model.lanes] == [2]
    own = tiny.padded(prompts["e.expert"])
    model(
        **tiny.padded(prompts["base"]),
        past_key_values=cache,
        prompt_length=3,
        member_input_ids={"e.expert": own["input_ids"]},
        member_attention_mask={"e.expert": own["attention_mask"]},
    )
    cache.batch_repeat_interleave(2)  # rows 0 0 1 1
    cache.reorder_cache(torch.tensor([2, 0, 1, 3]))  # rows 1 0 0 1
    cache.batch_select_indices(torch.tensor([False, True, False, True]))  # rows 0 1
    cache.reorder_cache(torch.tensor([1, 0]))  # rows 1 0
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    positions = torch.tensor([[2], [3]])
    out = model(torch.tensor([[50], [60]]), attention_mask=mask, position_ids=positions, past_key_values=cache)
    for index, (row, token) in enumerate(((1, 50), (0, 60))):
        expected = oracle.logits({name: rows[row] for name, rows in prompts.items()}, [token])[-1]
        torch.testing.assert_close(out.logits[index, -1], expected, rtol=1e-4, atol=1e-3)


# -- no cache -------------------------------------------------------------------------------------------------
def test_without_a_cache_lanes_are_read_through_states_that_keep_nothing(oracle, model, monkeypatch):
    read, capacities = TransformersState.read, []

    def counted(state, *args, **kwargs):
        capacities.append(state.capacity)
        return read(state, *args, **kwargs)

    monkeypatch.setattr(TransformersState, "read", counted)
    batch = tiny.padded([PROMPT, PROMPT[:9]])
    with torch.no_grad():
        out = model(**batch, use_cache=False)
        kept = model(**batch)
        last = model(**batch, use_cache=False, logits_to_keep=2)
    assert capacities == [0] * len(model.lanes) + [None] * len(model.lanes) + [0] * len(model.lanes)
    assert out.past_key_values is None
    assert last.logits.shape[1] == 2
    shown = batch["attention_mask"].bool()
    torch.testing.assert_close(out.logits[shown], kept.logits[shown], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(last.logits, kept.logits[:, -2:], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(out.logits[0, -1], oracle.logits(PROMPT, [])[-1], rtol=1e-4, atol=1e-3)


def test_training_and_other_positions_call_lanes_without_a_state(model, monkeypatch):
    monkeypatch.setattr(TransformersState, "read", None)
    ids = torch.tensor([PROMPT[:6]])
    model.requires_grad_(True)
    try:
        assert model(ids, use_cache=False).logits.requires_grad
    finally:
        model.requires_grad_(False)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])  # two texts in one row
    with torch.no_grad():
        together = model(ids, position_ids=packed, use_cache=False).logits
        alone = model(ids[:, 3:], position_ids=packed[:, 3:], use_cache=False).logits
    torch.testing.assert_close(together[:, 3:], alone, rtol=1e-4, atol=1e-3)


# -- the cache alone ------------------------------------------------------------------------------------------
@pytest.fixture
def shared():
    """Base and anti-expert are one model, so there are two lanes."""
    base = tiny.llama("small", 1)
    return tiny.compose(Oracle(base, [("e", tiny.qwen2("mini", 2), base, 1.0)]))


@torch.no_grad()
def test_the_whole_is_its_states(shared):
    cache = shared.new_cache()
    shared(torch.tensor([[1, 5, 6]]), past_key_values=cache)
    assert len(cache.states) == 2, "one state a lane"
    layers = [layer for state in cache.states for layer in state.layers]
    assert all(a is b for a, b in zip(cache.layers, layers, strict=True))
    assert [layer.get_seq_length() for layer in cache.layers] == [3] * len(layers)


@torch.no_grad()
@pytest.mark.parametrize(("call", "left"), [(-2, 3), (3, 3), (0, 5), (9, 5)])
def test_crop_counts_what_is_removed_and_takes_the_older_meaning_too(shared, call, left):
    cache = shared.new_cache()
    shared(torch.tensor([[1, 5, 6, 7, 8]]), past_key_values=cache)
    cache.crop(call)
    assert cache.get_seq_length() == left
    assert {layer.get_seq_length() for layer in cache.layers} == {left}


@torch.no_grad()
def test_reset_forgets_everything(shared):
    cache = shared.new_cache()
    first = shared(torch.tensor([[1, 5, 6]]), past_key_values=cache).logits
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(shared(torch.tensor([[1, 5, 6]]), past_key_values=cache).logits, first)


@torch.no_grad()
def test_rows_are_selected_by_a_boolean_mask(shared):
    rows = torch.tensor([[1, 5, 6], [1, 7, 8], [1, 9, 10]])
    cache = shared.new_cache()
    shared(rows, past_key_values=cache)
    cache.batch_select_indices(torch.tensor([True, False, True]))
    assert cache.n_batch == 2
    out = shared(torch.tensor([[11], [11]]), past_key_values=cache).logits
    full = shared(torch.cat([rows[[0, 2]], torch.full((2, 1), 11)], dim=1)).logits
    torch.testing.assert_close(out[:, -1], full[:, -1], rtol=1e-4, atol=1e-4)
