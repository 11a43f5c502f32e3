"""Prediction lines and the pure scorers: every rule of the public repository's, on small lines made by hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from proxytune import ProxyTuneError
from proxytune.answers.journal import Journal
from proxytune.evaluation import TASKS, check_tasks
from proxytune.evaluation.records import FIELDS, parse, read
from proxytune.evaluation.scoring import (
    choice_letter,
    exact_match,
    gsm8k_answer,
    gsm8k_reference,
    score,
    trim_gsm8k,
    triviaqa_match,
)


def gsm8k(output, answer="18", **more):
    return {"question": "?", "answer": answer, "model_output": output, **more}


def choice(output, right="A", **more):
    return {"mc_output": output, "mc_answer_idx": right, **more}


# -- GSM8K ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("She makes 9 * 2 = $18 every day.", "18"),
        ("It is 18.", "18"),  # the full stop is no decimal point
        ("It is 18.50", "18.50"),
        ("-3 degrees", "3"),  # the sign belongs to a decimal fraction alone
        ("-3.5 degrees", "-3.5"),
        ("+.5", "+.5"),
        ("$1,234,567", "1234567"),
        ("1,2,3", "3"),  # becomes 12,3: pairs of digits do not overlap
        ("1, 2", "2"),
        ("18\n\nQuestion: what is 2 + 2? Answer: 4", "18"),
        ("18 Comment: 5", "18"),
        ("18\nAnswer the following question 3", "18"),
        ("question: 4", "4"),  # only as they are written
        ("no number", "no number"),
        ("", ""),
        ("٣", "٣"),  # a digit in another script is a digit to the published expression
    ],
)
def test_the_last_number_is_the_answer(output, answer):
    assert gsm8k_answer(output) == answer


@pytest.mark.parametrize(
    ("answer", "reference"),
    [("18", "18"), ("9 <<16-7=9>>9 eggs.\n#### 1,080", "1080"), ("1,080", "1080"), ("#### -5", "-5")],
)
def test_a_reference_is_cleaned(answer, reference):
    assert gsm8k_reference(answer) == reference


@pytest.mark.parametrize(
    ("prediction", "reference", "same"),
    [
        ("18", "18", True),
        ("18.", "18", True),
        ("-5", "5", True),
        ("1.5", "15", True),  # punctuation is ignored, the decimal point too
        ("18.0", "18", False),
        ("018", "18", False),
        ("TEN", "ten", True),
        (" 18", "18", False),
    ],
)
def test_exact_match_ignores_case_and_punctuation_and_no_more(prediction, reference, same):
    assert exact_match(prediction, reference) is same


def test_exact_match_is_that_of_the_evaluate_library():
    """Not its code but numpy's string functions, which it calls."""
    np = pytest.importorskip("numpy")
    import string

    drop = str.maketrans("", "", string.punctuation)
    words = ["18", "-18", "1.8", "Ten!", "ten", "", " 18", "18 ", "٣", "é", "É", "ß"]
    pairs = [(a, b) for a in words for b in words]
    theirs = np.char.translate(np.char.lower([a for a, _ in pairs]), table=drop) == np.char.translate(
        np.char.lower([b for _, b in pairs]), table=drop
    )
    assert [exact_match(a, b) for a, b in pairs] == theirs.tolist()


def test_trimming_twice_changes_nothing():
    once = trim_gsm8k("4 Comment: Question: 5 Answer the following question 6")
    assert once == trim_gsm8k(once) == "4 "


@pytest.mark.parametrize("answer", ["18", "She has 9.\n#### 18"])
def test_gsm8k_in_both_field_forms(answer):
    scores = score("gsm8k", [gsm8k("18", answer), gsm8k("19", answer), gsm8k("the end", answer), gsm8k("$18", answer)])
    assert scores.metrics == {"exact_match": 0.5, "total": 4}
    assert next(iter(scores.metrics)) == scores.headline == "exact_match"
    assert scores.ids == ["1", "2", "3", "4"]
    assert scores.examples == [1.0, 0.0, 0.0, 1.0]


def test_an_example_with_several_samples_is_worth_their_mean():
    lines = [gsm8k("18", id="a", sample=0), gsm8k("2", id="b", sample=0), gsm8k("1", id="a", sample=1)]
    scores = score("gsm8k", lines)
    assert (scores.ids, scores.examples, scores.metrics["exact_match"]) == (["a", "b"], [0.5, 0.0], 0.25)


