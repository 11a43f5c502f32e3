"""``proxytune bench``: what it measures, that its arms write the same tokens, and how it fails. No timed assertions."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

from proxytune import ProxyTunedForCausalLM, load_recipe
from proxytune.answers.plain_loop import plain_loop
from proxytune.cli.speed import BENCH_LEGEND, _drafts
from proxytune.decoding.trace import Tracer
from proxytune.recipe.options import LoadingOptions
from proxytune.speed import bench
from proxytune.speed.options import ARMS, BenchOptions, Case, MemberOptions
from support import oracle, tiny
from support.commands import fails, run

pytestmark = pytest.mark.usefixtures("no_progress")

ROW = {"arm", "options", "batch", "prompt", "output", "tokens_per_second", "tokens_per_second_low"}
ROW |= {"tokens_per_second_high", "ratio_to_base", "ratio_to_plain_loop", "acceptance", "peak_memory_bytes"}
ROW |= {"time_to_first_token_s", "repeats", "speculation", "ratio_to_untraced"}
QUICK = ("--batch-size", "1", "--lengths", "6/5", "--repeats", "2")


@pytest.fixture(scope="module")
def recipe(shelf):
    return shelf / "recipe"


@pytest.fixture(scope="module")
def lora_recipe(shelf):
    """M+ is an adapter on M-, so that members share weights."""
    values = {
        "experts": [{"expert": {"model": "../anti", "adapter": "../adapter"}, "anti_expert": {"model": "../anti"}}]
    }
    return tiny.write_recipe(shelf / "lora_recipe", {"base": {"model": "../base"}, **values})


@pytest.fixture
def measured(lora_recipe, tmp_path):
    """Run the command; its JSON and what it printed."""

    def measure(*options, recipe=lora_recipe, status=0):
        made = run("bench", recipe, *options, "--output", tmp_path / "bench.json", status=status)
        return json.loads((tmp_path / "bench.json").read_text("utf-8")), made

    return measure


# -- the plain loop -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("plausibility", [None, 0.2])
def test_the_plain_loop_is_the_oracles(trio, plausibility):
    reference = oracle.Oracle(trio.base, [("e", trio.expert, trio.anti_expert, 0.8)], plausibility)
    rows = [[5, 9, 40, 77], [8, 3, 250, 12]]
    experts = [(trio.expert, trio.anti_expert, 0.8)]
    made, caches = plain_loop(trio.base, experts, torch.tensor(rows), 7, plausibility=plausibility)
    for row, tokens in zip(rows, made):
        assert tokens[:4].tolist() == row
        oracle.assert_same_tokens(tokens[4:], reference.greedy(row, 7))
    assert [cache.get_seq_length() for cache in caches] == [10, 10, 10]  # the last token is read by none


def test_the_plain_loop_takes_experts_of_one_side(trio):
    reference = oracle.Oracle(trio.base, [("a", None, trio.anti_expert, 0.5), ("b", trio.expert, None, 0.3)])
    experts = [(None, trio.anti_expert, 0.5), (trio.expert, None, 0.3)]
    made, _ = plain_loop(trio.base, experts, torch.tensor([[5, 9, 40]]), 6)
    oracle.assert_same_tokens(made[0, 3:], reference.greedy([5, 9, 40], 6))


# -- prompts --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n_prompt", [1, 2, 8, 100])
def test_prompts_have_the_length_that_was_asked_for(tokenizer, n_prompt):
    ids = bench.prompts(bench.problem_texts(0), tokenizer, Case(3, n_prompt, 1))
    assert ids.shape == (3, n_prompt)
    assert (ids[:, 0] == tiny.BOS).all() == (n_prompt > 1)
    texts = tokenizer.batch_decode(ids)
    assert all("Question: ... Answer:".endswith(text[-7:].removeprefix("<s>")) for text in texts)
    assert n_prompt < 8 or len(set(texts)) == 3


def test_long_prompts_hold_solved_problems(tokenizer):
    ids = bench.prompts(bench.problem_texts(0), tokenizer, Case(1, 600, 1))
    assert tokenizer.decode(ids[0]).count("#### ") >= 2


def test_prompts_of_a_file_are_its_paragraphs(tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("One paragraph.\n\n\n\nAnother one,\nof two lines.\n", "utf-8")
    texts = bench.texts_of_file(tmp_path / "text.txt")
    assert [ending for _, ending in itertools.islice(texts, 3)] == [
        "One paragraph.",
        "Another one,\nof two lines.",
        "One paragraph.",
    ]
    ids = bench.prompts(texts, tokenizer, Case(1, 60, 1))
    assert tokenizer.decode(ids[0]).endswith(".")


# -- what is measured -----------------------------------------------------------------------------------------
def test_every_arm_is_measured(measured):
    found, made = measured("--batch-size", "1,2", "--lengths", "6/5,3/9", "--repeats", "2")
    rows = found["rows"]
    assert all(set(row) == ROW for row in rows)
    cases = {(row["batch"], row["prompt"], row["output"]) for row in rows}
    assert cases == {(1, 6, 5), (2, 6, 5), (1, 3, 9), (2, 3, 9)}
    for case in cases:
        arms = [row["arm"] for row in rows if (row["batch"], row["prompt"], row["output"]) == case]
        assert arms == [arm for arm in ARMS if arm != "base_lookup" or case[0] == 1]
    for row in rows:
        base, loop = (
            next(
                other
                for other in rows
                if other["arm"] == arm
                and all(other[key] == row[key] for key in ("batch", "prompt", "output", "options"))
            )
            for arm in ("base", "plain_loop")
        )
        assert row["ratio_to_base"] == row["tokens_per_second"] / base["tokens_per_second"]
        assert row["ratio_to_plain_loop"] == row["tokens_per_second"] / loop["tokens_per_second"]
        assert row["tokens_per_second_low"] <= row["tokens_per_second"] <= row["tokens_per_second_high"]
        assert (row["repeats"], row["options"]) == (2, "float32")
        assert 0 < row["time_to_first_token_s"] < row["batch"] * row["output"] / row["tokens_per_second_low"]
        assert row["acceptance"] is None or (row["arm"] == "speculative" and 0 <= row["acceptance"] <= 1)
    steered = [row for row in rows if row["arm"] not in ("base", "base_lookup")]
    assert found["outputs"] == {
        "compared": sum(row["batch"] * row["repeats"] for row in steered if row["arm"] != "plain_loop"),
        "identical": found["outputs"]["compared"] - found["outputs"]["near_ties"],
        "near_ties": found["outputs"]["near_ties"],
        "mismatches": [],
    }
    machine = found["machine"]
    assert (machine["torch"], machine["gpu"]) == (torch.__version__, None)
    assert machine["cores"] >= 1
    assert [one["arm"] for one in found["overhead"]] == ["base", "composite", "shared"]
    assert all(one["repeats"] == 2 and one["forwards_seconds"] > 0 for one in found["overhead"])
    assert "steered rows are token-identical" in made.stdout
    assert made.stdout.count("| speculative |") == 4
    assert {row["arm"] for row in rows if row["ratio_to_untraced"] is not None} == {"traced"}
    assert made.stdout.count("of the speed without a trace") == 4
    assert made.stderr == ""


def test_the_cost_of_tracing_is_of_rounds_side_by_side(measured, monkeypatch):
    n_traced, settle = [], Tracer.settle
    monkeypatch.setattr(Tracer, "settle", lambda *args: (n_traced.append(1), settle(*args))[1])
    measured(*QUICK, "--arms", "speculative")
    assert not n_traced
    found, _ = measured(*QUICK, "--arms", "speculative,traced")
    assert n_traced
    assert found["outputs"]["compared"] == found["outputs"]["identical"] == 2

    def runs(arm, *seconds):
        samples = [bench.Sample(each, 0.0, torch.zeros(1, 1), 0) for each in seconds]
        return bench.Run(Case(1, 6, 5), arm, SimpleNamespace(options="float32"), 1.0, samples)

    # Each round is slower than the one before: the ratio of the medians would be 10 / 18.
    before, after = bench._rows([runs("speculative", 1.0, 10.0, 20.0), runs("traced", 1.25, 18.0, 25.0)])
    assert before["ratio_to_untraced"] is None
    assert after["ratio_to_untraced"] == pytest.approx(0.8)
    assert bench._rows([runs("traced", 1.0)])[0]["ratio_to_untraced"] is None


def test_memory_counts_the_weights_that_an_arm_has(measured, lora_recipe):
    found, _ = measured(*QUICK)
    held = {row["arm"]: row["peak_memory_bytes"] for row in found["rows"]}
    model = ProxyTunedForCausalLM.from_pretrained(lora_recipe)
    weights = {name: sum(p.nbytes for p in model.member(name).parameters()) for name in ("base", "expert.anti_expert")}
    layers, heads, head = 3, 2, 8  # of the base: keys and values of all columns but the last
    assert held["base"] == pytest.approx(weights["base"] + 2 * layers * heads * head * 10 * 4, rel=0.02)
    assert held["base"] < held["shared"] < held["composite"] == held["plain_loop"]


def test_there_is_no_shared_arm_where_nothing_is_shared(measured, recipe):
    found, made = measured(*QUICK, recipe=recipe)
    assert "shared" not in [row["arm"] for row in found["rows"]]
    assert "no members share weights" in made.stdout


def test_some_arms_and_no_base(measured):
    found, _ = measured(*QUICK, "--arms", "plain_loop,composite")
    assert [row["arm"] for row in found["rows"]] == ["plain_loop", "composite"]
    assert [row["ratio_to_base"] for row in found["rows"]] == [None, None]


def test_member_options_are_on_in_every_arm(measured):
    found, _ = measured(*QUICK, "--arms", "base,composite", "--options", "float32,bfloat16")
    assert [(row["arm"], row["options"]) for row in found["rows"]] == [
        ("base", "float32"),
        ("composite", "float32"),
        ("base", "bfloat16"),
        ("composite", "bfloat16"),
    ]
    assert [row["ratio_to_base"] for row in found["rows"] if row["arm"] == "base"] == [1.0, 1.0]
    weights = [row["peak_memory_bytes"] for row in found["rows"] if row["arm"] == "base"]
    assert weights[1] < 0.6 * weights[0]


def test_members_with_prompts_of_their_own_read_the_same_tokens(shelf, measured):
    values = {
        "base": {"model": "../base"},
        "experts": [{"expert": {"model": "../expert", "prompt": "chat"}, "anti_expert": {"model": "../anti"}}],
    }
    found, _ = measured(*QUICK, recipe=tiny.write_recipe(shelf / "chat_recipe", values))
    assert found["outputs"]["compared"] == 2 * len(set(bench.STEERED) - {"plain_loop", "shared"})
    assert found["outputs"]["mismatches"] == []


def test_the_same_seed_takes_the_same_prompts(measured, monkeypatch):
    seen = []
    original = bench.run_arm
    monkeypatch.setattr(bench, "run_arm", lambda *args: (seen.append(args[2].tolist()), original(*args))[1])
    for seed in (1, 1, 2):
        measured(*QUICK, "--arms", "base", "--seed", seed)
    assert seen[:3] == seen[3:6] != seen[6:]
    assert seen[1] != seen[2], "a round has prompts of its own"


def test_prompts_from_a_file(measured, tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.", "utf-8")
    found, _ = measured(*QUICK, "--arms", "base", "--prompts", tmp_path / "text.txt")
    assert len(found["rows"]) == 1


def test_drafts_and_their_acceptance_are_reported_alike():
    """The acceptance is of the drafts that were checked, not of all."""
    counts = {"drafted": 55, "accepted": 23, "looked_up": 234, "lookups_accepted": 161, "judged": 216, "cycles": 90}
    assert _drafts("float32", counts) == (
        "Drafts (float32): 289, of which 55 by an expert and 234 copied from the text. The mixture checked 216 of them "
        "and accepted 184 (23 of the expert's, 161 copied ones), in 90 cycles."
    )
    assert "checked" in BENCH_LEGEND["acceptance"]


# -- budget and interruption ----------------------------------------------------------------------------------
def test_the_budget_cuts_rounds_and_options_and_says_so():
    result = bench.BenchResult({}, BenchOptions(repeats=5))
    case = Case(4, 8, 512)
    slow = bench.Run(case, "base", SimpleNamespace(options="float32"), 10.0)
    fast = bench.Run(case, "base", SimpleNamespace(options="float32+pack"), 4.0)
    assert bench._cut(result, case, [slow, fast], None) == ([slow, fast], 5)
    assert bench._cut(result, case, [slow, fast], 70.0) == ([slow, fast], 5)
    assert result.notes == []
    assert bench._cut(result, case, [slow, fast], 69.0) == ([fast], 5)
    assert bench._cut(result, case, [slow, fast], 11.0) == ([fast], 2)
    assert bench._cut(result, case, [slow, fast], 3.9)[1] == 0
    costs_said = "the budget is short (a round takes float32 10 s, float32+pack 4 s)"
    assert result.notes == [
        f"8/512 at batch 4 has 5 of 5 rounds, of float32+pack alone: {costs_said}",
        f"8/512 at batch 4 has 2 of 5 rounds, of float32+pack alone: {costs_said}",
        f"8/512 at batch 4 is left out: {costs_said}",
    ]


@pytest.mark.parametrize(("scale", "minutes"), [(1.0, 18.0), (0.2, 18.0), (1.0, 3.0), (1.0, 0.0)])
def test_the_time_left_is_never_more_than_the_budget_leaves(monkeypatch, scale, minutes):
    """With the cases' costs of a slow machine, or a fast one: the cheap cases come first."""
    clock, told = [50.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def measure(result, subjects, case, draw, rng, *, seconds, progress, **others):
        warm, a_run = scale * 10.0, scale * 0.03 * case.batch * case.output
        for arm in range(6):
            progress(f"warm-up, {arm}", 0.0)
            clock[0] += warm
        rounds = 5 if seconds is None else min(5, max(0, int((seconds - 6 * warm) / (6 * a_run))))
        for number, turn in itertools.product(range(rounds), range(6)):
            progress("round", (number + turn / 6) / rounds)
            clock[0] += a_run
        return 6 * warm

    monkeypatch.setattr(bench, "_measure_case", measure)
    model = SimpleNamespace(tokenizer=len, context_of=lambda name: None, shortest="base", device=torch.device("cpu"))
    subject = SimpleNamespace(separate=model, compiled=False, shares=True)
    options = BenchOptions(minutes=minutes)
    bench.run_bench([subject], options, iter(()), progress=lambda said, share: told.append((said, clock[0], share)))
    assert told[0] == ("64/128 at batch 1: prompts", 50.0, 0.0)
    shares = [share for _, _, share in told]
    assert shares == sorted(shares)
    assert 0.5 < shares[-1] <= 1
    for said, at, share in told[1:]:
        elapsed = at - 50.0
        left = elapsed * (1 - share) / share if elapsed and share else 0.0  # as it is told
        if minutes:
            assert left <= 60 * minutes - elapsed + 1e-6, said


def test_a_main_case_beyond_the_budget_is_not_done_before_it_ends(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    share = bench._Share(budget=60.0, n_cases=9, begin=0.0)
    found = []
    for clock[0], part in ((0.0, 0.0), (20.0, 0.0), (40.0, 0.1), (120.0, 0.5), (200.0, 0.9)):
        found.append(share.done(0, part, main=True))
    assert found == pytest.approx([0.0, 20 / 60, 40 / 220, 120 / 220, 200 / 220])
    share = bench._Share(budget=60.0, n_cases=9, begin=0.0, warmed=40.0)
    clock[0] = 50.0
    assert share.done(8, 0.1, main=False) == pytest.approx(0.9)  # it would take 140 s, and will be cut
    clock[0] = 57.0
    assert share.done(8, 0.1, main=False) == pytest.approx(57 / 60)


@pytest.mark.slow
def test_without_time_only_the_main_case_is_measured(measured):
    found, made = measured("--batch-size", "1,2", "--lengths", "64/128,6/5", "--arms", "base", "--minutes", "0.0001")
    assert {(row["batch"], row["prompt"], row["repeats"]) for row in found["rows"]} == {(1, 64, 5)}
    assert made.stdout.count("is left out") == 3


def test_an_interruption_leaves_what_was_measured(measured, monkeypatch):
    original, calls = bench.run_arm, itertools.count()

    def interrupted(*args):
        if next(calls) == 7:  # two warm-ups, two rounds, and then the first half of the third
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(bench, "run_arm", interrupted)
    found, made = measured(*QUICK, "--repeats", "5", "--arms", "base,composite", status=130)
    assert found["interrupted"]
    assert sorted(row["repeats"] for row in found["rows"]) == [2, 3]
    assert "interrupted" in made.stdout


def test_compiled_members_are_in_every_arm(measured, monkeypatch):
    """All but the lookups of the base alone, and the overhead, whose bare forwards have no static cache."""
    compiled, caches, generate = [], [], LlamaForCausalLM.generate
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: compiled.append(module))

    def noted(model, *args, **kwargs):
        caches.append(kwargs.get("cache_implementation"))
        return generate(model, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "generate", noted)
    found, made = measured(*QUICK, "--options", "float32+compile")
    assert {row["arm"] for row in found["rows"]} == set(ARMS) - {"base_lookup"}
    assert {row["options"] for row in found["rows"]} == {"float32+compile"}
    assert found["overhead"] == []
    assert len(compiled) >= 3
    assert set(caches) == {"static"}, "the base alone is run over one as well"
    assert "`base_lookup` is not measured compiled" in made.stdout


# -- the outputs are compared with each other ------------------------------------------------------------------
def test_other_tokens_are_an_error(measured, monkeypatch):
    original = bench.run_arm

    def wrong(subject, arm, ids, n_new, asked):
        sample = original(subject, arm, ids, n_new, asked)
        if arm == "composite" and n_new == 5:
            sample.tokens[0, 3] = (sample.tokens[0, 3] + 7) % tiny.VOCAB
        return sample

    monkeypatch.setattr(bench, "run_arm", wrong)
    monkeypatch.setattr(bench, "WARM_UP", 2)
    found, made = measured(*QUICK, "--arms", "plain_loop,composite", status=2)
    assert [one["differs_at"] for one in found["outputs"]["mismatches"]] == [3, 3]
    assert made.stderr.startswith(
        "error: composite (float32, 6/5 at batch 1) wrote another token at position 3 than plain_loop"
    )
    assert made.stderr.count("\n") == 2


def test_a_near_tie_is_no_mismatch(lora_recipe):
    subject = bench.load_subject(load_recipe(lora_recipe), MemberOptions(), LoadingOptions())
    ids = torch.tensor([[5, 9, 40]])
    with torch.no_grad():
        order = subject.separate(ids).logits[0, -1].argsort(descending=True)
    case = Case(1, 3, 1)
    found = {"plain_loop": order[None, :1], "composite": order[None, 1:2]}
    (clear,) = bench.compare_tokens(subject, case, ids, found)
    assert (clear.differs_at, clear.near_tie) == (0, False)
    assert clear.gap > bench.NEAR_TIE
    with torch.no_grad():  # a head whose rows of the two tokens are the same
        for name in subject.separate.seats:
            head = subject.separate.member(name).get_output_embeddings().weight
            head[order[1]] = head[order[0]]
    (tied,) = bench.compare_tokens(subject, case, ids, found)
    assert (tied.differs_at, tied.near_tie) == (0, True)


# -- what is refused ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--arms", "base,turbo"], "no arm is called 'turbo'; known are base, base_lookup"),
        (["--arms", "base,base"], "the arms must be named, each once"),
        (["--lengths", "64x128"], "lengths are PROMPT/OUTPUT in tokens, such as 64/128, not '64x128'"),
        (["--lengths", "64/0"], "not '64/0'"),
        (["--lengths", "200/100"], "200/100 needs 300 tokens, but member 'base' can read only 256"),
        (["--batch-size", "1,x"], "--batch-size is numbers, such as 1,16"),
        (["--batch-size", "0"], "a batch has at least 1 row"),
        (["--repeats", "0"], "--repeats must be at least 1, not 0"),
        (["--options", "int3"], "no member option is called 'int3'"),
        (["--options", "float32+bfloat16"], "names two dtypes"),
        (["--options", "auto,auto"], "names one set twice"),
        (["--prompts", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--output", "/nowhere/x.json"], "/nowhere/x.json: No such file"),
    ],
)
def test_bad_input_is_one_sentence(recipe, options, said, monkeypatch):
    monkeypatch.setattr(bench, "run_arm", lambda *args: pytest.fail("nothing is measured"))
    assert said in fails("bench", recipe, *options)


def test_a_file_without_text_is_refused(recipe, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n ", "utf-8")
    assert "has no text" in fails("bench", recipe, "--prompts", tmp_path / "empty.txt")
    (tmp_path / "empty.txt").write_bytes(b"\xff\xfe")
    assert "not a text in UTF-8" in fails("bench", recipe, "--prompts", tmp_path / "empty.txt")


def test_samples_are_of_a_seed_and_are_not_compared(measured, monkeypatch):
    tokens = {}
    plain = bench.run_arm

    def noted(subject, arm, *args):
        sample = plain(subject, arm, *args)
        tokens.setdefault(arm, []).append(sample.tokens.tolist())
        return sample

    monkeypatch.setattr(bench, "run_arm", noted)
    arms = "base,plain_loop,composite,speculative"
    options = ("--batch-size", "2", "--lengths", "6/9", "--repeats", "2", "--temperature", "2.5", "--arms", arms)
    found, _ = measured(*options)
    first, tokens = tokens, {}
    assert found["settings"]["temperature"] == 2.5
    assert found["outputs"]["compared"] == 0
    assert all(rows[1][0] != rows[2][0] for rows in first.values()), "greedy it would be, too, were it not sampled"
    measured(*options)
    for arm, rows in first.items():
        assert rows[1:] == tokens[arm][1:], "the warm-up has no seed"


def test_a_number_of_drafts_copies_none(measured):
    found, made = measured("--batch-size", "1", "--lengths", "6/20", "--repeats", "1", "--speculate", "3")
    stats = next(row["speculation"] for row in found["rows"] if row["arm"] == "speculative")
    assert stats["drafted"] > 0 == stats["looked_up"] == stats["lookup_cycles"]
    assert f"of which {stats['drafted']} by an expert and 0 copied from the text." in made.stdout


def test_batches_are_drafted_for(measured):
    found, _ = measured("--batch-size", "3", "--lengths", "6/20", "--repeats", "1", "--speculate", "3")
    row = next(row for row in found["rows"] if row["arm"] == "speculative")
    assert row["speculation"]["drafted"] > 0
    assert row["peak_memory_bytes"] > next(row for row in found["rows"] if row["arm"] == "base")["peak_memory_bytes"]
    assert found["outputs"]["identical"] == found["outputs"]["compared"] == 12


@pytest.mark.parametrize(
    ("option", "said"),
    [(("--temperature", "0"), "a temperature is greater than 0"), (("--speculate", "13"), "speculate must be")],
)
def test_how_arms_decode_is_checked_first(recipe, option, said):
    assert said in fails("bench", recipe, *option)
