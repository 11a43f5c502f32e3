"""Recipes on disk and on the hub: finding one, writing one, bundling its members, and its model card."""

from __future__ import annotations

import logging
import os
import re
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from transformers import GenerationConfig, PreTrainedConfig

from proxytune.errors import MemberError, ProxyTuneError, RecipeError, first_line, unknown_arguments
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.generation_config import valid_generation_config
from proxytune.recipe.members import member_source
from proxytune.recipe.parts import ApiBase, Member
from proxytune.recipe.place import check_kind, check_place, named_recipe
from proxytune.recipe.source import rebase

__all__ = ["load_recipe", "model_card", "moved_member", "read_from", "write_recipe"]

logger = logging.getLogger(__name__)
PLACE = ("revision", "subfolder")  # of the recipe, not of its members
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "proxies", *PLACE)
# With this one-line module beside config.json, trust_remote_code=True loads a recipe without `import proxytune`.
# That is for one's own recipes: in a stranger's it may say anything.
SHIM_NAME = "proxytune_shim"
SHIM = '''"""For tools that cannot `import proxytune`; where one can, this file is not read."""

from proxytune import ProxyTuneConfig, ProxyTunedForCausalLM

__all__ = ["ProxyTuneConfig", "ProxyTunedForCausalLM"]
'''
AUTO_MAP = {"AutoConfig": f"{SHIM_NAME}.ProxyTuneConfig", "AutoModelForCausalLM": f"{SHIM_NAME}.ProxyTunedForCausalLM"}


def load_recipe(recipe: str | Path, **hub: Any) -> ProxyTuneConfig:
    """Read a recipe's ``config.json`` from a directory, a hub id, or the name of an embedded recipe (``demo``). It
    loads no weights.

    Other packages can add named recipes: an entry point in the group ``proxytune.recipes``, a function that returns the
    directory.

    Raises:
        RecipeError: if there is no recipe at that place.

    Example:
        >>> import proxytune
        >>> config = proxytune.load_recipe("my-recipe")
        >>> config.alphas
        [1.0]
        >>> config.base_member.model
        '../base'
    """
    if unknown := hub.keys() - {*HUB_ARGUMENTS}:
        raise unknown_arguments(load_recipe, unknown, HUB_ARGUMENTS)
    path = os.path.expanduser(os.fspath(recipe))
    if (named := named_recipe(path)) is not None:
        path = str(named.load()())
    check_place(path, hub.get("subfolder", ""))
    try:
        values, _ = PreTrainedConfig.get_config_dict(path, **hub)
        check_kind(values, path)  # no code that lies beside it is run, or asked about
        config = ProxyTuneConfig.from_dict(values, name_or_path=path)
    except ProxyTuneError:
        raise
    except Exception as error:  # missing, unreachable, malformed: each raises something of its own
        raise RecipeError(f"the recipe {path!r} cannot be read: {first_line(error)}") from error
    return read_from(config, hub.get("subfolder"), hub.get("revision"))


def read_from(config: ProxyTuneConfig, subfolder: str | None, revision: str | None) -> ProxyTuneConfig:
    """The config, told where in its repository it lay, which AutoConfig forgets: its relative paths are meant there."""
    if subfolder and not str(config.name_or_path).endswith(f"/{subfolder}"):
        config.name_or_path = f"{config.name_or_path}/{subfolder}"
    if revision:
        config._commit_hash = revision  # a name that transformers never serialises
    return config


