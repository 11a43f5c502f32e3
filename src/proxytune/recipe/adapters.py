"""How an adapter may be used: sharing its model's weights, merged into them, with separate weights, or not at all.

This module decides for both engines, from an adapter's own config. The lists name what was compared with PEFT.
Everything else is refused, so a new option of PEFT is refused until it has been checked.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import load_state_dict

from proxytune.errors import MemberError

__all__ = [
    "APART",
    "Terms",
    "active_adapter",
    "can_be_merged",
    "changed_weights",
    "checksums",
    "judge",
    "load_adapter",
    "plain_weights",
    "read_config",
    "refuse",
    "save_adapter",
    "try_adapter",
    "unlike_as_loaded",
]

# -- the lists ------------------------------------------------------------------------------------------------
# Options of a LoRA adapter that set its place and size. With any values of these, it adds s B A x to the outputs of
# linear layers and embeddings, and does nothing else.
PLAIN = frozenset(
    {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "runtime_config", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
        *("lora_dropout", "init_lora_weights"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # read with `init_lora_weights` alone
        *("megatron_core", "qalora_group_size"),  # read with `megatron_config` and `use_qalora` alone
    }
)
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # values that keep the weights

# Options that work in PEFT's own layers, but only on all rows of a batch.
APART = {
    "bias": "it trains biases",
    "modules_to_save": "it sets modules_to_save",
    "trainable_token_indices": "it sets trainable_token_indices",
    "use_dora": "it sets use_dora",
    "lora_bias": "it sets lora_bias",
    "target_parameters": "it sets target_parameters",
    "ensure_weight_tying": "it sets ensure_weight_tying",
    "use_bdlora": "it sets use_bdlora",
    "kasa_config": "it sets kasa_config, which changes the model's weights",
    "velora_config": "it sets velora_config",
}
APART_STARTS = ("pissa", "olora", "mica")  # the same at each loading; PiSSA and OLoRA change the model's weights
CHANGING_STARTS = ("pissa", "olora")  # of these, those that write to the model's weights
MERGED = frozenset({"use_dora", "target_parameters", "init_lora_weights"})  # may be merged nevertheless

# Options that are refused for every type of adapter, and why. LoRA's options that no list names are refused too.
REFUSED = {
    "alora_invocation_tokens": "it acts behind its invocation tokens alone (alora_invocation_tokens)",
    "layer_replication": "it repeats layers of its model (layer_replication)",
    "arrow_config": "it routes between other adapters (arrow_config)",
}

# Other types of adapters that were compared with PEFT. They run in PEFT's own layers, with weights of their own.
OTHER_TYPES = frozenset(
    {
        *("ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA"),
        *("HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA"),
        *("RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA"),
        "WAVEFT",
    }
)

UNTRIED = frozenset({"ADAMSS", "BOFT", "FROD", "SHIRA", "UNILORA"})  # of these, those that need weights to be set up


# -- the rule -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Terms:
    """The rules for using one adapter.

    Attributes:
        refused: why it cannot be used at all, or None.
        apart: why it cannot be applied to a part of a batch, and so needs separate weights, or None.
        merges: whether it may be merged into plain weights that no other module shares.
        options: what it sets beyond a plain LoRA adapter, by the names of PEFT's fields.
    """

    refused: str | None = None
    apart: str | None = None
    merges: bool = False
    options: tuple[str, ...] = ()


def judge(config: Any) -> Terms:
    """The rules for an adapter with this PEFT config."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning:
        return Terms(refused=f"its type is {kind}, which puts tokens of its own before each prompt")
    changed = [field.name for field in dataclasses.fields(config) if _is_set(config, field)]
    for name in changed:
        if name in REFUSED:
            return Terms(refused=REFUSED[name])
    if kind != "LORA":
        reason = f"its type is {kind}"
        return Terms(apart=reason) if kind in OTHER_TYPES else Terms(refused=f"{reason}, which was not verified")
    options = [name for name in changed if name not in PLAIN]
    if unknown := next((name for name in options if name not in APART), None):
        return Terms(refused=f"it sets {unknown}, which was not verified")
    reasons = [APART[name] for name in options]
    start = config.init_lora_weights
    if start not in PLAIN_STARTS:
        if start not in APART_STARTS:
            return Terms(refused=f"it sets init_lora_weights={start!r}, which is not the same at each load")
        options.append("init_lora_weights")
        reasons.append(f"it sets init_lora_weights={start!r}")
    return Terms(None, reasons[0] if reasons else None, MERGED.issuperset(options), tuple(options))


