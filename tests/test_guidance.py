"""Experts without training: negative prompts (classifier-free guidance), and one small model under two prompts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from proxytune import Prompt, PromptError, ProxyTunedForCausalLM, ProxyTuneError, generate
from proxytune.answers.chat import Conversation
from proxytune.answers.generation import Sampling, answer, encode
from proxytune.lanes.transformers import TransformersState
from proxytune.recipe.prompts import render_chat
from proxytune.recipe.store import load_recipe
from support import tiny
from support.commands import fails, run
from support.own_prompts import TEXTS, batch_of

pytestmark = pytest.mark.usefixtures("no_progress")

NEGATIVE = ["the dog sleeps", "apples", "one of the two small ones is a model"]
GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def base():
    return tiny.llama("base", 1)


def guided(base, tokenizer, guidance=1.5, negative="the lazy dog", **kwargs):
    """A recipe of one model in memory, and of the same with a negative prompt."""
    expert = {"name": "guidance", "expert": base, "anti_expert": base, "alpha": guidance - 1}
    expert["anti_expert_prompt"] = Prompt("negative", template=negative)
    return ProxyTunedForCausalLM.from_members(base, experts=[expert], tokenizer=tokenizer, **kwargs)


def by_transformers(base, batch, negative, guidance):
    """The tokens of transformers' own guidance, which reads the negative prompts in a cache of their own."""
    return base.generate(
        **batch,
        guidance_scale=guidance,
        negative_prompt_ids=negative["input_ids"],
        negative_prompt_attention_mask=negative["attention_mask"],
        **GREEDY,
    ).tolist()


# -- negative prompts -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("speculate", [False, "auto"])
@pytest.mark.parametrize("guidance", [1.5, 3.0])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_greedy_tokens_are_those_of_transformers_guidance(family, tokenizer, guidance, speculate):
    """One row; and a ragged batch with negative prompts of unequal lengths."""
    base = tiny.model(family, "base", 1)
    model = guided(base, tokenizer, guidance, negative=None, speculate=speculate)
    assert [seat.names for seat in model.lanes[0].seats] == [("base", "guidance.expert"), ("guidance.anti_expert",)]
    for texts, negative in (([TEXTS[0]], NEGATIVE[:1]), (TEXTS, NEGATIVE)):
        batch = batch_of(tokenizer, texts)
        found = model.generate(**batch, negative_prompt=negative, **GREEDY).tolist()
        assert found != base.generate(**batch, **GREEDY).tolist()
        ids = [tokenizer(text).input_ids for text in negative]
        assert model.generate(**batch, negative_prompt=ids, **GREEDY).tolist() == found
        if family == "gpt2" and len(texts) > 1:  # transformers gives padded negative prompts the wrong positions
            continue
        assert found == by_transformers(base, batch, batch_of(tokenizer, negative), guidance)


def test_drafts_are_copied_where_all_members_share_the_base(tokenizer):
    model = guided(tiny.gemma3("mini", 1), tokenizer)  # it repeats itself
    batch = batch_of(tokenizer, ["the fox the fox the fox"])
    options = {**GREEDY, "max_new_tokens": 120}
    drafted = model.generate(**batch, **options)
    stats = model.speculation_stats
    assert stats.lookups_accepted > 40
    assert stats.drafted == 0
    assert drafted.tolist() == model.generate(**batch, speculate=False, **options).tolist()
    options |= {"do_sample": True, "seed": 3, "temperature": 0.3}
    drafted = model.generate(**batch, **options)
    assert model.speculation_stats.looked_up > 0
    assert drafted.tolist() == model.generate(**batch, speculate=False, **options).tolist()
    with pytest.raises(ProxyTuneError, match="no member with weights of its own can draft"):
        model.generate(**batch, speculate=3, **GREEDY)


