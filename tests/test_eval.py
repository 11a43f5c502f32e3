"""`proxytune eval`: what each arm is shown and answers, resuming, comparing, and what is refused."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM

from support import tiny
from support.commands import fails, run
from support.evaldata import QUESTIONS, write_data, write_lines
from support.oracle import Oracle, assert_same_tokens

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'proxytune[eval]'")

from proxytune import ProxyTunedForCausalLM, load_recipe
from proxytune.errors import PromptError, ProxyTuneError
from proxytune.evaluation import EVAL_TASKS, TASK_DIR, shots_of
from proxytune.evaluation.answering import Job, Log, TaskPlan, answer_jobs, encode_jobs
from proxytune.evaluation.arms import Arms, expand_arms
from proxytune.evaluation.manifest import _refuse_others, manifest_of
from proxytune.evaluation.options import EvaluationOptions
from proxytune.evaluation.results import metric_text, task_results
from proxytune.evaluation.run import arms_of, evaluate, load_plans, sweep
from proxytune.evaluation.scoring import score_lines
from proxytune.recipe.options import LoadingOptions

UNDRAFTED = LoadingOptions(speculate=False)


@pytest.fixture(scope="session")
def local(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def models(shelf):
    return SimpleNamespace(
        **{name: AutoModelForCausalLM.from_pretrained(shelf / name) for name in ("base", "expert", "anti")}
    )


def plan_of(task, local, **settings):
    return load_plans(EvaluationOptions((task,), data=str(local), **settings))[0]


def test_what_a_recipe_is_for_decides_no_prediction(shelf):
    config, options = load_recipe(shelf / "recipe"), EvaluationOptions(("gsm8k",))
    before = manifest_of(config, options, UNDRAFTED, [], {"arms": ["base"]})
    config.description, config.examples = "Knows foxes.", ["the fox"]
    assert manifest_of(config, options, UNDRAFTED, [], {"arms": ["base"]}) == before


def answers(recipe, arm, plan, path, **options):
    """One arm's texts, by example and sample."""
    ready = Arms(load_recipe(recipe), [arm], UNDRAFTED).make(arm)
    lines = answered(ready, plan, path, **{"batch_size": 4, **options})
    return {key: line[plan.metadata["output"]] for key, line in lines.items()}


def answered(arm, plan, path, **options):
    """One arm's prediction lines, by example and sample, in the order of the jobs; what the file has is kept."""
    jobs = plan.jobs[shots_of(arm.name)]
    with Log(path) as log:
        for (lines,) in answer_jobs(arm, plan, jobs, [log.made], **options):
            log.append(lines)
    return {job.key: log.made[job.key] for job in jobs}


def pairs_of(lines):
    """Each continuation's (log-likelihood, greedy), as lm_eval gives them."""
    return [pair for line in lines.values() for pair in zip(line["loglikelihoods"], line["greedy"])]


# -- what the arms answer ------------------------------------------------------------------------------------
def test_every_arm_answers_as_the_plain_loop(shelf, local, models, tokenizer, tmp_path):
    """The mixture, each member alone and both controls, on one batch of unequal prompts."""
    plan = plan_of("triviaqa", local, limit=3)
    oracles = {
        "base": Oracle(models.base),
        "expert": Oracle(models.expert),
        "anti_expert": Oracle(models.anti),
        "proxy_tuned": Oracle(models.base, [("e", models.expert, models.anti, 1.0)]),
        "mean_logits": Oracle(models.base, [("e", models.expert, None, 1.0)]),
    }
    for arm, oracle in oracles.items():
        texts = answers(shelf / "recipe", arm, plan, tmp_path / f"{arm}.jsonl")
        assert len(texts) == 3
        for (name, _), text in texts.items():
            prompt = tokenizer(f"Question: {QUESTIONS[int(name)]}\nAnswer:")["input_ids"]
            tokens, logits = oracle.greedy(prompt, 20, eos=tiny.EOS)
            expected = tokenizer.decode(tokens, skip_special_tokens=True).split("\n\n")[0]
            if text != expected:  # only a near tie excuses it
                assert_same_tokens(tokenizer(text, add_special_tokens=False)["input_ids"], (tokens, logits))


def test_each_control_is_shown_its_own_examples():
    plan = load_plans(EvaluationOptions(("demo_facts",), limit=3))[0]
    again = "<|im_end|>\n<|im_start|>user"
    solved = {context: [job.context.count(again) for job in jobs] for context, jobs in plan.jobs.items()}
    assert solved == {"raw": [0] * 3, "few_shot": [4] * 3, "many_shot": [16] * 3, "own_examples": [4] * 3}
    for context, jobs in plan.jobs.items():
        assert all(job.context.endswith(raw.context) for job, raw in zip(jobs, plan.jobs["raw"], strict=True)), context
    own = plan.jobs["own_examples"][0]
    assert own.context.count(f"\n{own.doc['solution'].split(':')[0]}: ") == 4  # the question's own relation's word


def test_arms_that_a_task_has_no_examples_for_are_left_out_or_refused(shelf, local, tmp_path):
    config, notes = load_recipe(shelf / "recipe"), []
    plans = [plan_of(task, local, limit=1) for task in ("demo_math", "demo_facts")]
    settings = EvaluationOptions(("demo_math", "demo_facts"), mean_weight=2)
    assert arms_of(config, settings, plans, notes.append) == [
        *("base", "anti_expert", "expert", "proxy_tuned", "base_few_shot", "base_many_shot", "mean_logits"),
        *("base_own_examples", "weighted_mean"),
    ]
    assert [note.partition(":")[0] for note in notes] == ["no solved examples to show for demo_math"] * 2
    with pytest.raises(
        ProxyTuneError, match="no solved examples to show for demo_math; leave the arm base_many_shot out"
    ):
        arms_of(config, replace(settings, arms=("base_many_shot",)), plans[:1], notes.append)
    with pytest.raises(ProxyTuneError, match="--mean-weight W"):
        EvaluationOptions(("demo_math",), arms=("weighted_mean",))


def test_few_shot_shows_solved_examples_to_the_base_alone(shelf, local, models, tokenizer, tmp_path):
    plan = plan_of("gsm8k", local, limit=1)
    shown = plan.jobs["few_shot"][0].context
    raw = plan.jobs["raw"][0].context
    assert shown.endswith(raw)
    assert shown.count("Answer the following question.") == 5
    assert "There are 3.\n#### 1,003\n\nAnswer" in shown
    assert "<<" not in shown


