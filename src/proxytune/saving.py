"""Saving a loaded composite: its recipe, the weights that are stored nowhere else, and uploads to the hub."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from proxytune.errors import RecipeError
from proxytune.lanes.transformers import TransformersLane
from proxytune.recipe.adapters import plain_weights, save_adapter
from proxytune.recipe.generation_config import valid_generation_config
from proxytune.recipe.members import member_source
from proxytune.recipe.parts import ApiBase, Member
from proxytune.recipe.store import load_recipe, model_card, moved_member, write_recipe

__all__ = ["push_model", "save_model"]


def save_model(model: Any, directory: Path, *, bundle: bool = False, max_shard_size: int | str = "50GB") -> None:
    """Write a composite's recipe, and the weights that are stored nowhere else.

    A member that was given in memory, or that is or was trained here, is saved in ``directory/members``. The others
    stay where they are. ``bundle=True`` saves every member there, so that the directory works on any machine.

    Raises:
        RecipeError: before anything is written, for a member that transformers cannot write.
    """
    places: dict[str, tuple[str, str | None]] = {}  # member name -> (model, adapter)
    lanes: Sequence[TransformersLane] = model.lanes
    here = [lane for lane in lanes if lane.model is not None]
    saved = [lane for lane in here if lane.source is None or lane.changed or bundle]
    for lane in saved:
        quantizer = getattr(lane.model, "hf_quantizer", None)
        if quantizer is not None and not quantizer.is_serializable():
            raise RecipeError(
                f"{lane.seats[0].names[0]} is quantized in a way that cannot be written to files; save without it, or "
                "load it unquantized"
            )
    try:
        for lane in saved:
            places |= _save_lane(lane, model, directory / "members", max_shard_size)
    except OSError as error:
        raise RecipeError(f"the members cannot be written to {str(directory)!r}: {error.strerror or error}") from error

    def placed(name: str, member: Member) -> Member:
        if name not in places:
            return moved_member(member, model.config.name_or_path, directory)
        weights, adapter = places[name]
        return Member(
            model=weights, adapter=adapter, dtype=member.dtype, device_map=member.device_map, prompt=member.prompt
        )

    config = model.config.with_members(placed)
    config.name_or_path = ""  # all paths already start at the new directory, so write_recipe changes none
    write_recipe(config, directory, tokenizer=model.tokenizer, generation_config=model.generation_config)


def _save_lane(
    lane: TransformersLane, model: Any, members: Path, max_shard_size: int | str
) -> dict[str, tuple[str, str | None]]:
    """Save one lane's weights and adapters; member name -> (model, adapter), relative to the recipe."""
    # Named after a member that uses the weights without an adapter, if there is one.
    own = min(lane.seats, key=lambda seat: seat.adapter is not None).names[0]
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
    model: Any,
    repo_id: str,
    *,
    bundle: bool,
    commit_message: str,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    create_pr: bool,
) -> str:
    """Upload a recipe to the hub with a card that names its members and their licences; return the commit's address.

    Raises:
        RecipeError: if a member exists only on this machine and is not bundled.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder), bundle=bundle)
        written = load_recipe(folder)
        for name, member in written.members():
            if isinstance(member, ApiBase):
                source = written.locate(member.tokenizer)
            else:
                source, _ = member_source(written, name, member)
            if source.is_local and not Path(source.path).is_relative_to(folder):
                raise RecipeError(
                    f"member {name} lies on this machine ({source.path}), where others cannot load it; "
                    "push with bundle=True"
                )
        # The card names the original members, not the copies in the bundle.
        model_card(model.config).save(Path(folder) / "README.md")
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision, create_pr=create_pr
        )
    return str(commit)
