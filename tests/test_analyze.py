"""`proxytune analyze`: numbers by hand on traces made by hand, classes by the whole text, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from proxytune.analysis.explanation import Explanation
from proxytune.analysis.tokens import analyze, classes_of, load_classes, measure
from proxytune.evaluation.statistics import bootstrap_of
from support.commands import fails, run


def log(p):
    return None if p == 0 else math.log(p)


def candidate(id_, text, base, mixture, expert):
    return {
        "id": id_,
        "token": text,
        "base_logprob": log(base),
        "mixture_logprob": log(mixture),
        "expert_logprob": {"math": log(expert)},
        "delta": {"math": 0.0},
        "masked": False,
    }


def token(id_, text, base, mixture, others=(), *, expert=0.5, changed=False):
    written = candidate(id_, text, base, mixture, expert)
    return {**written, "changed": changed, "kl": 0.1, "offsets": {"math": 1.0}, "candidates": [written, *others]}


def trace(text, tokens):
    return {"schema": "proxytune.trace/1", "prompt": "p", "text": text, "alpha": {"math": 1.0}, "tokens": tokens}


# "3 + 4 = 7" and its end; the base would begin with "The", and be sure of it.
FIRST = trace(
    "3 + 4 = 7",
    [
        token(1, "3", 0.2, 0.8, [candidate(9, "The", 0.6, 0.1, 0.3)], expert=0.6, changed=True),
        token(2, " +", 0.5, 0.7),
        token(3, " 4", 0.5, 0.6),
        token(4, " =", 0.9, 0.9),
        token(5, " 7", 0.9, 0.8),
        token(0, "</s>", 0.25, 0.75),
    ],
)
SECOND = trace("so.", [token(6, "so", 0.1, 0.5), token(7, ".", 0.5, 0.5)])


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def result(*words):
    return json.loads(run("analyze", *words, "--json").stdout)


def test_the_numbers_are_those_by_hand(tmp_path):
    found = result(write(tmp_path / "t.jsonl", FIRST, SECOND))
    means = {name: (of["tokens"], of["mean"] and round(of["mean"], 6)) for name, of in found["classes"].items()}
    assert means == {
        "left_hand_side": (3, 0.3),  # 0.6, 0.2, 0.1
        "right_hand_side": (1, -0.1),
        "digits": (3, 0.2),  # 0.6, 0.1, -0.1
        "reasoning_words": (1, 0.4),
        "punctuation": (1, 0.0),
        "hedges": (0, None),
        "special": (1, 0.5),
        "other": (1, 0.0),  # the =
    }
    assert (found["answers"], found["tokens"], found["unknown"]) == (2, 8, 0)
    assert found["shift"]["mean"] == pytest.approx(1.7 / 8)
    assert found["left_minus_right"]["mean"] == pytest.approx(0.4)
    assert found["changed"]["mean"] == pytest.approx(1 / 8)
    assert [(p["from"], p["to"], p["tokens"], p["mean"]) for p in found["positions"]] == [
        (1, 1, 2, 0.5),
        (2, 3, 3, 0.0),
        (4, 7, 3, 0.0),
    ]
    assert (found["promoted"][0]["token"], found["promoted"][0]["written"]) == ("3", 1)
    assert found["promoted"][0]["mean"] == pytest.approx(0.3)  # 0.6 over two answers
    assert [each["token"] for each in found["demoted"]] == ["The", " 7"]
    assert found["demoted"][0]["mean"] == pytest.approx(-0.25)
    expert = found["experts"]["math"]
    assert expert["differed"]["mean"] == pytest.approx(1 / 8)
    assert {side: expert[side]["mean"] for side in ("base", "expert", "took_expert", "took_base")} == pytest.approx(
        {"base": 0.6, "expert": 0.6, "took_expert": 1.0, "took_base": 0.0}
    )


def test_a_text_is_summed_over_all_its_places(tmp_path):
    places = [(0.2, 0.8, 0.6, 0.1), (0.3, 0.6, 0.5, 0.2)]  # of "3" and of "The", in the base and in the mixture
    tokens = [token(1, "3", was, now, [candidate(9, "The", *the, 0.3)]) for was, now, *the in places]
    found = result(write(tmp_path / "t.jsonl", trace("33", tokens)), "--top", 1)
    (up,), (down,) = found["promoted"], found["demoted"]
    assert (up["token"], up["written"], up["mean"]) == ("3", 2, pytest.approx(0.9))
    assert (down["token"], down["written"], down["mean"]) == ("The", 0, pytest.approx(-0.8))
    assert found["kl"]["mean"] == pytest.approx(0.1)


def test_no_more_texts_than_asked_for(tmp_path):
    others = [candidate(8, "a", 0.1, 0.2, 0.1), candidate(9, "b", 0.3, 0.2, 0.1), candidate(7, "c", 0.3, 0.1, 0.1)]
    file = write(tmp_path / "t.jsonl", trace("3", [token(1, "3", 0.2, 0.5, others)]))
    for top, up, down in ((1, ["3"], ["c"]), (5, ["3", "a"], ["c", "b"])):
        found = result(file, "--top", top)
        assert [[each["token"] for each in found[side]] for side in ("promoted", "demoted")] == [up, down]


def test_each_expert_is_compared_with_the_base_by_itself():
    """The base would write a; of two experts one too, the other b; written is c."""
    shares = {"a": (0.6, 0.7, 0.2), "b": (0.3, 0.2, 0.7), "c": (0.1, 0.1, 0.1)}  # in the base and in the experts
    candidates = [
        {**candidate(at, text, base, 0.3, one), "expert_logprob": {"one": log(one), "two": log(two)}}
        for at, (text, (base, one, two)) in enumerate(shares.items())
    ]
    tokens, classes = [{**candidates[2], "candidates": candidates, "changed": True}], load_classes()
    both = measure(Explanation("p", "c", {"one": 1.0, "two": 1.0}, tokens), classes)
    alone = measure(Explanation("p", "c", {"one": 1.0}, tokens), classes)
    found = analyze([alone, both], classes)["experts"]
    assert {name: (of["differed"]["tokens"], of["differed"]["mean"]) for name, of in found.items()} == {
        "one": (2, 0.0),
        "two": (1, 1.0),
    }
    assert {side: found["two"][side]["mean"] for side in ("base", "expert", "took_expert", "took_base")} == (
        pytest.approx({"base": 0.6, "expert": 0.7, "took_expert": 0.0, "took_base": 0.0})
    )
    assert found["one"]["took_base"]["mean"] is None, "they never differ"


def test_intervals_are_about_the_means(tmp_path):
    """Of two answers one is drawn twice in half of the draws: the bounds are the answers' own means."""
    other = trace("1 + 1 = 2", [token(1, "1 + 1", 0.5, 0.6), token(2, " =", 0.5, 0.5), token(3, " 2", 0.5, 0.9)])
    tokens = [token(1, "1", 0.0, 0.5)]  # without a shift
    found = result(write(tmp_path / "t.jsonl", FIRST, other, trace("1", tokens)))
    assert found["unknown"] == 1
    found = result(write(tmp_path / "t.jsonl", FIRST, other))
    for name, first, second in (("left_hand_side", 0.3, 0.1), ("right_hand_side", -0.1, 0.4)):
        of = found["classes"][name]
        assert (of["low"], of["high"]) == (pytest.approx(min(first, second)), pytest.approx(max(first, second)))
        assert of["low"] < of["mean"] < of["high"]
    difference = found["left_minus_right"]
    assert difference["mean"] == pytest.approx(1.0 / 4 - 0.15)
    assert (difference["low"], difference["high"]) == (pytest.approx(-0.3), pytest.approx(0.4))