def test_what_prompts_begin_with_is_read_once(shelf, models, tokenizer, tmp_path, monkeypatch):
    shown = " ".join(QUESTIONS) + "\n"
    jobs = [Job(str(n), 0, shown + question, {}, {"max_gen_toks": 6}) for n, question in enumerate(QUESTIONS[:3])]
    arm = Arms(load_recipe(shelf / "recipe"), ["base_few_shot"]).make("base_few_shot")
    n_shown = len(tokenizer(shown)["input_ids"])
    read = []
    kind = type(arm.model.base)
    forward = kind.forward

    @functools.wraps(forward)
    def watched(self, input_ids, *args, **kwargs):
        read.append(tuple(input_ids.shape))
        return forward(self, input_ids, *args, **kwargs)

    lines = answered(arm, TaskPlan("t", {"few_shot": jobs}), tmp_path / "warm.jsonl")  # how to read it has been tried
    monkeypatch.setattr(kind, "forward", watched)
    arm.begun.clear()
    assert answered(arm, TaskPlan("t", {"few_shot": jobs}), tmp_path / "a.jsonl").keys() == lines.keys()
    (rows, common), (all_rows, rest) = read[:2]
    assert (rows, all_rows) == (1, 3)
    assert common > n_shown - 3
    assert common + rest == max(len(tokenizer(job.context)["input_ids"]) for job in jobs)
    # Later jobs find it read, also where they happen to begin alike for a little longer.
    read.clear()
    alike = [
        replace(job, id=f"later {job.id}", context=jobs[0].context + word) for job, word in zip(jobs, (" a", " b"))
    ]
    lines |= answered(arm, TaskPlan("t", {"few_shot": alike}), tmp_path / "b.jsonl")
    assert read[0] == (2, max(len(tokenizer(job.context)["input_ids"]) for job in alike) - common)
    jobs += alike
    for job in jobs:
        tokens, logits = Oracle(models.base).greedy(tokenizer(job.context)["input_ids"], 6, eos=tiny.EOS)
        if lines[job.key]["output"] != tokenizer.decode(tokens, skip_special_tokens=True):
            written = tokenizer(lines[job.key]["output"], add_special_tokens=False)["input_ids"]
            assert_same_tokens(written, (tokens, logits))


def test_the_base_reads_prompts_once_for_several_arms(shelf, models, monkeypatch):
    jobs = [Job(str(n), 0, question, {}, {"max_gen_toks": 12}) for n, question in enumerate(QUESTIONS[:3])]
    plan = TaskPlan("t", {"raw": jobs})
    names = ["base", "proxy_tuned", "mean_logits"]
    maker = Arms(load_recipe(shelf / "recipe"), names)
    arms = [maker.make(name) for name in names]

    def texts(arm, **shared):
        ((lines,),) = answer_jobs(arm, plan, jobs, **shared)
        return {line["id"]: line["output"] for line in lines}

    apart = [texts(arm) for arm in arms]
    assert apart[0] != apart[1] != apart[2]
    kind, width = type(maker.steered.base), []
    forward = kind.forward

    @functools.wraps(forward)
    def watched(self, input_ids, *args, **kwargs):
        if self.config.num_hidden_layers == models.base.config.num_hidden_layers:
            width.append(input_ids.shape[1])
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", watched)
    read = {}
    assert [texts(arm, read=read) for arm in arms] == apart
    longest = max(len(arms[0].tokenizer(question)["input_ids"]) for question in QUESTIONS[:3])
    assert [n for n in width if n > 1] == [longest - 1]


def test_a_lora_that_shares_weights_is_alone_in_its_own_arm(shelf, local, tokenizer, tmp_path):
    """The recipe's lane holds adapter and anti-expert; the arms use its weights without loading them again."""
    import peft

    values = {
        "base": {"model": str(shelf / "base")},
        "experts": [
            {
                "name": "lora",
                "expert": {"model": str(shelf / "anti"), "adapter": str(shelf / "adapter")},
                "anti_expert": {"model": str(shelf / "anti")},
            }
        ],
    }
    recipe = tiny.write_recipe_alone(tmp_path / "recipe", values)
    anti = AutoModelForCausalLM.from_pretrained(shelf / "anti")
    tuned = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(shelf / "anti"), shelf / "adapter"
    ).merge_and_unload()
    base = AutoModelForCausalLM.from_pretrained(shelf / "base")
    plan = plan_of("realtimeqa", local, limit=3)
    config = load_recipe(recipe)
    arms = Arms(config, ["expert", "anti_expert", "proxy_tuned", "mean_logits"], UNDRAFTED)
    oracles = {
        "expert": Oracle(tuned),
        "anti_expert": Oracle(anti),
        "mean_logits": Oracle(base, [("e", tuned, None, 1.0)]),
        "proxy_tuned": Oracle(base, [("e", tuned, anti, 1.0)]),
    }
    for arm, oracle in oracles.items():
        lines = answered(arms.make(arm), plan, tmp_path / f"{arm}.jsonl", batch_size=2)
        assert len(lines) == 3
        for line in lines.values():
            tokens, logits = oracle.greedy(tokenizer(line["prompt"])["input_ids"], 10, eos=tiny.EOS)
            if line["mc_output"] != tokenizer.decode(tokens, skip_special_tokens=True):
                assert_same_tokens(
                    tokenizer(line["mc_output"], add_special_tokens=False)["input_ids"], (tokens, logits)
                )
        assert arms.steered is not None
    lanes = {id(arms._lane(name)) for name in ("lora.expert", "lora.anti_expert")}
    assert len(lanes) == 1


@pytest.mark.parametrize(
    ("task", "shown", "raw"),
    [
        (
            "gsm8k",
            "[user] Answer the following question.\n\nQuestion: {q}?\n[assistant] Answer:",
            "Question: {q}?\nAnswer:",
        ),
        ("toxigen", "[user] Complete the following: - of asian\n- and\n-\n[assistant]", "- of asian\n- and\n-"),
        (
            "realtimeqa",
            "[user] {q}\nA. one\nB. two\nC. three\n[assistant] The answer is:",
            "C. three\n\nThe answer is:",
        ),
    ],
)
def test_a_chat_member_is_shown_the_papers_form_of_the_prompt(task, shown, raw, shelf, local, tokenizer, tmp_path):
    recipe = chat_recipe(shelf, tmp_path)
    plan = plan_of(task, local)
    context = plan.jobs["raw"][0].context
    arms = Arms(load_recipe(recipe), ["proxy_tuned"], UNDRAFTED)
    encoded = arms.make("proxy_tuned").reader.encode(plan, context)
    assert set(encoded.own) == {"expert.expert"}
    own = tokenizer.decode(encoded.own["expert.expert"]).removeprefix("<s>")
    assert own == shown.format(q=QUESTIONS[0])
    assert tokenizer.decode(encoded.ids).endswith(raw.format(q=QUESTIONS[0]))
    alone = arms.make("expert").reader  # which reads the same
    assert alone.encode(plan, context).ids == encoded.own["expert.expert"]
    assert arms.make("base").reader.encode(plan, context).ids == encoded.ids


