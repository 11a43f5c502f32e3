"""The trace of a generation, compared with the plain loop: three forwards per token, and alphas tried one by one."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from proxytune import ProxyTunedForCausalLM, ProxyTuneError
from proxytune.answers.traces import token_texts
from proxytune.decoding.flips import best, contenders, flips, top
from proxytune.decoding.pace import Pace
from proxytune.decoding.text import Lookup
from support import adapters, own_prompts, tiny
from support.commands import fails, run
from support.decoding import QUIET, ROWS, family_oracle, near
from support.oracle import Oracle
from support.own_prompts import batch_of, prompts_of
from support.traced import CLOSE, hold

N_NEW = 10


def traced(model, rows=ROWS, n_new=N_NEW, **options):
    """The traces of a batch, and its new tokens, up to each row's end."""
    batch = tiny.padded(rows)
    out = model.generate(**batch, **{**QUIET, "max_new_tokens": n_new, "return_trace": True, **options})
    new = out.sequences[:, batch["input_ids"].shape[1] :].tolist()
    return out.traces, new


def of_pair(**more):
    oracle = family_oracle("llama")
    return Oracle(oracle.base, oracle.experts, **more)


def of_three():
    """Experts with a missing side, and a narrower vocabulary."""
    base = tiny.llama("base", 1)
    narrow = tiny.qwen2("small", 4, vocab_size=tiny.VOCAB - 9)
    return Oracle(
        base,
        [
            ("towards", tiny.qwen2("small", 2), None, 0.4),
            ("away", None, narrow, 0.3),
            ("back", near(base, 3), near(base, 4), -0.5),
        ],
    )


MADE = {"pair": of_pair, "plausible": lambda: of_pair(plausibility=0.2), "three": of_three}


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("speculate", [False, 3])
@pytest.mark.parametrize("drawn", [{}, {"do_sample": True, "seed": 4}], ids=["greedy", "sampled"])
def test_every_number_is_the_plain_loops(made, speculate, drawn):
    oracle = MADE[made]()
    model = tiny.compose(oracle)
    traces, new = traced(model, speculate=speculate, **drawn)
    assert [[each.id for each in trace] for trace in traces] == new
    for row, trace in zip(ROWS, traces):
        hold(oracle, row, trace)
    if speculate:
        origins = {each.origin for trace in traces for each in trace}
        assert origins >= ({"drafted", "corrected"} if made == "pair" else {"corrected"})
    untraced = model.generate(**tiny.padded(ROWS), **{**QUIET, **drawn}, max_new_tokens=N_NEW, speculate=speculate)
    assert untraced[:, -N_NEW:].tolist() == new, "tracing changes nothing"


def test_torchs_generator_draws_the_same_with_a_trace():
    oracle = of_pair()
    model = tiny.compose(oracle)
    options = {"do_sample": True, "speculate": 3}
    torch.manual_seed(3)
    traces, new = traced(model, **options)
    torch.manual_seed(3)
    assert model.generate(**tiny.padded(ROWS), **{**QUIET, **options}, max_new_tokens=N_NEW)[:, -N_NEW:].tolist() == new
    for row, trace in zip(ROWS, traces):
        hold(oracle, row, trace)


def test_each_row_has_its_alpha_and_k():
    oracle = of_pair()
    alphas = [0.0, 2.0, -1.0]
    traces, _ = traced(tiny.compose(oracle), alpha=alphas, speculate=2, trace_top_k=2)
    for row, alpha, trace in zip(ROWS, alphas, traces):
        hold(oracle, row, trace, [alpha], k=2)
    assert not any(each.changed for each in traces[0]), "alpha 0 is the base"


def test_adapters_in_one_lane(shelf):
    oracle = adapters.oracle_of(shelf)
    model = adapters.load(shelf)
    assert len(model.lanes) == 2
    for speculate in (False, 2):
        for row, trace in zip(ROWS, traced(model, speculate=speculate)[0]):
            hold(oracle, row, trace)


def test_prompts_of_their_own(trio, tokenizer):
    oracle = Oracle(trio.base, [("e", trio.expert, trio.anti_expert, 1.0)])
    model = own_prompts.compose(oracle, tokenizer)
    out = model.generate(**batch_of(tokenizer), **QUIET, max_new_tokens=6, speculate=2, return_trace=True)
    for text, trace in zip(own_prompts.TEXTS, out.traces):
        hold(oracle, prompts_of(text, tokenizer), trace)


