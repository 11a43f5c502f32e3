"""The page of an explanation: what is in the file, and what a real Chromium makes of it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from proxytune import Explanation
from proxytune.analysis.explain import explain_prompt
from proxytune.analysis.options import Branch
from proxytune.answers.options import AnswerOptions, Sampling
from support import tiny
from support.browser import browser
from support.commands import fails, run
from support.oracle import Oracle

pytestmark = pytest.mark.usefixtures("no_progress")

HOSTILE = "</script><script>hacked = 1</script><img src=x onerror='hacked = 1'><!-- %DATA% %SCRIPT% \u2028\ud83d"


@pytest.fixture(scope="module")
def oracle(trio):
    return Oracle(trio.base, [("expert", trio.expert, trio.anti_expert, 1.0)])


@pytest.fixture(scope="module")
def why(oracle, tokenizer):
    model = tiny.compose(oracle, tokenizer=tokenizer)
    return explain_prompt(model, tokenizer, "the fox", (1.0,), AnswerOptions(max_new_tokens=30), Sampling(), 5)


def written(texts, **more):
    """An explanation of an answer with these tokens."""
    numbers = {"base_logprob": -1.0, "mixture_logprob": -0.5, "kl": 0.2, "changed": False}
    tokens = [{"id": at, "token": text, **numbers} for at, text in enumerate(texts)]
    return Explanation(**{"prompt": "p", "text": "".join(texts), "alpha": {"expert": 1.0}, "tokens": tokens, **more})


class Parts(HTMLParser):
    """The tags of a page, the text of its scripts and styles, and its policy."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.policy = [], {}, ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.inside = values.get("id") or tag
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]
        self.values = values

    def handle_data(self, text):
        if self.tags and self.tags[-1] in ("script", "style"):
            self.texts.setdefault(self.inside, text)


# -- the file -------------------------------------------------------------------------------------------------
def test_hostile_text_stays_text():
    why = written([HOSTILE, "<b>"], prompt=HOSTILE, own={"base": HOSTILE}, text=f"{HOSTILE}<b>")
    text = why.html()
    parts = Parts(text)
    assert (parts.tags.count("script"), parts.tags.count("img"), parts.tags.count("b")) == (2, 0, 0)
    assert "<" not in parts.texts["data"]
    assert text.count("</script>") == 2
    read = json.loads(parts.texts["data"])
    assert read["prompt"] == HOSTILE
    assert read["texts"]["0"] == HOSTILE
    text.encode("utf-8")


