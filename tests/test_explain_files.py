"""Explanations of files: our traces as they were written, and OpenAI's logs, whose gaps stay gaps."""

from __future__ import annotations

import copy
import json
import math

import pytest

from proxytune.analysis.explain import explain_prompt
from proxytune.analysis.reading import read_explanations
from proxytune.analysis.terminal import legend, marked, moves_table, totals_lines
from proxytune.answers.options import AnswerOptions, Sampling
from support import tiny
from support.commands import fails, run
from support.oracle import Oracle

pytestmark = pytest.mark.usefixtures("no_progress")


@pytest.fixture(scope="module")
def traces(shelf, tmp_path_factory):
    """A file of two traces, and its lines."""
    place = tmp_path_factory.mktemp("traces") / "traces.jsonl"
    run("generate", shelf / "recipe", "the fox", "a dog", "-n", "6", "--trace", place)
    return place, [json.loads(line) for line in place.read_text("utf-8").splitlines()]


def logged(token, log, top=(), raw=None):
    entry = {"token": token, "logprob": log, "bytes": raw}
    return {**entry, "top_logprobs": [{"token": t, "logprob": p, "bytes": None} for t, p in top]}


CHAT = {
    "id": "chatcmpl-1",
    "choices": [
        {
            "message": {"role": "assistant", "content": "Hi 🦊"},
            "logprobs": {
                "content": [
                    logged("Hi", -0.1, [("Hi", -0.1), ("Yes", -2.5)]),
                    logged(" \\xf0\\x9f", -9999.0, [], [32, 0xF0, 0x9F]),
                    logged("\\xa6\\x8a", -0.2, [], [0xA6, 0x8A]),
                ]
            },
        },
        {"message": {"content": "No"}, "logprobs": {"content": [logged("No", -1.5)]}},
    ],
}
COMPLETION = {
    "choices": [
        {
            "text": "a 🦊|",
            "logprobs": {
                "tokens": ["a", " ", "bytes:\\xf0\\x9f", "bytes:\\xa6\\x8a", "|"],
                "token_logprobs": [None, -0.3, -0.5, -0.1, -2.0],
                "top_logprobs": [None, {" ": -0.3, "b": -1.4}, None, {"bytes:\\xa6\\x8a": -0.1}, {"c": -0.5}],
            },
        }
    ]
}


def write(tmp_path, *values, name="log.json", **layout):
    (tmp_path / name).write_text("\n".join(json.dumps(value, **layout) for value in values), "utf-8")
    return tmp_path / name


def test_a_trace_is_shown_as_its_recipe_was(shelf, traces):
    place, _ = traces
    for number, prompt in enumerate(("the fox", "a dog"), start=1):
        again = run("explain", place, "--answer", number, "--moves", "4")
        assert again.stdout == run("explain", shelf / "recipe", prompt, "-n", "6", "--moves", "4").stdout
        assert again.stderr == ""
    first = run("explain", place, "--moves", "4")
    assert first.stdout == run("explain", place, "--moves", "4", "--answer", "1").stdout
    assert "this is answer 1 of 2; --answer N shows another" in first.stderr


def test_the_mixture_of_candidates_is_computed_where_it_is_missing(tmp_path, tokenizer, trio):
    oracle = Oracle(trio.base, [("a", trio.expert, trio.anti_expert, 0.7), ("b", None, trio.anti_expert, -0.3)])
    model = tiny.compose(oracle, tokenizer=tokenizer)
    why = explain_prompt(model, tokenizer, "the fox", (0.7, -0.3), AnswerOptions(max_new_tokens=4), Sampling(), 3)
    tokens = json.loads(json.dumps(why.tokens))
    for token in tokens:
        for each in token["candidates"]:
            del each["mixture_logprob"]
    trace = {"schema": "proxytune.trace/1", "prompt": "the fox", "text": why.text, "alpha": why.alpha, "tokens": tokens}
    read = read_explanations(write(tmp_path, trace))[0]()
    for token, was in zip(read.tokens, why.tokens):
        computed = [each["mixture_logprob"] for each in token["candidates"]]
        assert computed == pytest.approx([each["mixture_logprob"] for each in was["candidates"]], abs=1e-4)


@pytest.mark.parametrize("layout", [{}, {"indent": 2}])
def test_chat_completions(tmp_path, layout):
    first, second = (read() for read in read_explanations(write(tmp_path, CHAT, **layout)))
    assert (first.text, second.text) == ("Hi 🦊", "No")
    assert [(piece.text, piece.n_tokens) for piece in first.pieces] == [("Hi", 1), (" 🦊", 2)]
    assert [token.get("mixture_logprob") for token in first.tokens] == [-0.1, None, -0.2], "-9999 is unknown"
    assert [each["token"] for each in first.tokens[0]["candidates"]] == ["Hi", "Yes"]
    assert {first.kind(at) for at in range(3)} == {"unknown"}
    assert not any("base_logprob" in token or "kl" in token for token in first.tokens)


