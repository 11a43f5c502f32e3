"""Generation configs that real models publish, from every way in: honoured, left out with a note, or refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import GenerationConfig
from typer.testing import CliRunner

from proxytune import MemberError, ProxyTunedForCausalLM, ProxyTuneError, load_recipe
from proxytune.answers.generation import Encoded, Sampling, answer
from proxytune.cli import app
from proxytune.evaluation.arms import Arms
from proxytune.recipe.compose import compose, configure
from proxytune.recipe.generation_config import (
    FIELDS,
    IDLE,
    OF_A_CALL,
    OF_A_COMMAND,
    OF_A_FILE,
    OWN_CHOICE,
    adapted,
    plain_generation_config,
    valid_generation_config,
)
from proxytune.recipe.options import ComposeOptions, MemberChoice
from support import tiny

pytestmark = pytest.mark.usefixtures("no_progress")

ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PUBLISHED = {
    "gemma": {"cache_implementation": "hybrid", "do_sample": True, "top_k": 64, "top_p": 0.95},
    "stop strings": {"stop_strings": ["and", "\n\n"]},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "dola": {"dola_layers": "high"},
    "groups of beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "forced words": {"force_words_ids": [[5]], "num_beams": 4},
    "early exit": {"assistant_early_exit": 1},
    "mtp": {"use_mtp": True},
    "healing": {"token_healing": True},
    "quantized cache": {"cache_implementation": "quantized", "cache_config": {"nbits": 4}},
    "offloaded": {"cache_implementation": "offloaded_static", "max_cache_len": 64},
    "guidance": {"guidance_scale": 1.5},
    "outputs": {"output_attentions": True, "output_hidden_states": True, "return_dict_in_generate": True},
    "chunks": {"prefill_chunk_size": 2},
    "time": {"max_time": 100.0},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "suppress_tokens": [5, 6]},
    "unknown": {"chat_format": "chatml", "max_window_size": 6144},
}


@pytest.fixture(scope="module")
def place(shelf, tmp_path_factory):
    """A directory with a base whose generation config may be rewritten, and a recipe without one of its own."""
    root = tmp_path_factory.mktemp("generation")
    shutil.copytree(shelf / "base", root / "base")
    members = {"expert": {"model": str(shelf / "expert")}, "anti_expert": {"model": str(shelf / "anti")}}
    tiny.write_recipe_alone(root / "recipe", {"base": {"model": "../base"}, "experts": [members]})
    return root


def publish(place, values):
    (place / "base" / "generation_config.json").write_text(json.dumps({**ENDS, **values}))


def load(place):
    return ProxyTunedForCausalLM.from_pretrained(place / "recipe")


def run(*args, input=None):
    result = CliRunner().invoke(app, [str(arg) for arg in args], input=input)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


# -- every field is decided -----------------------------------------------------------------------------------
def test_every_field_has_a_place():
    """A field that transformers adds is refused until somebody has tried it."""
    assert set(FIELDS) >= OF_A_CALL >= OF_A_FILE
    assert not OF_A_COMMAND & OWN_CHOICE
    decided = OF_A_CALL | {
        *("assistant_early_exit", "assistant_ensemble_weight", "speculation_type", "use_mtp", "token_healing"),
        *("cache_config", "compile_config", "constraints", "continuous_batching_config", "dola_layers"),
        *("diversity_penalty", "force_words_ids", "low_memory", "max_cache_len", "num_beam_groups", "penalty_alpha"),
    }
    assert set(FIELDS) - decided == set()


@pytest.mark.parametrize("name", sorted(set(FIELDS) - OF_A_CALL))
def test_a_call_that_asks_for_the_rest_is_refused(name, trio):
    model = tiny_model(trio)
    ids = torch.tensor([[1, 5, 6]])
    with pytest.raises(ProxyTuneError, match=f"{name}=.* is not available for several members"):
        model.generate(ids, max_new_tokens=2, **{name: 2})
    asked = GenerationConfig(max_new_tokens=2)
    setattr(asked, name, 2)
    with pytest.raises(ProxyTuneError, match=f"{name}=.* is not available for several members"):
        model.generate(ids, generation_config=asked)


def tiny_model(trio, **kwargs):
    return ProxyTunedForCausalLM.from_members(trio.base, trio.expert, trio.anti_expert, **kwargs)


# -- published files ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("values", PUBLISHED.values(), ids=PUBLISHED)
def test_python_answers_with_it(place, values, tokenizer):
    publish(place, values)
    model = load(place)
    batch = tiny.padded([[1, 40, 41, 42], [1, 50]])
    for more in ({}, {"do_sample": False, "num_beams": 1}):
        made = model.generate(**batch, max_new_tokens=3, **more)
        assert (made if isinstance(made, torch.Tensor) else made.sequences).shape[0] == 2


@pytest.mark.parametrize("values", PUBLISHED.values(), ids=PUBLISHED)
def test_the_commands_answer_with_it(place, values, tokenizer):
    """One row, a batch, sampled and greedy, and an arm that is one model alone."""
    publish(place, values)
    arms = Arms(load_recipe(place / "recipe"), ["base", "proxy_tuned"])
    prompts = [[1, 40, 41, 42], [1, 50]]
    for arm in ("base", "proxy_tuned"):
        one = arms.make(arm)
        alphas = [one.alphas] * 2 if one.alphas else None
        for sampling in (Sampling(), Sampling(temperature=1.0)):
            asked = {"max_new_tokens": 4, "sampling": sampling}
            whole = answer(one.model, tokenizer, [Encoded(ids) for ids in prompts], alphas, **asked)
            for row, ids in enumerate(prompts[:1]):
                own = answer(one.model, tokenizer, [Encoded(ids)], alphas and alphas[:1], rows=[row], **asked)
                assert own[0] == whole[row]


def test_hybrid_is_dynamic_and_needs_no_note(place, caplog):
    publish(place, PUBLISHED["gemma"])
    assert load(place).generation_config.cache_implementation is None
    assert "leaves" not in caplog.text
    assert not caplog.records


def test_what_is_left_out_is_reported_once(place, caplog):
    publish(place, {"penalty_alpha": 0.6, "cache_implementation": "quantized", "repetition_penalty": 1.2})
    model = load(place)
    said = [record.message for record in caplog.records]
    assert said == [
        "the generation config asks for penalty_alpha=0.6, cache_implementation='quantized', which recipes do not "
        "support; it is left out"
    ]
    assert model.generation_config.repetition_penalty == 1.2
    model.generation_config.penalty_alpha = 0.6  # whoever sets it now asks for it
    with pytest.raises(ProxyTuneError, match=r"penalty_alpha=0\.6 is not available"):
        model.generate(torch.tensor([[1, 5]]), max_new_tokens=2)


def test_commands_tell_what_they_leave_out(place, caplog, tokenizer):
    publish(place, {"max_time": 99.5, "watermarking_config": {"bias": 2.0}, "temperature": 0.5, "num_beams": 3})
    plain = plain_generation_config(load(place), 5)
    assert (plain.max_time, plain.watermarking_config, plain.num_beams, plain.do_sample) == (None, None, 1, False)
    assert "asks for max_time=99.5, watermarking_config=" in caplog.text
    notes = [record.message for record in caplog.records if record.name.startswith("proxytune")]
    assert len(notes) == 1
    assert "temperature" not in notes[0], "the choice of tokens is the command's own: its help says so"


def test_stop_strings_end_each_row_of_a_batch(place, tokenizer):
    """The answers are those of the text alone, cut after the first stop string."""
    publish(place, {})
    prompts = [[1, 40, 41, 42], [1, 50], [1, 60, 61]]
    asked = {"max_new_tokens": 24, "sampling": Sampling()}
    encoded, alphas = [Encoded(ids) for ids in prompts], [(1.0,)] * 3
    whole = answer(load(place), tokenizer, encoded, alphas, **asked)
    words = [tokenizer.decode(token) for one in whole for token in one.tokens[3:]]
    stop = next(word for word in words if word.isascii() and word.strip() and not word.startswith("<"))
    publish(place, {"stop_strings": stop})
    model = load(place)
    cut = answer(model, tokenizer, encoded, alphas, **asked)
    for row, (before, after) in enumerate(zip(whole, cut)):
        assert after.tokens == before.tokens[: len(after.tokens)]
        found = stop in tokenizer.decode(before.tokens)
        assert (after.finish == "stop" and stop in after.text) if found else after == before
        alone = answer(model, tokenizer, encoded[row : row + 1], alphas[:1], **asked)
        assert alone == [after]
    assert any(len(after.tokens) < len(before.tokens) for before, after in zip(whole, cut))
    made = model.generate(torch.tensor(prompts[:1]), max_new_tokens=24)  # generate() has the tokenizer too
    assert made[0, 4:].tolist() == cut[0].tokens[: made.shape[1]]


def test_penalties_are_honoured_as_transformers_honours_them(place, tokenizer):
    publish(place, {"repetition_penalty": 1.5, "suppress_tokens": [7], "no_repeat_ngram_size": 2})
    model, ids = load(place), [1, 40, 41, 42]
    made = answer(model, tokenizer, [Encoded(ids)], [(1.0,)], max_new_tokens=12, sampling=Sampling())[0].tokens
    wanted = model.generate(torch.tensor([ids]), max_new_tokens=12, speculate=False)[0, 4:].tolist()
    assert made == wanted
    publish(place, {})
    plain = answer(load(place), tokenizer, [Encoded(ids)], [(1.0,)], max_new_tokens=12, sampling=Sampling())[0].tokens
    assert made != plain


def test_what_is_not_given_of_sampling_is_off_whatever_is_published(place, tokenizer):
    asked = {"max_new_tokens": 12, "sampling": Sampling(temperature=2.0)}
    made = []
    for fields in ({}, {"do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.1, "min_p": 0.9}):
        publish(place, fields)
        made.append(answer(load(place), tokenizer, [Encoded([1, 40, 41])], [(1.0,)], **asked))
    assert made[0] == made[1]
    greedy = answer(load(place), tokenizer, [Encoded([1, 40, 41])], [(1.0,)], max_new_tokens=12, sampling=Sampling())
    assert made[0] != greedy


# -- the command line -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["gemma", "stop strings", "contrastive search"])
@pytest.mark.slow
def test_every_command_answers_with_it(place, name, tmp_path):
    publish(place, PUBLISHED[name])
    data = tmp_path / "gsm8k.jsonl"
    data.write_text(json.dumps({"question": "How many?", "answer": "x\n#### 2"}) + "\n")
    recipe, evaluated = place / "recipe", ["--tasks", "gsm8k", "--data", data]
    made = [
        run("new", tmp_path / "made", "--base", place / "base", "--anti-expert", place / "base"),
        run("check", recipe),
        run("generate", recipe, "Question: how", "and", "-n", "3"),
        run("chat", recipe, "-n", "3", input="hello\n"),
        run("eval", recipe, *evaluated, "--output", tmp_path / "eval", "--arms", "base,proxy_tuned"),
        run("sweep", recipe, *evaluated, "--output", tmp_path / "sweep", "--alpha", "0,1"),
    ]
    assert [(each.exit_code, each.output) for each in made if each.exit_code] == []
    if name == "contrastive search":
        assert "asks for penalty_alpha=0.6, which recipes do not support; it is left out" in made[0].output
        assert "penalty_alpha" not in (tmp_path / "made" / "generation_config.json").read_text()


# -- broken and absent ----------------------------------------------------------------------------------------
BROKEN = {
    "not JSON": "{ broken",
    "a list": "[1]",
    "a cache": '{"cache_implementation": "cardboard"}',
    "an end": '{"eos_token_id": "</s>"}',
    "ours": '{"alpha": 0.5}',
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_of_the_recipe_or_its_base_is_named(place, text):
    publish(place, {})
    for where, name in ((place / "recipe", "the recipe"), (place / "base", "base")):
        (where / "generation_config.json").write_text(text)
        with pytest.raises(MemberError, match=f"(generation_config.json of {name}|{name} .*cannot be loaded)"):
            load(place)
        assert run("check", place / "recipe").exit_code == 2
        result = run("generate", place / "recipe", "hello")
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        (where / "generation_config.json").unlink()
    load(place)


@pytest.mark.parametrize(
    "values",
    [
        {"repetition_penalty": -1.0},
        {"bad_words_ids": "the"},
        {"suppress_tokens": "x"},
        {"sequence_bias": [[[9999], 1.0]]},
        {"stop_strings": [5]},
        {"stop_strings": [""]},
        {"do_sample": True, "temperature": "hot"},
    ],
    ids=str,
)
def test_a_value_that_transformers_cannot_use_is_reported_at_loading(place, values):
    publish(place, values)
    with pytest.raises(MemberError, match=r"the generation config cannot be used: .*; correct the file"):
        load(place)


def composed(place, expert):
    base = MemberChoice(str(place / "base"))
    return configure(ComposeOptions(base=base, expert=MemberChoice(expert), anti_expert=base))


def make(place, out, **options):
    config = composed(place, str(out.parent / "expert"))
    return compose(config, out, **options)


def test_an_experts_generation_config_is_read_or_reported(place, shelf, tmp_path):
    publish(place, {})
    expert = tmp_path / "expert"
    shutil.copytree(shelf / "expert", expert)
    file = expert / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [2, 40]}))
    make(place, tmp_path / "one")
    assert GenerationConfig.from_pretrained(tmp_path / "one").eos_token_id == [2, 40]
    file.unlink()
    assert make(place, tmp_path / "two") == []
    assert GenerationConfig.from_pretrained(tmp_path / "two").eos_token_id == 2
    file.write_text("{ broken")
    with pytest.raises(MemberError, match=r"generation_config\.json of expert\.expert .* cannot be read"):
        make(place, tmp_path / "three")
    assert not (tmp_path / "three").exists()


def test_an_expert_on_an_unreachable_hub_is_noted(place, tmp_path):
    publish(place, {})
    config = composed(place, "org/expert")
    notes = compose(config, tmp_path / "made")
    assert len(notes) == 1
    assert notes[0].startswith("the generation config of expert.expert cannot be reached (")


# -- writing --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.9, "top_p": 0.6},
        {"output_scores": True},
        {"early_stopping": True, "length_penalty": 2.0},
        {"use_cache": False, "cache_implementation": "static"},
        {"pad_token_id": -1},
    ],
    ids=str,
)
def test_what_transformers_will_not_write_is_made_valid(values, tmp_path):
    odd = GenerationConfig(eos_token_id=2)
    for name, value in values.items():
        setattr(odd, name, value)
    valid_generation_config(odd).save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 2
    assert all(getattr(odd, name) == value for name, value in values.items()), "a copy is changed, not the original"


def test_adapted_leaves_the_original():
    odd = GenerationConfig(penalty_alpha=0.6, top_k=4, eos_token_id=2, **dict.fromkeys(IDLE & {"is_assistant"}))
    made, notes = adapted(odd, tiny.VOCAB, "it")
    assert (odd.penalty_alpha, made.penalty_alpha, made.eos_token_id, len(notes)) == (0.6, None, 2, 1)