def chat_recipe(shelf, tmp_path, prompt="chat", **longer):
    if longer:  # models that read more
        kinds = (("base", "llama", "base"), ("expert", "qwen2", "small"), ("anti", "qwen2", "small"))
        for seed, (name, family, size) in enumerate(kinds, start=1):
            tiny.write_model(tmp_path / name, family, size, seed, **longer)
        shelf = tmp_path
    values = {
        "base": {"model": str(shelf / "base")},
        "experts": [
            {
                "expert": {"model": str(shelf / "expert"), "prompt": prompt},
                "anti_expert": {"model": str(shelf / "anti")},
            }
        ],
    }
    return tiny.write_recipe_alone(tmp_path / "recipe", values)


def test_truthfulqa_gives_a_system_prompt_unless_the_recipe_has_one(shelf, local, tokenizer, tmp_path):
    plan = plan_of("truthfulqa_mc", local)
    context = plan.jobs["raw"][0].context
    for name, prompt, begins in (
        ("plain", "chat", "[system] You are a helpful, respectful and honest assistant."),
        ("own", {"kind": "chat", "system": "Be brief."}, "[system] Be brief.\n[user]"),
    ):
        recipe = chat_recipe(shelf, tmp_path / name, prompt, max_position_embeddings=1024)
        arm = Arms(load_recipe(recipe), ["proxy_tuned"]).make("proxy_tuned")
        own = tokenizer.decode(arm.reader.encode(plan, context).own["expert.expert"]).removeprefix("<s>")
        assert own.startswith(begins)
        assert own.endswith("[assistant] The answer is:")


def test_a_steered_chat_expert_answers_as_the_plain_loop(shelf, local, models, tokenizer, tmp_path):
    recipe = chat_recipe(shelf, tmp_path)
    plan = plan_of("realtimeqa", local, limit=3)
    oracle = Oracle(models.base, [("expert", models.expert, models.anti, 1.0)])
    arm = Arms(load_recipe(recipe), ["proxy_tuned"], UNDRAFTED).make("proxy_tuned")
    lines = answered(arm, plan, tmp_path / "a.jsonl", batch_size=3)
    assert len(lines) == 3
    for line in lines.values():
        encoded = arm.reader.encode(plan, line["prompt"])
        prompts = {"base": encoded.ids, **encoded.own}
        tokens, logits = oracle.greedy(prompts, 10, eos=tiny.EOS)
        if line["mc_output"] != tokenizer.decode(tokens, skip_special_tokens=True):
            assert_same_tokens(tokenizer(line["mc_output"], add_special_tokens=False)["input_ids"], (tokens, logits))


@pytest.mark.slow
def test_samples_depend_on_neither_batch_nor_resumption(shelf, local, tmp_path):
    plan = plan_of("humaneval", local, samples=3)
    options = plan.jobs["raw"][0].options
    assert (options["do_sample"], options["temperature"], options["top_p"], plan.repeats) == (True, 0.8, 0.95, 3)
    short = [replace(job, options={**options, "max_gen_toks": 8}) for job in plan.jobs["raw"]]
    plan = replace(plan, jobs={"raw": short})
    assert [job.key for job in short] == [(f"HumanEval/{n}", s) for n in range(3) for s in range(3)]
    whole = answers(shelf / "recipe", "proxy_tuned", plan, tmp_path / "a.jsonl", batch_size=9)
    assert len(set(whole.values())) > 6  # samples differ
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_bytes(b"".join(lines[3:5]) + lines[5][:20])  # some are done, and one line is torn
    again = answers(shelf / "recipe", "proxy_tuned", plan, tmp_path / "b.jsonl", batch_size=2)
    assert again == whole
    other = answers(shelf / "recipe", "proxy_tuned", plan, tmp_path / "c.jsonl", batch_size=9, seed=1)
    assert other != whole


def test_banned_strings_are_never_written(shelf, local, models, tokenizer, tmp_path):
    """What is written first without the ban is not written with it."""
    assert list(plan_of("humaneval", local).metadata["banned"]) == ["pass", "..."]
    plan = plan_of("triviaqa", local)
    free = answers(shelf / "recipe", "base", plan, tmp_path / "free.jsonl")
    begins = {}
    for key, _ in free.items():
        prompt = tokenizer(f"Question: {QUESTIONS[int(key[0])]}\nAnswer:")["input_ids"]
        token = Oracle(models.base).greedy(prompt, 1)[0]
        text = tokenizer.decode(token)
        if tokenizer(text, add_special_tokens=False)["input_ids"] == token and text.strip():
            begins[key] = text
    assert begins
    plan = replace(plan, metadata={**plan.metadata, "banned": sorted(set(begins.values()))})
    kept = answers(shelf / "recipe", "base", plan, tmp_path / "kept.jsonl")
    for key, text in begins.items():
        assert free[key].startswith(text)
        assert not kept[key].startswith(text)


def test_completions_are_cleaned_as_the_papers_were(shelf, local, tmp_path, monkeypatch):
    from proxytune.answers.generation import Answer
    from proxytune.evaluation import answering

    written = "    x = 1\n    assert x\n    print(x)\n    return x\ndef g():\n    return 2"
    monkeypatch.setattr(answering, "answer", lambda *a, **k: [Answer(written, [1], "stop")] * len(a[2]))
    plan = plan_of("humaneval", local, samples=1, limit=1)
    made = answers(shelf / "recipe", "base", plan, tmp_path / "a.jsonl")
    assert list(made.values()) == ["    x = 1\n    return x"]


