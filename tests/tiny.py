"""Tiny random models, a real tokenizer, adapters and recipes: everything the tests need, nothing downloaded.

Weights are drawn wide enough that the models disagree clearly: a steered token differs from an unsteered one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB = 384  # 4 specials, 256 bytes and merges
PAD, BOS, EOS, UNK = 0, 1, 2, 3
WINDOW = 8  # of the models that slide
CONTEXT = 256

SPECIALS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CORPUS = [
    "Question: how many apples are there? Answer: there are seven apples.",
    "The quick brown fox jumps over the lazy dog, and the dog sleeps.",
    "Steering a large model with two small ones changes what it says.",
    "[user] the question [system] the rules [assistant] the answer",
]

SIZES = {  # (hidden, layers, heads, MLP)
    "base": (32, 3, 4, 48),
    "small": (16, 2, 2, 24),
    "mini": (24, 1, 2, 32),
}


def llama(size: str = "base", seed: int = 0, **config: Any) -> LlamaForCausalLM:
    return _made(LlamaForCausalLM, LlamaConfig, seed, {**_shape(size), **config})


def qwen2(size: str = "base", seed: int = 0, **config: Any) -> Qwen2ForCausalLM:
    return _made(Qwen2ForCausalLM, Qwen2Config, seed, {**_shape(size), **config})


def mistral(size: str = "base", seed: int = 0, **config: Any) -> MistralForCausalLM:
    """Every layer slides."""
    return _made(MistralForCausalLM, MistralConfig, seed, {**_shape(size), "sliding_window": WINDOW, **config})


def gemma3(size: str = "base", seed: int = 0, **config: Any) -> Gemma3ForCausalLM:
    """Layers slide and see everything in turn."""
    shape = _shape(size)
    kinds = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(shape["num_hidden_layers"])]
    own = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, "layer_types": kinds}
    return _made(Gemma3ForCausalLM, Gemma3TextConfig, seed, {**shape, **own, **config})


def gpt2(size: str = "base", seed: int = 0, **config: Any) -> GPT2LMHeadModel:
    """Absolute positions: wrong position ids show at once."""
    hidden, layers, heads, _ = SIZES[size]
    shape = {"n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": CONTEXT, "vocab_size": VOCAB}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return _made(GPT2LMHeadModel, GPT2Config, seed, {**shape, **quiet, **config})


FAMILIES = {"llama": llama, "qwen2": qwen2, "gemma3": gemma3, "mistral": mistral, "gpt2": gpt2}


def model(family: str, size: str = "base", seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random model in float32 and eval mode; ``config`` overrides its config's fields."""
    return FAMILIES[family](size, seed, **config)


def _shape(size: str) -> dict[str, Any]:
    hidden, layers, heads, mlp = SIZES[size]
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "intermediate_size": mlp,
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
    }


def _made(kind: type[PreTrainedModel], config: type[PreTrainedConfig], seed: int, values: dict[str, Any]) -> Any:
    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    values = {"initializer_range": 0.35, "tie_word_embeddings": False, **ids, **values}
    with torch.random.fork_rng():
        torch.manual_seed(1000 + seed)
        made = kind(config(**values))
        for name, parameter in made.named_parameters():  # biases are drawn too: at zero they would hide mistakes
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    return made.eval().requires_grad_(False)


def compose(oracle: Any, **kwargs: Any) -> Any:
    """The composite of an oracle's very models."""
    from proxytune import ProxyTunedForCausalLM

    experts = [
        {"name": name, "expert": expert, "anti_expert": anti_expert, "alpha": alpha}
        for name, expert, anti_expert, alpha in oracle.experts
    ]
    return ProxyTunedForCausalLM.from_members(oracle.base, experts=experts, plausibility=oracle.plausibility, **kwargs)


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Rows of ids as a left-padded batch."""
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


# -- the tokenizer --------------------------------------------------------------------------------------------
@cache
def _trained(bos: bool) -> str:
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIALS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIALS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
        )
    return tokenizer.to_str()


def tokenizer(
    *, bos: bool = True, chat_template: str | None = CHAT_TEMPLATE, swap: tuple[str, str] | None = None
) -> Any:
    """A byte-level BPE tokenizer that knows every string.

    ``bos``: whether ``<s>`` is put before a text. ``swap``: two tokens that exchange their ids.
    """
    text = _trained(bos)
    if swap is not None:
        parsed = json.loads(text)
        vocab = parsed["model"]["vocab"]
        vocab[swap[0]], vocab[swap[1]] = vocab[swap[1]], vocab[swap[0]]
        text = json.dumps(parsed)
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), padding_side="left", **SPECIALS)
    made.chat_template = chat_template
    return made


# -- directories ----------------------------------------------------------------------------------------------
def write_model(
    directory: Path, family: str = "llama", size: str = "base", seed: int = 0, *, tokenizer_: Any = True, **config: Any
) -> Path:
    """Write a model directory: weights, config and (``tokenizer_``: True, None or one to be used) a tokenizer."""
    model(family, size, seed, **config).save_pretrained(directory)
    if tokenizer_ is not None:
        (tokenizer() if tokenizer_ is True else tokenizer_).save_pretrained(directory)
    return Path(directory)


def write_adapter(directory: Path, model_directory: Path, seed: int = 0, **lora: Any) -> Path:
    """Write a random LoRA adapter for the model in ``model_directory``; B is not zero, so that it does something."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    values = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **lora}
    with torch.random.fork_rng():
        torch.manual_seed(2000 + seed)
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(model_directory), LoraConfig(task_type="CAUSAL_LM", **values)
        )
        shake(adapted)
    adapted.save_pretrained(directory)
    return Path(directory)


def shake(adapted: Any, std: float = 0.3) -> None:
    """Draw every trainable parameter of a PEFT model at random."""
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.normal_(std=std)


def write_recipe(directory: Path, values: dict[str, Any] | None = None, *, tokenizer_: Any = True) -> Path:
    """Write a recipe directory and its members beside it.

    ``values`` are fields of the recipe that replace the defaults: base ``../base`` (Llama), expert ``../expert``
    and anti-expert ``../anti`` (Qwen2), alpha 1. Members that do not exist yet are made; others are left alone.
    """
    directory = Path(directory)
    for name, family, size, seed in (
        ("base", "llama", "base", 1),
        ("expert", "qwen2", "small", 2),
        ("anti", "qwen2", "small", 3),
    ):
        if not (directory.parent / name).exists():
            write_model(directory.parent / name, family, size, seed, tokenizer_=tokenizer_)
    defaults = {
        "base": {"model": "../base"},
        "experts": [{"expert": {"model": "../expert"}, "anti_expert": {"model": "../anti"}, "alpha": 1.0}],
    }
    return write_recipe_alone(directory, {**defaults, **(values or {})}, tokenizer_=tokenizer_)


def write_recipe_alone(directory: Path, values: dict[str, Any], *, tokenizer_: Any = True) -> Path:
    """Write a recipe directory without its members."""
    from proxytune import ProxyTuneConfig, write_recipe

    return write_recipe(
        ProxyTuneConfig(**values), directory, tokenizer=tokenizer() if tokenizer_ is True else tokenizer_
    )


def publish(cache: Path, repo_id: str, folder: Path, revision: str = "main") -> str:
    """Lay ``folder`` into a hub cache as if that revision of a repository had been downloaded; its commit."""
    repository = Path(cache) / f"models--{repo_id.replace('/', '--')}"
    commit = hashlib.sha1(f"{repo_id}@{revision}".encode()).hexdigest()
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    return commit