def test_completions(tmp_path):
    (read,) = read_explanations(write(tmp_path, COMPLETION))
    why = read()
    assert why.text == "a 🦊|"
    assert [piece.text for piece in why.pieces] == ["a", " ", "🦊", "|"]
    assert [token.get("mixture_logprob") for token in why.tokens] == [None, -0.3, -0.5, -0.1, -2.0]
    assert [each["token"] for each in why.tokens[4]["candidates"]] == ["c", "|"]
    assert why.moves(2) == [4, 2]
    assert moves_table(why, 1).rows == [("5", '"|"', f"{math.exp(-2):.2f}", '"c" 0.61')]
    assert (marked(why), totals_lines(why)) == (why.text, "5 tokens")
    assert legend(why, styled=False) == "This log does not record what steering did."


def test_logs_one_a_line_and_in_a_list(tmp_path):
    for file in (write(tmp_path, CHAT, COMPLETION, name="a.jsonl"), write(tmp_path, [CHAT, COMPLETION], indent=1)):
        assert [read().text for read in read_explanations(file)] == ["Hi 🦊", "No", "a 🦊|"]


def test_a_log_without_content_has_the_text_of_its_tokens(tmp_path):
    log = copy.deepcopy(CHAT)
    log["choices"][0]["message"]["content"] = None
    assert read_explanations(write(tmp_path, log))[0]().text == "Hi 🦊"


def test_the_command_shows_a_log(tmp_path):
    shown = run("explain", write(tmp_path, CHAT), "--answer", "1").stdout
    assert shown.startswith("Hi 🦊\n\nThis log does not record")
    assert '"Hi"' in shown
    assert "0.90" in shown
    run("explain", write(tmp_path, CHAT), "--answer", "2", "--html", tmp_path / "page.html")
    assert '"prompt":null' in (tmp_path / "page.html").read_text("utf-8")


# What a recipe in vLLM 0.32 answered, without fields that say nothing: a completion, and a chat completion whose
# first token is a part of a character, as are two of the candidates. vLLM gives such tokens no text and no bytes.
OF_VLLM = [
    {
        "object": "text_completion",
        "choices": [
            {
                "index": 0,
                "text": "",
                "logprobs": {
                    "text_offset": [0],
                    "token_logprobs": [-0.3828350007534027],
                    "tokens": ["</s>"],
                    "top_logprobs": [
                        {"</s>": -0.3828350007534027, "\x13": -1.5043436288833618, "\x1c": -2.6472983360290527}
                    ],
                },
                "finish_reason": "stop",
                "stop_reason": None,
                "token_ids": None,
                "prompt_logprobs": None,
            }
        ],
    },
    {
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "\ufffd\\D", "refusal": None, "reasoning": None},
                "logprobs": {
                    "content": [
                        logged(
                            "",
                            -0.7648783326148987,
                            [("", -0.7648783326148987), ("", -2.0375261306762695), ("rge", -2.1795434951782227)],
                            [],
                        ),
                        logged(
                            "\\", -0.8760226368904114, [("\\", -0.8760226368904114), ("h", -1.6708357334136963)], [92]
                        ),
                        logged(
                            "D", -0.7853050827980042, [("D", -0.7853050827980042), (")", -1.9086923599243164)], [68]
                        ),
                    ]
                },
                "finish_reason": "length",
                "token_ids": None,
            }
        ],
    },
]


def test_responses_of_vllm(tmp_path):
    completion, chat = (read() for read in read_explanations(write(tmp_path, OF_VLLM)))
    assert (completion.text, chat.text) == ("", "\ufffd\\D")
    assert [each["token"] for each in completion.tokens[0]["candidates"]] == ["</s>", "\x13", "\x1c"]
    first = chat.tokens[0]
    assert [(each["token"], round(each["mixture_logprob"], 2)) for each in first["candidates"]] == [
        ("", -0.76),
        ("rge", -2.18),
    ], "of two without a text the likelier, which was written"
    assert {chat.kind(at) for at in range(3)} == {"unknown"}
    shown = run("explain", write(tmp_path, OF_VLLM), "--answer", "2").stdout
    assert "This log does not record what steering did." in shown
    assert "0.42" in shown  # of the backslash, the least probable