# -- multiple choice ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("output", "letter"),
    [
        (" C", "C"),
        ("(B) because", "B"),
        ("\n\\begin{blockquote}\nD", "D"),
        ("\\begin{code}A", "A"),
        ("All of them", "A"),  # the first letter, whatever it begins
        ("a", None),
        ("E", None),
        ("The answer is C", None),
        ("", None),
        (" \n", None),
        ("\n\n> B", None),  # these were invalid in the published figures
        (" **C**", None),
        ("<blockquote>C", None),
        ("```\nC", None),
    ],
)
def test_the_first_letter_is_the_choice(output, letter):
    assert choice_letter(output) == letter


def test_invalid_choices_are_counted_apart():
    scores = score("truthfulqa_mc", [choice("A"), choice(" B", "C"), choice("?"), choice("(D)", "D")])
    assert scores.metrics == {"acc": 2 / 3, "num_invalid_predictions": 1, "acc_of_all": 0.5, "total": 4}
    assert scores.headline == "acc"
    assert scores.examples == [1.0, 0.0, 0.0, 1.0]


def test_nothing_valid_is_no_division_by_zero():
    scores = score("truthfulqa_mc", [choice("?")])
    assert scores.metrics == {"acc": 0.0, "num_invalid_predictions": 1, "acc_of_all": 0.0, "total": 1}


def test_a_fifth_choice_is_realtimeqas_alone():
    assert score("realtimeqa", [choice("E", "E")]).metrics["acc"] == 1.0
    with pytest.raises(ProxyTuneError, match=r"line 2 .*'mc_answer_idx' is not one of A, B, C, D"):
        score("truthfulqa_mc", [choice("A"), choice("E", "E")])


# -- TriviaQA -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("output", "right"),
    [(" pulsar\n", True), ("Beltex Optics", True), ("a pulsar", False), ("pulsar.", False), ("", False)],
)
def test_triviaqa_wants_an_alias_and_nothing_else(output, right):
    assert triviaqa_match(output, ["PULSAR", " Beltex optics "]) is right


def test_triviaqa():
    line = {"question": "?", "answers": ["Paris"]}
    scores = score("triviaqa", [{**line, "output": " paris"}, {**line, "output": "Rome"}])
    assert scores.metrics == {"exact_match": 0.5, "total": 2}


# -- lines that cannot be scored ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("task", "lines", "reason"),
    [
        ("gsm9k", [], "no task 'gsm9k'; did you mean 'gsm8k'"),
        ("xyzzy", [], "the tasks are alpacafarm, "),
        ("gsm8k", [], "there are no predictions"),
        ("gsm8k", [gsm8k("1"), {"answer": "1"}], "line 2 cannot be scored as gsm8k: it has no field 'model_output'"),
        ("gsm8k", [gsm8k("1"), choice("A")], r"line 2 .*it fits realtimeqa and truthfulqa_mc"),
        ("gsm8k", [gsm8k("1", task="triviaqa")], "its field `task` is 'triviaqa'"),
        ("gsm8k", [gsm8k(18)], "line 1 .*its 'model_output' is not text"),
        ("gsm8k", [gsm8k(None)], "its 'model_output' is not text"),
        ("triviaqa", [{"answers": "Paris", "output": ""}], "its 'answers' is not a list of texts"),
        ("triviaqa", [{"answers": ["Paris", 3], "output": ""}], "its 'answers' is not a list of texts"),
        ("gsm8k", [gsm8k("1", id="a"), gsm8k("2", id="a")], "line 2 .*it is sample 0 of 'a', as line 1 is"),
        ("gsm8k", [gsm8k("1", id="a", sample=3), gsm8k("2", id="a", sample=3)], "sample 3 of 'a', as line 1 is"),
        ("gsm8k", [gsm8k("1", id=None)], "its 'id' is not text"),
        ("gsm8k", [gsm8k("1", id="a", sample=-1)], "its 'sample' is not a whole number"),
        ("gsm8k", [gsm8k("1", id="a", sample=True)], "its 'sample' is not a whole number"),
    ],
)
def test_a_line_that_cannot_be_scored_is_named(task, lines, reason):
    with pytest.raises(ProxyTuneError, match=reason):
        score(task, lines)


def test_samples_without_a_number_are_counted():
    lines = [
        {"task_id": name, "completion": ""} for name in ("HumanEval/0", "HumanEval/0", "HumanEval/1", "HumanEval/0")
    ]
    assert [(one.id, one.sample, one.line) for one in parse("humaneval", lines)] == [
        ("HumanEval/0", 0, 1),
        ("HumanEval/0", 1, 2),
        ("HumanEval/1", 0, 3),
        ("HumanEval/0", 2, 4),
    ]