def test_rows_that_end_are_traced_up_to_their_end():
    """Padded rows that stay (without drafts, streams), and rows that leave."""
    oracle = of_pair()
    model = tiny.compose(oracle)
    _, new = traced(model, n_new=16)
    ends = {"eos_token_id": [new[0][4], new[1][7]], "pad_token_id": tiny.PAD}
    lengths = [next((n for n, i in enumerate(row, 1) if i in ends["eos_token_id"]), 16) for row in new]
    assert min(lengths) < max(lengths)
    for speculate in (False, 3):
        for more in ({}, {"do_sample": True, "top_k": 1}, {"cache_implementation": "static"}):
            traces, _ = traced(model, n_new=16, speculate=speculate, **ends, **more)
            assert [[each.id for each in trace] for trace in traces] == [row[:n] for row, n in zip(new, lengths)]
    for row, trace in zip(ROWS, traces):
        hold(oracle, row, trace)


def test_several_sequences_of_a_prompt_and_what_a_dict_holds_besides():
    oracle = of_pair()
    drawn = {"do_sample": True, "seed": 2, "num_return_sequences": 2}
    out = tiny.compose(oracle).generate(
        **tiny.padded(ROWS[:2]), **{**QUIET, **drawn}, max_new_tokens=5, return_trace=True,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    assert len(out.traces) == 4
    assert out.past_key_values is not None
    for row, trace in zip([row for row in ROWS[:2] for _ in range(2)], out.traces):
        hold(oracle, row, trace)
    for at, logits in enumerate(out.logits):
        assert [trace[at].mixture_logprob for trace in out.traces] == pytest.approx(
            [float(row.log_softmax(-1)[trace[at].id]) for row, trace in zip(logits, out.traces)], **CLOSE
        )


class Forced(LogitsProcessor):
    """Writes on the logits it is given, and goes round four tokens."""

    row_by_row = True

    def __call__(self, input_ids, scores):
        scores.fill_(-50.0)
        scores[:, 10 + input_ids.shape[1] % 4] = 0
        return scores


def test_processors_come_after_what_is_traced():
    oracle = of_pair(plausibility=0.5)
    traces, new = traced(tiny.compose(oracle), [ROWS[0]], logits_processor=LogitsProcessorList([Forced()]))
    assert set(new[0]) == {10, 11, 12, 13}
    hold(oracle, ROWS[0], traces[0])
    (forced, *_) = (each for each in traces[0] if each.mixture_logprob == -math.inf)
    written = json.loads(json.dumps(forced.to_json(), allow_nan=False))
    assert written["mixture_logprob"] is None, "JSON has no infinity"


# -- where tokens come from -----------------------------------------------------------------------------------------
def test_origins_tell_the_drafts():
    model = tiny.compose(of_pair())
    (trace,), _ = traced(model, [ROWS[0]], n_new=60, speculate=3)
    stats = model.speculation_stats
    origins = [each.origin for each in trace]
    assert origins.count("drafted") == stats.accepted
    assert origins.count("corrected") == stats.judged - stats.accepted
    letters = "".join(origin[0] for origin in origins)
    assert re.fullmatch("p(dddp|d?d?c)*d?d?d?", letters[:-4]), "a token follows whole drafts, or a rejected one"
    assert "dddp" in letters
    assert "dc" in letters


def test_copies_are_distinguished_from_drafts(monkeypatch):
    oracle = of_pair()
    model = tiny.compose(oracle)
    _, new = traced(model, [ROWS[0]], n_new=20)
    coming = [*new[0], 0, 0, 0]
    monkeypatch.setattr(Pace, "from_lookup", lambda _self, found: min(found, 3))
    # Of three copies two are what comes next.
    monkeypatch.setattr(Lookup, "find", lambda self, most: [*coming[len(self.tokens) - len(ROWS[0]) :][:2], 0][:most])
    monkeypatch.setattr(Pace, "first", lambda *_: False)
    monkeypatch.setattr("proxytune.decoding.cost.Costs.best_drafts", lambda *_: 1)
    (trace,), again = traced(model, [ROWS[0]], n_new=20, speculate="auto")
    assert again == new
    hold(oracle, ROWS[0], trace)
    assert "".join(each.origin[:2] for each in trace)[: 2 * 13] == "pl" + 4 * "cococo"
    assert [each.origin for each in trace][1:7] == ["copied", "copied", "corrected"] * 2


# -- flips ----------------------------------------------------------------------------------------------------------
def told(start, slope):
    ids, starts, slopes = (each[0].tolist() for each in contenders(torch.tensor([start]), torch.tensor([slope])))
    return [(round(alpha, 4), i) for alpha, i in flips(ids, starts, slopes)]


def test_flips_of_lines_that_are_known():
    assert told([1.0, 0.0, 0.5], [0.0, 1.0, 0.0]) == [(0, 0), (1, 1)]
    assert told([1.0, 1.0, 0.0], [0.0, 0.0, -1.0]) == [(0, 0)], "of equals the lowest id"
    assert told([1.0, 1.0], [0.0, 1.0]) == [(0, 0), (0, 1)], "equals at 0 alone"
    assert told([3.0, 2.0, 1.0, -9.0], [0.0, 1.0, 2.0, 4.0]) == [(0, 0), (1, 2)], "three meet in one point"
    assert told([0.0, -9.0], [0.0, 2.9]) == [(0, 0)], "beyond 3"
    assert told([0.0, -9.0], [0.0, 3.0]) == [(0, 0), (3, 1)]
    inf = math.inf
    assert told([0.0, -inf, -2.0], [0.0, 5.0, 1.0]) == [(0, 0), (2, 2)], "what the base excludes stays excluded"
    assert told([5.0, 1.0, 0.0], [-inf, 0.0, 1.0]) == [(0, 0), (0, 1), (1, 2)], "the expert excludes the first"


def test_flips_of_many_lines():
    generator = torch.Generator().manual_seed(5)
    start, slope = (torch.randn(20, 300, generator=generator) * 3 for _ in range(2))
    rows = list(zip(*(each.tolist() for each in contenders(start, slope))))
    grid = torch.arange(3001, dtype=torch.float64) / 1000
    for row in range(20):
        steps = flips(*rows[row])
        best = (start[row].double() + grid[:, None] * slope[row].double()).argmax(dim=-1).tolist()
        changes = [(at / 1000, i) for at, i in enumerate(best) if at == 0 or best[at - 1] != i]
        # What leads between two points of the grid is not seen there.
        ends = [*(a for a, _ in steps[1:]), 9.0]
        seen = [(a, i) for (a, i), end in zip(steps, ends) if math.ceil(a * 1000) <= math.floor(end * 1000)]
        assert [i for _, i in changes] == [i for _, i in seen]
        assert [a for a, _ in changes] == pytest.approx([math.ceil(a * 1000) / 1000 for a, _ in seen], abs=1e-9)


def test_nearly_all_lines_are_left_out():
    generator = torch.Generator().manual_seed(6)
    start, slope = (torch.randn(4, 20_000, generator=generator) for _ in range(2))
    ids, starts, slopes = contenders(start, slope)
    assert ids.shape == starts.shape == slopes.shape
    assert ids.shape[1] < 100
    assert ids[:, 0].tolist() == start.argmax(dim=-1).tolist()
    assert torch.equal(starts, start.gather(1, ids))
    assert torch.equal(slopes, slope.gather(1, ids))


@pytest.mark.parametrize("width", [1, 63, 64, 65, 1000])
def test_the_largest_of_many(width):
    values = torch.randn(9, width, generator=torch.Generator().manual_seed(width)).mul(3).round()  # many are equal
    values[0], values[1, ::2] = -torch.inf, -torch.inf
    first = [row.index(max(row)) for row in values.tolist()]
    assert best(values)[:, 0].tolist() == first
    for k in {1, min(5, width), width}:
        found, ids = top(values, k)
        assert torch.equal(found, values.topk(k).values)
        assert torch.equal(found, values.gather(1, ids))
        assert all(len(set(row)) == k for row in ids.tolist())


# -- refusals -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "a trace needs greedy decoding or sampling"),
        ({"prompt_lookup_num_tokens": 2}, "a trace needs greedy decoding or sampling"),
        ({"use_cache": False}, "a trace needs greedy decoding or sampling"),
        ({"trace_top_k": 0}, "trace_top_k must be a whole number of at least 1, not 0"),
        ({"trace_top_k": 2.5}, "trace_top_k must be a whole number"),
        ({"return_trace": False, "trace_top_k": 3}, "trace_top_k is for traces; add return_trace=True"),
    ],
    ids=str,
)
def test_what_cannot_be_traced_is_refused(options, message):
    with pytest.raises(ProxyTuneError, match=message):
        traced(tiny.compose(of_pair()), [ROWS[0]], **options)


