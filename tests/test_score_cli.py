"""``proxytune score``: what it prints, what it writes, and bad input in one sentence."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

from proxytune.cli import app
from proxytune.evaluation import judges
from proxytune.evaluation.judges import JudgeDown


def run(*args, status=0):
    result = CliRunner().invoke(app, ["score", *map(str, args)])
    assert result.exit_code == status, result.output
    return result


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def gsm8k(tmp_path):
    outputs = ("18", "It is $1,018.", "none")
    lines = [{"question": "?", "answer": "#### 18", "model_output": output} for output in outputs]
    return write(tmp_path / "predictions.jsonl", *lines)


def test_the_figures_are_printed_with_counts_and_an_interval_and_written(gsm8k, tmp_path):
    out = tmp_path / "scores.json"
    shown = run("gsm8k", gsm8k, "--output", out).stdout
    (row,) = [line for line in shown.splitlines() if "exact_match" in line]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["exact_match", "1/3", "33.3 %", "6.1 – 79.2"]
    assert json.loads(out.read_text()) == {"task": "gsm8k", "metrics": {"exact_match": 1 / 3, "total": 3}}


def test_a_mean_that_is_not_a_count_is_not_shown_as_one(tmp_path):
    lines = [{"task_id": "a", "completion": "", "passed": n < 1} for n in range(4)]
    out = tmp_path / "scores.json"
    shown = run("humaneval", write(tmp_path / "p", *lines), "--k", "1,2", "--output", out).stdout
    assert "mean of 1" in shown
    assert "50.0 %" in shown
    assert "samples: failed" in shown
    assert json.loads(out.read_text()) == {
        "task": "humaneval",
        "metrics": {"pass@2": 0.5, "pass@1": 0.25, "total": 1, "samples": 4},
        "outcomes": {"passed": 1, "failed": 3},
    }


def test_the_interval_is_that_of_eval(tmp_path):
    """pass@k is no count: its interval is drawn over the problems, wherever it is printed."""
    from proxytune.evaluation.results import task_results

    lines = [
        {"task_id": str(n), "id": str(n), "sample": s, "completion": "", "passed": s < n % 4, "seconds": 1.0}
        for n in range(12)
        for s in range(4)
    ]
    arm = task_results("humaneval", {"base": lines}, options={"ks": (1,)})["arms"]["base"]
    assert arm["interval"] == "bootstrap"
    shown = run("humaneval", write(tmp_path / "p", *lines), "--k", "1").stdout
    assert f"{100 * arm['low']:.1f} – {100 * arm['high']:.1f}" in shown


def test_the_interval_of_multiple_choice_leaves_invalid_answers_out(tmp_path):
    lines = [{"mc_output": output, "mc_answer_idx": "A"} for output in ("A", "B", "?")]
    shown = run("truthfulqa_mc", write(tmp_path / "p", *lines)).stdout
    assert "1/2" in shown
    assert "9.5 – 90.5" in shown
    assert "num invalid predictions" in shown


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["gsm9k", "{file}"], "there is no task 'gsm9k'; did you mean 'gsm8k'?"),
        (["gsm8k", "{file}.no"], "No such file"),
        (["gsm8k", "{empty}"], "holds no predictions"),
        (["gsm8k", "{torn}"], "it is not JSON"),
        (["triviaqa", "{file}"], "line 1 cannot be scored as triviaqa: it has no field 'answers' (it fits gsm8k)"),
        (["gsm8k", "{file}", "--k", "x"], "--k is numbers"),
        (["humaneval", "{code}", "--k", "0"], "--k is numbers from 1 on"),
        (["humaneval", "{code}", "--data", "{file}.no"], "there is no data at"),
        (["humaneval", "{code}", "--data", "{file}"], "has no field 'task_id'"),
        (["gsm8k", "{file}", "--judge", "x"], "gsm8k takes no judge"),
        (["toxigen", "{toxigen}"], "toxigen needs a judge: --judge-url with --judge-model, or --judge DIR_OR_ID"),
        (["gsm8k", "{file}", "--output", "{file}/x"], "Not a directory"),
    ],
)
def test_bad_input_is_reported_in_one_sentence(gsm8k, tmp_path, args, reason):
    places = {
        "file": gsm8k,
        "empty": write(tmp_path / "empty"),
        "torn": write(tmp_path / "torn", gsm8k.read_text(), '{"a'),
        "code": write(tmp_path / "code", {"task_id": "HumanEval/0", "completion": ""}),
        "toxigen": write(tmp_path / "toxigen", {"prediction": "text"}),
    }
    said = run(*[arg.format(**places) for arg in args], status=2).stderr
    assert reason in " ".join(said.split())
    assert "Traceback" not in said


def test_a_judge_that_is_down_is_reported_by_the_exit_status_and_continued(tmp_path, monkeypatch):
    class Judge:
        name, lasts = "judge", 3

        def ask(self, texts):
            if self.lasts <= 0:
                raise JudgeDown("the judge does not answer")
            self.lasts -= 1
            return [1.0 for _ in texts]

    monkeypatch.setattr(judges, "CHUNK", 1)
    monkeypatch.setattr(judges, "LocalModel", lambda name, label=None: Judge())
    lines = [{"prediction": str(n)} for n in range(5)]
    file = write(tmp_path / "p.jsonl", *lines)
    said = run("toxigen", file, "--judge", "x", status=3).stderr
    assert "the same command continues from there" in " ".join(said.split())
    assert len((tmp_path / "p.jsonl.verdicts.jsonl").read_text().splitlines()) == 3
    assert "5/5" in run("toxigen", file, "--judge", "x").stdout


@pytest.mark.skipif(sys.platform != "linux", reason="programs are locked up on Linux alone")
def test_code_is_run_and_run_again(tmp_path):
    problem = {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f): assert f()"}
    data = write(tmp_path / "problems.jsonl", problem)
    line = {"task_id": "HumanEval/0", "completion": "    return 1", "passed": False}
    file = write(tmp_path / "p.jsonl", line)
    assert "0/1" in run("humaneval", file, "--data", data).stdout
    assert "1/1" in run("humaneval", file, "--data", data, "--rerun", "--workers", 1, "--seconds", 5).stdout
