"""From texts to texts in one call, and what every call says to an argument that it does not take."""

from __future__ import annotations

import json

import pytest
import torch

import proxytune
from proxytune import AlphaError, MemberError, PromptError, ProxyTunedForCausalLM, ProxyTuneError
from support import tiny
from support.commands import run

pytestmark = pytest.mark.usefixtures("no_progress")

IDS = torch.tensor([[1, 40, 77]])
PROMPTS = ["the fox", "Question: how many", "and the dog"]


@pytest.fixture(scope="module")
def model(shelf):
    return ProxyTunedForCausalLM.from_pretrained(shelf / "recipe")


def by_command(shelf, *args):
    """What ``proxytune generate`` writes."""
    lines = run("generate", shelf / "recipe", *PROMPTS, "--json", "-n", "12", *args).stdout.splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((), {}),
        (("--alpha", "0.3"), {"alpha": 0.3}),
        (("--alpha", "expert=-1", "--chat", "--system", "be"), {"alpha": {"expert": -1}, "chat": True, "system": "be"}),
        (
            ("--temperature", "0.9", "--top-p", "0.9", "--top-k", "50", "--min-p", "0.01", "--seed", "3"),
            {"temperature": 0.9, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 3, "batch_size": 2},
        ),
    ],
    ids=["plain", "alpha", "chat", "sampled"],
)
def test_the_texts_are_the_commands(shelf, model, args, options):
    wanted = by_command(shelf, *args)
    assert proxytune.generate(model, PROMPTS, max_new_tokens=12, **options) == wanted
    assert proxytune.generate(model, PROMPTS[0], max_new_tokens=12, **options) == wanted[0]
    assert len(set(wanted)) == 3


def test_a_recipe_is_loaded_by_its_place(shelf):
    assert proxytune.generate(str(shelf / "recipe"), PROMPTS[0], max_new_tokens=12) == by_command(shelf)[0]


def test_the_models_alpha_is_the_default_and_prompts_can_have_their_own(shelf, model):
    weak = ProxyTunedForCausalLM.from_pretrained(shelf / "recipe", alpha=0.3)
    assert proxytune.generate(weak, PROMPTS[0], max_new_tokens=12) == by_command(shelf, "--alpha", "0.3")[0]
    each = proxytune.generate(model, PROMPTS[:1] * 2, max_new_tokens=12, alpha=[0.3, 1.0])
    assert each == [by_command(shelf, "--alpha", "0.3")[0], by_command(shelf)[0]]


def test_members_in_memory_need_a_tokenizer(trio, tokenizer):
    model = ProxyTunedForCausalLM.from_members(trio.base, trio.expert, trio.anti_expert, tokenizer=tokenizer)
    assert proxytune.generate(model, [], max_new_tokens=3) == []
    assert isinstance(proxytune.generate(model, "the fox", max_new_tokens=3), str)
    bare = ProxyTunedForCausalLM.from_members(trio.base, trio.expert, trio.anti_expert)
    with pytest.raises(ProxyTuneError, match="neither the recipe nor its base has a tokenizer"):
        proxytune.generate(bare, "the fox")


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (PromptError, {"prompts": ["a", " "]}, r"prompts\[1\]: the prompt is empty"),
        (PromptError, {"prompts": ""}, "^the prompt is empty"),
        (PromptError, {"prompts": ["fox " * 300]}, r"prompts\[0\]: the prompt has .* can read only 256"),
        (PromptError, {"prompts": 5}, "prompts must be a text or a list of texts"),
        (PromptError, {"prompts": [5]}, "prompts must be a text or a list of texts"),
        (AlphaError, {"alpha": {"nosuch": 1}}, "no expert is called 'nosuch'"),
        (AlphaError, {"prompts": ["a", "b"], "alpha": [1, 2, 3]}, "3 alphas for 1 expert"),
        (ProxyTuneError, {"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        (ProxyTuneError, {"batch_size": 0}, "batch_size must be at least 1, not 0"),
        (ProxyTuneError, {"system": "x"}, "a system prompt needs chat"),
        (ProxyTuneError, {"temperature": -1}, "temperature must be a finite number"),
        (ProxyTuneError, {"seed": 1}, "seed is for sampling; give temperature"),
        (ProxyTuneError, {"seed": 0, "temperature": 0}, "seed is for sampling; give temperature"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_one_sentence(model, kind, arguments, message):
    with pytest.raises(kind, match=message):
        proxytune.generate(model, **{"prompts": "a", **arguments})


# -- arguments that nobody takes ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, _: model.generate(IDS, alhpa=1), "generate() takes no argument 'alhpa'; did you mean 'alpha'?"),
        (lambda model, _: model.generate(IDS, max_new_token=1), "generate() takes no argument 'max_new_token'; did"),
        (
            lambda model, _: model.generate(IDS, streemer=1),
            "generate() takes no argument 'streemer'; did you mean 'str",
        ),
        (lambda model, _: model.generate(IDS, token_type_ids=IDS), "generate() takes no argument 'token_type_ids'"),
        (lambda model, _: model(IDS, alhpa=1), "forward() takes no argument 'alhpa'; did you mean 'alpha'?"),
        (lambda model, _: model.save_pretrained("x", bundel=True), "save_pretrained() takes no argument 'bundel'; did"),
        (lambda model, _: model.push_to_hub("x", privat=True), "ProxyTunedForCausalLM.push_to_hub() got an unexpected"),
        (
            lambda model, place: type(model).from_pretrained(place, alhpa=1),
            "from_pretrained() takes no argument 'alhpa'; did you mean 'alpha'?",
        ),
        (
            lambda model, place: type(model).from_pretrained(place, revison="x"),
            "from_pretrained() takes no argument 'revison'; did you mean 'revision'?",
        ),
        (
            lambda model, place: type(model).from_members(model.base, model.base, specualte=4),
            "from_members() takes no argument 'specualte'; did you mean 'speculate'?",
        ),
        (lambda _, place: proxytune.load_recipe(place, revison="x"), "load_recipe() takes no argument 'revison'; did"),
    ],
)
def test_a_misspelt_argument_is_named_with_the_method(shelf, model, call, message):
    with pytest.raises(TypeError) as caught:
        call(model, shelf / "recipe")
    assert str(caught.value).startswith(message)


def test_a_member_that_is_not_there(model):
    for ask in (model.member, model.context_of):
        with pytest.raises(MemberError, match=r"no member 'bas'; there are base, expert\.expert, expert\.anti_expert"):
            ask("bas")
    assert model.context_of("base") == tiny.CONTEXT