def test_the_table_gives_shares_in_percent(tmp_path):
    shown = run("analyze", write(tmp_path / "t.jsonl", FIRST, SECOND)).stdout
    assert "| all | 8 | 12.5 | 0.0 to 16.7 |" in " ".join(shown.replace("**", "").split())


def test_intervals_draw_whole_answers():
    """Two answers, of one token with 1 and three with 0: a draw is one of them twice or both, by halves."""
    sums, counts = [1.0, 0.0], [1.0, 3.0]
    assert bootstrap_of(lambda a, n: a / n, [sums, counts]) == (0.0, 1.0)
    assert bootstrap_of(lambda a, n: a / n, [[1.0], [1.0]]) is None
    assert bootstrap_of(lambda a, n: a / n, [[0.0, 0.0], [0.0, 0.0]]) is None
    generator = np.random.default_rng(1)
    values = generator.normal(size=400)
    low, high = bootstrap_of(lambda a, n: a / n, [(5 * values).tolist(), [5.0] * 400])
    half = 1.96 * values.std() / 20  # as of 400 answers, not of 2000 tokens
    assert high - low == pytest.approx(2 * half, rel=0.05)


def classed(text, *tokens):
    why = Explanation("p", text, {"math": 1.0}, [{"id": at, "token": each} for at, each in enumerate(tokens)])
    return classes_of(why, load_classes())


