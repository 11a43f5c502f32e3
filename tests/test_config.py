"""The recipe as a config: what it accepts, what it refuses and in which words, and its JSON."""

from __future__ import annotations

import json
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from proxytune import (
    AlphaError,
    Expert,
    Member,
    Prompt,
    ProxyTuneConfig,
    ProxyTunedForCausalLM,
    RecipeError,
)
from proxytune.recipe.source import Source, rebase, resolve
from support import tiny

PAIR = {"expert": {"model": "e"}, "anti_expert": {"model": "a"}}


MISPLACED = [
    *[(word, "an entry of `experts`") for word in ("alpha", "name", "expert", "anti_expert")],
    *[(word, "a member: `base`, or") for word in ("model", "adapter", "prompt", "revision", "device_map")],
    *[(word, "the `prompt` of a member") for word in ("system", "response_prefix", "template", "kind")],
    *[(word, "the recipe's generation_config.json") for word in ("temperature", "eos_token_id", "max_new_tokens")],
]


def recipe(**values):
    return ProxyTuneConfig(**{"base": {"model": "b"}, "experts": [PAIR], **values})


def test_the_smallest_recipe():
    config = recipe()
    assert config.base_member == Member("b")
    assert config.expert_list == [Expert("expert", Member("e"), Member("a"), 1.0)]
    assert config.alphas == [1.0]
    assert config.plausibility is None
    assert [name for name, _ in config.members()] == ["base", "expert.expert", "expert.anti_expert"]


def test_strings_stand_for_members():
    config = recipe(base="b", experts=[{"expert": "e"}])
    assert config.base_member == Member("b")
    assert config.expert_list[0].expert == Member("e")


def test_experts_are_named_in_order():
    config = recipe(experts=[PAIR, {"name": "chat", "expert": "c", "alpha": -1}, {"anti_expert": "x"}])
    assert [expert.name for expert in config.expert_list] == ["expert", "chat", "expert3"]
    assert config.alphas == [1.0, -1.0, 1.0]
    assert [name for name, _ in config.members()][-2:] == ["chat.expert", "expert3.anti_expert"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base": None}, "the recipe names no `base`; name the model to steer"),
        ({"base": {}}, "a member must be a string or an object with `model`, not {}"),
        ({"base": 3}, "a member must be a string or an object with `model`, not 3"),
        ({"base": {"model": "b", "dtipe": "float32"}}, "member 'b' has an unknown field 'dtipe'; did you mean 'dtype'"),
        ({"base": {"model": ""}}, "a member's `model` must be a hub id or a path, not ''"),
        ({"base": {"model": 7}}, "a member's `model` must be a hub id or a path, not 7"),
        ({"base": {"model": "b", "dtype": "int8"}}, "dtype 'int8' of member 'b' is not one of auto, float32"),
        ({"base": {"model": "b", "prompt": "shout"}}, "prompt kind 'shout'"),
        ({"experts": None}, "`experts` must be a list of at least one expert"),
        ({"experts": []}, "`experts` must be a list of at least one expert"),
        ({"experts": {"expert": "e"}}, "`experts` must be a list"),
        ({"experts": ["e"]}, "experts[0] must be an object with `expert` and/or `anti_expert`, not 'e'"),
        ({"experts": [{"alpha": 1}]}, "expert 'expert' names neither an `expert` nor an `anti_expert`; give one"),
        ({"experts": [{**PAIR, "alhpa": 1}]}, "experts[0] has an unknown field 'alhpa'; did you mean 'alpha'"),
        ({"experts": [PAIR, {**PAIR, "name": "expert"}]}, "two experts have the same name: expert, expert"),
        ({"experts": [{**PAIR, "name": "a b"}]}, "an expert's name must be a word without spaces"),
        ({"experts": [{**PAIR, "name": ""}]}, "an expert's name must be a word"),
        ({"experts": [{**PAIR, "name": "a.b"}]}, "an expert's name must be a word"),
        ({"plausibility": 0}, "plausibility must lie in (0, 1], not 0"),
        ({"plausibility": 1.5}, "plausibility must lie in (0, 1], not 1.5"),
        ({"plausibility": math.nan}, "plausibility must lie in (0, 1], not nan"),
        ({"plausibility": "0.1"}, "plausibility must lie in (0, 1], not '0.1'"),
        ({"plausability": 0.1}, "unknown field 'plausability'; did you mean 'plausibility'?"),
        *[({word: 1}, f"the recipe has an unknown field {word!r}; it belongs to {place}") for word, place in MISPLACED],
        (
            {"blend": "mean"},
            "the recipe has an unknown field 'blend'; known are base, experts, combine, gate, plausibility,",
        ),
        ({"renamed_tokens": ["a", "b"]}, "`renamed_tokens` must be an object of ids"),
        ({"renamed_tokens": {"5": ["a"]}}, "`renamed_tokens` must list two or more names for an id, not '5': ['a']"),
        ({"renamed_tokens": {"x": ["a", "b"]}}, "`renamed_tokens` must list two or more names for an id, not 'x'"),
        ({"experts": [{**PAIR, "prompt": "chat"}]}, "experts[0] has an unknown field 'prompt'; it belongs to a member"),
        ({"experts": [{**PAIR, "base": "b"}]}, "experts[0] has an unknown field 'base'; it belongs to the recipe's"),
        ({"base": {"model": "b", "alpha": 1}}, "member 'b' has an unknown field 'alpha'; it belongs to an entry of"),
        ({"base": {"model": "b", "system": "s"}}, "member 'b' has an unknown field 'system'; it belongs to the"),
        ({"base": {"model": "b", "prompt": {"kind": "chat", "adapter": "a"}}}, "a prompt has an unknown field"),
        (
            {"base": {"model": "b", "prompt": 5}},
            "a prompt must be raw, chat, template, negative, or an",
        ),
        ({"base": {"model": "b", "prompt": {"kind": "chat", "system": 5}}}, "`system` of a prompt cannot be 5"),
        ({"base": {"model": "b", "prompt": {"kind": "chat", "user_prefix": None}}}, "`user_prefix` of a prompt"),
        ({"base": {"model": "b", "adapter": 5}}, "`adapter` of member 'b' cannot be 5"),
        ({"base": {"model": "b", "quantization_config": "4bit"}}, "`quantization_config` of member 'b' cannot be"),
        ({"plausibility": True}, "plausibility must lie in (0, 1], not True"),
        ({"description": 5}, "`description` must be a text that is not empty, not 5"),
        ({"description": " "}, "`description` must be a text that is not empty, not ' '"),
        ({"description": "a\x1b[2Jb"}, "`description` has a control character: 'a\\x1b[2Jb'; remove it"),
        ({"examples": "a"}, "`examples` must be a list of prompts, not 'a'"),
        ({"examples": ["a", 5]}, "`examples`[1] must be a text that is not empty, not 5"),
        ({"examples": ["\ud800"]}, "`examples`[0] has a control character"),
    ],
    ids=str,
)
def test_bad_recipes(values, message):
    with pytest.raises(RecipeError) as caught:
        recipe(**values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf, "1", None, True, [1.0], 10**400, 1e39], ids=repr)