def test_nothing_but_our_script_may_run_and_nothing_may_be_fetched():
    parts = Parts(written(["a"]).html())
    rules = dict(rule.split(" ", 1) for rule in parts.policy.split("; "))

    def digest(text):
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == digest(parts.texts["script"])
    assert rules["style-src"] == digest(parts.texts["style"])
    code = parts.texts["script"]
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(|XMLHttp|import\(", code
    )


def test_a_long_answer_is_under_a_megabyte():
    """500 tokens, the most candidates that two models with five each of four distributions give, and many flips."""
    names = ["expert"]
    candidates = [
        {
            "id": 30000 + n,
            "token": f" token{n}",
            "base_logprob": -12.345678 - n,
            "mixture_logprob": -11.345678 - n,
            "expert_logprob": {"expert": -10.123456 - n},
            "delta": {"expert": -1.234567},
            "masked": False,
        }
        for n in range(20)
    ]
    flips = {name: [[n / 7, 30000 + n] for n in range(6)] for name in names}
    more = {"base_rank": 12345, "base_entropy": 1.234567, "entropy": 1.234567, "origin": "corrected"}
    why = written([f" token{n}" for n in range(500)])
    tokens = [
        {**token, **more, "offsets": {"expert": 1.234567}, "candidates": candidates, "flips": flips}
        for token in why.tokens
    ]
    assert len(replace(why, tokens=tokens, own={"base": why.text, "expert": why.text}).html().encode()) < 1_000_000


def test_what_is_unknown_is_left_out():
    tokens = [{"id": 1, "token": "a", "candidates": [{"id": 1, "token": "a", "mixture_logprob": -0.1}]}]
    read = json.loads(Parts(Explanation(None, "a", {}, tokens).html()).texts["data"])
    assert read["tokens"][0].keys() == {"id", "kind", "offsets", "choices", "candidates", "flips"}
    assert read["tokens"][0]["candidates"] == [[1, None, -0.1, [], 0]]
    assert read["prompt"] is None


def test_a_notebook_shows_it_in_a_frame():
    why = written([HOSTILE, '"&'])
    frame = Parts(why._repr_html_())
    assert frame.tags == ["iframe"]
    assert frame.values["srcdoc"] == why.html()
    assert frame.values["sandbox"] == "allow-scripts"


def test_the_command_writes_it(shelf, tmp_path):
    recipe = shelf / "recipe"
    made = run("explain", recipe, "the fox", "-n", "5", "--html", tmp_path / "why.html")
    assert made.stdout == ""
    assert "open it in a browser" in made.stderr
    read = json.loads(Parts((tmp_path / "why.html").read_text("utf-8")).texts["data"])
    assert read["prompt"] == "the fox"
    base = run("generate", recipe, "the fox", "-n", "5", "--alpha", "0").stdout.removesuffix("\n")
    assert dict(read["own"])["base"] == base
    assert [title for title, _ in read["own"]] == ["base", "expert"]
    assert "there is no directory" in fails("explain", recipe, "hi", "--html", tmp_path / "no" / "why.html")
    assert "is a directory" in fails("explain", recipe, "hi", "--html", tmp_path)


# -- a real browser -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def window():
    with browser() as one:
        yield one


def shown(window, tmp_path, why, **look):
    """Open the page of an explanation from disk; nothing else is asked for, and nothing is complained of."""
    (tmp_path / "page.html").write_text(why.html(), "utf-8")
    window.look(**look)
    window.requests()
    window.open(tmp_path / "page.html")
    assert window.complaints() == []
    assert [url.split("/")[-1] for url in window.requests()] == ["page.html"]


def slide(window, alpha):
    window.run(
        "const slider = document.getElementById('alpha'); slider.value = arguments[0];"
        "slider.dispatchEvent(new Event('input'))",
        str(alpha),
    )


@pytest.mark.slow
def test_the_slider_finds_the_flips_of_full_forwards(window, tmp_path, why, oracle, tokenizer):
    shown(window, tmp_path, why)
    assert window.run("return document.querySelectorAll('.flips').length") == 0
    logits = oracle.member_logits(tokenizer("the fox")["input_ids"], [token["id"] for token in why.tokens])
    for alpha in (0.0, 0.4, 1.8, 3.0):
        slide(window, alpha)
        mixed = oracle.mix(logits, [alpha])[: len(why.tokens)]
        best = mixed.argmax(dim=-1).tolist()
        near = mixed.topk(2, dim=-1).values.diff(dim=-1).abs().flatten() < 1e-3
        assert not near.any(), "a tie decides nothing"
        framed = window.run("return spans.map((span) => span.classList.contains('flips'))")
        for piece in why.pieces:
            places = range(piece.first, piece.first + piece.n_tokens)
            expected = any(best[at] != why.tokens[at]["id"] for at in places)
            assert framed[piece.first] == expected, (alpha, piece)
        for at in (0, 7):
            window.run("show(arguments[0])", at)
            rows = window.run(
                "return [...document.querySelectorAll('#card tbody th .quoted')].map((e) => e.textContent)"
            )
            candidates = why.tokens[at]["candidates"]
            order = sorted(candidates, key=lambda each: -(each["base_logprob"] + alpha * each["delta"]["expert"]))
            assert [json.loads(row) for row in rows] == [each["token"] for each in order]
    assert "The text before each place stays as it was." in window.text("#effect")
    window.click("#reset")
    assert window.run("return document.querySelectorAll('.flips').length") == 0


@pytest.mark.slow
def test_one_of_several_experts_is_varied(window, tmp_path, trio, tokenizer):
    both = [("towards", trio.expert, trio.anti_expert, 0.7), ("away", None, tiny.qwen2("small", 4), 0.4)]
    oracle = Oracle(trio.base, both)
    model = tiny.compose(oracle, tokenizer=tokenizer)
    why = explain_prompt(model, tokenizer, "the fox", (0.7, 0.4), AnswerOptions(max_new_tokens=12), Sampling(), 5)
    shown(window, tmp_path, why)
    window.run(
        "const list = document.getElementById('expert'); list.value = '1'; list.dispatchEvent(new Event('change'))"
    )
    assert window.run("return document.getElementById('alpha').value") == "0.4"
    assert window.run("return document.querySelectorAll('.flips').length") == 0
    slide(window, 2.5)
    logits = oracle.member_logits(tokenizer("the fox")["input_ids"], [token["id"] for token in why.tokens])
    best = oracle.mix(logits, [0.7, 2.5])[:12].argmax(dim=-1).tolist()
    differ = [best[at] != token["id"] for at, token in enumerate(why.tokens)]
    assert 0 < sum(differ) < 12
    assert f"another token at {sum(differ)} of 12 places" in window.text("#effect")


@pytest.mark.slow
def test_keys_the_mouse_and_a_tap(window, tmp_path, why):
    shown(window, tmp_path, why)
    window.run("show(0, true)")
    assert window.text("#card h3").startswith("Token 1 of 30")
    window.press("ArrowRight", "ArrowRight", "ArrowLeft")
    assert window.text("#card h3").startswith("Token 2 of 30")
    assert window.run("return document.activeElement.getAttribute('aria-label')").startswith("token 2: ")
    window.press("End")
    assert window.text("#card h3").startswith("Token 30 of 30")
    window.press("Escape")
    window.run("spans[4].dispatchEvent(new PointerEvent('pointerenter', {pointerType: 'mouse'}))")
    assert window.text("#card h3").startswith("Token 5 of 30")
    window.run("spans[9].click()")
    window.run("spans[4].dispatchEvent(new PointerEvent('pointerenter', {pointerType: 'mouse'}))")
    assert window.text("#card h3").startswith("Token 10 of 30"), "a click holds the card"
    kl = f"{why.tokens[9]['kl']:.2f}"
    assert kl in window.text("#card dl")


@pytest.mark.slow
def test_hostile_text_does_not_run(window, tmp_path):
    hostile = HOSTILE.replace("\ud83d", "")
    shown(window, tmp_path, written([hostile, "<b>"], prompt=hostile, own={"base": hostile}))
    assert window.run("return typeof hacked") == "undefined"
    assert window.run("return document.images.length + document.querySelectorAll('b').length") == 0
    assert window.run("return document.getElementById('prompt').textContent") == hostile
    window.run(
        "const made = document.createElement('script'); made.textContent = 'hacked = 1'; document.body.append(made)"
    )
    assert window.run("return typeof hacked") == "undefined", "the policy allows our script alone"
    assert any("Content Security Policy" in line for line in window.complaints())


@pytest.mark.slow
def test_light_dark_phone_and_print(window, tmp_path, why):
    paper = "return getComputedStyle(document.body).backgroundColor"
    shown(window, tmp_path, why)
    light = window.run(paper)
    window.look(dark=True)
    assert window.run(paper) != light
    shown(window, tmp_path, why, width=390, height=844)
    assert window.run("return document.documentElement.scrollWidth") <= 390
    hidden = "return getComputedStyle(document.getElementById('card')).display"
    assert window.run(hidden) == "none"
    window.click(".token:nth-child(3)")
    assert window.run(hidden) != "none"
    assert window.run(
        "const r = document.getElementById('card').getBoundingClientRect(); return r.bottom <= innerHeight"
    )
    window.look()
    window.devtools("Emulation.setEmulatedMedia", {"media": "print"})
    assert window.run(hidden) == "none"
    window.devtools("Emulation.setEmulatedMedia", {"media": ""})


@pytest.mark.slow
def test_scripts_from_right_to_left_and_parts_of_characters(window, tmp_path):
    shown(window, tmp_path, written(["مر", "حبا", " \ufffd", "\ufffd", "\n"], text="مرحبا 🦊\n"))
    assert window.run("return getComputedStyle(document.getElementById('answer')).direction") == "rtl"
    assert window.run("return document.getElementById('answer').textContent") == "مرحبا 🦊\n"
    window.run("show(0, true)")
    window.press("ArrowLeft", "ArrowLeft")
    assert window.text("#card h3").startswith("Token 3 of 5"), "forward is to the left"
    assert 'Part 1 of 2 of the text " 🦊"' in window.text("#card")
    window.press("ArrowLeft")
    assert 'Part 2 of 2 of the text " 🦊"' in window.text("#card")


@pytest.mark.slow
def test_masked_candidates_and_what_is_excluded(window, tmp_path):
    def each(id_, base, mixture, masked, delta=1.0):
        return {
            "id": id_, "token": f"t{id_}", "base_logprob": base, "mixture_logprob": mixture, "masked": masked,
            "delta": {"expert": delta}, "expert_logprob": {"expert": -1.0},
        }  # fmt: skip

    why = written(["t0"])
    candidates = [each(0, math.log(0.5), math.log(0.9), False), each(1, math.log(0.1), None, True)]
    candidates.append(each(2, None, None, False, None))
    tokens = [{**why.tokens[0], "candidates": candidates, "flips": {"expert": [[0.0, 1], [0.5, 0]]}}]
    shown(window, tmp_path, replace(why, tokens=tokens))
    rows = window.run("return [...document.querySelectorAll('#card tbody tr')].map((row) => row.innerText)")
    assert "masked" in rows[1]
    assert rows[2].count("–") == 3
    assert "–: excluded, or not recorded." in window.text("#card")
    slide(window, 2)
    assert window.run("return document.querySelectorAll('#card tr.out').length") == 1
    assert "100 %" in window.text("#card tbody tr:first-child"), "what is masked has no share"


@pytest.mark.slow
def test_the_first_card_is_of_a_token_of_the_text_and_names_every_choice(window, tmp_path):
    why = written(["a", "</s>"], text="a", own={"base": "b", "expert": "c"})
    flips = {"expert": [[0.0, 1], [0.5, 0]]}
    tokens = [{**why.tokens[0], "base_logprob": -9.0, "flips": flips}, {**why.tokens[1], "kl": 9.0}]
    shown(window, tmp_path, replace(why, tokens=tokens))
    card = window.text("#card")
    assert card.startswith("Token 1 of 2"), "the end token moved further, and says less"
    assert 'Greedy decoding chooses "</s>", from alpha 0.50 "a".' in card
    assert "base <0.1 % → steered 61 %" in card
    titles = "return [...document.querySelectorAll('#own-answers h3')].map((title) => title.textContent)"
    assert window.run(titles) == ["base alone", "expert alone"]


@pytest.mark.slow
def test_a_log_shows_what_it_does_not_know_as_unknown(window, tmp_path):
    tokens = [
        {
            "id": 0,
            "token": "a",
            "candidates": [{"id": 0, "token": "a"}, {"id": 1, "token": "b", "mixture_logprob": -1.0}],
        }
    ]
    shown(window, tmp_path, Explanation(None, "a", {}, tokens))
    card = window.text("#card")
    assert "unknown" in card.split("candidate")[0]
    assert [row.split()[-1] for row in card.split("probability\n")[-1].splitlines() if row] == ["%", "unknown"]
    assert "0.0 %" not in card
    assert not window.run("return document.getElementById('controls').checkVisibility()")


@pytest.mark.slow
def test_every_candidate_has_a_command_that_continues_from_it(window, tmp_path, shelf):
    """Each is what the shell would run, whatever the token's text is."""
    prompt = "it's a fox"
    run("explain", shelf / "recipe", prompt, "-n", "4", "--html", tmp_path / "page.html")
    window.look()
    window.open(tmp_path / "page.html")
    for at in (0, 2):
        window.run("show(arguments[0], true)", at)
        ids = window.run("return ranked(data.tokens[arguments[0]]).map(([each]) => each[0])", at)
        specs = set()
        for row, id_ in enumerate(ids):
            window.run("document.querySelectorAll('#card .try')[arguments[0]].click()", row)
            words = shlex.split(window.run("return document.querySelector('.command code').textContent"))
            assert words[:-1] == [
                "proxytune", "explain", str(shelf / "recipe"), prompt, "--max-new-tokens", "4", "--branch",
            ]  # fmt: skip
            branch = Branch.parse(words[-1])
            text = window.run("return textOf(arguments[0])", id_)
            assert branch.number == at + 1
            assert branch.id == id_ or branch.text == text
            specs.add(words[-1])
        assert len(specs) == len(ids), "no two candidates have one command"
    run(*words[1:])
    window.click("#command input")
    words = shlex.split(window.run("return document.querySelector('.command code').textContent"))
    assert words[-2:] == ["--branch-alpha", "0"]
    run(*words[1:])
