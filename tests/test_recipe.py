"""Recipes on disk: found, loaded through every door, saved, moved, bundled, described."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    pipeline,
)

from proxytune import (
    AlphaError,
    Member,
    MemberError,
    ProxyTuneConfig,
    ProxyTunedForCausalLM,
    RecipeError,
    VocabularyError,
    load_recipe,
    saving,
    write_recipe,
)
from proxytune.recipe import store as recipes
from proxytune.recipe.members import Loading, load_recipe_tokenizer
from support import tiny
from support.decoding import QUIET
from support.oracle import Oracle, assert_same_tokens

IDS = torch.tensor([[1, 40, 77, 102, 9, 33, 250, 61]])


@pytest.fixture(scope="module")
def logits(shelf):
    """What the shelf's recipe says to IDS, computed by the plain loop."""
    base, expert, anti = (AutoModelForCausalLM.from_pretrained(shelf / name) for name in ("base", "expert", "anti"))
    return Oracle(base, [("expert", expert, anti, 1.0)]).logits(IDS[0].tolist(), [])[-1]


@torch.no_grad()
def says(model, expected, **tolerance):
    torch.testing.assert_close(model(IDS).logits[0, -1].float(), expected, **{"rtol": 1e-4, "atol": 1e-3, **tolerance})


@pytest.fixture
def own_shelf(shelf, tmp_path):
    """A copy of the shelf that a test may move and break."""
    shutil.copytree(shelf, tmp_path / "shelf")
    return tmp_path / "shelf"


# -- every door -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("door", [ProxyTunedForCausalLM, AutoModelForCausalLM])
def test_loading(shelf, logits, door):
    model = door.from_pretrained(shelf / "recipe")
    assert isinstance(model, ProxyTunedForCausalLM)
    assert isinstance(model, PreTrainedModel)
    assert not model.training
    says(model, logits)


def test_the_config_and_the_tokenizer(shelf, tokenizer):
    config = AutoConfig.from_pretrained(shelf / "recipe")
    assert isinstance(config, ProxyTuneConfig)
    loaded = AutoTokenizer.from_pretrained(shelf / "recipe")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template


def test_a_config_that_was_loaded_before(shelf, logits):
    says(AutoModelForCausalLM.from_pretrained(shelf / "recipe", config=load_recipe(shelf / "recipe")), logits)


def test_from_members_takes_paths_models_and_members(shelf, logits):
    expert = AutoModelForCausalLM.from_pretrained(shelf / "expert")
    says(ProxyTunedForCausalLM.from_members(str(shelf / "base"), expert, Member(str(shelf / "anti"))), logits)
    says(ProxyTunedForCausalLM.from_members(shelf / "base", expert, {"model": str(shelf / "anti")}), logits)


