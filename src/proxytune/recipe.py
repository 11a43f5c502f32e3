"""Recipes on disk and on the hub: finding one, writing one, bundling its members, and its model card."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import HfApi, ModelCard, ModelCardData
from transformers import GenerationConfig, PreTrainedConfig

from proxytune.adapters import plain_weights, save_adapter
from proxytune.config import Member, ProxyTuneConfig, rebase
from proxytune.errors import MemberError, ProxyTuneError, RecipeError, first_line
from proxytune.generation_config import valid_generation_config
from proxytune.members import Lane, member_source

if TYPE_CHECKING:
    from proxytune.modeling import ProxyTunedForCausalLM

__all__ = ["load_recipe", "model_card", "push_model", "save_model", "write_recipe"]

logger = logging.getLogger(__name__)

HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
    "proxies",
)

# With this one-line module beside config.json, trust_remote_code=True loads a recipe without `import proxytune`.
# That is for one's own recipes: in a stranger's it may say anything.
SHIM_NAME = "proxytune_shim"
SHIM = '''"""For tools that cannot `import proxytune`; where one can, this file is not read."""

from proxytune import ProxyTuneConfig, ProxyTunedForCausalLM

__all__ = ["ProxyTuneConfig", "ProxyTunedForCausalLM"]
'''
AUTO_MAP = {
    "AutoConfig": f"{SHIM_NAME}.ProxyTuneConfig",
    "AutoModelForCausalLM": f"{SHIM_NAME}.ProxyTunedForCausalLM",
}


def load_recipe(recipe: str | Path, **hub: Any) -> ProxyTuneConfig:
    """Read a recipe's ``config.json``: a directory, a hub id, or ``"demo"`` for the embedded one.

    Raises:
        RecipeError: if there is none, or it is not a recipe.
    """
    path = os.path.expanduser(os.fspath(recipe))
    if path == "demo" and not os.path.isdir(path):
        from proxytune.demo import demo_recipe

        path = str(demo_recipe())
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, hub.get("subfolder", ""), "config.json")):
        raise RecipeError(f"{path!r} has no config.json, so it is not a recipe; make one with `proxytune new`")
    if os.path.isfile(path):
        raise RecipeError(f"{path!r} is a file; a recipe is a directory with a config.json")
    if not os.path.isdir(path) and (path.startswith((".", "/")) or path.count("/") != 1):
        raise RecipeError(f"there is no recipe at {path!r}; make one with `proxytune new`")
    try:
        values, _ = PreTrainedConfig.get_config_dict(path, **hub)
        kind = values.get("model_type")
        if kind == ProxyTuneConfig.model_type:  # no code that lies beside it is run, or asked about
            config = ProxyTuneConfig.from_dict(values, name_or_path=path)
    except ProxyTuneError:
        raise
    except Exception as error:  # missing, unreachable, malformed: each raises something of its own
        raise RecipeError(f"the recipe {path!r} cannot be read: {first_line(error)}") from error
    if kind != ProxyTuneConfig.model_type:
        what = f"a {kind} model" if kind else "a directory whose config.json names no model_type"
        raise RecipeError(f"{path!r} is {what}, not a recipe; `proxytune new DIR --base {path}` makes one of it")
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
    """Write a recipe directory: config.json, the shim, the base's tokenizer and generation config.

    Relative member paths are said anew from ``directory``. The weights stay where they are.
    """
    directory = Path(directory)

    written = config.with_members(lambda _, member: _moved(member, config.name_or_path, directory))
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


def _moved(member: Member, old: str | None, new: Path) -> Member:
    """The member with its relative paths, meant from the directory ``old``, said from ``new``."""
    return replace(member, model=rebase(member.model, old, new), adapter=rebase(member.adapter, old, new))


def save_model(
    model: ProxyTunedForCausalLM, directory: Path, *, bundle: bool = False, max_shard_size: int | str = "50GB"
) -> None:
    """Write a composite's recipe, and the weights that lie nowhere else.

    A member that was given in memory, or that is or was trained here, is saved under ``directory/members``; the
    others stay where they are. ``bundle=True`` saves every member there, which makes the directory portable.

    Raises:
        RecipeError: before anything is written, for a member that transformers cannot write.
    """
    places: dict[str, tuple[str, str | None]] = {}  # member name -> (model, adapter)
    saved = [lane for lane in cast(Sequence[Lane], model.lanes) if lane.source is None or lane.changed or bundle]
    for lane in saved:
        quantizer = getattr(lane.model, "hf_quantizer", None)
        if quantizer is not None and not quantizer.is_serializable():
            raise RecipeError(
                f"{lane.seats[0].names[0]} is quantized in a way that cannot be written to files; save without it, or "
                "load it unquantized"
            )
    try:
        for lane in saved:
            names = [name for seat in lane.seats for name in seat.names]
            places |= _save_lane(lane, model, directory / "members", max_shard_size, names)
    except OSError as error:
        raise RecipeError(f"the members cannot be written to {str(directory)!r}: {error.strerror or error}") from error

    def placed(name: str, member: Member) -> Member:
        if name not in places:
            return _moved(member, model.config.name_or_path, directory)
        weights, adapter = places[name]
        return Member(
            model=weights,
            adapter=adapter,
            dtype=member.dtype,
            device_map=member.device_map,
            prompt=member.prompt,
        )

    config = model.config.with_members(placed)
    config.name_or_path = ""  # all paths are said from the new directory: write_recipe moves none
    write_recipe(config, directory, tokenizer=model.tokenizer, generation_config=model.generation_config)


def _save_lane(
    lane: Lane, model: ProxyTunedForCausalLM, members: Path, max_shard_size: int | str, names: list[str]
) -> dict[str, tuple[str, str | None]]:
    """Save one lane's weights and adapters; member name -> (model, adapter), relative to the recipe."""
    own = next(iter(names))
    for name in names:  # named after a member that uses the weights as they are, where there is one
        seat = next(seat for seat in lane.seats if name in seat.names)
        if seat.adapter is None:
            own = name
            break
    target = members / own
    lane.model.generation_config = valid_generation_config(lane.model.generation_config)
    weights = None if lane.adapted is None else plain_weights(lane.adapted)
    lane.model.save_pretrained(target, state_dict=weights, max_shard_size=max_shard_size)
    tokenizer = model.tokenizers.get(own) or model.tokenizer
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    places: dict[str, tuple[str, str | None]] = {}
    for seat in lane.seats:
        adapter = None
        if seat.adapter is not None:
            adapter = f"members/{seat.names[0]}-adapter"
            save_adapter(lane.adapted, seat.adapter, members.parent / adapter)
        places |= {name: (f"members/{own}", adapter) for name in seat.names}
    return places