def _is_set(config: Any, field: Any) -> bool:
    """Whether a field differs from its default; None, False and what is empty are all the same."""
    default = field.default if field.default is not dataclasses.MISSING else None
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    value = getattr(config, field.name)
    return value != default and bool(value or default)


# -- reading --------------------------------------------------------------------------------------------------
def read_config(owner: str, directory: str | Path) -> Any:
    """The PEFT config in a directory.

    Raises:
        MemberError: for an adapter that is refused. PEFT ignores fields that it does not know; here they are refused.
    """
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    written = json.loads((Path(directory) / "adapter_config.json").read_text("utf-8"))
    kind = written.get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        refuse(owner, f"its type is {kind}, which PEFT {peft.__version__} does not know")
    known = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
    if unknown := sorted(name for name, value in written.items() if value and name not in known):
        refuse(owner, f"it sets {unknown[0]}, which PEFT {peft.__version__} does not know")
    config = peft.PeftConfig.from_pretrained(str(directory))
    if reason := judge(config).refused:
        refuse(owner, reason)
    return config


def refuse(owner: str, reason: str) -> None:
    """Raise :class:`MemberError` for an adapter that cannot be used."""
    raise MemberError(
        f"the adapter of {owner} cannot be used, because {reason}; name a plain LoRA adapter, or a model that it is "
        "merged into"
    )


