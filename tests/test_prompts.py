"""Members with prompts of their own: each reads its prompt, and all read the shared continuation."""

from __future__ import annotations

import pytest
import torch

from proxytune import Member, Prompt, PromptError, ProxyTunedForCausalLM, RecipeError
from proxytune.answers.chat import Conversation
from proxytune.answers.generation import Sampling, encode
from proxytune.recipe.prompts import Prompter, left_pad, render
from support import tiny
from support.decoding import QUIET
from support.oracle import Oracle, assert_same_tokens
from support.own_prompts import CHAT, TEMPLATE, TEXTS, batch_of, chat_ids, compose, prompts_of, template_ids


@pytest.fixture(scope="module")
def oracle(trio):
    return Oracle(trio.base, [("e", trio.expert, trio.anti_expert, 1.0)])


@pytest.fixture(scope="module")
def model(oracle, tokenizer):
    return compose(oracle, tokenizer)


# -- rendering ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (Prompt(), lambda text, t: t(text)["input_ids"]),
        (Prompt("chat"), lambda text, t: chat_ids(text, t, system=None, prefix="")),
        (CHAT, chat_ids),
        (
            Prompt("chat", user_prefix="Complete: "),
            lambda text, t: chat_ids(f"Complete: {text}", t, system=None, prefix=""),
        ),
        (TEMPLATE, template_ids),
        (
            Prompt("template", template="<{prompt}>", response_prefix=" Answer:"),
            lambda text, t: t(f"<{text.removesuffix('Answer:').rstrip()}> Answer:")["input_ids"],
        ),
    ],
    ids=["raw", "chat", "chat with system and prefix", "chat with user prefix", "template", "template with prefix"],
)
def test_rendering(text, prompt, expected, tokenizer):
    assert render(prompt, tokenizer, text) == expected(text, tokenizer)


def test_a_chat_begins_with_one_bos(tokenizer):
    assert render(CHAT, tokenizer, "hello").count(tiny.BOS) == 1


def test_text_is_taken_literally(tokenizer):
    text = "a {brace} and %s and {prompt}"
    ids = render(TEMPLATE, tokenizer, text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"Tell me: {text}\nReply:"


def test_a_chat_needs_a_chat_template():
    with pytest.raises(PromptError, match="no chat template; use a `template`"):
        render(Prompt("chat"), tiny.tokenizer(chat_template=None), "hello")


SAID = [
    {"role": "system", "content": "theirs"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three Answer:"},
]


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        (Prompt("chat"), "[system] theirs\n[user] one\n[assistant] two\n[user] three Answer:\n[assistant]"),
        (CHAT, "[system] the rules\n[user] one\n[assistant] two\n[user] three\n[assistant]Answer:"),
        (
            Prompt("chat", user_prefix="Complete: "),
            "[system] theirs\n[user] Complete: one\n[assistant] two\n[user] Complete: three Answer:\n[assistant]",
        ),
        (TEMPLATE, "Tell me: System: theirs\nUser: one\nAssistant: two\nUser: three Answer:\nReply:"),
        (
            Prompt("template", template="<{prompt}>", response_prefix=" Answer:"),
            "<System: theirs\nUser: one\nAssistant: two\nUser: three> Answer:",
        ),
    ],
    ids=["chat", "with system and prefix", "with user prefix", "template", "template with prefix"],
)
def test_a_conversation_is_rendered_as_a_prompt_is(prompt, shown, tokenizer):
    assert tokenizer.decode(render(prompt, tokenizer, SAID)).removeprefix("<s>") == shown
    turn = [{"role": "user", "content": "hello"}]
    assert render(prompt, tokenizer, turn) == render(prompt, tokenizer, "hello")


