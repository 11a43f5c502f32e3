"""Every mode of ``generate`` against the plain loop."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from proxytune import AlphaError, PromptError, ProxyTunedForCausalLM, ProxyTuneError
from support import tiny
from support.decoding import QUIET, ROWS
from support.oracle import Oracle, assert_same_tokens

N_NEW = 16


def greedy(model, rows=None, n_new=N_NEW, **kwargs):
    """New tokens of a left-padded batch, one list a row."""
    batch = tiny.padded(rows or ROWS)
    out = model.generate(**batch, **{**QUIET, "max_new_tokens": n_new, **kwargs})
    return [row[batch["input_ids"].shape[1] :].tolist() for row in out]


@pytest.fixture(scope="module")
def steered(trio):
    """The oracle of the shared trio, its composite, and its greedy answers to ROWS."""
    oracle = Oracle(trio.base, [("e", trio.expert, trio.anti_expert, 1.0)])
    return SimpleNamespace(
        oracle=oracle, model=tiny.compose(oracle), answers=[oracle.greedy(row, N_NEW) for row in ROWS]
    )


# -- greedy, over families ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("base", "expert", "anti_expert"),
    [
        ("llama", "qwen2", "gemma3"),
        ("llama", "mistral", "mistral"),
        ("qwen2", "llama", "mistral"),
        ("gemma3", "llama", "qwen2"),
        ("gemma3", "gemma3", "gemma3"),
        ("mistral", "gemma3", "llama"),
        ("gpt2", "gpt2", "llama"),
    ],
)
def test_greedy_is_the_plain_loop_over_families(base, expert, anti_expert):
    oracle = Oracle(
        tiny.model(base, "base", 1), [("e", tiny.model(expert, "small", 2), tiny.model(anti_expert, "mini", 3), 1.0)]
    )
    for row, tokens in zip(ROWS, greedy(tiny.compose(oracle))):
        assert_same_tokens(tokens, oracle.greedy(row, N_NEW))


def test_steering_changes_the_answer(steered):
    """Otherwise agreement with the oracle would show nothing."""
    plain = [Oracle(steered.oracle.base).greedy(row, N_NEW)[0] for row in ROWS]
    assert all(ours != theirs for ours, (theirs, _) in zip(plain, steered.answers))


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_with_and_without_a_cache(steered, use_cache):
    for tokens, answer in zip(greedy(steered.model, use_cache=use_cache), steered.answers):
        assert_same_tokens(tokens, answer)


def test_several_experts(trio):
    third, fourth = tiny.llama("mini", 7), tiny.gemma3("small", 8)
    oracle = Oracle(
        trio.base,
        [("a", trio.expert, trio.anti_expert, 0.7), ("b", third, None, -0.4), ("c", None, fourth, 0.5)],
    )
    for row, tokens in zip(ROWS, greedy(tiny.compose(oracle))):
        assert_same_tokens(tokens, oracle.greedy(row, N_NEW))


def test_attention_masks_may_have_holes(steered):
    """A mask that hides columns inside a row hides them from every member."""
    batch = tiny.padded([ROWS[0]])
    batch["attention_mask"][0, 3] = 0
    out = steered.model.generate(**batch, **QUIET, max_new_tokens=8, return_dict_in_generate=True, output_logits=True)
    full, mask = out.sequences, torch.ones_like(out.sequences)
    mask[0, 3] = 0
    expected = steered.oracle.batch_logits(full, mask)[0, len(ROWS[0]) - 1 : -1]
    torch.testing.assert_close(torch.cat(out.logits), expected, rtol=1e-3, atol=1e-3)


# -- what generate returns ------------------------------------------------------------------------------------
def test_scores_and_logits_are_the_mixture(steered):
    row = ROWS[0]
    out = steered.model.generate(
        torch.tensor([row]),
        **QUIET,
        max_new_tokens=N_NEW,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    expected = steered.oracle.logits(row, out.sequences[0, len(row) :].tolist())[:-1]
    for found in (out.logits, out.scores):
        torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("asked", ["output_scores", "output_logits"])
def test_criteria_see_scores_where_scores_are_asked_for(steered, asked):
    """As in transformers' own loop."""
    seen = []

    class Watch(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append(None if scores is None else len(scores))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    options = {asked: True, "return_dict_in_generate": True, "stopping_criteria": StoppingCriteriaList([Watch()])}
    out = steered.model.generate(torch.tensor([ROWS[0]]), **QUIET, max_new_tokens=4, **options)
    assert seen == ([1, 2, 3, 4] if asked == "output_scores" else [None] * 4)
    assert (out.scores is None) == (asked == "output_logits")
    assert (out.logits is None) == (asked == "output_scores")
    assert len(out.scores or out.logits) == 4


def test_a_cache_is_continued_across_calls(steered):
    row, more = ROWS[0], [5, 6, 7]
    first = steered.model.generate(torch.tensor([row]), **QUIET, max_new_tokens=10, return_dict_in_generate=True)
    grown = [*first.sequences[0].tolist(), *more]
    cache = first.past_key_values
    assert cache.get_seq_length() == len(row) + 10 - 1  # the last token has not been read yet
    out = steered.model.generate(torch.tensor([grown]), **QUIET, max_new_tokens=10, past_key_values=cache)
    assert_same_tokens(out[0, len(grown) :], steered.oracle.greedy(grown, 10))


def test_a_callers_own_cache_is_filled(steered):
    cache = steered.model.new_cache()
    row = ROWS[0]
    steered.model.generate(torch.tensor([row]), **QUIET, max_new_tokens=4, past_key_values=cache)
    assert cache.get_seq_length() == len(row) + 3
    assert all(state.view.get_seq_length() == len(row) + 3 for state in cache.states)


def test_a_prompt_read_in_chunks_gives_the_same(steered):
    row = [*ROWS[0], *ROWS[1], *ROWS[2]]
    out = steered.model.generate(torch.tensor([row]), **QUIET, max_new_tokens=10, prefill_chunk_size=5)
    assert_same_tokens(out[0, len(row) :], steered.oracle.greedy(row, 10))


# -- ends -----------------------------------------------------------------------------------------------------
def test_eos_ends_each_row_on_its_own(steered):
    """An end token that two rows say at different places and the third never."""
    eos, ends = 254, []
    rows = greedy(steered.model, eos_token_id=eos)
    for row, tokens in zip(ROWS, rows):
        expected, logits = steered.oracle.greedy(row, N_NEW, eos=eos)
        assert_same_tokens(tokens[: len(expected)], (expected, logits))
        assert tokens[len(expected) :] == [tiny.PAD] * (N_NEW - len(expected))
        ends.append(expected.index(eos) if eos in expected else None)
    assert len(set(ends)) == 3
    assert None in ends


def test_a_criterion_of_the_callers_sees_every_row_of_the_batch(steered):
    """Rows that have ended too: it may keep something for each row."""
    seen = []

    def ends_nothing(ids, scores, **_):
        seen.append(len(ids))
        return torch.zeros(len(ids), dtype=torch.bool)

    rows = greedy(steered.model, eos_token_id=254, stopping_criteria=StoppingCriteriaList([ends_nothing]))
    assert rows == greedy(steered.model, eos_token_id=254)
    assert set(seen) == {len(ROWS)}
    assert any(row[-1] == tiny.PAD for row in rows)


def test_the_bases_eos_is_the_default(trio):
    """Where nothing is said, the base's generation config ends the text."""
    base = tiny.llama("base", 1)
    oracle = Oracle(base, [("e", trio.expert, trio.anti_expert, 1.0)])
    eos = oracle.greedy(ROWS[0], N_NEW)[0][4]
    base.generation_config.eos_token_id = eos
    out = tiny.compose(oracle).generate(torch.tensor([ROWS[0]]), do_sample=False, max_new_tokens=N_NEW)
    assert out[0, -1] == eos
    assert out.shape[1] <= len(ROWS[0]) + 5


def test_max_length_counts_the_prompt(steered):
    out = steered.model.generate(torch.tensor([ROWS[0]]), **QUIET, max_length=len(ROWS[0]) + 3)
    assert out.shape[1] == len(ROWS[0]) + 3


def test_stop_strings(steered, tokenizer):
    answer = steered.answers[0][0]
    at = next(i for i in range(2, N_NEW) if answer[i] not in answer[:i] and tokenizer.decode([answer[i]]).isascii())
    out = steered.model.generate(
        torch.tensor([ROWS[0]]),
        **QUIET,
        max_new_tokens=N_NEW,
        stop_strings=[tokenizer.decode([answer[at]])],
        tokenizer=tokenizer,
    )
    assert len(ROWS[0]) < out.shape[1] <= len(ROWS[0]) + at + 1
    assert tokenizer.decode([answer[at]]) in tokenizer.decode(out[0, len(ROWS[0]) :])


def test_stopping_criteria(steered):
    out = steered.model.generate(
        torch.tensor([ROWS[0]]),
        **QUIET,
        max_new_tokens=N_NEW,
        stopping_criteria=StoppingCriteriaList(
            [lambda ids, scores, **_: torch.tensor([ids.shape[1] >= len(ROWS[0]) + 4])]
        ),
    )
    assert out.shape[1] == len(ROWS[0]) + 4


# -- sampling -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampling_is_a_hand_written_loop_of_the_same_seed(steered, temperature):
    for seed in range(3):
        torch.manual_seed(seed)
        out = steered.model.generate(
            torch.tensor([ROWS[0]]),
            do_sample=True,
            top_k=0,
            temperature=temperature,
            eos_token_id=None,
            max_new_tokens=N_NEW,
            speculate=False,  # drafts draw other samples from one seed
        )
        assert out[0, len(ROWS[0]) :].tolist() == steered.oracle.sample(ROWS[0], N_NEW, seed, temperature=temperature)


def test_top_k_keeps_to_the_mixtures_best(steered):
    torch.manual_seed(0)
    out = steered.model.generate(
        torch.tensor([ROWS[0]]), do_sample=True, top_k=3, eos_token_id=None, max_new_tokens=N_NEW
    )
    tokens = out[0, len(ROWS[0]) :]
    allowed = steered.oracle.logits(ROWS[0], tokens.tolist())[:-1].topk(3).indices
    assert all(token in best for token, best in zip(tokens, allowed))


def test_num_return_sequences_are_separate_draws(steered):
    torch.manual_seed(0)
    out = steered.model.generate(
        **tiny.padded(ROWS[:2]), do_sample=True, top_k=0, eos_token_id=None, max_new_tokens=8, num_return_sequences=3,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    assert out.sequences.shape == (6, len(ROWS[0]) + 8)
    assert len({tuple(row.tolist()) for row in out.sequences}) == 6
    logits = torch.stack(out.logits, dim=1)
    for index, sequence in enumerate(out.sequences):
        expected = steered.oracle.logits(ROWS[index // 3], sequence[len(ROWS[0]) :].tolist())[:-1]
        torch.testing.assert_close(logits[index], expected, rtol=1e-3, atol=2e-3)


# -- beams ----------------------------------------------------------------------------------------------------
class Fused(LlamaForCausalLM):
    """An oracle in the clothes of one model: transformers' own beam search over cacheless mixed logits."""

    def __init__(self, oracle, n_vocab=tiny.VOCAB):
        super().__init__(
            LlamaConfig(
                hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4, vocab_size=n_vocab
            )
        )
        self.oracle = oracle

    def forward(self, input_ids, attention_mask=None, **_):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        return CausalLMOutputWithPast(logits=self.oracle.batch_logits(input_ids, attention_mask))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.5},
        {"num_beams": 3, "no_repeat_ngram_size": 1, "early_stopping": True},
    ],
    ids=str,
)
def test_beams_are_those_of_one_fused_model(steered, options):
    batch = tiny.padded(ROWS)
    options = {**QUIET, **options, "max_new_tokens": 8, "return_dict_in_generate": True, "output_scores": True}
    ours = steered.model.generate(**batch, **options)
    theirs = Fused(steered.oracle).generate(**batch, **options, use_cache=False)
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.sequences, theirs.sequences)


