"""Explanations: their numbers against full forwards, the text that a terminal shows, and what is refused."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

import proxytune
from proxytune import Explanation, ProxyTunedForCausalLM
from proxytune.analysis.explain import explain_answer, explain_branch, explain_prompt, own_answers
from proxytune.analysis.explanation import base_choice, expert_choice, kind_of
from proxytune.analysis.options import Branch
from proxytune.analysis.terminal import legend, marked, moves_table, shaded, totals_lines, visible
from proxytune.answers.chat import Conversation
from proxytune.answers.generation import Answer, answer
from proxytune.answers.options import AnswerOptions, Sampling
from support import own_prompts, tiny
from support.commands import fails, run
from support.decoding import QUIET
from support.oracle import Oracle

pytestmark = pytest.mark.usefixtures("no_progress")
CLOSE = {"abs": 1e-3}


@pytest.fixture(scope="module")
def oracle(trio):
    return Oracle(trio.base, [("expert", trio.expert, trio.anti_expert, 1.0)])


@pytest.fixture(scope="module")
def model(oracle, tokenizer):
    return tiny.compose(oracle, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def why(model, tokenizer):
    return explain_prompt(model, tokenizer, "the fox", (1.0,), AnswerOptions(max_new_tokens=12), Sampling(), 5)


def token(id_=1, text="a", base=0.5, mixture=0.5, *, changed=False, kl=0.0, candidates=(), **more):
    return {
        "id": id_,
        "token": text,
        "base_logprob": math.log(base),
        "mixture_logprob": math.log(mixture),
        "kl": kl,
        "changed": changed,
        "candidates": list(candidates),
        **more,
    }


def candidate(id_, text, base, mixture, **more):
    return {"id": id_, "token": text, "base_logprob": math.log(base), "mixture_logprob": math.log(mixture), **more}


# -- numbers --------------------------------------------------------------------------------------------------
def test_what_members_would_choose_is_what_they_do(why, oracle, tokenizer):
    """compared with full forwards of every member, after the answer itself."""
    logits = oracle.member_logits(tokenizer("the fox")["input_ids"], [each["id"] for each in why.tokens])
    for at, each in enumerate(why.tokens):
        base, expert = (logits[name][at].log_softmax(dim=-1) for name in ("base", "expert.expert"))
        assert base_choice(each)["id"] == int(base.argmax())
        assert base_choice(each)["base_logprob"] == pytest.approx(float(base.max()), **CLOSE)
        assert expert_choice(each, "expert")["id"] == int(expert.argmax())
        assert expert_choice(each, "expert")["expert_logprob"]["expert"] == pytest.approx(float(expert.max()), **CLOSE)
    far = why.moves(5)
    assert [why.tokens[at]["kl"] for at in far] == sorted((each["kl"] for each in why.tokens), reverse=True)[:5]


def test_kinds():
    assert kind_of(token(changed=True)) == "changed"
    assert kind_of(token(base=0.5, mixture=0.56)) == "strengthened"
    assert kind_of(token(base=0.5, mixture=0.54)) == "kept"
    assert kind_of(token(base=0.5, mixture=0.1)) == "kept"
    assert kind_of({"id": 1, "token": "a"}) == "unknown"


def test_totals_add_up_over_candidates():
    tokens = [
        token(1, "a", changed=True, kl=1.0, candidates=[candidate(1, "a", 0.2, 0.9), candidate(2, "b", 0.7, 0.1)]),
        token(1, "a", kl=0.5, candidates=[candidate(1, "a", 0.5, 0.6), candidate(3, "b", 0.1, 0.05)]),
    ]
    totals = Explanation("p", "aa", {"expert": 1.0}, tokens).totals
    assert (totals.n_tokens, totals.kinds, totals.kl) == (2, {"changed": 1, "kept": 1}, 0.75)
    assert totals.promoted == [("a", pytest.approx(0.8))]
    assert totals.demoted == [("b", pytest.approx(-0.6)), ("b", pytest.approx(-0.05))], "two ids with one text"


def test_what_was_given_counts_nowhere():
    tokens = [
        token(1, "a", changed=True, kl=3.0, candidates=[candidate(1, "a", 0.1, 0.9)]),
        token(2, "b", kl=0.5, candidates=[candidate(2, "b", 0.5, 0.6)]),
        token(3, "c", kl=0.7, candidates=[candidate(2, "b", 0.2, 0.3)]),
    ]
    why = Explanation("p", "abc", {"expert": 1.0}, tokens, n_given=1)
    assert [why.kind(at) for at in range(3)] == ["given", "kept", "kept"]
    assert why.moves(3) == [2, 1]
    totals = why.totals
    assert (totals.n_tokens, totals.kinds, totals.kl) == (2, {"given": 1, "kept": 2}, pytest.approx(0.6))
    assert (totals.promoted, totals.demoted) == ([("b", pytest.approx(0.2))], [])


def test_the_five_that_moved_most_are_reported_most_first():
    candidates = [candidate(at, f"up{at}", 0.1, 0.1 + at / 100) for at in range(1, 8)]
    candidates += [candidate(10 + at, f"down{at}", 0.2, 0.2 - at / 100) for at in range(1, 8)]
    totals = Explanation("p", "a", {"expert": 1.0}, [token(candidates=candidates)]).totals
    assert [text for text, _ in totals.promoted] == ["up7", "up6", "up5", "up4", "up3"]
    assert [text for text, _ in totals.demoted] == ["down7", "down6", "down5", "down4", "down3"]


def test_what_is_unknown_is_no_zero():
    """A candidate without a log-probability is never chosen; a written token without one has no rise."""
    masked = {**candidate(2, "b", 0.5, 0.5), "mixture_logprob": None}
    totals = Explanation("p", "a", {"expert": 1.0}, [token(candidates=[masked])]).totals
    assert totals.demoted == [("b", pytest.approx(-0.5))]
    assert kind_of({**token(mixture=0.9), "base_logprob": None}) == "kept"
    equals = [candidate(5, "x", 0.4, 0.4), candidate(3, "y", 0.4, 0.4)]
    assert base_choice({"candidates": equals})["id"] == 3, "of equals the lowest id"


@pytest.mark.parametrize(
    ("text", "tokens", "pieces"),
    [
        ("a fox", ["a", " fox", "</s>"], [("a", 0, 1), (" fox", 1, 1), ("</s>", 2, 1)]),
        ("hi 🦊!", ["hi", " \ufffd", "\ufffd", "\ufffd", "!"], [("hi", 0, 1), (" 🦊", 1, 3), ("!", 4, 1)]),
        ("🦊", ["\ufffd", "\ufffd"], [("🦊", 0, 2)]),
        ("🦊", ["\ufffd", "\ufffd", "</s>"], [("🦊", 0, 2), ("</s>", 2, 1)]),
        ("a\ufffd", ["a", "\ufffd"], [("a", 0, 1), ("\ufffd", 1, 1)]),
        ("مرحبا", ["مر", "حبا"], [("مر", 0, 1), ("حبا", 1, 1)]),
    ],
)
def test_text_is_cut_into_its_tokens(text, tokens, pieces):
    why = Explanation(None, text, {}, [{"id": at, "token": each} for at, each in enumerate(tokens)])
    assert [(piece.text, piece.first, piece.n_tokens) for piece in why.pieces] == pieces


def test_pieces_of_a_real_tokenizer_add_up(tokenizer):
    text = "Ünïcode 🦊🦊 and\nlines"
    tokens = [{"id": id_, "token": tokenizer.decode([id_])} for id_ in tokenizer(text)["input_ids"][1:]]
    assert "".join(piece.text for piece in Explanation(None, text, {}, tokens).pieces) == text


# -- the terminal ---------------------------------------------------------------------------------------------
def test_marks_say_the_same_with_and_without_styles():
    tokens = [token(1, "one", changed=True, kl=2.0), token(2, " two", 0.2, 0.5, kl=0.2), token(3, " three")]
    why = Explanation("p", "one two three", {"expert": 1.0}, tokens)
    assert marked(why) == "⟦one⟧⟨ two⟩ three"
    text = shaded(why)
    assert text.plain == "one two three"
    (changed, strengthened) = (str(span.style) for span in text.spans if span.style)
    assert "bold" in changed
    assert "208" in changed, "the darkest"
    assert "bold" not in strengthened
    assert "underline" in strengthened
    for styled, words in (
        (False, ("⟦⟧: changed", "⟨⟩: strengthened")),
        (True, ("bold, orange: changed", "underlined, blue: ")),
    ):
        assert all(word in legend(why, styled=styled) for word in words)


def test_control_characters_are_shown_and_not_obeyed():
    why = Explanation("p", "a\x1b[2J", {"expert": 1.0}, [token(1, "a\x1b[2J", changed=True)])
    for shown in (marked(why), shaded(why).plain, moves_table(why, 3).rows[0][1], visible("a\x1b[2J")):
        assert "\x1b" not in shown
        assert "\\u001b" in shown


def test_the_command(shelf):
    shown = run("explain", shelf / "recipe", "the fox", "-n", "6", "--moves", "3").stdout
    assert "\x1b" not in shown
    answered = run("generate", shelf / "recipe", "the fox", "-n", "6").stdout.rstrip("\n")
    first = shown.split("\n\n⟦⟧: changed")[0]
    assert visible(answered) == re.sub("[⟦⟧⟨⟩]", "", first)
    assert shown.count("| changed |") == 3
    assert "6 tokens: " in shown
    assert run("explain", shelf / "recipe", "-n", "6", "--moves", "3", input="the fox\n").stdout == shown
    base = run("explain", shelf / "recipe", "the fox", "-n", "6", "--alpha", "0").stdout
    assert "6 tokens: 6 kept; mean KL 0.00 nats" in base
    assert "Steering changed no token." in base
    sampled = [run("explain", shelf / "recipe", "the fox", "-n", "6", "--temperature", "2").stdout for _ in range(2)]
    assert sampled[0] == sampled[1] != shown


def test_generate_explains_below_its_answers(shelf):
    alone = run("explain", shelf / "recipe", "the fox", "-n", "6").stdout
    plain = run("generate", shelf / "recipe", "the fox", "-n", "6").stdout
    assert run("generate", shelf / "recipe", "the fox", "-n", "6", "--explain").stdout == f"{plain}\n{alone}"
    both = run("generate", shelf / "recipe", "the fox", "a dog", "-n", "6", "--explain").stdout
    assert both.count("The largest moves") == 2
    assert alone in both


def test_why_in_a_conversation(shelf):
    result = run("chat", shelf / "recipe", "-n", "5", input="/why\nthe fox\n/alpha 0\n/why\n/undo\n/why\n/quit\n")
    assert result.stderr.count("there is no answer of this session to explain") == 2
    assert result.stdout.count("The largest moves") == 1
    assert "5 tokens: " in result.stdout
    assert "5 kept" not in result.stdout, "it was answered at alpha 1"


def test_a_conversations_trace_is_that_of_the_answer(model, tokenizer):
    talk = Conversation(model, tokenizer, (1.0,), sampling=Sampling(), max_new_tokens=6)
    for text in ("the fox", "and then"):
        talk.say(text, lambda piece: None)
        made, alphas = talk.last
        fresh = answer(
            model, tokenizer, [talk.encode(talk.messages[:-1])], [alphas], max_new_tokens=6, sampling=Sampling(),
            trace_top_k=5,
        )[0]  # fmt: skip
        assert made.tokens == fresh.tokens
        assert [each.kl for each in made.trace] == pytest.approx([each.kl for each in fresh.trace], **CLOSE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("explain RECIPE --moves 0 hi", "--moves must be at least 1, not 0"),
        ("generate RECIPE hi --explain --json", "--explain is for answers that are printed as text"),
        ("generate RECIPE hi --explain --output FILE", "--explain is for answers that are printed as text"),
        ("generate RECIPE hi --trace-top-k 3", "--trace-top-k needs --trace FILE or --explain"),
        ("explain RECIPE", "there is no prompt: give one as an argument or on stdin"),
        ("explain ./nosuch hi", "there is no recipe at './nosuch'"),
        ("explain RECIPE hi --alpha x=1", "no expert is called 'x'"),
    ],
)
def test_what_is_refused(words, message, shelf, tmp_path):
    named = [
        word.replace("RECIPE", str(shelf / "recipe")).replace("FILE", str(tmp_path / "f")) for word in words.split()
    ]
    if message.startswith("moves"):
        assert message in run(*named, status=2).stderr
    else:
        assert message in fails(*named)


# -- another token --------------------------------------------------------------------------------------------
def continued(model, tokenizer, text, ids, n, **options):
    """What ``generate`` writes after a text and these ids."""
    start = torch.tensor([[*tokenizer(text)["input_ids"], *ids]])
    out = model.generate(start, attention_mask=torch.ones_like(start), **QUIET, max_new_tokens=n, **options)
    return out[0, start.shape[1] :].tolist()


@pytest.mark.parametrize("speculate", [False, 3])
@pytest.mark.parametrize("after", [1.0, 0.0])
def test_another_token_is_gone_on_from(oracle, tokenizer, why, speculate, after):
    model = tiny.compose(oracle, tokenizer=tokenizer, speculate=speculate)
    options = AnswerOptions(max_new_tokens=12)
    other = why.tokens[4]["candidates"][2]
    made = explain_branch(
        model, tokenizer, why, Branch(5, id=other["id"]), (after,), options, Sampling(), 5
    )  # fmt: skip
    ids = [token["id"] for token in made.tokens]
    given = [*(token["id"] for token in why.tokens[:4]), other["id"]]
    assert ids == given + continued(model, tokenizer, "the fox", given, 7, alpha=after)
    assert ids != [token["id"] for token in why.tokens]
    assert [made.kind(at) == "given" for at in range(12)] == [True] * 5 + [False] * 7
    assert (made.totals.n_tokens, made.totals.kinds["given"]) == (7, 5)
    assert not set(made.moves(20)) & set(range(5))
    logits = oracle.member_logits(tokenizer("the fox")["input_ids"], ids)
    mixed = oracle.mix(logits, [after]).log_softmax(dim=-1)
    for at, each in enumerate(made.tokens):
        assert each["mixture_logprob"] == pytest.approx(float(mixed[at, each["id"]]), **CLOSE), "also of given ones"
    if after == 0:
        base = explain_branch(model, tokenizer, why, Branch(5, other["token"]), (0.0,), options, Sampling(), 5)
        assert [token["id"] for token in base.tokens] == ids, "by its text, as by its id"


def test_a_sampled_answer_keeps_what_is_given(model, tokenizer):
    options, sampling = AnswerOptions(max_new_tokens=8), Sampling(temperature=1.5, top_k=4, seed=3)
    before = explain_prompt(model, tokenizer, "the fox", (1.0,), options, sampling, 5)
    made = explain_branch(model, tokenizer, before, Branch(3, id=40), (1.0,), options, sampling, 5)
    ids = [token["id"] for token in before.tokens]
    assert [token["id"] for token in made.tokens][:3] == [*ids[:2], 40]


def test_the_command_continues_from_another_token(shelf, why):
    words = ("explain", shelf / "recipe", "the fox", "-n", "6", "--branch")
    shown = run(*words, "2:#40").stdout
    assert "The first 2 tokens were given." in shown
    assert "2 given" in shown
    assert run(*words, "2:#40", "--branch-alpha", "0").stdout.count("kept") == 5
    twice = run(*words, "2:#40", "--branch", "4:#41").stdout
    assert "The first 4 tokens were given." in twice
    assert shown.startswith(why.tokens[0]["token"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--branch 3", "--branch is N:TOKEN, the number of a token from 1 and a candidate's text, or N:#ID, not '3'"),
        ("--branch 0:a", "--branch is N:TOKEN"),
        ("--branch 1:", "--branch is N:TOKEN"),
        ("--branch 9:a", "--branch 9:a: the answer has only 4 tokens"),
        ("--branch 2:nosuch", "no candidate at token 2 is 'nosuch'; there are '"),
        ("--branch 2:#384", "--branch 2:#384: the models share 384 tokens, numbered from 0"),
        ("--branch 1:\ufffd", "several candidates have this text; name one by its id: 1:#"),
        ("--branch-alpha 0", "--branch-alpha needs --branch N:TOKEN"),
        ("--branch 1:a --branch-alpha x=0", "no expert is called 'x'"),
    ],
)
def test_other_tokens_that_are_refused(shelf, words, message):
    assert message in fails("explain", shelf / "recipe", "the fox", "-n", "4", *words.split())


def test_the_command_that_gives_an_answer_is_kept_with_it(shelf, tmp_path):
    def kept(*words):
        run("explain", "--html", tmp_path / "page.html", "--moves", "3", *words)
        return json.loads(re.search('"command":(.*?),"own"', (tmp_path / "page.html").read_text("utf-8"))[1])

    recipe = str(shelf / "recipe")
    options = ["--branch", "2:#40", "--branch", "3:#41", "--alpha", "0.5", "--max-new-tokens", "3", "--chat"]
    assert kept(recipe, "it's", *options[:4], "-a", "0.5", "-n", "3", "--chat") == [
        ["proxytune", "explain", recipe, "it's", *options],
        [],
    ]
    assert kept("-n", "2", "--", recipe, "-x") == [
        ["proxytune", "explain", "--max-new-tokens", "2"],
        ["--", recipe, "-x"],
    ]


# -- Python ---------------------------------------------------------------------------------------------------
def test_from_python(shelf):
    made = proxytune.explain(ProxyTunedForCausalLM.from_pretrained(shelf / "recipe"), "the fox", max_new_tokens=5)
    assert made.text == proxytune.generate(shelf / "recipe", "the fox", max_new_tokens=5)
    assert made.own["base"] == proxytune.generate(shelf / "recipe", "the fox", max_new_tokens=5, alpha=0)
    assert list(made.own) == ["base", "expert"]


def test_the_experts_own_answer_is_its_own(shelf, model, tokenizer):
    lone = tiny.model("qwen2", "small", 2)
    ids = tokenizer("the fox", return_tensors="pt")
    greedy = lone.generate(**ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, ids["input_ids"].shape[1] :]
    made = proxytune.explain(shelf / "recipe", "the fox", max_new_tokens=5)
    whole = tokenizer.decode([*ids["input_ids"][0], *greedy], skip_special_tokens=True)
    assert "the fox" + made.own["expert"] == whole


def test_members_answer_alone_to_prompts_of_their_own(trio, tokenizer):
    made = Oracle(trio.base, [("e", trio.expert, trio.anti_expert, 1.0)])
    model, text = own_prompts.compose(made, tokenizer), own_prompts.TEXTS[0]
    own = own_answers(model, tokenizer, text, AnswerOptions(max_new_tokens=5), Sampling())
    prompts = own_prompts.prompts_of(text, tokenizer)
    for title, lone, member in (("base", trio.base, "base"), ("e", trio.expert, "e.expert")):
        ids = torch.tensor([prompts[member]])
        new = lone.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0
        )[0, ids.shape[1] :]  # fmt: skip
        before = tokenizer.decode(ids[0, -8:], skip_special_tokens=True)
        whole = tokenizer.decode([*ids[0, -8:], *new], skip_special_tokens=True)
        assert before + own[title] == whole


def test_an_answer_without_tokens():
    made = explain_answer("p", Answer("", [], "stop", []), ["expert"], (1.0,), tiny.tokenizer())
    assert (marked(made), moves_table(made, 3).rows, totals_lines(made)) == ("", [], "0 tokens: none")