def test_every_way_in_shows_a_member_the_same(oracle, tokenizer):
    """`generate --chat`, `chat`, and a bare prompt differ in the base's text alone."""
    model = compose(oracle, tokenizer, Prompt("chat", user_prefix="Complete: "), TEMPLATE)
    talk = Conversation(model, tokenizer, [1.0], sampling=Sampling(), max_new_tokens=3)
    turn = [{"role": "user", "content": "the dog"}]
    bare = encode(model, tokenizer, "the dog").own
    assert bare == encode(model, tokenizer, "the dog", chat=True).own == talk.encode(turn).own
    assert tokenizer.decode(bare["e.expert"]) == "<s>[user] Complete: the dog\n[assistant]"
    system = [{"role": "system", "content": "be nice"}, *turn]
    told = encode(model, tokenizer, "the dog", chat=True, system="be nice").own
    assert told == talk.encode(system).own
    assert tokenizer.decode(told["e.expert"]).startswith("<s>[system] be nice\n[user] Complete: ")


REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}x"


def test_a_template_that_refuses_a_conversation_is_one_sentence(oracle, tokenizer):
    strict = tiny.tokenizer(chat_template=REFUSES)
    model = compose(oracle, tokenizer, Prompt("chat"), Prompt(), tokenizers={"e.expert": strict})
    talk = Conversation(model, tokenizer, [1.0], sampling=Sampling(), max_new_tokens=3, system="be nice")
    with pytest.raises(PromptError, match=r"template of member 'e\.expert' refuses .*: no system role here"):
        talk.say("hello", lambda piece: None)
    with pytest.raises(PromptError, match=r"template of the recipe refuses .*: no system role here"):
        encode(model, strict, "hello", chat=True, system="be nice")


def test_a_prompt_needs_a_tokenizer():
    with pytest.raises(PromptError, match="has no tokenizer; add one"):
        render(TEMPLATE, None, "hello")


def test_left_pad():
    ids, mask = left_pad([[1, 2, 3], [4]])
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_ids_are_rendered_by_way_of_their_text(tokenizer):
    prompter = Prompter(tokenizer, {"m": (TEMPLATE, tokenizer)})
    batch = batch_of(tokenizer)
    assert prompter.from_ids(**batch) == {"m": [template_ids(text, tokenizer) for text in TEXTS]}


def test_what_a_negative_prompt_needs(tokenizer):
    """A request's takes the place of the recipe's, so only that one counts."""
    negative = Prompt("negative", template="no {prompt}")
    guided = Prompter(tokenizer, {"m": (negative, tokenizer)})
    assert guided.needs_text()
    assert guided.needs_text("never {prompt}")
    assert not guided.needs_text("never")
    assert not guided.needs_text([5, 6])
    assert not Prompter(tokenizer, {"m": (Prompt("negative"), tokenizer)}).needs_text()
    assert Prompter(tokenizer, {"m": (negative, tokenizer), "n": (TEMPLATE, tokenizer)}).needs_text("never")


def test_ids_that_do_not_survive_their_text_are_refused(tokenizer):
    """``the`` in three tokens where the tokenizer makes fewer."""
    letters = [tiny.BOS, *tokenizer.convert_tokens_to_ids(list("the"))]
    assert tokenizer("the")["input_ids"] != letters
    prompter = Prompter(tokenizer, {"m": (TEMPLATE, tokenizer)})
    with pytest.raises(
        PromptError, match=r"row 0 changes if it is decoded and encoded again.*from token 2.*member_input_ids"
    ):
        prompter.from_ids(torch.tensor([letters]), None)
    without_bos = torch.tensor([tokenizer("dog", add_special_tokens=False)["input_ids"]])
    with pytest.raises(PromptError, match="from token 0 on"):
        prompter.from_ids(without_bos, None)


# -- generate -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_from_input_ids_alone(model, oracle, tokenizer, use_cache):
    """What pipeline, serve and lm_eval do: the members' own prompts are made from the text of the ids."""
    batch = batch_of(tokenizer)
    out = model.generate(**batch, **QUIET, max_new_tokens=12, use_cache=use_cache)
    for text, tokens in zip(TEXTS, out[:, batch["input_ids"].shape[1] :]):
        assert_same_tokens(tokens, oracle.greedy(prompts_of(text, tokenizer), 12))


def test_own_prompts_matter(model, oracle, tokenizer):
    raw = oracle.greedy(tokenizer(TEXTS[0])["input_ids"], 12)[0]
    assert oracle.greedy(prompts_of(TEXTS[0], tokenizer), 12)[0] != raw


