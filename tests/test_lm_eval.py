"""lm_eval takes a recipe, its log-likelihoods are the plain loop's, and those of `proxytune eval` are lm_eval's."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from proxytune import ProxyTunedForCausalLM
from support import tiny
from support.evaldata import write_data
from support.oracle import Oracle

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'proxytune[eval]'")

REQUESTS = [
    ("Question: how many apples are there? Answer:", " there are seven apples."),
    ("The quick brown fox", " jumps"),
    ("the dog", " sleeps, and the lazy fox"),
]


@pytest.fixture(scope="module")
def oracle(shelf):
    base, expert, anti = (AutoModelForCausalLM.from_pretrained(shelf / name) for name in ("base", "expert", "anti"))
    return Oracle(base, [("expert", expert, anti, 0.5)])


def harness(kind, shelf, tokenizer, **kwargs):
    from lm_eval.models.huggingface import HFLM

    settings = {"device": "cpu", "batch_size": 2, "dtype": "float32", "max_length": tiny.CONTEXT, "add_bos_token": True}
    if kind == "path":
        return HFLM(pretrained=str(shelf / "recipe"), alpha=0.5, **settings, **kwargs)
    model = ProxyTunedForCausalLM.from_pretrained(shelf / "recipe", alpha=0.5)
    return HFLM(pretrained=model, tokenizer=tokenizer, **settings, **kwargs)


@pytest.mark.parametrize("kind", ["path", "instance"])
def test_loglikelihoods_are_the_plain_loops(kind, shelf, tokenizer, oracle):
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(REQUESTS)]
    found = harness(kind, shelf, tokenizer).loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (score, is_greedy) in zip(REQUESTS, found, strict=True):
        prompt = tokenizer(context)["input_ids"]
        tokens = tokenizer(context + continuation)["input_ids"][len(prompt) :]
        log_p = oracle.logits(prompt, tokens)[:-1].log_softmax(dim=-1)
        assert score == pytest.approx(sum(float(row[token]) for row, token in zip(log_p, tokens)), abs=1e-3)
        assert is_greedy == (log_p.argmax(dim=-1).tolist() == tokens)


def test_generation_is_the_plain_loops(shelf, tokenizer, oracle):
    from lm_eval.api.instance import Instance

    contexts = [context for context, _ in REQUESTS]
    options = {"until": ["never said"], "max_gen_toks": 6, "do_sample": False}
    requests = [Instance("generate_until", {}, (context, options), index) for index, context in enumerate(contexts)]
    found = harness("instance", shelf, tokenizer).generate_until(requests, disable_tqdm=True)
    for context, text in zip(contexts, found, strict=True):
        tokens, _ = oracle.greedy(tokenizer(context)["input_ids"], 6, eos=tiny.EOS)
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)


# -- `proxytune eval` scores what lm_eval scores ---------------------------------------------------------------
NO_DATA = ("alpacafarm", "ds1000")  # need files that write_data does not write, and are not likelihoods
LONG = " ".join(map(str, range(100, 200)))  # a token a digit
PAIRS = {
    "white space at the end": [
        ("Question: how many\nAnswer: ", "seven"),
        ("a\n\n", "b c"),
        ("a \t", " b"),
        ("fox\n", "\n"),
    ],
    "no context": [("", "the quick fox"), ("", " jumps"), ("", "<s>the dog")],
    "white space alone": [("\n", "the quick fox"), ("  ", " jumps")],
    "merging across the border": [
        ("Quest", "ion: how many"),
        ("the qui", "ck brown fox"),
        ("how man", "y apples, and the dog sleeps"),
    ],
    "one token": [("the dog", "s"), ("the dog", "."), ("Answer:", "\n")],
    "a beginning of its own": [("<s>the dog", " sleeps"), ("<s>the dog ", "sleeps")],
    "one token and many": [("the dog", "s"), ("the dog", " sleeps, and the lazy fox jumps"), ("the dog", " is")],
    "longer than the context": [(LONG, " and"), (LONG, LONG[:40]), (LONG + "\n", "b"), ("short", " one")],
}


def bare_plan():
    """A task that says nothing."""
    from proxytune.evaluation.answering import TaskPlan

    return TaskPlan("t", {}, likelihood=True)


def scored(arm, pairs):
    """Pairs scored by an arm and by lm_eval's own model: each (log-likelihood, greedy)."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from proxytune.evaluation.run import jobs_of

    names: dict[str, str] = {}
    requests = [
        Instance("loglikelihood", {"id": names.setdefault(context, str(len(names)))}, (context, text), at)
        for at, (context, text) in enumerate(pairs)
    ]
    ours, lines = of_arm(arm, bare_plan(), jobs_of(requests))
    model = HFLM(pretrained=own(arm), tokenizer=arm.tokenizer, device="cpu", batch_size=1, max_length=tiny.CONTEXT)
    return ours, model.loglikelihood(requests, disable_tqdm=True), lines


def own(arm):
    """The model of an arm as lm_eval takes it: the transformers model itself, where it is one alone."""
    return arm.model if arm.alphas else arm.model.base