def test_bad_alphas(alpha):
    with pytest.raises(AlphaError, match="alpha of expert 'expert' must be a finite number, not"):
        recipe(experts=[{**PAIR, "alpha": alpha}])


# -- JSON -----------------------------------------------------------------------------------------------------
words = st.text("abcdefghij-_/", min_size=1, max_size=8)
prompts = st.sampled_from(
    [Prompt(), Prompt("chat", system="s", response_prefix="A:"), Prompt("template", template="Q {prompt}")]
)
members = st.builds(
    Member,
    model=words,
    revision=st.none() | words,
    adapter=st.none() | words,
    dtype=st.sampled_from([None, "bfloat16", "auto"]),
    device_map=st.sampled_from([None, "auto", 0, {"": "cpu"}]),
    quantization_config=st.sampled_from([None, {"load_in_8bit": True}]),
    prompt=prompts,
)
experts = st.lists(
    st.builds(
        lambda name, one, other, alpha, swap: Expert(name, *((other, one) if swap else (one, other)), alpha),
        st.text("abc", min_size=1, max_size=5),
        members,
        st.none() | members,
        st.floats(-10, 10),
        st.booleans(),
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda expert: expert.name,
)


@settings(max_examples=60, deadline=None)
@given(members, experts, st.none() | st.floats(0.01, 1))
def test_json_keeps_everything(base, listed, plausibility):
    config = ProxyTuneConfig(base=base, experts=listed, plausibility=plausibility)
    values = json.loads(config.to_json_string())
    assert values["model_type"] == "proxytune"
    again = ProxyTuneConfig.from_dict(values)
    assert again.base_member == base
    assert again.expert_list == listed
    assert again.plausibility == plausibility


def test_only_what_is_said_is_written():
    assert recipe().base == {"model": "b"}
    assert recipe().experts == [
        {"name": "expert", "expert": {"model": "e"}, "anti_expert": {"model": "a"}, "alpha": 1.0}
    ]


def test_the_config_survives_the_disk(tmp_path):
    text = tiny.gemma3("small", 1).config
    about = {"description": "Knows\nfoxes.", "examples": ["the fox", "a\tb"]}
    recipe(plausibility=0.1, text_config=text, **about).save_pretrained(tmp_path)
    for load in (AutoConfig, ProxyTuneConfig):
        config = load.from_pretrained(tmp_path)
        assert type(config) is ProxyTuneConfig
        assert config.plausibility == 0.1
        assert {"description": config.description, "examples": config.examples} == about
        assert config.get_text_config().model_type == "gemma3_text"
        assert config.vocab_size == tiny.VOCAB
        assert "ProxyTunedForCausalLM" in config.architectures
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == tiny.VOCAB


@pytest.mark.parametrize("word", ["dtype", "torch_dtype"])
def test_a_dtype_at_the_top_is_refused_in_a_file_and_not_in_a_call(tmp_path, word):
    values = json.loads(recipe().to_json_string())
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert AutoConfig.from_pretrained(tmp_path, **{word: "float32"}).alphas == [1.0]
    (tmp_path / "config.json").write_text(json.dumps({**values, word: "float32"}))
    with pytest.raises(RecipeError, match=f"unknown field '{word}'; it belongs to a member"):
        AutoConfig.from_pretrained(tmp_path)


def test_two_dtypes_in_a_call_are_refused(tmp_path):
    recipe().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="takes no argument 'torch_dtype'"):
        ProxyTunedForCausalLM.from_pretrained(tmp_path, dtype="float32", torch_dtype="bfloat16")


