"""What an adapter may do: share its model's weights, be merged into them, run beside them, or nothing at all.

One place decides, for both engines, from an adapter's own config. The lists name what was held against PEFT; what they
do not name is refused, so the next option of PEFT is refused until it has been looked at.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxytune.errors import MemberError

__all__ = ["Terms", "active_adapter", "can_be_merged", "judge", "read_config"]

# -- the lists ------------------------------------------------------------------------------------------------
# Options of a LoRA adapter that say where it lies and how large it is. With any values of these it adds s B A x to the
# outputs of linear layers and embeddings, and does nothing else.
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
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # of `init_lora_weights`: they leave the weights alone

# Options with which PEFT's own layers give the right answer, on all rows of a batch alone.
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
    "monteclora_config": "it sets monteclora_config",
}
APART_STARTS = ("pissa", "olora", "mica")  # the same at each load; PiSSA and OLoRA change the model's weights
MERGED = frozenset({"use_dora", "target_parameters", "init_lora_weights"})  # may be merged all the same

# Options that are refused whatever their adapter's type, and why; those of LoRA that no list names are refused too.
REFUSED = {
    "alora_invocation_tokens": "it acts behind its invocation tokens alone (alora_invocation_tokens)",
    "layer_replication": "it repeats layers of its model (layer_replication)",
    "arrow_config": "it routes between other adapters (arrow_config)",
}

# Other types of adapters that were held against PEFT. They run in PEFT's own layers, with weights of their own.
OTHER_TYPES = frozenset(
    {
        *("ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA"),
        *("HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA"),
        *("RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA"),
        "WAVEFT",
    }
)


# -- the rule -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Terms:
    """On what terms an adapter is used.

    Attributes:
        refused: why it is not used at all, or None.
        apart: why it cannot be applied to a part of a batch, and so needs weights of its own, or None.
        merges: whether it may be merged into plain weights that no other module shares.
        options: what it sets beyond a plain LoRA adapter, by the names of PEFT's fields.
    """

    refused: str | None = None
    apart: str | None = None
    merges: bool = False
    options: tuple[str, ...] = ()


def judge(config: Any) -> Terms:
    """The terms of an adapter with this PEFT config."""
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
        MemberError: for an adapter that is refused. PEFT drops fields that it does not know; here they are a reason.
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
    """Raise :class:`MemberError` for an adapter that is not used."""
    raise MemberError(
        f"the adapter of {owner} cannot be used, because {reason}; name a plain LoRA adapter, or a model that it is "
        "merged into"
    )


# -- adapters in memory ---------------------------------------------------------------------------------------
def active_adapter(owner: str, model: Any) -> str | None:
    """The adapter that a model in memory answers with, or None where it is no ``PeftModel``.

    Raises:
        MemberError: for an adapter that is refused, and for several at once.
    """
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

    Not where a weight is quantized, and not where another module uses it too: a head that is tied to the embeddings
    would change with them.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = adapted.get_base_model()
    if getattr(model, "hf_quantizer", None) is not None or not judge(adapted.active_peft_config).merges:
        return False
    users = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return all(users[id(weight)] == 1 for layer in layers for weight in layer.get_base_layer().parameters())