def test_the_pipeline(shelf, tokenizer):
    generate = pipeline("text-generation", model=str(shelf / "recipe"))
    [out] = generate("the dog", max_new_tokens=6, do_sample=False, eos_token_id=None, return_full_text=False)
    model = AutoModelForCausalLM.from_pretrained(shelf / "recipe")
    ids = tokenizer("the dog", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, **QUIET, max_new_tokens=6)[0, ids.shape[1] :]
    assert out["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_the_pipeline_in_batches(shelf):
    generate = pipeline("text-generation", model=str(shelf / "recipe"))
    texts = ["the dog", "Question: how many apples are there?", "a"]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert generate(texts, batch_size=3, **options) == [generate(text, **options) for text in texts]


def test_the_pipeline_in_chat(shelf):
    generate = pipeline("text-generation", model=str(shelf / "recipe"))
    messages = [{"role": "user", "content": "the question"}]
    [out] = generate(messages, max_new_tokens=4, do_sample=False)
    assert out["generated_text"][-1]["role"] == "assistant"


@pytest.mark.slow
def test_a_fresh_process_needs_only_trust_remote_code(shelf, logits):
    """No `import proxytune`: the recipe's shim brings it."""
    program = f"""
        import sys, torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        assert "proxytune" not in sys.modules
        model = AutoModelForCausalLM.from_pretrained({str(shelf / "recipe")!r}, trust_remote_code=True, alpha=0.5)
        assert type(model).__name__ == "ProxyTunedForCausalLM" and model.config.alphas == [0.5]
        AutoTokenizer.from_pretrained({str(shelf / "recipe")!r})
        with torch.no_grad():
            print(model(torch.tensor({IDS.tolist()}), alpha=1.0).logits[0, -1].tolist())
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "HF_MODULES_CACHE": str(shelf / "modules")},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = torch.tensor(json.loads(run.stdout.strip().splitlines()[-1]))
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-3)


REMOTE = """
import pathlib
from transformers import LlamaConfig
pathlib.Path({marker!r}).write_text("a member's code ran")
class TheirConfig(LlamaConfig):
    model_type = "theirs"
"""


def test_trust_in_the_recipe_does_not_reach_its_members(own_shelf, tmp_path, monkeypatch):
    """trust_remote_code=True loads our shim; a member that brings code is refused unless it is named."""
    marker = tmp_path / "ran"
    config = json.loads((own_shelf / "anti/config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.TheirConfig"}}
    (own_shelf / "anti/config.json").write_text(json.dumps(config))
    (own_shelf / "anti/theirs.py").write_text(REMOTE.format(marker=str(marker)))
    for options in ({}, {"trust_remote_code": True}):
        with pytest.raises(MemberError, match=r"expert\.anti_expert"):
            AutoModelForCausalLM.from_pretrained(own_shelf / "recipe", **options)
        assert not marker.exists()


# -- options --------------------------------------------------------------------------------------------------
def test_dtype_for_all_and_for_one(shelf, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(shelf / "recipe", dtype=torch.bfloat16)
    assert {lane.model.dtype for lane in model.lanes} == {torch.bfloat16}
    assert model.dtype == torch.bfloat16
    config = load_recipe(shelf / "recipe").with_members(
        lambda name, member: Member(str(shelf / member.model[3:]), dtype="float64" if name == "base" else None)
    )
    write_recipe(config, tmp_path / "recipe")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "recipe", dtype="bfloat16")
    assert [model.member(name).dtype for name, _ in model.config.members()] == [
        torch.float64, torch.bfloat16, torch.bfloat16,
    ]  # fmt: skip
    assert model(IDS).logits.dtype == torch.float32


@pytest.mark.parametrize("door", [ProxyTunedForCausalLM, AutoModelForCausalLM])
def test_attention_is_chosen_for_every_member(shelf, door):
    model = door.from_pretrained(shelf / "recipe", attn_implementation="eager")
    assert {lane.model.config._attn_implementation for lane in model.lanes} == {"eager"}


@pytest.mark.parametrize("door", [ProxyTunedForCausalLM, AutoModelForCausalLM])
def test_an_option_that_nothing_reads_is_refused(shelf, door):
    with pytest.raises((RecipeError, TypeError), match="alhpa"):
        door.from_pretrained(shelf / "recipe", alhpa=0.5)


def test_the_bases_generation_config_and_the_recipes(own_shelf):
    GenerationConfig(max_new_tokens=3, eos_token_id=None).save_pretrained(own_shelf / "base")
    assert AutoModelForCausalLM.from_pretrained(own_shelf / "recipe").generation_config.max_new_tokens == 3
    GenerationConfig(max_new_tokens=5, eos_token_id=None).save_pretrained(own_shelf / "recipe")
    model = AutoModelForCausalLM.from_pretrained(own_shelf / "recipe")
    assert model.generation_config.max_new_tokens == 5
    assert model.generate(IDS).shape[1] == IDS.shape[1] + 5


# -- saving ---------------------------------------------------------------------------------------------------
def test_saving_writes_the_recipe_and_not_the_weights(shelf, tmp_path, logits):
    model = ProxyTunedForCausalLM.from_pretrained(shelf / "recipe")
    model.save_pretrained(tmp_path / "deep" / "saved")
    assert not list((tmp_path / "deep" / "saved").rglob("*.safetensors"))
    assert load_recipe(tmp_path / "deep" / "saved").base_member.model == os.path.relpath(
        shelf / "base", tmp_path / "deep" / "saved"
    )
    says(AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "saved"), logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "deep" / "saved").chat_template == tiny.CHAT_TEMPLATE


def test_saving_in_place_changes_nothing(own_shelf, logits):
    before = json.loads((own_shelf / "recipe/config.json").read_text())
    ProxyTunedForCausalLM.from_pretrained(own_shelf / "recipe").save_pretrained(own_shelf / "recipe")
    after = json.loads((own_shelf / "recipe/config.json").read_text())
    assert (after["base"], after["experts"]) == (before["base"], before["experts"])
    says(AutoModelForCausalLM.from_pretrained(own_shelf / "recipe"), logits)


def test_the_alpha_given_at_load_is_saved(shelf, tmp_path):
    ProxyTunedForCausalLM.from_pretrained(shelf / "recipe", alpha=0.25).save_pretrained(tmp_path)
    assert load_recipe(tmp_path).alphas == [0.25]


def test_an_alpha_by_name_at_load(shelf):
    model = AutoModelForCausalLM.from_pretrained(shelf / "recipe", **{"alpha.expert": 0.25})
    assert model.config.alphas == [0.25]
    with pytest.raises(AlphaError, match="no expert is called 'math'"):
        ProxyTunedForCausalLM.from_pretrained(shelf / "recipe", **{"alpha.math": 0.25})


def test_members_in_memory_are_saved(trio, tokenizer, tmp_path, logits):
    model = ProxyTunedForCausalLM.from_members(trio.base, trio.expert, trio.anti_expert, tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "saved")
    shutil.move(tmp_path / "saved", tmp_path / "moved")
    config = load_recipe(tmp_path / "moved")
    assert all(member.model.startswith("members/") for _, member in config.members())
    says(AutoModelForCausalLM.from_pretrained(tmp_path / "moved"), logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "moved").get_vocab() == tokenizer.get_vocab()


def test_a_trained_member_is_saved_and_the_others_are_not(shelf, tmp_path):
    model = ProxyTunedForCausalLM.from_pretrained(shelf / "recipe")
    expert = model.member("expert.expert").requires_grad_(True)
    with torch.no_grad():
        expert.lm_head.weight.mul_(1.5)
    with torch.no_grad():
        trained = model(IDS).logits[0, -1]
    model.save_pretrained(tmp_path / "saved")
    members = dict(load_recipe(tmp_path / "saved").members())
    assert members["expert.expert"].model == "members/expert.expert"
    assert [path.parent.name for path in tmp_path.rglob("*.safetensors")] == ["expert.expert"]
    says(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), trained)


def bundle(model, tmp_path, shelf):
    """Bundle, move the bundle, take the originals away, load."""
    model.save_pretrained(tmp_path / "bundle", bundle=True)
    shutil.move(tmp_path / "bundle", tmp_path / "elsewhere")
    shutil.rmtree(shelf)
    text = (tmp_path / "elsewhere/config.json").read_text()
    assert str(tmp_path) not in text, "no path of this machine is left"
    return AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere")


def test_a_bundle_is_portable(own_shelf, tmp_path, logits):
    says(bundle(ProxyTunedForCausalLM.from_pretrained(own_shelf / "recipe"), tmp_path, own_shelf), logits)


def test_a_bundle_of_a_bundle_is_portable(own_shelf, tmp_path, logits):
    ProxyTunedForCausalLM.from_pretrained(own_shelf / "recipe").save_pretrained(own_shelf / "first", bundle=True)
    says(bundle(ProxyTunedForCausalLM.from_pretrained(own_shelf / "first"), tmp_path, own_shelf), logits)


def test_a_bundle_that_is_saved_plainly_points_to_its_members(own_shelf, tmp_path, logits):
    ProxyTunedForCausalLM.from_pretrained(own_shelf / "recipe").save_pretrained(own_shelf / "first", bundle=True)
    ProxyTunedForCausalLM.from_pretrained(own_shelf / "first").save_pretrained(tmp_path / "second")
    says(AutoModelForCausalLM.from_pretrained(tmp_path / "second"), logits)


def adapter_recipe(shelf):
    pair = {"expert": {"model": "../anti", "adapter": "../adapter"}, "anti_expert": {"model": "../anti"}}
    tiny.write_recipe(shelf / "lora", {"experts": [pair]})
    return ProxyTunedForCausalLM.from_pretrained(shelf / "lora")


def test_adapters_are_bundled_as_adapters(own_shelf, tmp_path):
    model = adapter_recipe(own_shelf)
    with torch.no_grad():
        expected = model(IDS).logits[0, -1]
    loaded = bundle(model, tmp_path, own_shelf)
    assert len(loaded.lanes) == 2, "weights are still shared"
    says(loaded, expected)
    assert len(list((tmp_path / "elsewhere/members").rglob("adapter_model.safetensors"))) == 1


def test_an_adapter_keeps_its_relative_path_when_the_recipe_moves(own_shelf, tmp_path):
    model = adapter_recipe(own_shelf)
    with torch.no_grad():
        expected = model(IDS).logits[0, -1]
    model.save_pretrained(tmp_path / "saved")
    member = dict(load_recipe(tmp_path / "saved").members())["expert.expert"]
    assert member.adapter == os.path.relpath(own_shelf / "adapter", tmp_path / "saved")
    says(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), expected)


def test_a_trained_adapter_in_memory_is_saved(trio, tmp_path):
    from peft import LoraConfig, get_peft_model

    expert = get_peft_model(tiny.qwen2("small", 3), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    tiny.shake(expert)
    for name, anti in (("shared", expert.get_base_model()), ("alone", trio.anti_expert)):
        model = ProxyTunedForCausalLM.from_members(trio.base, expert, anti)
        with torch.no_grad():
            expected = model(IDS).logits[0, -1]
        model.save_pretrained(tmp_path / name)
        says(AutoModelForCausalLM.from_pretrained(tmp_path / name), expected)
        member = dict(load_recipe(tmp_path / name).members())["expert.expert"]
        assert member.adapter is not None


def test_prompts_and_dtypes_survive_a_bundle(own_shelf, tmp_path):
    values = {
        "base": {"model": "../base", "dtype": "float32"},
        "experts": [{"expert": {"model": "../expert", "prompt": {"kind": "chat", "system": "s"}}, "alpha": 0.5}],
        "plausibility": 0.1,
    }
    tiny.write_recipe(own_shelf / "other", values)
    bundled = bundle(ProxyTunedForCausalLM.from_pretrained(own_shelf / "other"), tmp_path, own_shelf)
    assert bundled.config.base_member.dtype == "float32"
    assert bundled.config.expert_list[0].expert.prompt.system == "s"
    assert (bundled.config.alphas, bundled.config.plausibility) == ([0.5], 0.1)


def test_tied_weights_survive(tmp_path):
    base = tiny.llama("base", 1, tie_word_embeddings=True)
    model = ProxyTunedForCausalLM.from_members(base, tiny.qwen2("small", 2, tie_word_embeddings=True))
    with torch.no_grad():
        expected = model(IDS).logits[0, -1]
    model.save_pretrained(tmp_path)
    says(AutoModelForCausalLM.from_pretrained(tmp_path), expected)


def test_saved_members_are_models_of_their_own(trio, tmp_path):
    """Every engine takes them."""
    ProxyTunedForCausalLM.from_members(trio.base, trio.expert, trio.anti_expert).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "members/expert.expert")
    torch.testing.assert_close(loaded(IDS).logits, trio.expert(IDS).logits)


def test_a_place_that_cannot_be_written(trio, tmp_path):
    (tmp_path / "file").write_text("")
    model = ProxyTunedForCausalLM.from_members(trio.base, trio.expert, trio.anti_expert)
    with pytest.raises(RecipeError, match="cannot be written"):
        model.save_pretrained(tmp_path / "file" / "deep")
    with pytest.raises(RecipeError, match="the recipe cannot be written to"):
        write_recipe(load_or_make(), tmp_path / "file" / "deep")


def load_or_make():
    return ProxyTuneConfig(base="b", experts=[{"expert": "e"}])


# -- the hub --------------------------------------------------------------------------------------------------
def test_the_card_names_members_and_licences(own_shelf):
    (own_shelf / "base/README.md").write_text("---\nlicense: mit\n---\n")
    (own_shelf / "expert/README.md").write_text("---\nlicense: llama2\n---\n")
    card = str(recipes.model_card(load_recipe(own_shelf / "recipe")))
    for row in ("| base | ../base | mit |", "| expert.expert | ../expert | llama2 |", "../anti | unknown |"):
        assert row in card
    assert "license: other" in card
    assert "Alpha: expert 1" in card


ABOUT = {"description": "Knows foxes.", "examples": ["the fox", "and\nthe dog"]}


@pytest.mark.parametrize("bundle", [False, True])
def test_what_a_recipe_is_for_is_saved_with_it(shelf, tmp_path, bundle):
    places = {name: str(shelf / name) for name in ("base", "expert", "anti")}
    pair = {"expert": places["expert"], "anti_expert": places["anti"]}
    recipe = tiny.write_recipe_alone(tmp_path / "recipe", {"base": places["base"], "experts": [pair], **ABOUT})
    ProxyTunedForCausalLM.from_pretrained(recipe, alpha=0.5).save_pretrained(tmp_path / "saved", bundle=bundle)
    saved = load_recipe(tmp_path / "saved")
    assert {"description": saved.description, "examples": saved.examples} == ABOUT


def test_the_card_says_what_the_recipe_is_for(shelf, tmp_path):
    recipe = ProxyTuneConfig(base="b", experts=[{"expert": "e"}], **ABOUT)
    recipe.name_or_path = str(tmp_path)
    card = str(recipes.model_card(recipe))
    head = "# A proxy-tuned model\n\n"
    assert f"{head}Knows foxes.\n\nPrompts to try:\n\n    the fox\n\n    and\n    the dog\n\nThe base is" in card
    assert f"{head}The base is" in str(recipes.model_card(load_recipe(shelf / "recipe")))


def test_one_licence_for_all_is_the_recipes(own_shelf):
    for name in ("base", "expert", "anti"):
        (own_shelf / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert "license: apache-2.0" in str(recipes.model_card(load_recipe(own_shelf / "recipe")))


@pytest.fixture
def hub(own_shelf, tmp_path, monkeypatch):
    """A hub cache that has downloaded two revisions of a bundled recipe with an adapter; the bundles' own logits."""
    expected = {}
    for revision, alpha in (("main", 1.0), ("strong", 2.0)):
        pair = {"expert": {"model": "../anti", "adapter": "../adapter"}, "anti_expert": {"model": "../anti"}}
        tiny.write_recipe(own_shelf / revision, {"experts": [{**pair, "alpha": alpha}]})
        ProxyTunedForCausalLM.from_pretrained(own_shelf / revision).save_pretrained(tmp_path / revision, bundle=True)
        with torch.no_grad():
            expected[revision] = ProxyTunedForCausalLM.from_pretrained(tmp_path / revision)(IDS).logits[0, -1]
        tiny.publish(tmp_path / "hub", "me/steered", tmp_path / revision, revision)
    return expected


@pytest.mark.parametrize("revision", ["main", "strong"])
def test_a_bundle_on_the_hub_finds_its_members_in_its_own_repository(hub, tmp_path, revision):
    """And in its own revision."""
    place = {"cache_dir": tmp_path / "hub"} | ({} if revision == "main" else {"revision": revision})
    model = AutoModelForCausalLM.from_pretrained("me/steered", **place)
    says(model, hub[revision])
    assert len(model.lanes) == 2, "weights are still shared"
    assert set(model.tokenizers) == {"base", "expert.expert", "expert.anti_expert"}
    assert model.recipe_tokenizer is not model.tokenizer  # found where the recipe was, and kept
    assert model.recipe_tokenizer is model.recipe_tokenizer
    assert not torch.allclose(hub["main"], hub["strong"])


@pytest.mark.slow
def test_a_bundle_on_the_hub_from_the_command_line(hub, tmp_path):
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "proxytune"]
    checked, answered = (
        subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)
        for arguments in (["check", "me/steered"], ["generate", "me/steered", "the fox", "--json", "-n", "3"])
    )
    assert checked.returncode == 0, checked.stderr + checked.stdout
    assert answered.returncode == 0, answered.stderr
    assert len(json.loads(answered.stdout)["tokens"]) == 3


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, ProxyTunedForCausalLM.from_pretrained])
@pytest.mark.parametrize("on_the_hub", [True, False])
def test_a_recipe_in_a_subfolder_finds_its_members_from_there(own_shelf, tmp_path, load, on_the_hub):
    """One repository: the recipe in ``recipes/loud``, members beside and above it, nothing of use in its root."""
    pair = {"expert": {"model": "../../expert"}, "anti_expert": {"model": "../../anti"}, "alpha": 2.0}
    tiny.write_recipe_alone(own_shelf / "recipes/loud", {"base": {"model": "../../base"}, "experts": [pair]})
    model = ProxyTunedForCausalLM.from_pretrained(own_shelf / "recipes/loud")
    with torch.no_grad():
        expected = model(IDS).logits[0, -1]
    GenerationConfig(max_length=77).save_pretrained(own_shelf / "recipes/loud")
    place = {"subfolder": "recipes/loud"}
    if on_the_hub:  # under a revision alone: whoever forgets it finds nothing
        tiny.publish(tmp_path / "hub", "me/many", own_shelf, "v1")
        place |= {"cache_dir": tmp_path / "hub", "revision": "v1"}
    found = load("me/many" if on_the_hub else own_shelf, **place)
    says(found, expected)
    assert found.generation_config.max_length == 77
    weaker = load("me/many" if on_the_hub else own_shelf, alpha=0.5, **place)
    assert weaker.config.alphas == [0.5]
    found.save_pretrained(tmp_path / "again", bundle=True)
    says(ProxyTunedForCausalLM.from_pretrained(tmp_path / "again"), expected)