def test_beams_with_ends_are_those_of_one_fused_model(steered):
    eos = steered.answers[0][0][1]
    options = {**QUIET, "eos_token_id": eos, "num_beams": 3, "max_new_tokens": 8, "num_return_sequences": 2}
    ours = steered.model.generate(**tiny.padded(ROWS), **options)
    assert torch.equal(ours, Fused(steered.oracle).generate(**tiny.padded(ROWS), **options, use_cache=False))


def test_beams_by_hand(steered):
    out = steered.model.generate(
        torch.tensor([ROWS[1]]), **QUIET, num_beams=4, num_return_sequences=4, max_new_tokens=6,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    expected = steered.oracle.beams(ROWS[1], 6, 4)
    assert [row[len(ROWS[1]) :].tolist() for row in out.sequences] == [tokens for _, tokens in expected]
    torch.testing.assert_close(out.sequences_scores, torch.tensor([s for s, _ in expected]), rtol=1e-4, atol=1e-4)


# -- drafts ---------------------------------------------------------------------------------------------------
class Counting(torch.nn.Module):
    """How many forwards a model ran, and how many columns each read."""

    def __init__(self, model):
        super().__init__()
        self.columns = []
        self.handle = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.columns.append(ids.shape[1])


@pytest.mark.parametrize("seed", [1, 5])
def test_an_assistant_changes_nothing(steered, trio, seed):
    """Seed 1 makes the base itself the assistant, whose drafts are partly right; seed 5 knows nothing."""
    assistant = trio.base if seed == 1 else tiny.llama("mini", seed)
    calls = Counting(steered.model.member("e.expert"))
    out = steered.model.generate(torch.tensor([ROWS[0]]), **QUIET, max_new_tokens=N_NEW, assistant_model=assistant)
    calls.handle.remove()
    assert_same_tokens(out[0, len(ROWS[0]) :], steered.answers[0])
    assert max(calls.columns[1:]) > 1, "drafts were verified several at once"


def test_a_composite_can_draft(steered, monkeypatch):
    """The mixture as the assistant of itself: every draft is right, and the answer is the mixture's."""
    ids, drafted, generate = torch.tensor([ROWS[0]]), [], steered.model.generate

    def noted(**kwargs):
        out = generate(**kwargs)
        drafted.append(out.sequences[0, len(ROWS[0]) :].tolist())
        return out

    monkeypatch.setattr(steered.model, "generate", noted)
    out = generate(ids, **QUIET, max_new_tokens=N_NEW, assistant_model=steered.model)
    assert_same_tokens(out[0, len(ROWS[0]) :], steered.answers[0])
    tokens, logits = steered.answers[0]
    assert len(drafted) > 2
    for text in drafted:
        assert_same_tokens(text, (tokens[: len(text)], logits))


REPEATING = [1, 40, 41, 42, 43, 40, 41, 42, 43, 40, 41]


def test_prompt_lookup_changes_nothing(steered, trio):
    calls = Counting(steered.model.base)
    out = steered.model.generate(torch.tensor([REPEATING]), **QUIET, max_new_tokens=24, prompt_lookup_num_tokens=4)
    calls.handle.remove()
    assert_same_tokens(out[0, len(REPEATING) :], steered.oracle.greedy(REPEATING, 24))
    assert max(calls.columns[1:]) > 1, "drafts were verified several at once"


def test_prompt_lookup_with_sampling_runs(steered):
    torch.manual_seed(0)
    out = steered.model.generate(
        torch.tensor([REPEATING]), do_sample=True, eos_token_id=None, max_new_tokens=12, prompt_lookup_num_tokens=4
    )
    assert out.shape[1] == len(REPEATING) + 12


# -- streamers and processors ---------------------------------------------------------------------------------
class Recorder(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.tolist())

    def end(self):
        self.ended = True


def test_a_streamer_gets_the_prompt_and_then_token_by_token(steered):
    recorder = Recorder()
    out = steered.model.generate(torch.tensor([ROWS[0]]), **QUIET, max_new_tokens=N_NEW, streamer=recorder)
    assert recorder.ended
    assert recorder.pieces == [[ROWS[0]], *[[token] for token in out[0, len(ROWS[0]) :].tolist()]]


def test_a_text_streamer_says_the_decoded_answer(steered, tokenizer):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=10)
    out = steered.model.generate(torch.tensor([ROWS[0]]), **QUIET, max_new_tokens=N_NEW, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(out[0, len(ROWS[0]) :])


class Shift(LogitsProcessor):
    """Whatever is most likely, says the next id."""

    def __call__(self, input_ids, scores):
        return scores.roll(1, dims=-1)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.8},
        {"min_new_tokens": 9, "eos_token_id": 254},
        {"bad_words_ids": [[i] for i in range(100, 250)]},
        {"no_repeat_ngram_size": 1},
        {"encoder_repetition_penalty": 1.5},
        {"sequence_bias": {(5,): 8.0}},
        {"begin_suppress_tokens": list(range(100, 250))},
        {"exponential_decay_length_penalty": (2, 50.0), "eos_token_id": 5},
        {"suppress_tokens": list(range(4, 200))},
        {"logits_processor": LogitsProcessorList([Shift()])},
        {"forced_eos_token_id": 5, "eos_token_id": 5},
    ],
    ids=lambda options: next(iter(options)),
)
def test_processors_see_the_mixed_logits(steered, options):
    """Each of them changes the answer; otherwise the comparison would show nothing."""
    options = {**QUIET, **options, "max_new_tokens": 10}
    ours = steered.model.generate(**tiny.padded(ROWS), **options)
    theirs = Fused(steered.oracle).generate(**tiny.padded(ROWS), **options, use_cache=False)
    assert torch.equal(ours, theirs)
    ends = {**QUIET, "eos_token_id": options["eos_token_id"], "max_new_tokens": 10}
    assert not torch.equal(ours, steered.model.generate(**tiny.padded(ROWS), **ends))