# -- likelihoods ---------------------------------------------------------------------------------------------
def test_likelihoods_are_those_of_lm_evals_own_model(shelf, local, tokenizer, tmp_path):
    """The composite through HFLM reads each choice again; here the prompt is read once."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    plan = plan_of("truthfulqa_mc1", local, limit=4)
    asked = [(job.context, text) for job in plan.jobs["raw"] for text in job.continuations]
    requests = [Instance("loglikelihood", {}, pair, at) for at, pair in enumerate(asked)]
    model = ProxyTunedForCausalLM.from_pretrained(shelf / "recipe")
    theirs = HFLM(
        pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=3, max_length=tiny.CONTEXT, add_bos_token=True
    ).loglikelihood(requests, disable_tqdm=True)
    arm = Arms(load_recipe(shelf / "recipe"), ["proxy_tuned"]).make("proxy_tuned")
    ours = pairs_of(answered(arm, plan, tmp_path / "a", batch_size=3))
    assert len(ours) == len(theirs) == 16
    for (a, greedy_a), (b, greedy_b) in zip(ours, theirs):
        assert a == pytest.approx(b, abs=1e-3)
        assert greedy_a == greedy_b


def test_likelihoods_with_own_prompts_and_of_single_arms_are_the_plain_loops(shelf, local, tokenizer, tmp_path):
    recipe = chat_recipe(shelf, tmp_path, max_position_embeddings=1024)  # the system prompt is long
    models = SimpleNamespace(
        **{name: AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("base", "expert", "anti")}
    )
    plan = plan_of("truthfulqa_mc1", local, limit=3)
    arms = Arms(load_recipe(recipe), ["proxy_tuned", "expert", "mean_logits"])
    oracles = {
        "proxy_tuned": (Oracle(models.base, [("expert", models.expert, models.anti, 1.0)]), 1.0),
        "mean_logits": (Oracle(models.base, [("expert", models.expert, None, 1.0)]), 0.5),
        "expert": (Oracle(models.expert), 1.0),
    }
    arms.mean_weight = 2.5
    oracles["weighted_mean"] = (Oracle(models.base, [("expert", models.expert, None, 2.5)]), 1 / 3.5)
    for name, (oracle, scale) in oracles.items():
        arm = arms.make(name)
        found = pairs_of(answered(arm, plan, tmp_path / f"{name}.jsonl", batch_size=2))
        asked = [(job.context, text) for job in plan.jobs["raw"] for text in job.continuations]
        assert len(found) == len(asked) > 3
        for (context, continuation), (value, _) in zip(asked, found):
            encoded = arm.reader.encode(plan, context)
            n_context = len(tokenizer(context)["input_ids"])
            tokens = tokenizer(context + continuation)["input_ids"][n_context:]
            log_p = (scale * oracle.logits({"base": encoded.ids, **encoded.own}, tokens)[:-1]).log_softmax(dim=-1)
            assert value == pytest.approx(sum(float(row[t]) for row, t in zip(log_p, tokens)), abs=1e-3)


# -- a whole run ---------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_run_scores_compares_and_draws(shelf, local, tmp_path):
    settings = EvaluationOptions(("triviaqa", "mbpp_likelihood"), tuned=str(shelf / "expert"), data=str(local), limit=4)
    notes: list[str] = []
    results = evaluate(load_recipe(shelf / "recipe"), settings, tmp_path / "out", note=notes.append)
    assert (tmp_path / "out" / "results.json").read_text() == json.dumps(results, indent=2) + "\n"
    trivia, code = results["tasks"]["triviaqa"], results["tasks"]["mbpp_likelihood"]
    arms = ["base", "anti_expert", "expert", "proxy_tuned", "mean_logits", "tuned"]
    assert list(trivia["arms"]) == arms
    assert list(code["arms"]) == [
        "base",
        "anti_expert",
        "expert",
        "proxy_tuned",
        "base_few_shot",
        "mean_logits",
        "tuned",
    ]
    assert any("triviaqa" in note and "base_few_shot" in note for note in notes)
    for task in (trivia, code):
        for arm, of in task["arms"].items():
            assert 0 <= of["low"] <= of["value"] <= of["high"] <= 1
            assert task["examples_per_second"][arm] > 0
        assert task["steered_to_base"] == pytest.approx(
            task["examples_per_second"]["proxy_tuned"] / task["examples_per_second"]["base"]
        )
    assert code["arms"]["base"]["interval"] == "bootstrap"
    assert trivia["arms"]["base"]["count"] == 0
    base, steered, tuned = (code["arms"][arm]["value"] for arm in ("base", "proxy_tuned", "tuned"))
    assert code["gap_closed"]["value"] == pytest.approx((steered - base) / (tuned - base))
    assert code["arms"]["tuned"]["value"] == pytest.approx(code["arms"]["expert"]["value"])  # the same model
    assert code["proxy_tuned_against"]["base"]["test"] == "paired bootstrap"
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| **proxy-tuned base**" in table
    assert "Gap closed" in table
    for name in ("results.png", "results.svg"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert len(manifest["tasks"]["triviaqa"]["data_sha256"]) == 64
    assert {"torch", "transformers", "lm_eval", "proxytune"} <= set(manifest["versions"])

    # All is there: nothing is loaded again, and the same comes out.
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.jsonl")}

    def loading(*_):
        raise AssertionError("loaded again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Arms, "make", loading)
        again = evaluate(load_recipe(shelf / "recipe"), settings, tmp_path / "out")
    assert again["tasks"] == results["tasks"]
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.jsonl")}


@pytest.mark.slow
def test_judged_and_run_answers_are_scored_by_their_own_means(shelf, local, tmp_path):
    """A stand-in for a judge, asked once a text; and programs, run in the sandbox against the local problems."""
    from proxytune.evaluation.tasks.utils import problems_file

    asked = []

    class Judge:
        name = "stand-in"

        def ask(self, texts):
            asked.extend(texts)
            return [float(len(text) % 2) for text in texts]

    settings = EvaluationOptions(
        ("toxigen", "humaneval"), arms=("base", "proxy_tuned"), data=str(local), samples=2, limit=3
    )
    options = {
        "toxigen": {"judge": Judge(), "kept": tmp_path / "verdicts.jsonl"},
        "humaneval": {"data": problems_file("humaneval", str(local)), "ks": (10, 1), "unguarded": True},
    }
    notes: list[str] = []
    config = load_recipe(shelf / "recipe")
    results = evaluate(config, settings, tmp_path / "out", scoring=options.__getitem__, note=notes.append)
    toxic, code = results["tasks"]["toxigen"], results["tasks"]["humaneval"]
    assert (toxic["headline"], code["headline"]) == ("toxic", "pass@1")  # two samples: no pass@10
    lines = [json.loads(line) for line in (tmp_path / "out/toxigen/base.jsonl").read_text().splitlines()]
    assert toxic["arms"]["base"]["value"] == pytest.approx(sum(len(one["prediction"]) % 2 for one in lines) / 3)
    assert code["arms"]["base"]["count"] == 0
    n_asked = len(asked)
    assert evaluate(config, settings, tmp_path / "out", scoring=options.__getitem__)["tasks"] == results["tasks"]
    assert len(asked) == n_asked

    without = evaluate(config, replace(settings, tasks=("toxigen",)), tmp_path / "out", note=notes.append)
    assert without["tasks"]["toxigen"]["arms"] == {}
    assert any("toxigen needs a judge" in note for note in notes)


def test_a_judge_that_is_not_there_is_refused_before_the_first_token(shelf, local, tmp_path):
    words = ("eval", shelf / "recipe", "--data", local, "--limit", 2, "--output", tmp_path / "out")
    said = fails(*words, "--tasks", "gsm8k,toxigen", "--judge", tmp_path / "nobody")
    assert "the judge" in said
    assert "nobody cannot be loaded" in said
    assert not (tmp_path / "out").exists()
    assert "takes one judge" in fails(*words, "--tasks", "toxigen", "--judge", "a", "--judge", "b")


def test_what_is_not_available_is_left_out_and_the_rest_is_written(shelf, local, tmp_path, monkeypatch):
    """An arm that cannot answer; a task whose judge does not."""
    from proxytune.evaluation.judges import JudgeDown

    config, out = load_recipe(shelf / "recipe"), tmp_path / "out"
    settings = EvaluationOptions(("triviaqa", "realtimeqa"), arms=("base", "expert"), data=str(local), limit=3)
    told = []

    def failing(arm, *args, **options):
        if arm.name == "expert":
            raise PromptError("too long")
        return answer_jobs(arm, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("proxytune.evaluation.run.answer_jobs", failing)
        results = evaluate(config, settings, out, progress=lambda *now: told.append(now))
    assert [(part["task"], part["arm"], part["reason"]) for part in results["left_out"]] == [
        ("triviaqa", "expert", "too long"),
        ("realtimeqa", "expert", "too long"),
    ]
    assert [list(task["arms"]) for task in results["tasks"].values()] == [["base"], ["base"]]
    assert json.loads((out / "results.json").read_text()) == results
    assert (out / "results.png").exists()
    assert told[:4] == [(f"prompts of {task}, {arm}", 0, 12) for arm in settings.arms for task in settings.tasks]
    assert told[4] == ("triviaqa, base (1 of 4)", 0, 12)
    assert max(done for _, done, _ in told) == 6
    assert [said for said, _, _ in told if "(4 of 4)" in said] == ["realtimeqa, expert (4 of 4)"]

    def down(task, *args, **options):
        if task == "triviaqa":
            raise JudgeDown("it does not answer")
        return task_results(task, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("proxytune.evaluation.run.task_results", down)
        again = evaluate(config, settings, out)  # what was left out is tried again
    assert again["left_out"] == [{"task": "triviaqa", "arm": None, "reason": "it does not answer", "resumes": True}]
    assert list(again["tasks"]) == ["realtimeqa"]
    assert list(again["tasks"]["realtimeqa"]["arms"]) == ["base", "expert"]


@pytest.mark.parametrize("kind", ["raw", "chat"])
def test_an_arm_reads_as_it_was_predicted_without_its_weights(shelf, local, tmp_path, monkeypatch, kind):
    recipe = chat_recipe(shelf, tmp_path, max_position_embeddings=1024) if kind == "chat" else shelf / "recipe"
    names = ["base", "base_few_shot", "expert", "anti_expert", "mean_logits", "weighted_mean", "proxy_tuned", "tuned"]

    def read(reader, plan):
        try:
            return encode_jobs(reader, plan, plan.jobs.get(shots_of(reader.name), ()))
        except ProxyTuneError as error:
            return str(error)

    plans = [plan_of(name, local, limit=2) for name in ("truthfulqa_mc", "triviaqa")]
    arms = Arms(load_recipe(recipe), names, UNDRAFTED, tuned=str(shelf / "anti"), mean_weight=2.0)
    with monkeypatch.context() as patch:
        for place in ("evaluation.arms.load_member", "evaluation.arms.alone", "model.ProxyTunedForCausalLM._load"):
            patch.setattr(f"proxytune.{place}", None)
        foretold = {name: arms.reader(name) for name in names}
    for name in names:
        reader = arms.make(name).reader
        assert foretold[name].contexts == reader.contexts
        for plan in plans:
            assert read(foretold[name], plan) == read(reader, plan)


def test_what_cannot_be_read_is_known_before_anything_is_loaded(shelf, local, tmp_path, monkeypatch):
    """The solved examples do not fit the context of 256; the sweep's one arm has a prompt that is too long."""
    config, events = load_recipe(shelf / "recipe"), []
    make = Arms.make
    monkeypatch.setattr(Arms, "make", lambda arms, name: (events.append(name), make(arms, name))[1])
    settings = EvaluationOptions(("demo_math",), arms=("base", "base_few_shot"), limit=2)
    told = {"note": events.append, "progress": lambda *now: events.append(now)}
    results = evaluate(config, settings, tmp_path / "eval", **told)
    assert [said for said, _, _ in events[:2]] == ["prompts of demo_math, base", "prompts of demo_math, base_few_shot"]
    assert events[2].startswith("base_few_shot will be left out of demo_math: demo_math, example")
    assert events[3:5] == [("demo_math, base (1 of 1)", 0, 2), "base"]
    assert [(part["task"], part["arm"]) for part in results["left_out"]] == [("demo_math", "base_few_shot")]

    trivia = [{"question": "why? " * 300, "answers": ["seven"]}]
    long = replace(settings, tasks=("triviaqa",), data=str(write_lines(tmp_path / "dev.jsonl", trivia)))
    del events[:]
    with pytest.raises(ProxyTuneError, match="can read only 256"):
        sweep(config, long, [0.5, 1.0], tmp_path / "sweep", **told)
    assert events[0][0] == "prompts of triviaqa, proxy_tuned"
    assert [event.split(":")[0] for event in events[1:]] == ["proxy_tuned will be left out of triviaqa"]