def test_a_bundle_on_the_hub_saved_again_is_portable(hub, tmp_path):
    model = AutoModelForCausalLM.from_pretrained("me/steered", cache_dir=tmp_path / "hub")
    model.save_pretrained(tmp_path / "again", bundle=True)
    shutil.rmtree(tmp_path / "hub")
    says(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), hub["main"])


class Hub:
    """The hub's client, as far as an upload needs it."""

    def __init__(self, **_):
        pass

    def create_repo(self, repo_id, **_):
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, *, repo_id, folder_path, **_):
        shutil.copytree(folder_path, self.place, dirs_exist_ok=True)
        return f"commit of {repo_id}"

    def model_info(self, path, **_):
        raise OSError("offline")


def test_push_to_hub_writes_the_card(shelf, tmp_path, monkeypatch, logits):
    monkeypatch.setattr(Hub, "place", tmp_path / "hub", raising=False)
    monkeypatch.setattr(saving, "HfApi", Hub)
    model = ProxyTunedForCausalLM.from_pretrained(shelf / "recipe")
    assert model.push_to_hub("me/steered", bundle=True) == "commit of me/steered"
    card = (tmp_path / "hub/README.md").read_text()
    assert "| expert.anti_expert |" in card
    assert "tags:\n- proxytune" in card
    says(AutoModelForCausalLM.from_pretrained(tmp_path / "hub"), logits)