def test_a_generation_config_object(steered):
    settings = GenerationConfig(do_sample=False, max_new_tokens=5, eos_token_id=None, pad_token_id=tiny.PAD)
    out = steered.model.generate(torch.tensor([ROWS[0]]), settings)
    assert_same_tokens(out[0, len(ROWS[0]) :], steered.oracle.greedy(ROWS[0], 5))


# -- refusals -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("implementation", ["quantized", "offloaded"])
def test_other_caches_are_refused(steered, implementation):
    with pytest.raises(ProxyTuneError, match=f"{implementation}.*'dynamic'"):
        steered.model.generate(torch.tensor([ROWS[0]]), cache_implementation=implementation, max_new_tokens=2)
    with pytest.raises(ProxyTuneError, match=implementation):
        steered.model.generate(
            torch.tensor([ROWS[0]]), GenerationConfig(cache_implementation=implementation, max_new_tokens=2)
        )


def test_the_dynamic_cache_may_be_named(steered):
    assert greedy(steered.model, cache_implementation="dynamic") == greedy(steered.model)


def test_a_foreign_cache_is_refused(steered, trio):
    from transformers import DynamicCache

    with pytest.raises(ProxyTuneError, match="new_cache"):
        steered.model.generate(torch.tensor([ROWS[0]]), past_key_values=DynamicCache(), max_new_tokens=2)