def test_rows_may_have_negative_prompts_of_their_own_or_none(base, tokenizer):
    model = guided(base, tokenizer)
    batch = batch_of(tokenizer)
    mixed = model.generate(**batch, negative_prompt=[None, "apples", tokenizer("a fox").input_ids], **GREEDY)
    own = model.generate(**batch, **GREEDY)
    assert mixed[0].tolist() == own[0].tolist(), "the recipe's"
    for row, text in ((1, "apples"), (2, "a fox")):
        assert mixed[row].tolist() == model.generate(**batch, negative_prompt=text, **GREEDY)[row].tolist()
        assert mixed[row].tolist() != own[row].tolist()
    without = guided(base, tokenizer, negative=None)
    plain = base.generate(**batch, **GREEDY)
    assert without.generate(**batch, **GREEDY).tolist() == plain.tolist(), "no negative prompt, no guidance"
    some = without.generate(**batch, negative_prompt=[None, "apples", None], **GREEDY)
    assert [a == b for a, b in zip(some.tolist(), plain.tolist())] == [True, False, True]
    assert model.generate(**batch, alpha=0.0, **GREEDY).tolist() == plain.tolist()


def test_a_negative_prompt_may_hold_the_prompt(base, tokenizer):
    """Context-aware decoding: the same question without its context."""
    model = guided(base, tokenizer, negative="Answer: {prompt}")
    batch = batch_of(tokenizer)
    negative = batch_of(tokenizer, [f"Answer: {text}" for text in TEXTS])
    assert model.generate(**batch, **GREEDY).tolist() == by_transformers(base, batch, negative, 1.5)


def test_sequences_that_are_returned_together_have_one_negative_prompt(base, tokenizer):
    model = guided(base, tokenizer)
    batch = batch_of(tokenizer)
    options = {**GREEDY, "do_sample": True, "num_return_sequences": 2, "seed": list(range(6))}
    found = model.generate(**batch, negative_prompt=NEGATIVE, **options)
    one = model.generate(**batch_of(tokenizer, TEXTS[1:2]), negative_prompt=NEGATIVE[1], **{**options, "seed": [2, 3]})
    width = one.shape[1] - GREEDY["max_new_tokens"]
    assert [row[-24:] for row in found[2:4].tolist()] == [row[width:] for row in one.tolist()]


@pytest.mark.parametrize(
    ("negative", "message"),
    [
        ("", "the negative prompt is empty; give a text, or leave it out"),
        ([[], [4], [4]], "the negative prompt is empty; give at least one token"),
        (["a"], "negative_prompt has 1 entries for 3 rows"),
        (3.5, "negative_prompt must be a text, its ids, or a list of these"),
        ("{prompt} and {prompt}", r"a negative prompt may contain \{prompt\} once"),
        ("no \ud800", "half of a surrogate pair"),
        ("the fox " * 200, "member 'guidance.anti_expert' can read only 256"),
    ],
)
def test_what_is_not_a_negative_prompt(base, tokenizer, negative, message):
    with pytest.raises(PromptError, match=message):
        guided(base, tokenizer).generate(**batch_of(tokenizer), negative_prompt=negative, **GREEDY)


def test_negative_prompts_need_a_member_that_reads_them(trio, base, tokenizer):
    model = ProxyTunedForCausalLM.from_members(trio.base, trio.expert, trio.anti_expert, tokenizer=tokenizer)
    batch = batch_of(tokenizer)
    with pytest.raises(PromptError, match="the recipe has no member that reads a negative prompt; make one with"):
        model.generate(**batch, negative_prompt="apples", **GREEDY)
    with pytest.raises(ProxyTuneError, match="negative_prompt_ids are for transformers' guidance_scale"):
        model.generate(**batch, negative_prompt_ids=torch.tensor([[4]]), **GREEDY)
    model = guided(base, tokenizer)
    with pytest.raises(PromptError, match="either member_input_ids or negative_prompt"):
        model.generate(**batch, negative_prompt="a", member_input_ids={"guidance.anti_expert": [[4]] * 3}, **GREEDY)