def test_members_of_this_machine_are_not_pushed_without_their_weights(shelf, monkeypatch):
    monkeypatch.setattr(saving, "HfApi", Hub)
    with pytest.raises(RecipeError, match=r"member base lies on this machine .*bundle=True"):
        ProxyTunedForCausalLM.from_pretrained(shelf / "recipe").push_to_hub("me/steered")


# -- errors ---------------------------------------------------------------------------------------------------
def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize("door", [load_recipe, ProxyTunedForCausalLM.from_pretrained])
def test_no_recipe_there(tmp_path, shelf, door):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("")
    for path, message in (
        (tmp_path / "gone", "there is no recipe at"),
        ("./gone", "there is no recipe at './gone'; make one with `proxytune new`"),
        (tmp_path / "empty", "has no config.json, so it is not a recipe"),
        (tmp_path / "file.txt", "is a file; a recipe is a directory"),
        (shelf / "base", "is a llama model, not a recipe; `proxytune new DIR --base"),
    ):
        with pytest.raises(RecipeError) as caught:
            door(path)
        assert message in one_sentence(caught)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "proxytune"}', "", '{"model_type": "nonsense"}'])
def test_a_broken_recipe(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path)
    assert one_sentence(caught)


@pytest.mark.parametrize("name", ["base", "expert", "anti"])
def test_a_missing_member_is_named(own_shelf, name):
    shutil.rmtree(own_shelf / name)
    with pytest.raises(RecipeError, match=rf"'\.\./{name}' does not exist beside the recipe") as caught:
        AutoModelForCausalLM.from_pretrained(own_shelf / "recipe")
    one_sentence(caught)