@pytest.mark.parametrize("as_tensors", [True, False], ids=["tensors", "lists"])
def test_member_input_ids_are_used_as_given(model, oracle, tokenizer, as_tensors):
    """Prompts that no text would give, ragged, and of other widths than the base's."""
    rows = {"e.expert": [[1, 50, 51, 52, 53, 54, 55], [1, 60], [9]], "e.anti_expert": [[1], [1, 70, 71], [1, 72]]}
    batch, given = batch_of(tokenizer), {"member_input_ids": rows}
    if as_tensors:
        pairs = {name: left_pad(values) for name, values in rows.items()}
        given = {
            "member_input_ids": {name: ids for name, (ids, _) in pairs.items()},
            "member_attention_mask": {name: mask for name, (_, mask) in pairs.items()},
        }
    out = model.generate(**batch, **QUIET, max_new_tokens=10, **given)
    for index, tokens in enumerate(out[:, batch["input_ids"].shape[1] :]):
        own = {"base": tokenizer(TEXTS[index])["input_ids"], **{name: values[index] for name, values in rows.items()}}
        assert_same_tokens(tokens, oracle.greedy(own, 10))


def test_the_base_may_have_a_prompt_of_its_own(oracle, tokenizer, tmp_path, shelf):
    model = ProxyTunedForCausalLM.from_members(
        Member(str(shelf / "base"), prompt=TEMPLATE), str(shelf / "expert"), str(shelf / "anti")
    )
    batch = batch_of(tokenizer)
    out = model.generate(**batch, **QUIET, max_new_tokens=8)
    for text, tokens in zip(TEXTS, out[:, batch["input_ids"].shape[1] :]):
        raw = tokenizer(text)["input_ids"]
        own = {"base": template_ids(text, tokenizer), "e.expert": raw, "e.anti_expert": raw}
        assert_same_tokens(tokens, oracle.greedy(own, 8))


def test_one_model_under_two_prompts(trio, tokenizer):
    """Context-aware decoding: the base with the context against the base without it, in one forward."""
    oracle = Oracle(trio.base, [("e", trio.base, trio.base, 0.5)])
    model = compose(oracle, tokenizer, expert=TEMPLATE, anti_expert=Prompt())
    assert len(model.lanes) == 1
    batch = batch_of(tokenizer)
    out = model.generate(**batch, **QUIET, max_new_tokens=10)
    for text, tokens in zip(TEXTS, out[:, batch["input_ids"].shape[1] :]):
        raw = tokenizer(text)["input_ids"]
        own = {"base": raw, "e.expert": template_ids(text, tokenizer), "e.anti_expert": raw}
        assert_same_tokens(tokens, oracle.greedy(own, 10))


@pytest.mark.parametrize("share", [True, False])
def test_own_prompts_with_a_shared_adapter(shelf, tokenizer, share):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = ProxyTunedForCausalLM.from_members(
        str(shelf / "base"),
        Member(str(shelf / "anti"), adapter=str(shelf / "adapter"), prompt=CHAT),
        str(shelf / "anti"),
        share=share,
    )
    assert len(model.lanes) == (2 if share else 3)
    base, anti, other = (AutoModelForCausalLM.from_pretrained(shelf / name) for name in ("base", "anti", "anti"))
    oracle = Oracle(base, [("expert", PeftModel.from_pretrained(other, shelf / "adapter").eval(), anti, 1.0)])
    batch = batch_of(tokenizer)
    out = model.generate(**batch, **QUIET, max_new_tokens=10)
    for text, tokens in zip(TEXTS, out[:, batch["input_ids"].shape[1] :]):
        own = {"base": tokenizer(text)["input_ids"], "expert.expert": chat_ids(text, tokenizer)}
        assert_same_tokens(tokens, oracle.greedy(own, 10))


def test_beams(model, oracle, tokenizer):
    batch = batch_of(tokenizer)
    out = model.generate(**batch, **QUIET, max_new_tokens=6, num_beams=3, num_return_sequences=3)
    for index, text in enumerate(TEXTS):
        expected = oracle.beams(prompts_of(text, tokenizer), 6, 3)
        ours = out[3 * index : 3 * index + 3, batch["input_ids"].shape[1] :].tolist()
        assert ours == [tokens for _, tokens in expected]