def test_a_conversation_reads_its_negative_prompt_once(base, tokenizer, monkeypatch):
    model = guided(base, tokenizer, negative="apples apples apples")
    one = Conversation(model, tokenizer, (0.5,), sampling=Sampling(), max_new_tokens=10, system="the rules")
    read = []
    plain = TransformersState.read
    monkeypatch.setattr(TransformersState, "read", lambda *args, **kw: read.append(args[1]) or plain(*args, **kw))
    for turn, text in enumerate(("the fox", "and the dog", "why?")):
        read.clear()
        said = one.say(text, lambda piece: None)
        texts = [tokenizer.decode(row) for ids in read for row in ids.tolist()]
        assert any("apples" in each for each in texts) == (turn == 0)
        assert (one.reused > 0) == (turn > 0)
        encoded = one.encode(one.messages[:-1])
        assert tokenizer.decode(encoded.own["guidance.anti_expert"]).count("apples") == 3
        fresh = answer(model, tokenizer, [encoded], [(0.5,)], max_new_tokens=10, sampling=Sampling())[0]
        assert said == fresh
    one.set_negative("the dog")  # another one is read again
    said = one.say("more", lambda piece: None)
    encoded = one.encode(one.messages[:-1])
    assert said == answer(model, tokenizer, [encoded], [(0.5,)], max_new_tokens=10, sampling=Sampling())[0]


# -- the commands ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def recipe(shelf, tmp_path_factory):
    directory = tmp_path_factory.mktemp("guided") / "r"
    run("new", directory, "--base", shelf / "base", "--negative-prompt", "the lazy dog", "--guidance", "2.5")
    return directory


def test_new_makes_a_recipe_with_a_negative_prompt(recipe, shelf):
    expert = json.loads((recipe / "config.json").read_text())["experts"][0]
    assert expert["name"] == "guidance"
    assert expert["alpha"] == 1.5
    assert expert["anti_expert"]["prompt"] == {"kind": "negative", "template": "the lazy dog"}
    assert load_recipe(recipe).expert_list[0].anti_expert.prompt == Prompt("negative", template="the lazy dog")
    found = json.loads(run("check", recipe, "--json").stdout)
    assert found["works"]
    assert len({member["model"] for member in found["members"]}) == 1
    assert "(negative prompt 'the lazy dog')" in run("check", recipe).stdout


def test_plan_says_where_drafts_come_from(recipe):
    assert "drafts are copied from the text where it repeats itself" in run("plan", recipe).stdout