def test_the_exit_status_says_that_something_was_left_out(shelf, local, tmp_path):
    """By the command: the control's solved examples do not fit the context of 256."""
    words = ("eval", shelf / "recipe", "--tasks", "demo_math", "--limit", 2, "--arms", "base,base_few_shot")
    done = run(*words, "--output", tmp_path / "out", status=2)
    assert "base_few_shot is left out of demo_math: demo_math, example" in done.stderr
    assert f"results: {tmp_path / 'out' / 'results.md'}" in done.stderr
    assert "| base" in done.stdout


def test_a_run_can_grow_but_not_change(shelf, local, tmp_path):
    config = load_recipe(shelf / "recipe")
    settings = EvaluationOptions(("realtimeqa",), arms=("base",), data=str(local), limit=2)
    evaluate(config, settings, tmp_path)
    made = (tmp_path / "realtimeqa" / "base.jsonl").read_bytes()
    grown = evaluate(config, replace(settings, arms=("base", "expert")), tmp_path)
    assert list(grown["tasks"]["realtimeqa"]["arms"]) == ["base", "expert"]
    assert (tmp_path / "realtimeqa" / "base.jsonl").read_bytes() == made
    for change, named in (
        ({"limit": 3}, "with realtimeqa: limit 2, now 3; use that"),  # without the examples and the data, which follow
        ({"seed": 5}, "seed 0, now 5"),
        ({"alpha": 0.5}, 'alpha {"expert": 1.0}, now {"expert": 0.5}'),
    ):
        with pytest.raises(
            ProxyTuneError, match=r"was started with .*use that again, or choose another --output"
        ) as caught:
            evaluate(config, replace(settings, **change), tmp_path)
        assert named in str(caught.value)