def test_classes_are_of_the_whole_text():
    assert classed("12+3=15", "12+", "3=1", "5") == [
        {"left_hand_side", "digits"},
        {"left_hand_side", "right_hand_side", "digits"},
        {"right_hand_side", "digits"},
    ]
    assert classed("th" + "erefore, 1.5", "th", "erefore", ",", " 1", ".", "5")[:3] == [
        {"reasoning_words"},
        {"reasoning_words"},
        {"punctuation"},
    ]
    assert classed("1.5", "1", ".", "5")[1] == {"other"}, "a decimal point is no punctuation"
    left, right = load_classes()["left_hand_side"], load_classes()["right_hand_side"]
    for text, sides in {
        "He has 3 pens + 4 pens = 7 pens": ("3 pens + 4 pens", "7"),
        "$5 * 3 = $15.": ("$5 * 3", "$15"),
        "48/2=<<48/2=24>>24": ("48/2", "24"),
    }.items():
        assert tuple(text[slice(*of.spans(text)[0])] for of in (left, right)) == sides
    assert left.spans("x = 5") == right.spans("x = 5") == []


def test_half_characters_empty_and_special_tokens():
    assert classed("a🦊", "a", "\ufffd", "\ufffd", "", "</s>") == [{"other"}] * 4 + [{"special"}]


def test_a_token_without_a_probability_has_no_shift():
    tokens = [token(1, "3", 0.0, 0.5), token(2, "4", 0.25, 0.5)]
    classes = load_classes()
    found = analyze([measure(Explanation("p", "34", {"math": 1.0}, tokens), classes)], classes)
    assert (found["unknown"], found["shift"]["tokens"], found["shift"]["mean"]) == (1, 1, 0.25)
    assert found["shift"]["low"] is None, "one answer has no interval"


def test_more_classes(tmp_path):
    more = tmp_path / "more.yaml"
    more.write_text("plus: {about: a plus, pattern: '(?P<sign>[+]) ', group: sign}\nhedges: null\n")
    file = write(tmp_path / "t.jsonl", FIRST)
    found = result(file, "--classes", more)
    assert found["classes"]["plus"]["mean"] == pytest.approx(0.2)
    assert "hedges" not in found["classes"]
    for text, message in {
        "a: {pattern: '('}": "the pattern of 'a' is not a regular expression",
        "a: {pattern: x, group: g}": "the pattern of 'a' has no group 'g'",
        "a: {about: x}": "the class 'a' has no pattern that is a text",
        "a: {pattern: x, patern: y}": "the class 'a' has an unknown field 'patern'",
        "other: {pattern: x}": "the class 'other' is built in and has no pattern",
        "- a": "holds no classes",
        "a: [": "is not valid YAML",
    }.items():
        more.write_text(text)
        assert message in fails("analyze", file, "--classes", more)


def test_tables_files_and_figures(tmp_path):
    first, second = write(tmp_path / "a.jsonl", FIRST, SECOND), write(tmp_path / "b.jsonl", SECOND)
    shown = run("analyze", first, second, "--plot", tmp_path / "plots", "--output", tmp_path / "out.json").stdout
    assert "| left minus right hand side" in shown
    assert f"| {first}" in shown
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["answers"] == 3
    assert [of["answers"] for of in found["files"].values()] == [2, 1]
    assert found["files"][str(second)]["shift"]["mean"] == pytest.approx(0.2)
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert names == ["classes.png", "classes.svg", "positions.png", "positions.svg"]


def test_answers_of_a_model_alone_have_a_row_and_no_part_in_the_set(tmp_path):
    alone = {**FIRST, "alpha": {}, "tokens": [{**token, "kl": 0.0} for token in FIRST["tokens"]]}
    alone["tokens"] = [{name: of for name, of in token.items() if name != "offsets"} for token in alone["tokens"]]
    base, steered = write(tmp_path / "base.jsonl", alone, alone), write(tmp_path / "a.jsonl", FIRST, SECOND)
    found = result(base, steered)
    assert {name: found[name] for name in found if name != "files"} == {
        name: of for name, of in result(steered).items() if name != "files"
    }
    assert [of["answers"] for of in found["files"].values()] == [2, 2]
    assert "there is no trace of a steered answer in" in fails("analyze", base)


def test_what_is_not_a_trace_is_named(tmp_path):
    good = write(tmp_path / "good.jsonl", FIRST)
    for line, message in (
        ({"mine": 1}, "it is not a trace (proxytune.trace/1)"),
        ({**FIRST, "schema": "proxytune.trace/9"}, "it is not a trace (proxytune.trace/1)"),
        ({**FIRST, "tokens": [{"id": 1}]}, "tokens[0] must have an id"),
    ):
        bad = write(tmp_path / "bad.jsonl", FIRST, line)
        assert f"line 2 of {bad}: {message}" in fails("analyze", good, bad)
    bad.write_text('{"a": 1}\n{torn')
    assert f"line 1 of {bad}" in fails("analyze", bad)
    bad.write_text("")
    assert "there is no trace of a steered answer in" in fails("analyze", bad)
    assert "is named twice" in fails("analyze", good, good)
    assert "No such file" in fails("analyze", tmp_path / "nosuch.jsonl")
    assert "is a file; --plot names a directory" in fails("analyze", good, "--plot", good)