def test_generate_takes_negative_prompts(recipe, shelf, tmp_path):
    def answers(*args, **options):
        out = run("generate", recipe, "the fox", "-n", "12", "--json", *args, **options).stdout
        return json.loads(out)

    own, other = answers(), answers("--negative-prompt", "apples")
    assert "negative_prompt" not in own
    assert other["negative_prompt"] == "apples"
    assert own["tokens"] != other["tokens"]
    model = ProxyTunedForCausalLM.from_pretrained(recipe)
    assert generate(model, "the fox", max_new_tokens=12, negative_prompt="apples") == other["text"]
    lines = [{"prompt": "the fox"}, {"prompt": "the fox", "negative_prompt": "apples", "id": 7}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = ("generate", recipe, "-n", "12", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    run(*job)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in found] == [own["tokens"], other["tokens"]]
    assert found[1]["id"] == 7
    lines[1]["negative_prompt"] = "a dog"
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "is the result of another prompt, negative prompt or alpha" in fails(*job)
    lines[1]["negative_prompt"] = " "
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    broken = run("generate", recipe, "-n", "2", "--input", tmp_path / "in.jsonl", status=2)
    assert "line 2: the negative prompt is empty" in broken.stderr
    assert "no member that reads a negative prompt" in fails(
        "generate", shelf / "recipe", "hi", "--negative-prompt", "x"
    )


@pytest.mark.parametrize("command", ["explain", "limit"])
def test_a_negative_prompt_that_nobody_reads_is_refused_before_loading(command, shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(f"proxytune.cli.{command}.load_model", lambda *_: pytest.fail("the models were loaded"))
    (tmp_path / "gold.jsonl").write_text('{"prompt": "the fox", "completion": " jumps"}\n')
    asked = {"explain": ["hi"], "limit": ["--input", tmp_path / "gold.jsonl"]}[command]
    said = fails(command, shelf / "recipe", *asked, "--negative-prompt", "x")
    assert "no member that reads a negative prompt" in said


def test_in_the_chat_template_the_negative_prompt_is_the_question(recipe, tokenizer):
    model = ProxyTunedForCausalLM.from_pretrained(recipe)
    encoded = encode(model, tokenizer, "the fox", chat=True, system="the rules", negative_prompt="not {prompt}")
    turns = [{"role": "system", "content": "the rules"}, {"role": "user", "content": "not the fox"}]
    assert encoded.own["guidance.anti_expert"] == render_chat(tokenizer, turns, "it")


def test_chat_changes_the_negative_prompt(recipe, tmp_path):
    talk = f"the fox\n/negative apples\n/retry\n/save {tmp_path / 't.json'}\n/negative off\n/negative\n/retry\n"
    made = run("chat", recipe, "-n", "8", input=talk)
    assert "negative prompt: apples\n" in made.stderr
    assert "negative prompt: that of the recipe\n" in made.stderr
    first, second, third = made.stdout.splitlines()
    assert first == third != second
    made = run("chat", recipe, "-n", "8", input=f"/load {tmp_path / 't.json'}\n/negative\n/retry\n")
    assert made.stdout.splitlines() == [second]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--negative-prompt", " "], "the negative prompt is empty"),
        (["--guidance", "nan"], "--guidance must be a finite number"),
        (["--guidance", "2", "--alpha", "1"], "the strength of a negative prompt as --guidance"),
        (["--guidance", "2", "--base-prompt", "chat"], "leave --base-prompt out"),
        (["--small", "SMALL"], "add --expert-system, --expert-prompt or --expert-examples"),
        (["--small", "SMALL", "--expert", "SMALL"], "leave --expert out"),
        (["--expert", "SMALL", "--expert-system", "x", "--system", "y"], "and has no system prompt yet"),
        (["--expert-system", "x"], "no expert is given"),
        (["--anti-expert", "SMALL", "--expert-system", "x"], "need an expert; add --expert or --small"),
        (["--small", "SMALL", "--expert-system", "x", "--expert-prompt", "Say {prompt}"], "leave --expert-prompt out"),
        (["--small", "SMALL", "--expert-examples", "none.jsonl"], "there is no file none.jsonl"),
    ],
)
def test_new_says_what_is_wrong(shelf, tmp_path, args, message):
    args = [str(shelf / "anti") if arg == "SMALL" else arg for arg in args]
    assert message in fails("new", tmp_path / "r", "--base", shelf / "base", *args)
    assert not (tmp_path / "r").exists()


# -- prompted experts -----------------------------------------------------------------------------------------
def prompts_of(recipe):
    return {name: member.prompt for name, member in load_recipe(recipe).members()}


def test_an_expert_with_a_system_prompt_of_its_own(shelf, tmp_path):
    run("new", tmp_path / "r", "--base", shelf / "base", "--small", shelf / "anti", "--expert-system", "the rules")
    prompts = prompts_of(tmp_path / "r")
    assert prompts == {
        "base": Prompt(), "expert.expert": Prompt("chat", system="the rules"), "expert.anti_expert": Prompt("chat"),
    }  # fmt: skip
    shown = run("check", tmp_path / "r").stdout
    assert "(chat prompt, system 'the rules')\n" in shown
    assert "(chat prompt)\n" in shown
    model = ProxyTunedForCausalLM.from_pretrained(tmp_path / "r")
    assert len(model.lanes) == 2
    assert [seat.names for seat in model.lanes[1].seats] == [("expert.expert",), ("expert.anti_expert",)]
    assert model.drafting is not None