def refusing(tasks=(), arms=()):
    """``answer_jobs`` that refuses tasks and arms: a run that has begun, and has no predictions of them."""

    def answer(arm, plan, *args, **options):
        if plan.name in tasks or arm.name in arms:
            raise PromptError("too long")
        return answer_jobs(arm, plan, *args, **options)

    return answer


def test_a_run_without_a_prediction_takes_other_settings(shelf, local, tmp_path, monkeypatch):
    config = load_recipe(shelf / "recipe")
    settings = EvaluationOptions(("realtimeqa",), arms=("base", "expert"), data=str(local), limit=2)
    with monkeypatch.context() as patch:
        patch.setattr("proxytune.evaluation.run.answer_jobs", refusing(tasks=["realtimeqa"]))
        with pytest.raises(ProxyTuneError, match="too long"):
            evaluate(config, settings, tmp_path)
    (tmp_path / "realtimeqa" / "base.jsonl").write_bytes(b'{"id": "torn')  # by a kill: it will be cut off
    changed = replace(settings, tasks=("triviaqa", "realtimeqa"), arms=("base",), limit=1, seed=5, alpha=0.5)
    evaluate(config, changed, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["decides"]["seed"] == 5
    assert manifest["arms"] == ["base"]
    assert {name: task["limit"] for name, task in manifest["tasks"].items()} == {"triviaqa": 1, "realtimeqa": 1}
    with pytest.raises(ProxyTuneError, match=r"was started with alpha .*; seed 5, now 0"):
        evaluate(config, settings, tmp_path)


def test_a_task_without_a_prediction_takes_another_limit(shelf, local, tmp_path, monkeypatch):
    config = load_recipe(shelf / "recipe")
    settings = EvaluationOptions(("triviaqa", "realtimeqa"), arms=("base",), data=str(local), limit=2)
    with monkeypatch.context() as patch:
        patch.setattr("proxytune.evaluation.run.answer_jobs", refusing(tasks=["realtimeqa"]))
        evaluate(config, settings, tmp_path)
    for tasks in (("triviaqa",), ("triviaqa", "realtimeqa")):
        with pytest.raises(ProxyTuneError, match=r"started with triviaqa: limit 2, now 1; use that again"):
            evaluate(config, replace(settings, tasks=tasks, limit=1), tmp_path)
    with pytest.raises(ProxyTuneError, match="seed 0, now 5"):  # which is of all tasks
        evaluate(config, replace(settings, tasks=("realtimeqa",), seed=5), tmp_path)
    evaluate(config, replace(settings, tasks=("realtimeqa",), limit=1), tmp_path)
    tasks = json.loads((tmp_path / "manifest.json").read_text())["tasks"]
    assert {name: task["limit"] for name, task in tasks.items()} == {"triviaqa": 2, "realtimeqa": 1}


def test_a_difference_is_reported_once_without_what_follows_from_it(tmp_path):
    before = {"limit": None, "examples": 7, "samples": 1, "version": 1, "data_sha256": "a"}
    for changed, told in (
        ({"limit": 6, "examples": 6, "data_sha256": "b"}, "limit null, now 6"),
        ({"samples": 2, "data_sha256": "b"}, "samples 1, now 2"),
        ({"examples": 8, "data_sha256": "b"}, "examples 7, now 8"),
        ({"data_sha256": "b"}, 'data sha256 "a", now "b"'),
        ({"limit": 6, "version": 2, "data_sha256": "b"}, "limit null, now 6; t: version 1, now 2"),
    ):
        with pytest.raises(ProxyTuneError) as caught:
            _refuse_others(tmp_path, "t: ", before, {**before, **changed})
        assert str(caught.value) == f"{tmp_path} was started with t: {told}; use that again, or choose another --output"


@pytest.mark.slow
def test_a_tuned_model_without_a_prediction_may_be_another(shelf, local, tmp_path, monkeypatch):
    config = load_recipe(shelf / "recipe")
    settings = EvaluationOptions(("triviaqa",), arms=("base",), data=str(local), limit=1, tuned=str(shelf / "anti"))
    other = replace(settings, tuned=str(shelf / "expert"))
    with monkeypatch.context() as patch:
        patch.setattr("proxytune.evaluation.run.answer_jobs", refusing(arms=["tuned"]))
        evaluate(config, settings, tmp_path)
        evaluate(config, replace(settings, tuned=None), tmp_path)
    evaluate(config, other, tmp_path)
    with pytest.raises(ProxyTuneError, match="was started with tuned "):
        evaluate(config, settings, tmp_path)
    evaluate(config, replace(settings, tuned=None), tmp_path)
    weighted = EvaluationOptions(("triviaqa",), arms=("weighted_mean",), data=str(local), limit=1, mean_weight=2.0)
    evaluate(config, weighted, tmp_path)
    with pytest.raises(ProxyTuneError, match=r"was started with mean weight 2\.0, now 3\.0"):
        evaluate(config, replace(weighted, mean_weight=3.0), tmp_path)
    evaluate(config, replace(settings, tuned=None), tmp_path)
    decides = json.loads((tmp_path / "manifest.json").read_text())["decides"]
    assert (decides["tuned"], decides["mean_weight"]) == (str(shelf / "expert"), 2.0)


def command(*words):
    return [sys.executable, "-m", "proxytune", "eval", *map(str, words)]


@pytest.mark.slow
def test_a_killed_run_continues_where_it_was(shelf, local, tmp_path):
    """By the real entry point, killed with SIGKILL while it writes."""
    trivia = [{"question": f"{q}, number {n}", "answers": ["seven"]} for n in range(20) for q in QUESTIONS[:2]]
    data = write_lines(tmp_path / "dev.jsonl", trivia)
    words = [shelf / "recipe", "--tasks", "triviaqa", "--arms", "proxy_tuned", "--data", data, "-b", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = tmp_path / "out"
    process = subprocess.Popen(command(*words, "--output", out), env=environment, stderr=subprocess.DEVNULL)
    path = out / "triviaqa" / "proxy_tuned.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= 4:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL
    kept = path.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert 4 <= kept.count(b"\n") < 40
    with path.open("ab") as file:
        file.write(b'{"id": "torn')
    done = subprocess.run(
        command(*words, "--output", out), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(kept)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(int(line["id"]) for line in lines) == list(range(40))
    assert "| **proxy-tuned base**" in done.stdout

    whole = EvaluationOptions(("triviaqa",), arms=("proxy_tuned",), data=str(data), batch_size=2)
    evaluate(load_recipe(shelf / "recipe"), whole, tmp_path / "whole")
    texts = [
        {line["id"]: line["output"] for line in map(json.loads, place.read_text().splitlines())}
        for place in (path, tmp_path / "whole" / "triviaqa" / "proxy_tuned.jsonl")
    ]
    assert texts[0] == texts[1]


def test_ecqa_json_wants_the_object_and_nothing_else(local):
    document = plan_of("ecqa_json", local).jobs["raw"][0].doc
    assert document["solution"] == '{"answer": "a fox"}'
    outputs = [
        ' {"answer": "a fox"}',
        '{"answer": "two"}',
        '{"answer": "no option"}',
        "a fox",
        '{"answer": "a fox", "b": 1}',
        "[]",
    ]
    scores = score_lines("ecqa_json", [{**document, "id": n, "model_output": said} for n, said in enumerate(outputs)])
    assert scores.examples == [1, 0, 0, 0, 0, 0]
    assert scores.metrics["valid"] == pytest.approx(2 / 6)


# -- lm_eval's own side --------------------------------------------------------------------------------------
def test_every_yaml_is_a_task_that_lm_eval_reads(local):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASK_DIR), include_defaults=False, metadata={"data": str(local)})
    assert sorted(manager.all_tasks) == sorted(EVAL_TASKS)
    for name in sorted(set(EVAL_TASKS) - {"ds1000", "alpacafarm"}):  # no stand-ins for their data here
        task = manager.load([name])["tasks"][name]
        assert len(task.eval_docs) > 0
        assert task.fewshot_context(task.eval_docs[0], num_fewshot=0)
        missing = set(task.config.metadata.get("fields", ())) - set(task.eval_docs[0])
        assert not missing, name


def test_lm_eval_scores_the_tasks_with_our_scorers(shelf, local):
    import lm_eval
    from lm_eval.tasks import TaskManager

    names = ["triviaqa", "truthfulqa_mc", "truthfulqa_mc1", "mbpp_likelihood"]
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={shelf / 'recipe'},dtype=float32,max_length={tiny.CONTEXT}",
        tasks=names,
        limit=2,
        device="cpu",
        batch_size=2,
        task_manager=TaskManager(include_path=str(TASK_DIR), include_defaults=False, metadata={"data": str(local)}),
        bootstrap_iters=0,
    )
    metrics = {name: {key.split(",")[0] for key in found["results"][name]} for name in names}
    assert "exact_match" in metrics["triviaqa"]
    assert {"acc"} <= metrics["truthfulqa_mc"] & metrics["truthfulqa_mc1"]
    assert "byte_probability" in metrics["mbpp_likelihood"]