# -- loading --------------------------------------------------------------------------------------------------
def load_adapter(model: Any, owner: str, name: str, directory: str) -> Any:
    """Load the adapter in ``directory`` under ``name`` onto a model or a ``PeftModel``; return the ``PeftModel``.

    Raises:
        MemberError: for an adapter that is refused, and if its tensors are not exactly those that its config needs for
            this model.
    """
    import peft
    from peft.utils import load_peft_weights

    config = read_config(owner, directory)
    tensors = load_peft_weights(directory, device="cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # told below, as an error
        with _telling(f"the adapter of {owner} ({directory})"):
            if isinstance(model, peft.PeftModel):
                model.load_adapter(directory, adapter_name=name)
            else:
                model = peft.PeftModel.from_pretrained(model, directory, adapter_name=name, config=config)
    fit_tensors(owner, directory, model, name, tensors)
    return model


def try_adapter(owner: str, directory: str, model: Any) -> tuple[int, bool]:
    """Compare an adapter's file with a model on the meta device, and change this model. No weight is read.

    Returns:
        The number of the adapter's parameters, and whether names and shapes were compared, which some types do not
        allow.

    Raises:
        MemberError: as :func:`load_adapter`.
    """
    from peft import get_peft_model

    config = read_config(owner, directory)
    tensors = _empty_tensors(owner, Path(directory))
    if config.peft_type in UNTRIED:
        return sum(tensor.numel() for tensor in tensors.values()), False
    before = sum(parameter.numel() for parameter in model.parameters())
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about the other path of the model
        adapted = get_peft_model(model, config)
        count = sum(parameter.numel() for parameter in adapted.parameters()) - before
        fit_tensors(owner, directory, adapted, "default", tensors)
    return count, True


def _empty_tensors(owner: str, directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's file without their values, on the meta device."""
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (directory / name).exists():
            return load_state_dict(directory / name, map_location="meta")
    raise MemberError(f"the adapter of {owner} ({directory}) has no weights in its directory")


def fit_tensors(owner: str, directory: str, adapted: Any, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Fill adapter ``name`` of a ``PeftModel`` with a file's tensors. All of them must fit.

    On the meta device this compares only names and shapes.

    Raises:
        MemberError: names the first tensor that is missing, unexpected or of another shape.
    """
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
    from peft.utils import set_peft_model_state_dict

    config = adapted.peft_config[name]
    who = f"the adapter of {owner} ({directory})"
    trained = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    for indices in trained.values() if isinstance(trained, dict) else [trained]:
        n_rows = adapted.get_input_embeddings().weight.shape[0]
        if indices and max(indices) >= n_rows:
            raise MemberError(f"{who} trains token {max(indices)}, but the model has {n_rows} tokens")
    with _telling(who):
        result: Any = set_peft_model_state_dict(adapted, dict(tensors), adapter_name=name)
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "")
    missing = [key for key in result.missing_keys if prefix in key and f".{name}" in key and not _is_reference(key)]
    for keys, what in (
        (result.unexpected_keys, "has a tensor {!r}, which fits no layer of its model"),
        (missing, "lacks the tensor {!r}, which its config asks for"),
    ):
        if keys:
            raise MemberError(
                f"{who} " + what.format(sorted(keys)[0].replace(f".{name}", "")) + f" ({len(keys)} in all)"
            )


@contextmanager
def _telling(who: str) -> Iterator[None]:
    """Turn PEFT's errors about tensors that do not fit into one sentence."""
    try:
        yield
    except KeyError as error:  # PEFT reads some tensors by name
        raise MemberError(f"{who} lacks the tensor {error.args[0]!r}") from error
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        said = next((line for line in lines if line.startswith("size mismatch")), None)
        if said is None:
            raise
        raise MemberError(f"{who} does not fit its model: {said.rstrip('.')}") from error


def _is_reference(key: str) -> bool:
    """Whether a layer's tensor is another name of a tensor that the whole adapter shares. Files have only the shared
    one."""
    layer = not key.startswith(("base_model.unilora_theta_d.", "base_model.tinylora_v."))
    return layer and (".tinylora_v." in key or ".unilora_theta_d." in key or "vblora_vector_bank" in key)


def checksums(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """A checksum for each weight. It takes one pass over memory."""
    sums = {}
    for name, tensor in weights.items():
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size())
        if tensor.device.type != "meta" and whole is not None and not tensor.is_complex():
            sums[name] = int(tensor.detach().contiguous().view(whole).sum(dtype=torch.int64))
    return sums


def changed_weights(adapted: Any, before: Mapping[str, int]) -> str | None:
    """The first of a model's own weights whose checksum differs from ``before``, or None."""
    after = checksums(plain_weights(adapted))
    return next((name for name, total in before.items() if after.get(name) != total), None)


# -- adapters in memory ---------------------------------------------------------------------------------------
def active_adapter(owner: str, model: Any) -> str | None:
    """The active adapter of a model in memory; None if it is not a ``PeftModel``.

    Raises:
        MemberError: for an adapter that is refused, for several active adapters, and for one that transformers loaded.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise MemberError(
            f"{owner} is a model that transformers put an adapter on; name the model and the adapter separately, or "
            "give a PeftModel"
        )
    if not hasattr(model, "get_base_model"):
        return None
    active = model.active_adapter
    if not isinstance(active, str):
        refuse(owner, f"several are active at once ({', '.join(active)})")
    if reason := judge(model.peft_config[active]).refused:
        refuse(owner, reason)
    return active  # type: ignore[no-any-return]


def can_be_merged(adapted: Any) -> bool:
    """Whether the one adapter of a ``PeftModel`` can be merged into its model's weights.

    It cannot if a weight is quantized, or if another module uses the weight too: a head that is tied to the embeddings
    would change with them.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = adapted.get_base_model()
    if getattr(model, "hf_quantizer", None) is not None or not judge(adapted.active_peft_config).merges:
        return False
    users = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return all(users[id(weight)] == 1 for layer in layers for weight in layer.get_base_layer().parameters())


def unlike_as_loaded(adapted: Any) -> str | None:
    """Why the layers of a ``PeftModel`` in memory do not compute with plain weights plus adapters, or None."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
    if any(layer.merged for layer in layers):
        return "it is merged at the moment (unmerge_adapter() undoes it)"
    return "it is disabled at the moment" if any(layer.disable_adapters for layer in layers) else None


# -- saving ---------------------------------------------------------------------------------------------------
def plain_weights(adapted: Any) -> dict[str, Tensor]:
    """The weights under a ``PeftModel``'s adapters, by their names without adapters."""
    from peft.utils.save_and_load import get_base_model_state_dict

    return get_base_model_state_dict(adapted)  # type: ignore[no-any-return]


def save_adapter(adapted: Any, name: str, directory: Path) -> None:
    """Save one adapter of a ``PeftModel`` as a PEFT directory of its own.

    The present weights are saved beside it, so the config of an adapter that changes weights at the start no longer
    says so.
    """
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    tensors = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
    config = copy.deepcopy(adapted.peft_config[name])
    config.inference_mode = True
    if getattr(config, "init_lora_weights", None) in CHANGING_STARTS:
        config.init_lora_weights = True
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()},  # clones: no shared tensor
        directory / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config.save_pretrained(str(directory))