def push_model(
    model: ProxyTunedForCausalLM,
    repo_id: str,
    *,
    bundle: bool = False,
    commit_message: str = "Upload recipe",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a recipe to the hub with a model card that names its members and their licences.

    Returns:
        The address of the commit.

    Raises:
        RecipeError: if a member lies on this machine only, and is not bundled.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder), bundle=bundle)
        written = load_recipe(folder)
        for name, member in written.members():
            source, _ = member_source(written, name, member)
            if source.is_local and not Path(source.path).is_relative_to(folder):
                raise RecipeError(
                    f"member {name} lies on this machine ({source.path}), where others cannot load it; "
                    "push with bundle=True"
                )
        # The card tells of the members as they were named, not of the copies in the bundle.
        model_card(model.config).save(Path(folder) / "README.md")
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    return str(commit)


# -- the model card -------------------------------------------------------------------------------------------
def model_card(config: ProxyTuneConfig) -> ModelCard:
    """A model card that names the members, their licences, and how they are mixed."""
    licences = {name: _licence(config, member) for name, member in config.members()}
    rows = [f"| {name} | {_shown(member)} | {licences[name]} |" for name, member in config.members()]
    alphas = ", ".join(f"{expert.name} {expert.alpha:g}" for expert in config.expert_list)
    known = set(licences.values())
    data = ModelCardData(
        library_name="transformers",
        tags=["proxytune", "proxy-tuning"],
        pipeline_tag="text-generation",
        license=known.pop() if len(known) == 1 and known != {"unknown"} else "other",
    )
    text = "\n".join(
        [
            "# A proxy-tuned model",
            "",
            "The base is steered at decoding time: `logits = base + alpha * (expert - anti_expert)` "
            "([Liu et al. 2024](https://arxiv.org/abs/2401.08565)). No weight of it is changed. "
            f"Alpha: {alphas}.",
            "",
            "| member | model | licence |",
            "|---|---|---|",
            *rows,
            "",
            "Each member keeps its own licence; using this recipe means keeping all of them.",
            "",
            "```python",
            "import proxytune  # so that the recipe is read as data, and no code of it is run",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("this repository")',
            "```",
        ]
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def _shown(member: Member) -> str:
    where = str(member.model)
    return where + (f" + adapter {member.adapter}" if member.adapter else "")


def _licence(config: ProxyTuneConfig, member: Member) -> str:
    """A member's licence as its own card says, or ``unknown``."""
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