def of_arm(arm, plan, jobs):
    """Each continuation's (log-likelihood, greedy), and the prediction lines, both in the order of the jobs."""
    from proxytune.evaluation.answering import answer_jobs

    made = {
        (line["id"], line["sample"]): line for (lines,) in answer_jobs(arm, plan, jobs, batch_size=3) for line in lines
    }
    lines = [made[job.key] for job in jobs]
    return [pair for line in lines for pair in zip(line["loglikelihoods"], line["greedy"])], lines


def same(ours, theirs):
    for (value, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy


@pytest.mark.parametrize("arm", ["base", "proxy_tuned"])
@pytest.mark.parametrize("kind", [kind for kind in PAIRS if kind != "white space alone"])
def test_pairs_are_encoded_and_scored_as_lm_eval_does(kind, arm, shelf):
    from proxytune import load_recipe
    from proxytune.evaluation.arms import Arms

    ours, theirs, lines = scored(Arms(load_recipe(shelf / "recipe"), [arm]).make(arm), PAIRS[kind])
    same(ours, theirs)
    assert any("cut" in line for line in lines) == (kind == "longer than the context")  # what was cut is told


@pytest.mark.parametrize("bos", [True, False])
def test_pairs_with_a_tokenizer_that_begins_no_text(bos, shelf):
    """Without a beginning a context of white space is empty: lm_eval asserts there, here it is the first token."""
    from proxytune.evaluation.arms import alone

    arm = alone("base", AutoModelForCausalLM.from_pretrained(shelf / "base"), tiny.tokenizer(bos=bos))
    if bos:
        same(*scored(arm, PAIRS["white space alone"])[:2])
    else:
        pairs = [pair for kind, pairs in PAIRS.items() if kind != "white space alone" for pair in pairs]
        same(*scored(arm, pairs)[:2])
        assert arm.reader.encode_pairs(bare_plan(), "\n", ["a"])[0].context.ids == [tiny.BOS]


def test_every_likelihood_task_gives_lm_evals_figures(shelf, tmp_path):
    """All that are in the package: a task that is added is compared with lm_eval too."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from proxytune import load_recipe
    from proxytune.evaluation import EVAL_TASKS, shots_of
    from proxytune.evaluation.arms import Arms
    from proxytune.evaluation.options import EvaluationOptions
    from proxytune.evaluation.run import load_plans

    data = write_data(tmp_path / "data")
    plans = [
        load_plans(EvaluationOptions((task,), data=str(data), limit=2))[0] for task in EVAL_TASKS if task not in NO_DATA
    ]
    plans = [plan for plan in plans if plan.likelihood]
    assert {plan.name for plan in plans} == {"truthfulqa_mc1", "mbpp_likelihood"}
    arms = Arms(load_recipe(shelf / "recipe"), ["proxy_tuned", "base_few_shot"])
    for plan in plans:
        for name in ("proxy_tuned", "base_few_shot"):
            arm, jobs = arms.make(name), plan.jobs.get(shots_of(name), ())
            asked = [(job.context, text) for job in jobs for text in job.continuations]
            assert asked or name == "base_few_shot"
            if requests := [Instance("loglikelihood", {}, pair, at) for at, pair in enumerate(asked)]:
                theirs = HFLM(pretrained=own(arm), tokenizer=arm.tokenizer, device="cpu", max_length=tiny.CONTEXT)
                same(of_arm(arm, plan, jobs)[0], theirs.loglikelihood(requests, disable_tqdm=True))


def test_a_continuation_that_cannot_be_scored_names_its_example(shelf):
    from proxytune.errors import ProxyTuneError
    from proxytune.evaluation.arms import alone

    arm = alone("base", AutoModelForCausalLM.from_pretrained(shelf / "base"), tiny.tokenizer())
    for pairs, said in (
        ([("how man", "y")], "t, example 0, base: a continuation adds no token"),  # both are one token
        ([("the dog", "")], "t, example 0, base: a continuation is empty"),
        ([("the dog", " sleeps"), ("fox", LONG)], "t, example 1, base: a continuation has .* can read only 256"),
    ):
        with pytest.raises(ProxyTuneError, match=said):
            scored(arm, pairs)


def test_examples_that_were_cut_are_counted_in_the_results():
    from proxytune.evaluation.results import results_tables, sweep_results, sweep_tables, task_results

    line = {"continuations": ["a"], "loglikelihoods": [-1.0], "seconds": 1.0}
    lines = [{**line, "id": "0", "cut": [3]}, {**line, "id": "1", "cut": [0]}, {**line, "id": "2"}]
    task = task_results("mbpp_likelihood", {"base": lines, "proxy_tuned": lines[2:]})
    assert [of["cut"] for of in task["arms"].values()] == [1, 0]
    said = "longer than the context, and lost their beginning as in lm_eval: 1."
    swept = sweep_results("mbpp_likelihood", {1.0: lines})
    for (table,) in (results_tables({"tasks": {"t": task}}), sweep_tables({"tasks": {"t": swept}})):
        assert any(note.endswith(said) for note in table.notes)