def test_what_other_tools_put_on_a_config_is_not_written(tmp_path):
    """Trainers set attributes on any model's config; a recipe that held them could not be read again."""
    config = recipe(_of_a_tool="thing")
    config.use_cache, config.dtype, config.somebody_elses = False, "float32", "thing"
    config.with_alpha(2).save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again._of_a_tool == "thing", "a name with an underscore is nobody's field"
    assert (again.dtype, hasattr(again, "somebody_elses"), again.alphas) == (None, False, [2.0])


def test_a_base_whose_config_is_remote_code_is_kept_as_it_is(tmp_path):
    values = json.loads(recipe().to_json_string())
    values["text_config"] = {"model_type": "from_the_future", "vocab_size": 10, "width": 3}
    config = ProxyTuneConfig.from_dict(values)
    assert config.vocab_size == 10
    assert config.text_config.width == 3


# -- changed copies -------------------------------------------------------------------------------------------
def test_with_alpha_leaves_the_original():
    config = recipe(experts=[PAIR, {"name": "b", "expert": "x", "alpha": 0.5}])
    assert config.with_alpha(2).alphas == [2.0, 2.0]
    assert config.with_alpha([0.1, 0.2]).alphas == [0.1, 0.2]
    assert config.with_alpha({"b": -1}).alphas == [1.0, -1.0]
    assert config.alphas == [1.0, 0.5]
    assert config.with_alpha(2).base == config.base


def test_with_members():
    config = recipe().with_members(lambda name, member: Member(f"{name}:{member.model}"))
    assert [member.model for _, member in config.members()] == ["base:b", "expert.expert:e", "expert.anti_expert:a"]


# -- where a member lies --------------------------------------------------------------------------------------
def test_resolve(tmp_path, monkeypatch):
    for name in ("recipe", "recipe/members/m", "beside", "org/model"):
        (tmp_path / name).mkdir(parents=True)
    at = str(tmp_path / "recipe")
    assert resolve(str(tmp_path / "beside"), at) == Source(str(tmp_path / "beside"))
    assert resolve("../beside", at) == Source(str(tmp_path / "beside"))
    assert resolve("members/m", at) == Source(str(tmp_path / "recipe/members/m"))
    assert resolve("org/name", at, "v1") == Source("org/name", "v1")
    assert resolve("org/name", None, "v1") == Source("org/name", "v1")
    assert resolve("members/m", "org/recipe", None, "abc") == Source("org/recipe", "abc", "members/m")
    assert resolve("../m", "org/recipe/a/b", None, "abc") == Source("org/recipe", "abc", "a/m")
    assert resolve(".", "org/recipe") == Source("org/recipe")
    assert resolve("members/m", "recipe-id", None, "abc") == Source("recipe-id", "abc", "members/m")
    assert resolve("./m", "recipe-id") == Source("recipe-id", None, "m")
    with pytest.raises(RecipeError, match=r"'\.\./m' leads out of the repository org/recipe"):
        resolve("../m", "org/recipe")
    monkeypatch.chdir(tmp_path)
    assert resolve("beside", None) == Source(str(tmp_path / "beside"))
    assert resolve("org/model", at) == Source("org/model"), "beside the recipe, not beside the user"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/beside", at) == Source(str(tmp_path / "beside"))


@pytest.mark.parametrize("path", ["../gone", "./gone", "/gone/model", "a/b/c", "gone.gguf"])
def test_a_path_to_nothing_is_named(tmp_path, path):
    for at in (str(tmp_path), None):
        with pytest.raises(RecipeError, match=f"member '{path}' does not exist"):
            resolve(path, at)


def test_rebase(tmp_path):
    for name in ("old", "new/deep", "model"):
        (tmp_path / name).mkdir(parents=True)
    old, new = str(tmp_path / "old"), tmp_path / "new" / "deep"
    assert rebase("../model", old, new) == os.path.join("..", "..", "model")
    assert rebase("org/name", old, new) == "org/name"
    assert rebase(str(tmp_path / "model"), old, new) == str(tmp_path / "model")
    assert rebase(None, old, new) is None
    assert rebase("../model", None, new) == "../model"