def test_an_empty_prompt_is_refused(steered):
    with pytest.raises(PromptError, match="empty"):
        steered.model.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=2)


def test_a_prompt_beyond_the_shortest_context_is_refused(trio):
    model = ProxyTunedForCausalLM.from_members(
        trio.base, tiny.qwen2("small", 2, max_position_embeddings=12), trio.anti_expert
    )
    assert model.shortest == "expert.expert"
    with pytest.raises(PromptError, match=r"13 tokens.*'expert\.expert'.*only 12"):
        model.generate(torch.ones(1, 13, dtype=torch.long), max_new_tokens=1)
    padding = torch.tensor([[0] * 5 + [1] * 8])  # columns of padding are not tokens
    model.generate(torch.ones(1, 13, dtype=torch.long), attention_mask=padding, max_new_tokens=1)


def test_a_generation_config_says_how_to_steer(steered):
    """As `transformers serve` hands one on: made of a request's JSON."""
    model, ids = steered.model, torch.tensor([ROWS[0]])

    def made(**fields):
        config = GenerationConfig(**{**QUIET, "max_new_tokens": N_NEW, **fields})
        before = config.to_dict()
        out = model.generate(ids, generation_config=config)
        assert config.to_dict() == before
        return out

    def called(**options):
        return model.generate(ids, **{**QUIET, "max_new_tokens": N_NEW, **options})

    unsteered = called(alpha=0.0)
    assert made(alpha=0).equal(unsteered)
    assert made(**{"alpha.e": 0}).equal(unsteered)
    assert not made().equal(unsteered)  # or the test says nothing
    sampling = {"do_sample": True, "temperature": 2.0, "top_k": 0, "seed": 7}
    assert made(**sampling, alpha=0.5).equal(called(**sampling, alpha=0.5))
    config = GenerationConfig(**QUIET, max_new_tokens=N_NEW, alpha=3.0)
    both = model.generate(ids, generation_config=config, alpha=0.0)
    assert both.equal(unsteered)  # the call's own goes first
    with pytest.raises(AlphaError, match="no expert is called 'x'"):
        made(**{"alpha.x": 1.0})

    # The model's own config says it too, after the call's.
    own, steeredly = model.generation_config, called(alpha=0.5)
    model.generation_config = copy.deepcopy(own)
    model.generation_config.alpha = 0.0
    try:
        assert called().equal(unsteered)
        assert called(alpha=0.5).equal(steeredly)
        assert made(alpha=0.5).equal(steeredly)
        assert made(**{"alpha.e": 0.5}).equal(steeredly)
        assert made().equal(unsteered)
    finally:
        model.generation_config = own
    assert not steeredly.equal(unsteered)  # or the test says nothing
    with pytest.raises(ProxyTuneError, match="speculate"):
        made(speculate="often")


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states", "inputs_embeds"])
def test_what_belongs_to_one_member_is_refused(steered, name):
    with pytest.raises(ProxyTuneError, match=f"`{name}` belongs to one member"):
        steered.model(torch.tensor([ROWS[0]]), **{name: torch.ones(1) if name == "inputs_embeds" else True})
    if name != "inputs_embeds":
        with pytest.raises(ProxyTuneError, match=f"`{name}` belongs to one member"):
            steered.model.generate(torch.tensor([ROWS[0]]), return_dict_in_generate=True, **{name: True})


def test_an_option_that_is_off_is_not_refused(steered):
    steered.model(torch.tensor([ROWS[0]]), output_attentions=False, output_hidden_states=False, inputs_embeds=None)


def test_continuous_batching_is_refused(steered):
    assert not hasattr(steered.model, "init_continuous_batching")  # how a server asks
    with pytest.raises(ProxyTuneError, match="several members' caches"):
        steered.model.generate_batch([[5, 6]])