def test_an_expert_with_a_prompt_of_its_own(shelf, tmp_path):
    run("new", tmp_path / "r", "--base", shelf / "base", "--small", shelf / "anti", "--expert-prompt", "Say {prompt}:")
    assert prompts_of(tmp_path / "r")["expert.expert"] == Prompt.parse("Say {prompt}:")
    assert prompts_of(tmp_path / "r")["expert.anti_expert"] == Prompt()


@pytest.mark.parametrize("chat", [False, True])
def test_only_the_expert_reads_the_examples(shelf, tmp_path, tokenizer, chat):
    file = tmp_path / "solved.jsonl"
    file.write_text('{"prompt": "a?", "completion": " b"}\n{"prompt": "c?", "completion": " d"}\n')
    more = ["--expert-system", "the rules"] if chat else []
    run("new", tmp_path / "r", "--base", shelf / "base", "--small", shelf / "anti", "--expert-examples", file, *more)
    pairs = (("a?", " b"), ("c?", " d"))
    assert prompts_of(tmp_path / "r")["expert.expert"].examples == pairs
    model = ProxyTunedForCausalLM.from_pretrained(tmp_path / "r")
    encoded = encode(model, tokenizer, "the fox")
    assert encoded.ids == tokenizer("the fox").input_ids
    by_hand = "<s>[system] the rules\n[user] a?\n[assistant]  b\n[user] c?\n[assistant]  d\n[user] the fox\n[assistant]"
    if chat:
        expected = tokenizer(by_hand, add_special_tokens=False).input_ids
    else:
        expected = tokenizer("a? b\n\nc? d\n\nthe fox").input_ids
    assert encoded.own["expert.expert"] == expected
    assert tokenizer.decode(encoded.own.get("expert.anti_expert", encoded.ids)).count("a?") == 0
    file.write_text('{"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}\n')
    run("new", tmp_path / "s", "--base", shelf / "base", "--small", shelf / "anti", "--expert-examples", file, *more)
    assert prompts_of(tmp_path / "s")["expert.expert"].examples == (("a?", "b"),)


def test_both_sides_get_the_texts_that_are_not_the_experts_own(shelf, tmp_path):
    file = tmp_path / "solved.jsonl"
    file.write_text('{"prompt": "a?", "completion": " b"}\n')
    words = ("--base", shelf / "base", "--small", shelf / "anti", "--system", "be brief", "--response-prefix", "A:")
    run("new", tmp_path / "r", *words, "--expert-prompt", "chat", "--expert-examples", file)
    both = Prompt("chat", system="be brief", response_prefix="A:")
    pairs = (("a?", " b"),)
    assert prompts_of(tmp_path / "r") == {
        "base": Prompt(), "expert.expert": replace(both, examples=pairs), "expert.anti_expert": both,
    }  # fmt: skip
    run("new", tmp_path / "s", *words, "--expert-system", "the rules")
    assert prompts_of(tmp_path / "s") == {
        "base": Prompt(), "expert.expert": replace(both, system="the rules"), "expert.anti_expert": both,
    }  # fmt: skip


def test_a_negative_prompt_beside_an_expert(shelf, tmp_path):
    run(
        *("new", tmp_path / "r", "--base", shelf / "base", "--expert", shelf / "expert", "--anti-expert"),
        *(shelf / "anti", "--guidance", "2", "--alpha", "0.5"),
    )
    experts = load_recipe(tmp_path / "r").expert_list
    assert [(expert.name, expert.alpha) for expert in experts] == [("expert", 0.5), ("guidance", 1.0)]
    run("generate", tmp_path / "r", "the fox", "-n", "3", "--negative-prompt", "apples", "--alpha", "guidance=0.3")