def test_a_member_that_cannot_be_loaded_is_named(own_shelf):
    (own_shelf / "expert/model.safetensors").write_bytes(b"not weights")
    with pytest.raises(MemberError, match=r"expert\.expert \(\.\./expert\) cannot be loaded: ") as caught:
        AutoModelForCausalLM.from_pretrained(own_shelf / "recipe")
    one_sentence(caught)


def test_a_member_of_unknown_kind_is_named(own_shelf):
    (own_shelf / "anti/config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(MemberError, match=r"expert\.anti_expert \(\.\./anti\) cannot be loaded: ") as caught:
        AutoModelForCausalLM.from_pretrained(own_shelf / "recipe")
    one_sentence(caught)


def test_mismatched_tokenizers_are_refused(own_shelf):
    tiny.tokenizer(swap=("a", "b")).save_pretrained(own_shelf / "expert")
    with pytest.raises(VocabularyError, match=r"member 'expert\.expert' does not share the base's vocabulary"):
        AutoModelForCausalLM.from_pretrained(own_shelf / "recipe")


def test_a_recipe_in_a_recipe_is_refused(own_shelf):
    tiny.write_recipe(own_shelf / "outer", {"base": {"model": "../recipe"}})
    with pytest.raises(MemberError, match=r"base \(\.\./recipe\) is itself a recipe"):
        AutoModelForCausalLM.from_pretrained(own_shelf / "outer")


def test_what_is_not_a_model_is_refused(trio):
    with pytest.raises(MemberError, match="base must be a transformers model, a path or a hub id, not int"):
        ProxyTunedForCausalLM.from_members(3, trio.expert)
    with pytest.raises(RecipeError, match="names neither"):
        ProxyTunedForCausalLM.from_members(trio.base)
    with pytest.raises(RecipeError, match="either"):
        ProxyTunedForCausalLM.from_members(trio.base, trio.expert, experts=[{"expert": trio.expert}])


def test_a_config_alone_is_not_a_model(shelf):
    config = load_recipe(shelf / "recipe")
    for make in (ProxyTunedForCausalLM, AutoModelForCausalLM.from_config):
        with pytest.raises(RecipeError, match="no weights of its own; use from_pretrained or from_members"):
            make(config)


def test_a_recipe_made_of_models_in_memory_needs_saving_first(trio, tmp_path):
    model = ProxyTunedForCausalLM.from_members(trio.base, trio.expert)
    write_recipe(model.config, tmp_path)
    with pytest.raises(MemberError, match="base was a model in memory when this recipe was made; save it"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_hub_id_that_cannot_be_reached_is_one_sentence(tmp_path):
    with pytest.raises(RecipeError, match="'nobody/nothing' cannot be read") as caught:
        load_recipe("nobody/nothing")
    one_sentence(caught)
    tiny.write_recipe(tmp_path / "recipe", {"base": {"model": "nobody/nothing"}})
    with pytest.raises(MemberError, match=r"base \(nobody/nothing\) cannot be loaded") as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path / "recipe")
    one_sentence(caught)


def test_a_recipe_directory_says_nothing_of_this_machine(shelf):
    for path in (shelf / "recipe").iterdir():
        assert str(shelf) not in path.read_text("utf-8"), path.name
    assert re.search(r"^from proxytune import", (shelf / "recipe/proxytune_shim.py").read_text(), re.MULTILINE)


def test_nothing_is_logged_on_a_plain_load(shelf, caplog):
    with caplog.at_level(logging.WARNING):
        AutoModelForCausalLM.from_pretrained(shelf / "recipe")
    assert not caplog.records


def test_greedy_through_the_auto_class(shelf):
    base, expert, anti = (AutoModelForCausalLM.from_pretrained(shelf / name) for name in ("base", "expert", "anti"))
    out = AutoModelForCausalLM.from_pretrained(shelf / "recipe").generate(IDS, **QUIET, max_new_tokens=8)
    oracle = Oracle(base, [("e", expert, anti, 1.0)])
    assert_same_tokens(out[0, IDS.shape[1] :], oracle.greedy(IDS[0].tolist(), 8))


def test_a_base_with_idle_sampling_flags_can_be_written(tmp_path):
    """Llama-2's first generation_config.json: a temperature without do_sample, which transformers won't save."""
    idle = GenerationConfig(temperature=0.9, top_p=0.6, max_length=64, eos_token_id=2)
    recipe = ProxyTuneConfig(base="base", experts=[{"expert": "expert"}])
    write_recipe(recipe, tmp_path, generation_config=idle)
    written = GenerationConfig.from_pretrained(tmp_path)
    assert (written.max_length, written.eos_token_id, written.temperature) == (64, 2, None)
    assert idle.temperature == 0.9  # the caller's is left alone

    base = tiny.llama()
    base.generation_config = idle
    ProxyTunedForCausalLM.from_members(base, tiny.llama(), alpha=0.5).save_pretrained(tmp_path / "bundle")
    assert (tmp_path / "bundle" / "members" / "base" / "model.safetensors").is_file()

    sampling = GenerationConfig(do_sample=True, temperature=0.9)
    write_recipe(recipe, tmp_path, generation_config=sampling)
    assert GenerationConfig.from_pretrained(tmp_path).temperature == 0.9


# -- what lies beside a recipe --------------------------------------------------------------------------------
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_recipes_broken_tokenizer_is_reported_and_not_replaced(tmp_path, file):
    """Absent is fine: the base has one too. Broken is not: the recipe's might have said another thing."""
    recipe = tiny.write_recipe(tmp_path / "recipe")
    loading = Loading()
    assert load_recipe_tokenizer(load_recipe(recipe), loading) is not None
    (recipe / file).write_text("{ broken")
    with pytest.raises(MemberError, match=f"the tokenizer of the recipe {re.escape(str(recipe))} .* cannot be loaded"):
        load_recipe_tokenizer(load_recipe(recipe), loading)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (recipe / name).unlink()
    assert load_recipe_tokenizer(load_recipe(recipe), loading) is None