def test_a_trace_of_another_program_is_completed_by_arithmetic(tmp_path):
    """log p = base + alpha * delta + a number that is the same for all tokens of a place."""
    candidates = [
        {"id": 1, "token": "a", "base_logprob": -2.0, "delta": {"e": 3.0}, "masked": False},
        {"id": 2, "token": "b", "base_logprob": -1.0, "delta": {"e": -1.0}, "masked": False},
        {"id": 3, "token": "c", "base_logprob": -4.0, "delta": {"e": 1.0}, "masked": True},
        {"id": 4, "token": "d", "base_logprob": -4.0, "delta": {"e": None}, "masked": False},
    ]
    token = {"id": 1, "token": "a", "base_logprob": -2.0, "mixture_logprob": -0.25, "offsets": {"e": 1.5}}
    token |= {"kl": math.nan, "candidates": candidates, "flips": {"e": [[0, 2], [0.25, 1]], "other": [[0, 1]]}}
    trace = {"schema": "proxytune.trace/1", "prompt": "p", "text": "a", "alpha": {"e": 0.5}, "tokens": [token]}
    (read,) = read_explanations(write(tmp_path, trace))
    (made,) = read().tokens
    # -0.25 = -2 + 0.5 * 3 + 0.25
    assert [each.get("mixture_logprob") for each in made["candidates"]] == [-0.25, -1.25, None, None]
    assert [each["masked"] for each in made["candidates"]] == [False, False, True, False]
    assert made["flips"] == {"e": [[0, 2], [0.25, 1]]}
    assert made["kl"] is None
    assert "its alpha is not a number for each expert" in fails(
        "explain", write(tmp_path, {**trace, "alpha": {"e": "x"}})
    )


# -- refusals -------------------------------------------------------------------------------------------------
def broken(change):
    """A trace with a change."""

    def made(line):
        line = copy.deepcopy(line)
        change(line)
        return line

    return made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(schema="proxytune.trace/9"), "its traces are proxytune.trace/9, and this version"),
        (lambda t: t.update(schema="x"), "object 1 is neither a trace of `generate --trace` nor an OpenAI response"),
        (lambda t: t.update(alpha={"expert": "1"}), "answer 1: its alpha is not a number for each expert"),
        (lambda t: t.update(prompt=None), "answer 1: its prompt is not a text"),
        (lambda t: t.update(tokens=3), "answer 1: the trace: tokens is not a list"),
        (lambda t: t["tokens"][2].pop("id"), "tokens[2] must have an id (a number from 0)"),
        (lambda t: t["tokens"][2].update(kl="big"), "tokens[2]: kl is 'big', which is not a number"),
        (lambda t: t["tokens"][0].update(changed=1), "tokens[0]: changed is not true or false"),
        (lambda t: t["tokens"][0].update(flips={"expert": [[1]]}), "tokens[0]: flips are not lists of [alpha, id]"),
        (lambda t: t["tokens"][0]["candidates"][1].update(delta=[1]), "candidates[1]: delta is not an object"),
    ],
)
def test_traces_that_cannot_be_read(tmp_path, traces, change, message):
    file = write(tmp_path, broken(change)(traces[1][0]), name="t.jsonl")
    assert message in fails("explain", file)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"choices": [{"message": {}, "logprobs": None}]},
            'it has no logprobs; ask the server for them ("logprobs": true, "top_logprobs": 5)',
        ),
        ({"choices": [{"text": "a"}]}, 'it has no logprobs; ask the server for them ("logprobs": 5)'),
        ({"error": {"message": "no such model"}}, "object 1 is a server's error: no such model"),
        ({"error": "Not Found"}, "object 1 is a server's error: Not Found"),
        ({"choices": [{"logprobs": {}}]}, "neither content (chat completions) nor tokens (completions)"),
        (
            {"choices": [{"logprobs": {"content": [{"logprob": 1}]}}]},
            "content[0] has no token, or one that is not a text",
        ),
        ({"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": []}}]}, "are not lists of one length"),
        ({"choices": []}, "holds no answer"),
        ([], "holds no answer"),
        (3, "object 1 is neither"),
    ],
)
def test_logs_that_cannot_be_read(tmp_path, value, message):
    assert message in fails("explain", write(tmp_path, value))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("FILE hi", "a file contains its own prompts; leave 'hi' out"),
        ("FILE --answer 3", "--answer 3: FILE has only 2"),
        ("FILE -n 5 --temperature 1", "leave --max-new-tokens, --temperature out"),
        ("FILE --trace-top-k 2 --alpha 0", "leave --trace-top-k, --alpha out"),
        ("RECIPE hi --answer 1", "--answer chooses among the answers of a FILE"),
        ("nosuch.jsonl", "there is no file 'nosuch.jsonl'"),
        ("LINES", "Expecting value"),
    ],
)
def test_what_does_not_go_together(shelf, tmp_path, words, message):
    names = {"FILE": write(tmp_path, CHAT), "RECIPE": shelf / "recipe", "LINES": tmp_path / "lines.txt"}
    names["LINES"].write_text("no JSON\n")
    given = [str(names.get(word, word)) for word in words.split()]
    assert message.replace("FILE has", f"{names['FILE']} has") in fails("explain", *given)