def test_several_draws(model, oracle, tokenizer):
    torch.manual_seed(0)
    batch = batch_of(tokenizer)
    out = model.generate(
        **batch, do_sample=True, top_k=0, eos_token_id=None, max_new_tokens=4, num_return_sequences=2,
        return_dict_in_generate=True, output_logits=True, pad_token_id=tiny.PAD,
    )  # fmt: skip
    logits = torch.stack(out.logits, dim=1)
    for index, sequence in enumerate(out.sequences):
        new = sequence[batch["input_ids"].shape[1] :].tolist()
        expected = oracle.logits(prompts_of(TEXTS[index // 2], tokenizer), new)[:-1]
        torch.testing.assert_close(logits[index], expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("draft", ["assistant", "lookup"])
def test_drafts(model, oracle, tokenizer, draft, text):
    options = (
        {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
        if draft == "lookup"
        else {"assistant_model": oracle.base}
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    out = model.generate(ids, **QUIET, max_new_tokens=20, **options)
    assert_same_tokens(out[0, ids.shape[1] :], oracle.greedy(prompts_of(text, tokenizer), 20))


@pytest.mark.parametrize("draft", [{}, {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}], ids=str)
def test_sliding_windows(tokenizer, draft):
    oracle = Oracle(tiny.gemma3("base", 1), [("e", tiny.mistral("small", 2), tiny.gemma3("mini", 3), 1.0)])
    model = compose(oracle, tokenizer)
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    out = model.generate(ids, **QUIET, max_new_tokens=20, **draft)
    assert_same_tokens(out[0, ids.shape[1] :], oracle.greedy(prompts_of(TEXTS[0], tokenizer), 20))


def test_absolute_positions(trio, tokenizer):
    """GPT-2 adds a vector for each position: shifted positions would show."""
    oracle = Oracle(tiny.gpt2("base", 1), [("e", tiny.gpt2("small", 2), tiny.gpt2("mini", 3), 1.0)])
    model = compose(oracle, tokenizer)
    batch = batch_of(tokenizer)
    out = model.generate(**batch, **QUIET, max_new_tokens=8)
    for text, tokens in zip(TEXTS, out[:, batch["input_ids"].shape[1] :]):
        assert_same_tokens(tokens, oracle.greedy(prompts_of(text, tokenizer), 8))


# -- a bare forward -------------------------------------------------------------------------------------------
@torch.no_grad()
def test_a_forward_with_a_boundary(model, oracle, tokenizer):
    own = prompts_of(TEXTS[0], tokenizer)
    new = [40, 41, 42]
    out = model(
        torch.tensor([[*own["base"], *new]]),
        prompt_length=len(own["base"]),
        member_input_ids={name: torch.tensor([ids]) for name, ids in own.items() if name != "base"},
    )
    assert out.logits.shape[1] == 1 + len(new), "from the last token of the prompt on"
    torch.testing.assert_close(out.logits[0], oracle.logits(own, new), rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_a_forward_is_continued_from_its_cache(model, oracle, tokenizer):
    own, cache = prompts_of(TEXTS[0], tokenizer), model.new_cache()
    model(
        torch.tensor([own["base"]]),
        past_key_values=cache,
        prompt_length=len(own["base"]),
        member_input_ids={name: torch.tensor([ids]) for name, ids in own.items() if name != "base"},
    )
    model(torch.tensor([[40, 41]]), past_key_values=cache)
    out = model(torch.tensor([[42]]), past_key_values=cache)
    torch.testing.assert_close(out.logits[0, -1], oracle.logits(own, [40, 41, 42])[-1], rtol=1e-4, atol=1e-3)
    cache.activate_past_recording()
    cache.crop(-3)
    with pytest.raises(PromptError, match="cropped into the prompt"):
        cache.crop(-1)


@torch.no_grad()
def test_a_hidden_column_of_the_continuation_is_hidden_from_all(model, oracle, tokenizer):
    """As a rejected draft in a batch is: masked, and not counted in the positions."""
    own = prompts_of(TEXTS[0], tokenizer)
    n_prompt, new = len(own["base"]), [40, 99, 42]
    mask = torch.ones(1, n_prompt + 3, dtype=torch.long)
    mask[0, n_prompt + 1] = 0
    out = model(
        torch.tensor([[*own["base"], *new]]),
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        prompt_length=n_prompt,
        member_input_ids={name: torch.tensor([ids]) for name, ids in own.items() if name != "base"},
    )
    torch.testing.assert_close(out.logits[0, -1], oracle.logits(own, [40, 42])[-1], rtol=1e-4, atol=1e-3)


def test_a_bare_forward_is_refused(model, tokenizer):
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    own = {name: torch.tensor([[1, 5]]) for name in ("e.expert", "e.anti_expert")}
    for given in ({}, {"prompt_length": 3}, {"member_input_ids": own}):
        with pytest.raises(PromptError, match="`member_input_ids` and `prompt_length`"):
            model(ids, **given)


def test_a_prompt_for_a_member_without_its_own_is_refused(model, tokenizer):
    given = {name: [[1, 5]] for name in ("e.expert", "e.anti_expert", "base")}
    with pytest.raises(PromptError, match=r"'base' has no prompt of its own.*e\.expert, e\.anti_expert"):
        model.generate(**tokenizer(TEXTS[0], return_tensors="pt"), **QUIET, max_new_tokens=2, member_input_ids=given)


def test_a_prompt_for_each_such_member_is_needed(model, tokenizer):
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    with pytest.raises(PromptError, match=r"has no prompt for member 'e\.anti_expert'"):
        model(ids, prompt_length=ids.shape[1], member_input_ids={"e.expert": torch.tensor([[1, 5]])})
    wrong = {name: torch.ones(2, 3, dtype=torch.long) for name in ("e.expert", "e.anti_expert")}
    with pytest.raises(PromptError, match=r"shape \(2, 3\), not \(1, width\)"):
        model(ids, prompt_length=ids.shape[1], member_input_ids=wrong)


def test_positions_before_the_boundary_are_refused(model, tokenizer):
    own = {name: torch.tensor([[1, 5]]) for name in ("e.expert", "e.anti_expert")}
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    given = {"member_input_ids": own, "prompt_length": ids.shape[1] - 2}
    for length in (0, -1, ids.shape[1] + 1):
        with pytest.raises(PromptError, match="reads the whole prompt"):
            model(ids, member_input_ids=own, prompt_length=length)
    assert model(ids, **given, logits_to_keep=3).logits.shape[1] == 3
    with pytest.raises(PromptError, match="only the last 3 positions"):
        model(ids, **given, logits_to_keep=4)
    with pytest.raises(PromptError, match="`labels` need one prompt"):
        model(ids, **given, labels=ids)


# -- refusals -------------------------------------------------------------------------------------------------
def test_reading_the_prompt_in_chunks_is_refused(model, tokenizer):
    with pytest.raises(PromptError, match="prefill_chunk_size"):
        model.generate(**batch_of(tokenizer, TEXTS[:1]), **QUIET, max_new_tokens=4, prefill_chunk_size=4)


def test_a_cache_of_an_earlier_prompt_is_refused(model, tokenizer):
    first = model.generate(**batch_of(tokenizer, TEXTS[:1]), **QUIET, max_new_tokens=4, return_dict_in_generate=True)
    longer = tokenizer(TEXTS[0] + " seven apples, and the dog sleeps", return_tensors="pt")["input_ids"]
    with pytest.raises(PromptError, match="cannot be continued with a longer prompt"):
        model.generate(longer, **QUIET, max_new_tokens=4, past_key_values=first.past_key_values)


def test_ids_that_do_not_survive_are_refused_in_generate(model, tokenizer):
    letters = torch.tensor([[tiny.BOS, *tokenizer.convert_tokens_to_ids(list("the"))]])
    with pytest.raises(PromptError, match="member_input_ids"):
        model.generate(letters, max_new_tokens=1)


def test_without_a_tokenizer_the_ids_must_be_given(oracle):
    model = compose(oracle, None)
    with pytest.raises(PromptError, match=r"needs? a tokenizer"):
        model.generate(torch.tensor([[1, 5]]), max_new_tokens=1)


def test_own_prompts_are_checked_too(model, oracle, tokenizer):
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    fine = {"e.anti_expert": [[1, 5]]}
    for bad, message in (([[1, 999]], "token id 999"), ([[]], "empty"), ([[1] * 300], "300 tokens.*only 256")):
        with pytest.raises(PromptError, match=f"{message}") as caught:
            model.generate(ids, member_input_ids={"e.expert": bad, **fine}, max_new_tokens=1)
        assert "e.expert" in str(caught.value)


def test_member_input_ids_where_nobody_wants_them_are_refused(trio):
    model = ProxyTunedForCausalLM.from_members(trio.base, trio.expert, trio.anti_expert)
    with pytest.raises(PromptError, match="every member of the recipe reads the raw prompt"):
        model(torch.tensor([[1, 5]]), member_input_ids={"expert.expert": torch.tensor([[1]])})
    with pytest.raises(PromptError, match="every member of the recipe reads the raw prompt"):
        model.generate(torch.tensor([[1, 5]]), member_input_ids={"expert.expert": [[1]]}, max_new_tokens=1)


# -- the prompt as a part of the recipe -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("value", "prompt"),
    [
        (None, Prompt()),
        ("raw", Prompt()),
        ("chat", Prompt("chat")),
        ("Q: {prompt}", Prompt("template", template="Q: {prompt}")),
        ({"kind": "chat", "user_prefix": "U: "}, Prompt("chat", user_prefix="U: ")),
        ({"kind": "chat", "system": "s", "response_prefix": "A:"}, Prompt("chat", system="s", response_prefix="A:")),
    ],
    ids=repr,
)
def test_prompts_are_parsed_and_written(value, prompt):
    assert Prompt.parse(value) == prompt
    assert Prompt.parse(prompt) is prompt
    assert Prompt.parse(prompt.to_json()) == prompt


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("talk", "prompt kind 'talk' is not one of raw, chat, template"),
        ({"kind": "template"}, "a prompt has a `template` if and only if its kind is `template`"),
        ({"kind": "chat", "template": "{prompt}"}, "if and only if"),
        ({"kind": "template", "template": "no slot"}, "'no slot' must contain {prompt} exactly once"),
        ("{prompt} and {prompt}", "exactly once"),
        ({"system": "s"}, "a `system` prompt needs the prompt kind `chat`"),
        ({"response_prefix": "A:"}, "a `response_prefix` needs"),
        ({"user_prefix": "A:"}, "a `user_prefix` needs the prompt kind `chat`"),
        (
            {"kind": "chat", "sistem": "s"},
            "a prompt has an unknown field 'sistem'; did you mean 'system'? known are kind, system",
        ),
    ],
    ids=repr,
)
def test_bad_prompts(value, message):
    with pytest.raises(RecipeError) as caught:
        Prompt.parse(value)
    assert message in str(caught.value)


def test_a_prompt_beside_a_path_is_the_members(shelf):
    one = {"expert": str(shelf / "expert"), "anti_expert": shelf / "anti", "expert_prompt": "chat"}
    model = ProxyTunedForCausalLM.from_members(str(shelf / "base"), experts=[one])
    assert dict(model.config.members())["expert.expert"].prompt == Prompt("chat")
    for wrong, message in (
        ({"expert": Member(one["expert"], prompt=TEMPLATE)}, "expert.expert has two prompts"),
        ({"expert": None}, "a prompt is given for expert.expert, but no model"),
        ({"expert_promt": "chat"}, "has an unknown field 'expert_promt'"),
    ):
        with pytest.raises(RecipeError, match=message):
            ProxyTunedForCausalLM.from_members(str(shelf / "base"), experts=[{**one, **wrong}])


def test_ids_of_another_shape_are_reported(oracle, tokenizer):
    model = compose(oracle, tokenizer, Prompt(), Prompt())
    for ids, message in (
        (torch.tensor([1, 5]), r"input_ids have shape \(2,\), not \(n_batch, n_columns\)"),
        ([[1, 5]], "input_ids must be a tensor"),
        (torch.zeros(1, 0, dtype=torch.long), "the prompt is empty"),
    ):
        with pytest.raises(PromptError, match=message):
            model.generate(ids, max_new_tokens=1)