def write_recipe(
    config: ProxyTuneConfig,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    generation_config: GenerationConfig | None = None,
) -> Path:
    """Write a recipe directory: config.json, the base's tokenizer and generation config, and a file for tools that load
    remote code.

    Relative paths of members are rewritten so that they start at ``directory``. The weights stay where they are.

    Raises:
        RecipeError: if it cannot be written.

    Example:
        >>> import proxytune
        >>> weaker = proxytune.load_recipe("my-recipe").with_alpha(0.5)
        >>> print(proxytune.write_recipe(weaker, "weaker-recipe"))
        weaker-recipe
        >>> proxytune.load_recipe("weaker-recipe").alphas
        [0.5]
    """
    directory = Path(directory)
    written = config.with_members(lambda _, member: moved_member(member, config.name_or_path, directory))
    written.auto_map = AUTO_MAP
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        if generation_config is not None:
            valid_generation_config(generation_config).save_pretrained(directory)
        (directory / f"{SHIM_NAME}.py").write_text(SHIM, encoding="utf-8")
        written.save_pretrained(directory)  # last: a directory with a config.json is a whole recipe
    except OSError as error:
        raise RecipeError(f"the recipe cannot be written to {str(directory)!r}: {error.strerror or error}") from error
    return directory


def moved_member(member: Member, old: str | None, new: Path) -> Member:
    """The member with its relative paths, meant from the directory ``old``, said from ``new``."""
    if isinstance(member, ApiBase):
        return replace(member, tokenizer=str(rebase(member.tokenizer, old, new)))
    return replace(member, model=rebase(member.model, old, new), adapter=rebase(member.adapter, old, new))


# -- the model card -------------------------------------------------------------------------------------------
CARD = """---
{data}
---

# A proxy-tuned model

{about}The base is steered at decoding time: `logits = base + alpha * (expert - anti_expert)` \
([Liu et al. 2024](https://arxiv.org/abs/2401.08565)). No weight of it is changed. Alpha: {alphas}.

| member | model | licence |
|---|---|---|
{rows}

Each member keeps its own licence; using this recipe means keeping all of them.

```python
import proxytune  # so that the recipe is read as data, and no code of it is run
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this repository")
```
"""


def model_card(config: ProxyTuneConfig) -> ModelCard:
    """A model card: what the recipe is for, its members, their licences, and how they are mixed."""
    licences = {name: _licence(config, member) for name, member in config.members()}
    rows = []
    for name, member in config.members():
        adapter = f" + adapter {member.adapter}" if member.adapter else ""
        where = f" behind {member.api}" if isinstance(member, ApiBase) else ""
        rows.append(f"| {name} | {member.model}{adapter}{where} | {licences[name]} |")
    alphas = ", ".join(f"{expert.name} {expert.alpha:g}" for expert in config.expert_list)
    known = set(licences.values())
    data = ModelCardData(
        library_name="transformers",
        tags=["proxytune", "proxy-tuning"],
        pipeline_tag="text-generation",
        license=known.pop() if len(known) == 1 and known != {"unknown"} else "other",
    )
    return ModelCard(CARD.format(data=data.to_yaml(), about=_about(config), alphas=alphas, rows="\n".join(rows)))


def _about(config: ProxyTuneConfig) -> str:
    """The recipe's description and example prompts, as Markdown."""
    parts = [config.description] if config.description else []
    if config.examples:
        blocks = (textwrap.indent(example, "    ") for example in config.examples)  # a block shows any text as it is
        parts += ["Prompts to try:", *blocks] if len(config.examples) > 1 else ["A prompt to try:", *blocks]
    return "".join(f"{part}\n\n" for part in parts)


def _licence(config: ProxyTuneConfig, member: Member) -> str:
    """A member's licence as its own card says, or ``unknown``."""
    if isinstance(member, ApiBase):
        return "unknown"
    try:
        source, _ = member_source(config, "member", member)
    except (RecipeError, MemberError):
        return "unknown"
    if source.is_local:
        readme = Path(source.path) / "README.md"
        if readme.is_file() and (found := re.search(r"^license:\s*(\S+)", readme.read_text("utf-8"), re.MULTILINE)):
            return found.group(1)
        return "unknown"
    try:
        card = HfApi().model_info(source.path, revision=source.revision).card_data
    except Exception as error:  # offline, private, gone: the card must still be written
        logger.warning("the licence of %s cannot be looked up (%s)", source.path, error)
        return "unknown"
    return str(getattr(card, "license", None) or "unknown")