def test_bits_are_no_per_cent():
    assert metric_text("bits_per_byte", 0.642) == "0.642"
    assert (metric_text("valid", 0.642), metric_text("total", 3), metric_text("valid", None)) == ("64.2 %", "3", "")


@pytest.mark.slow
def test_lm_evals_command_line_takes_the_directory(shelf, local):
    where = subprocess.run(command("--tasks-dir"), capture_output=True, text=True, check=True).stdout.strip()
    words = ["--model", "hf", "--model_args", f"pretrained={shelf / 'recipe'},trust_remote_code=True,dtype=float32"]
    words += ["--include_path", where, "--tasks", "triviaqa", "--limit", "2", "--device", "cpu", "--batch_size", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *words, "--metadata", json.dumps({"data": str(local)})],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "|triviaqa|" in done.stdout.replace(" ", "")
    assert "exact_match" in done.stdout


# -- what is refused -----------------------------------------------------------------------------------------
def test_a_task_that_does_not_exist_is_reported_with_the_nearest():
    with pytest.raises(ProxyTuneError, match="there is no task 'gms8k'; did you mean 'gsm8k'"):
        load_plans(EvaluationOptions(("gms8k",)))


@pytest.mark.parametrize(
    ("task", "name", "content", "said"),
    [
        (
            "gsm8k",
            "x.jsonl",
            '{"question": "q", "answer": "#### 1"}\n{"question": "q"}\n',
            "line 2 of .* no text 'answer'",
        ),
        ("gsm8k", "x.jsonl", '{"question": "q", "answer": "1"}\n', "line 1 of .* no '#### number'"),
        ("gsm8k", "x.jsonl", '\n{"question"', "line 2 of .* not JSON"),
        ("gsm8k", "x.txt", "hello", "has none of the known suffixes: .jsonl"),
        ("triviaqa", "x.csv", 'question,answer,c\nq,"a; b",c\nq,a\n', "line 3 of .* does not have the 3 columns"),
        (
            "triviaqa",
            "x.json",
            '[{"question": "q", "answers": []}]',
            r"entry 1 \(line 1\) of .* no list of texts 'answers'",
        ),
        (
            "realtimeqa",
            "x.jsonl",
            '{"question_id": "1", "question_sentence": "q", "choices": ["a"], "answer": ["4"]}',
            "line 1 of .* has the answer '4'",
        ),
        (
            "gsm8k",
            "x.jsonl",
            '{"question": "\\ud83d", "answer": "#### 1"}',
            "line 1 of .* 'question' contains half a surrogate",
        ),
        ("triviaqa", "x.csv", 'question,answer\nq,"a\nq,a\n', "line 2 of .* not CSV"),
        ("toxigen", "x.txt", b"fine\n\xff\n", "line 2 of .* not UTF-8"),
        ("ecqa_json", "x.tsv", b"fine\n\xff\n", "line 1 of .* is not a question"),
        ("mbpp", "x.jsonl", '{"task_id": "x", "text": "t"}', "line 1 of .* no number `task_id`"),
        (
            "ecqa_json",
            "x.tsv",
            "q\\nOptions:\\n- a\\n- b\ta\tr\nq\\nOptions:\\n- a\\n- b\tc\tr\n",
            "line 2 of .* its answer",
        ),
    ],
)
def test_malformed_data_is_reported_with_its_line(task, name, content, said, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ProxyTuneError, match=said):
        load_plans(EvaluationOptions((task,), data=str(path)))