def test_a_public_ds1000_line_is_all_of_its_samples():
    found = parse("ds1000", [{"lib": "Pandas", "problem_id": 3, "output": ["a", "b"], "solution": "c"}])
    assert [(one.id, one.sample, one["completion"], one["solution"]) for one in found] == [
        ("Pandas/3", 0, "a", "c"),
        ("Pandas/3", 1, "b", "c"),
    ]


def test_fields_go_by_their_first_name_and_others_are_kept():
    (one,) = parse("truthfulqa_open", [{"Question": "?", "output": None, "Category": "Law"}])
    assert (one["question"], one["output"], one["Category"]) == ("?", "", "Law")


def test_every_task_has_fields():
    assert set(FIELDS) == set(TASKS)
    assert check_tasks(["gsm8k", "mbpp", "gsm8k"]) == ("gsm8k", "mbpp")


# -- files ----------------------------------------------------------------------------------------------------
def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def test_a_file_is_lines_or_a_list(tmp_path):
    lines = [gsm8k("1"), gsm8k("é\u2028")]
    assert read(write(tmp_path / "a", *lines, "\n \n")) == lines
    assert read(write(tmp_path / "b", "\ufeff", *lines)) == lines
    assert read(write(tmp_path / "c", json.dumps(lines, indent=2))) == lines


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "holds no predictions"),
        (b" \n\n", "holds no predictions"),
        (b"[]", "holds no predictions"),
        (b'{"a": 1}\n{"a"', "it is not JSON"),
        (b'{"a": 1}\n\n3\n', "line 3 of .*: it is not a JSON object"),
        (b'{"a": 1}\n"\xff"\n', "line 2 of .*: it is not UTF-8"),
        (b'{"a": 1}\n{"a": ' + b"9" * 5000 + b"}\n", "line 2 of .*: it cannot be read as JSON"),
        (b'{"a": ' + b"[" * 100_000, "line 1 of .*: (it is not JSON|it cannot be read as JSON)"),
        (b"[1]", r"entry 1 \(line 1\) of .*: it is not a JSON object"),
        (b"[{}", r"line 1 of .*: it is not JSON \(Expecting ',' or '\]' at column 4\)"),
        (b'[\n{"a": 1},\n{"a": 2}\n {"a"', r"line 4 of .*: it is not JSON \(Expecting ',' or '\]' at column 2\)"),
        (b'[\n{"a": 1},\n{"a" 2}\n]', "line 3 of .*: it is not JSON .*delimiter"),
        (b'[\n{"a": 1}\n]\n{}', "line 4 of .*: it is not JSON .Extra data"),
        (b'[{"a": 1},\n"\xff"]', "line 2 of .*: it is not UTF-8"),
        (b'{\n"a": 1\n}\n', "line 1 of .*: it starts an object that spans several lines; write one object per line"),
    ],
)
def test_a_file_that_cannot_be_read_is_reported_with_the_line(tmp_path, text, reason):
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(text)
    with pytest.raises(ProxyTuneError, match=reason):
        read(path)


def test_a_journal_reads_what_is_there_and_drops_a_torn_end(tmp_path):
    path = tmp_path / "predictions.jsonl"
    with Journal(path) as journal:
        journal.append([gsm8k("1", id="a", sample=0), gsm8k("\ud800", id="b", sample=1)])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "c", "mod')
    with Journal(path) as journal:
        assert [(line["id"], line["sample"]) for line in journal.lines] == [("a", 0), ("b", 1)]
        journal.append([gsm8k("2", id="c", sample=0)])
    assert path.read_bytes().startswith(whole)
    assert [line["id"] for line in read(path)] == ["a", "b", "c"]


def test_two_processes_do_not_write_one_journal(tmp_path):
    path = tmp_path / "predictions.jsonl"
    with Journal(path), pytest.raises(ProxyTuneError, match="another process"), Journal(path):
        pass


def test_what_a_journal_has_appended_survives_a_kill(tmp_path):
    path = tmp_path / "predictions.jsonl"
    program = f"""
import os, signal
from proxytune.answers.journal import Journal
with Journal({str(path)!r}) as journal:
    journal.append([{{"id": "a"}}])
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], check=False, env=dict(os.environ))
    assert killed.returncode == -signal.SIGKILL
    with Journal(path) as journal:
        assert journal.lines == [{"id": "a"}]


def test_scoring_text_imports_nothing_heavy():
    program = (
        "import sys; from proxytune.evaluation.scoring import score; "
        "score('triviaqa', [{'answers': ['a'], 'output': 'a'}]); "
        "print(*sorted({'torch', 'transformers', 'lm_eval', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "\n"
