"""Activation steering: against a model with the vector in its biases, its files, and the arm of an evaluation."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from proxytune.errors import ProxyTuneError
from proxytune.evaluation.arms import Arms
from proxytune.evaluation.options import EvaluationOptions
from proxytune.evaluation.run import evaluate
from proxytune.evaluation.vectors import read_vector, with_vector
from proxytune.recipe.store import load_recipe
from steering_vector import mean_difference, write_vector
from support.commands import fails
from support.oracle import Oracle

IDS = torch.tensor([[5, 9, 21, 7, 40], [8, 3, 17, 2, 11]])


@pytest.fixture(scope="module")
def base(shelf):
    return AutoModelForCausalLM.from_pretrained(shelf / "base").eval()


@pytest.fixture(scope="module")
def vector(base):
    torch.manual_seed(3)
    return {layer: 2 * torch.randn(base.config.hidden_size) for layer in range(2)}


def biased(model, vector, strength):
    """The oracle: what is added after a layer is a bias of the layer's last linear module, whose output is added."""
    model = copy.deepcopy(model)
    for layer, direction in vector.items():
        model.model.layers[layer].mlp.down_proj.bias = nn.Parameter(strength * direction)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("strength", [0.0, 1.0, -0.7])
def test_a_vector_is_added_after_its_layers(base, vector, strength):
    before = logits(base)
    steered = with_vector(base, vector, strength)
    torch.testing.assert_close(logits(steered), logits(biased(base, vector, strength)), atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(steered), before) == (strength == 0)
    assert torch.equal(logits(base), before), "the base stays as it is"
    assert {each.data_ptr() for each in steered.parameters()} == {each.data_ptr() for each in base.parameters()}


def test_layers_that_give_more_than_hidden_states(base, vector):
    steered = with_vector(base, {0: vector[0]}, 1.0)
    (hook,) = steered.model.layers[0]._forward_hooks.values()
    hidden, more = hook(None, None, (torch.zeros(1, 2, base.config.hidden_size), "more"))
    assert torch.equal(hidden[0], vector[0].expand(2, -1))
    assert more == "more"


def test_the_difference_is_of_the_answers_alone(base, tokenizer):
    """By hooks on the layers, for two pairs whose answers have different lengths."""
    pairs = [("the fox", " jumps over the dog", " apples"), ("how many", " and", " the lazy dog")]
    found = mean_difference(base, tokenizer, pairs)
    assert list(found) == list(range(base.config.num_hidden_layers - 1))
    for layer, direction in found.items():
        seen = []
        hook = base.model.layers[layer].register_forward_hook(lambda *given, seen=seen: seen.append(given[-1][0]))
        means = []
        for prompt, *answers in pairs:
            begun = tokenizer(prompt).input_ids
            for answer in answers:
                with torch.no_grad():
                    base(torch.tensor([begun + tokenizer(answer, add_special_tokens=False).input_ids]))
                means.append(seen[-1][len(begun) :].mean(dim=0))
        hook.remove()
        torch.testing.assert_close(direction, (means[0] - means[1] + means[2] - means[3]) / 2, atol=1e-5, rtol=1e-5)


def test_files(vector, tmp_path):
    write_vector(tmp_path / "v.gguf", vector, "llama")
    found = read_vector(tmp_path / "v.gguf")
    assert found.keys() == vector.keys()
    assert all(torch.equal(found[layer], vector[layer]) for layer in vector)
    (tmp_path / "text").write_text("no vector")
    with pytest.raises(ProxyTuneError, match="text cannot be read as GGUF: "):
        read_vector(tmp_path / "text")
    write_vector(tmp_path / "none.gguf", {}, "llama")
    with pytest.raises(ProxyTuneError, match=r"none\.gguf holds no steering vector: its tensors must be named"):
        read_vector(tmp_path / "none.gguf")


def test_vectors_that_do_not_fit(base, vector):
    with pytest.raises(ProxyTuneError, match="the steering vector is for layer 9, but the base has 3 layers"):
        with_vector(base, {0: vector[0], 9: vector[1]}, 1.0)
    with pytest.raises(ProxyTuneError, match="the steering vector has 3 numbers, but the base's hidden states have"):
        with_vector(base, {0: vector[0][:3]}, 1.0)


# -- the arm --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def file(vector, tmp_path_factory):
    path = tmp_path_factory.mktemp("vector") / "v.gguf"
    write_vector(path, vector, "llama")
    return path


def test_the_arm_writes_what_the_changed_base_writes(shelf, base, vector, file, tokenizer, tmp_path):
    settings = EvaluationOptions(
        ("demo_facts",), arms=("base",), limit=2, steering_vector=str(file), vector_strength=0.5
    )
    evaluate(load_recipe(shelf / "recipe"), settings, tmp_path)
    texts = {}
    for arm, model in (("steering_vector", biased(base, vector, 0.5)), ("base", base)):
        lines = [json.loads(line) for line in (tmp_path / "demo_facts" / f"{arm}.jsonl").read_text().splitlines()]
        assert len(lines) == 2
        for line in lines:
            read = tokenizer(line["prompt"]).input_ids
            written = tokenizer.decode(Oracle(model).greedy(read, 12)[0], skip_special_tokens=True)
            assert line["model_output"] == written.split("\n")[0]
        texts[arm] = [line["model_output"] for line in lines]
    assert texts["base"] != texts["steering_vector"]
    with pytest.raises(ProxyTuneError, match=r"was started with steering vector .* \* 0.5\", now .* \* 1\"; use that"):
        evaluate(load_recipe(shelf / "recipe"), replace(settings, vector_strength=None), tmp_path)


@pytest.mark.parametrize("more", [[], ["proxy_tuned"]])
def test_the_arm_shares_the_base(shelf, base, vector, file, more):
    """Alone or in the whole recipe, nothing but the base is loaded for it, and the arm ``base`` stays as it is."""
    arms = Arms(load_recipe(shelf / "recipe"), [*more, "base", "steering_vector"], vector=(str(file), 1.0))
    made = {name: arms.make(name) for name in ("steering_vector", "base")}
    assert list(arms.alone) == ([] if more else ["base"])
    for name, model in (("steering_vector", biased(base, vector, 1.0)), ("base", base)):
        with torch.no_grad():
            torch.testing.assert_close(made[name].model(IDS).logits, logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--arms", "steering_vector"], "the arm steering_vector needs a vector: --steering-vector FILE"),
        (["--vector-strength", "2"], "--vector-strength is the factor of a steering vector: give --steering-vector"),
        (["--steering-vector", "nosuch.gguf"], "there is no file nosuch.gguf (--steering-vector)"),
    ],
)
def test_what_is_refused(shelf, args, message):
    assert message in fails("eval", shelf / "recipe", "--tasks", "demo_facts", *args)