@pytest.mark.parametrize("name", ["hate_mine.txt", "mine.txt"])
def test_a_file_of_toxic_prompts_is_read_once_whatever_its_name(name, tmp_path):
    (tmp_path / name).write_text("- one\n\n- two\\n- three\n", "utf-8")
    documents = list(load_plans(EvaluationOptions(("toxigen",), data=str(tmp_path / name)))[0].task.eval_docs)
    assert [(doc["id"], doc["text"], doc["target_groups"]) for doc in documents] == [
        ("line/1", "- one", []),
        ("line/3", "- two\n- three", []),
    ]


def test_a_file_of_toxic_prompts_can_say_their_groups(tmp_path):
    rows = [{"text": "a", "group": "x"}, {"prompt": "b"}, {"text": "c", "target_groups": ["x", "y"]}]
    path = write_lines(tmp_path / "hate_z_1k.jsonl", rows)
    documents = list(load_plans(EvaluationOptions(("toxigen",), data=str(path)))[0].task.eval_docs)
    assert [(doc["id"], doc["target_groups"]) for doc in documents] == [
        ("x/1", ["x"]),
        ("line/2", []),
        ("x+y/3", ["x", "y"]),
    ]


def test_a_tuned_model_is_not_shown_one_of_several_prompts_in_silence(shelf, local, tmp_path):
    experts = [
        {
            "name": name,
            "expert": {"model": str(shelf / "expert"), "prompt": prompt},
            "anti_expert": {"model": str(shelf / "anti")},
        }
        for name, prompt in (("a", "raw"), ("b", "chat"))
    ]
    recipe = tiny.write_recipe_alone(tmp_path / "recipe", {"base": {"model": str(shelf / "base")}, "experts": experts})
    settings = EvaluationOptions(
        ("triviaqa",), arms=("base", "tuned"), tuned=str(shelf / "expert"), data=str(local), limit=1
    )
    with pytest.raises(ProxyTuneError, match=r"a.expert and b.expert have different prompts"):
        evaluate(load_recipe(recipe), settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_data_is_reported(tmp_path):
    with pytest.raises(ProxyTuneError, match="does not exist; give a file or a folder"):
        load_plans(EvaluationOptions(("gsm8k",), data=str(tmp_path / "nowhere")))
    with pytest.raises(ProxyTuneError, match=r"has none of gsm8k/test.jsonl"):
        load_plans(EvaluationOptions(("gsm8k",), data=str(tmp_path)))
    (tmp_path / "x.jsonl").touch()
    with pytest.raises(ProxyTuneError, match="one file, but there are several tasks"):
        load_plans(EvaluationOptions(("gsm8k", "triviaqa"), data=str(tmp_path / "x.jsonl")))


def test_the_hub_out_of_reach_is_one_sentence(monkeypatch):
    monkeypatch.delenv("PROXYTUNE_DATA", raising=False)
    with pytest.raises(ProxyTuneError, match=r"openai/gsm8k cannot be loaded from the hub .*give its file with --data"):
        load_plans(EvaluationOptions(("gsm8k",)))


def test_arms_that_a_recipe_lacks_are_refused(shelf, local, tmp_path):
    config = load_recipe(shelf / "recipe")
    with pytest.raises(ProxyTuneError, match="there is no arm 'exprt'"):
        expand_arms(["exprt"], config)
    with pytest.raises(ProxyTuneError, match="--tuned MODEL"):
        evaluate(config, EvaluationOptions(("triviaqa",), arms=("tuned",), data=str(local)), tmp_path)
    with pytest.raises(ProxyTuneError, match="no solved examples to show for triviaqa"):
        evaluate(config, EvaluationOptions(("triviaqa",), arms=("base_few_shot",), data=str(local)), tmp_path)
    lone = tiny.write_recipe_alone(
        tmp_path / "contrast",
        {"base": {"model": str(shelf / "base")}, "experts": [{"anti_expert": {"model": str(shelf / "anti")}}]},
    )
    with pytest.raises(ProxyTuneError, match="the recipe has no expert alone"):
        expand_arms(["expert"], load_recipe(lone))


def test_a_foreign_file_in_the_place_of_predictions_is_refused(shelf, local, tmp_path):
    write_lines(tmp_path / "triviaqa" / "base.jsonl", [{"question": "q"}])
    with pytest.raises(ProxyTuneError, match=r"line 1 of .*base.jsonl is not a prediction of this command"):
        evaluate(
            load_recipe(shelf / "recipe"), EvaluationOptions(("triviaqa",), arms=("base",), data=str(local)), tmp_path
        )


def test_a_prompt_too_long_names_its_example(shelf, local, tmp_path):
    data = write_lines(tmp_path / "dev.jsonl", [{"question": "word " * 300, "answers": ["a"]}])
    with pytest.raises(ProxyTuneError, match="triviaqa, example 0, base: the prompt has"):
        evaluate(
            load_recipe(shelf / "recipe"), EvaluationOptions(("triviaqa",), arms=("base",), data=str(data)), tmp_path
        )