def test_more_candidates_than_tokens():
    oracle = of_pair()
    (trace,), _ = traced(tiny.compose(oracle), [ROWS[0]], n_new=2, trace_top_k=10_000)
    assert len(trace[0].candidates) == tiny.VOCAB


# -- the command ----------------------------------------------------------------------------------------------------
HOSTILE = "a\u2028b\u2029c\x85d \U0001f98a"


def lines_of(path):
    text = path.read_bytes().decode("utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]  # splits at every line end of Unicode


def test_a_file_of_one_answer(shelf, tmp_path):
    made = run("generate", shelf / "recipe", "the fox", "-n", "6", "--trace", tmp_path / "trace.jsonl")
    plain = run("generate", shelf / "recipe", "the fox", "-n", "6")
    assert made.stdout == plain.stdout
    (line,) = lines_of(tmp_path / "trace.jsonl")
    assert list(line) == ["schema", "prompt", "text", "alpha", "tokens"]
    assert (line["schema"], line["prompt"]) == ("proxytune.trace/1", "the fox")
    assert made.stdout == line["text"] + "\n"
    assert line["alpha"] == {"expert": 1.0}
    assert len(line["tokens"]) == 6
    fields = "id token base_logprob mixture_logprob base_rank base_entropy entropy kl changed origin offsets candidates"
    assert list(line["tokens"][0]) == [*fields.split(), "flips"]
    of_candidates = ["id", "token", "base_logprob", "mixture_logprob", "expert_logprob", "delta", "masked"]
    assert list(line["tokens"][0]["candidates"][0]) == of_candidates
    tokenizer, model = tiny.tokenizer(), ProxyTunedForCausalLM.from_pretrained(shelf / "recipe")
    for token in line["tokens"]:
        for each in (token, *token["candidates"]):
            assert each["token"] == tokenizer.decode([each["id"]])
    ids = tokenizer("the fox", return_tensors="pt")
    (trace,) = model.generate(**ids, **{**QUIET, "eos_token_id": tiny.EOS}, max_new_tokens=6, return_trace=True).traces
    for token, each in zip(line["tokens"], trace):
        assert (token["id"], token["origin"]) == (each.id, each.origin)
        assert token["kl"] == pytest.approx(each.kl, **CLOSE)


def test_a_job_of_hostile_prompts(shelf, tmp_path):
    """Batches of unequal prompts; an interrupted job goes on in both files."""
    prompts = [HOSTILE, "the fox jumps over", "Question:", "a", HOSTILE + "!"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": p, "alpha": 0.5}) + "\n" for p in prompts))
    job = ("generate", shelf / "recipe", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    job = (*job, "-b", "2", "-n", "5", "--temperature", "1", "--trace", tmp_path / "trace.jsonl", "--trace-top-k", "1")
    run(*job)
    results, traces = (lines_of(tmp_path / name) for name in ("out.jsonl", "trace.jsonl"))
    assert [trace["prompt"] for trace in traces] == prompts
    assert [trace["alpha"] for trace in traces] == [{"expert": 0.5}] * 5
    for result, trace in zip(results, traces):
        assert (trace["line"], trace["text"]) == (result["line"], result["text"])
        assert [token["id"] for token in trace["tokens"]] == result["tokens"]
        assert all(len(token["candidates"]) <= 4 for token in trace["tokens"])

    def cut(name, n):
        whole = (tmp_path / name).read_bytes().splitlines(keepends=True)
        (tmp_path / name).write_bytes(b"".join(whole[:n]) + whole[n][:20])

    cut("out.jsonl", 2)
    cut("trace.jsonl", 3)  # killed between the two files
    run(*job)
    assert lines_of(tmp_path / "out.jsonl") == results
    assert [trace["line"] for trace in lines_of(tmp_path / "trace.jsonl")] == [1, 2, 3, 4, 5]
    assert "was written for another recipe, input or options" in fails(*job[:-1], "2")
    cut("trace.jsonl", 1)
    assert "already has the answer to line 2, but" in fails(*job)


def test_trace_files_that_are_refused(shelf, tmp_path):
    asked = ("generate", shelf / "recipe", "the fox", "-n", "2")
    kept = tmp_path / "kept.jsonl"
    kept.write_text('{"mine": 1}\n')
    assert "is not empty; remove it, or choose another --trace" in fails(*asked, "--trace", kept)
    assert kept.read_text() == '{"mine": 1}\n'
    out = tmp_path / "out.jsonl"
    assert "is not a trace of a job" in fails(*asked, "--output", out, "--trace", kept)
    assert not out.exists()
    assert "--trace-top-k needs --trace FILE" in fails(*asked, "--trace-top-k", "3")
    assert "--output and --trace are the same file" in fails(*asked, "--output", out, "--trace", out)


def test_the_text_of_a_token_keeps_its_space():
    """SentencePiece drops the space of a text's first word."""
    words = {1: " the", 2: "fox", 3: " jumps"}

    class Dropping:
        def decode(self, ids, **_):
            return "".join(words[i] for i in ids).removeprefix(" ")

    assert [token_texts(Dropping())(i) for i in words] == [*words.values()]
