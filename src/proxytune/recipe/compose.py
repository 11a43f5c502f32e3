"""From the options of ``proxytune new`` to a recipe on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from proxytune.errors import AlphaError, MemberError, RecipeError, first_line
from proxytune.recipe.alpha import alpha_of_text, resolve_alpha
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.generation_config import adapted, ends_of, read_generation_config
from proxytune.recipe.members import Loading, adapter_source, load_config, load_tokenizer, member_source
from proxytune.recipe.options import ComposeOptions, MemberChoice
from proxytune.recipe.parts import RECIPE_FIELDS, ApiBase, Expert, Member, Prompt
from proxytune.recipe.place import check_target
from proxytune.recipe.presets import PRESETS
from proxytune.recipe.store import moved_member, write_recipe

__all__ = ["EXPERT_SYNTAX", "compose", "configure", "parse_expert"]

EXPERT_SYNTAX = "NAME=EXPERT[,anti=MODEL][,alpha=NUMBER][,adapter=PATH][,prompt=raw|chat][,dtype=…][,revision=…]"


# -- reading the options --------------------------------------------------------------------------------------
def parse_expert(text: str) -> Expert:
    """Read one ``--add-expert``: a name, its model, and fields after commas.

    ``prompt``, ``dtype`` and ``revision`` belong to the expert; ``anti-prompt``, ``anti-dtype`` and
    ``anti-revision`` to the anti-expert. With an empty model (``NAME=,anti=...``) there is an adapter on the
    anti-expert, or, without an adapter, no expert at all.

    Raises:
        RecipeError: if it cannot be read.
    """
    first, *rest = text.split(",")
    name, found, model = first.partition("=")
    if not found or not name.strip():
        raise RecipeError(f"--add-expert {text!r} does not begin with NAME=; write {EXPERT_SYNTAX}")
    fields: dict[str, str] = {}
    known = ("anti", "alpha", "adapter", "prompt", "dtype", "revision", "anti-prompt", "anti-dtype", "anti-revision")
    for part in rest:
        key, found, value = part.partition("=")
        if not found or key.strip() not in known:
            raise RecipeError(f"--add-expert {text!r}: {part!r} is not one of {'=, '.join(known)}=")
        if key.strip() in fields:
            raise RecipeError(f"--add-expert {text!r} gives {key.strip()} twice")
        fields[key.strip()] = value.strip()
    try:
        (alpha,) = resolve_alpha(alpha_of_text([fields["alpha"]] if "alpha" in fields else ()), [name.strip()], [1.0])
    except AlphaError as error:
        raise RecipeError(f"--add-expert {text!r}: {error}") from error
    anti, own = (
        MemberChoice(model, *(fields.get(side + field) for field in ("revision", "prompt", "dtype")))
        for model, side in ((fields.get("anti"), "anti-"), (model.strip() or None, ""))
    )
    anti_expert = _over(anti, None, "the anti-expert")
    return Expert(name.strip(), expert_of(own, None, anti_expert, fields.get("adapter")), anti_expert, alpha)


def _over(choice: MemberChoice, known: Member | None, what: str) -> Member | None:
    """The member from the options, which replace what is ``known`` about it, for example from a preset.

    Another model keeps the known prompt and nothing else. None if there is neither.
    """
    given: dict[str, Any] = {name: value for name, value in vars(choice).items() if value is not None}
    if choice.prompt is not None:
        given["prompt"] = Prompt.parse(choice.prompt)
    if choice.model is None and known is None:
        if given:
            raise RecipeError(f"{next(iter(given))} is given for {what}, but no model; name one")
        return None
    if choice.model is not None:
        return Member(**{"prompt": known.prompt if known else Prompt(), **given})
    return replace(known, **given)  # type: ignore[type-var]


def expert_of(
    given: MemberChoice, known: Member | None, anti_expert: Member | None, adapter: str | None
) -> Member | None:
    """The expert: a model, a LoRA adapter on it, or only an adapter, which is then on the anti-expert's model."""
    if adapter is None and given.model is not None and _is_adapter(given.model):  # as if it were --expert-adapter
        given, known, adapter = replace(given, model=None), None, given.model
    if adapter is not None and given.model is None and known is None:
        if anti_expert is None:
            raise RecipeError("an expert adapter needs a model under it; give the expert or the anti-expert too")
        known = replace(anti_expert, prompt=Prompt())
    expert = _over(given, known, "the expert")
    return expert if adapter is None or expert is None else replace(expert, adapter=adapter)


def _is_adapter(path: str) -> bool:
    directory = Path(path).expanduser()
    return (directory / "adapter_config.json").is_file() and not (directory / "config.json").exists()


def configure(options: ComposeOptions, examples: Sequence[tuple[str, str]] = ()) -> ProxyTuneConfig:
    """The recipe that the options describe, with paths as they were given.

    Args:
        examples: the contents of the file ``expert_examples``.

    Raises:
        RecipeError: for options that make no recipe.
    """
    preset, name, alpha = options.preset, options.name, options.alpha
    start = ProxyTuneConfig(**PRESETS[preset]) if preset is not None else None
    first = start.expert_list[0] if start is not None else None
    made_base = _api_base(options) or _over(options.base, start.base_member if start is not None else None, "the base")
    if made_base is None:
        raise RecipeError("no base is given; name the model to steer with --base, or use --preset")
    expert_choice, anti_choice = (
        each if options.small is None else replace(each, model=options.small)
        for each in (options.expert, options.anti_expert)
    )
    anti = _over(anti_choice, first.anti_expert if first else None, "the anti-expert")
    towards = expert_of(expert_choice, first.expert if first else None, anti, options.expert_adapter)
    experts = [parse_expert(text) for text in options.add_expert]
    if options.negative_prompt is not None or options.guidance is not None:
        experts.append(_guidance(made_base, options.negative_prompt, options.guidance))
    if towards is not None or anti is not None:
        name = name or (first.name if first else "expert")
        alpha = (first.alpha if first else 1.0) if alpha is None else alpha
        experts.insert(0, Expert(name, towards, anti, alpha))
    elif not experts:
        raise RecipeError(
            "no expert is given; name one with --expert (or --anti-expert alone), --small or --negative-prompt, or use "
            "--preset"
        )
    elif alpha is not None or name is not None:
        raise RecipeError(
            "--alpha and --name are for --expert; write NAME=EXPERT,alpha=... in --add-expert, and the strength of a "
            "negative prompt as --guidance"
        )
    try:
        renamed = None if options.renamed_tokens is None else json.loads(options.renamed_tokens)
    except ValueError as error:
        raise RecipeError(f"--renamed-tokens must be a JSON object, not {options.renamed_tokens!r}") from error
    config = ProxyTuneConfig(
        base=made_base,
        experts=experts,
        combine=options.combine or "sum",
        gate=options.gate,
        plausibility=options.plausibility,
        renamed_tokens=renamed,
        description=options.description,
        examples=options.examples or None,
    )
    if options.expert_system is not None or examples:
        if towards is None:
            raise RecipeError("--expert-system and --expert-examples need an expert; add --expert or --small")
        config = _with_expert_texts(config, options, examples)
    # Last, because the expert's texts may give members the prompt kind chat.
    return _with_texts(config, options.system, options.response_prefix)


def _api_base(options: ComposeOptions) -> ApiBase | None:
    """The base behind an API that the options name, or None where they name none."""
    named = {f.name.removeprefix("api_"): getattr(options, f.name) for f in fields(options) if f.name.startswith("api")}
    given = {name: value for name, value in named.items() if value is not None}
    return ApiBase(**given) if given else None


def _guidance(base: Member, negative: str | None, guidance: float | None) -> Expert:
    """Classifier-free guidance (2306.17806, eq. 2): ``negative + guidance * (base - negative)``."""
    if base.prompt.kind != "raw":
        raise RecipeError("a negative prompt replaces the raw prompt, so leave --base-prompt out")
    away = replace(base, prompt=Prompt("negative", template=negative))
    return Expert("guidance", base, away, (1.5 if guidance is None else guidance) - 1)


def _with_expert_texts(
    config: ProxyTuneConfig, options: ComposeOptions, examples: Sequence[tuple[str, str]]
) -> ProxyTuneConfig:
    """Give the first expert a system prompt and solved examples. If both sides are one model, both get the prompt kind
    chat."""
    name = config.expert_list[0].name

    def changed(member: str, one: Member) -> Member:
        prompt = one.prompt
        if member == f"{name}.expert":
            if options.expert_system is not None:
                if options.expert.prompt not in (None, "chat"):
                    raise RecipeError("--expert-system needs the prompt kind chat; leave --expert-prompt out")
                prompt = replace(prompt if prompt.kind == "chat" else Prompt("chat"), system=options.expert_system)
            if examples and prompt.kind == "raw":
                prompt = Prompt("template", template="{prompt}")
            prompt = replace(prompt, examples=tuple(examples))
        elif member == f"{name}.anti_expert" and options.small is not None and options.anti_expert.prompt is None:
            chat = options.expert_system is not None or options.expert.prompt == "chat"
            prompt = Prompt("chat") if chat and prompt.kind == "raw" else prompt
        return replace(one, prompt=prompt)

    return config.with_members(changed)


def _with_texts(config: ProxyTuneConfig, system: str | None, response_prefix: str | None) -> ProxyTuneConfig:
    """Give every member that has a prompt of its own a response prefix and, if it is chat, a system prompt. A member
    that has a system prompt keeps it."""
    prompts = [one.prompt for _, one in config.members()]
    if system is not None and not any(_lacks_system(prompt) for prompt in prompts):
        raise RecipeError(
            "a system prompt needs a member whose prompt is `chat` and has no system prompt yet; add --expert-prompt "
            "chat, or leave --system out"
        )
    if response_prefix and all(prompt.kind == "raw" for prompt in prompts):
        raise RecipeError("a response prefix needs a member with a prompt of its own; add --expert-prompt chat")

    def changed(_: str, one: Member) -> Member:
        prompt = one.prompt
        if system is not None and _lacks_system(prompt):
            prompt = replace(prompt, system=system)
        if response_prefix and prompt.kind != "raw":
            prompt = replace(prompt, response_prefix=response_prefix)
        return replace(one, prompt=prompt)

    return config.with_members(changed)


def _lacks_system(prompt: Prompt) -> bool:
    return prompt.kind == "chat" and prompt.system is None


# -- writing it -----------------------------------------------------------------------------------------------
def compose(
    config: ProxyTuneConfig,
    directory: Path,
    *,
    force: bool = False,
    offline: bool = False,
    trust_remote_code: bool = False,
) -> list[str]:
    """Write a recipe, with relative paths starting at the current directory; return notes for the user.

    The base's config, tokenizer, chat template and generation config are copied into it. The end-of-sequence tokens of
    experts with a positive alpha are added to the base's: the token that ends a chat expert's turns must also end the
    mixture's.

    Raises:
        RecipeError: if the directory is in use, or a path does not exist.
        MemberError: if the base cannot be read; ``offline`` then writes the recipe without its files.
    """
    check_target(directory, force)
    loading = Loading(trust_remote_code=trust_remote_code, hub={"local_files_only": True} if offline else {})
    for name, one in config.members():
        if isinstance(one, ApiBase):
            config.locate(one.tokenizer)
            continue
        member_source(config, name, one)  # a path that does not exist is refused now, not when the recipe is used
        adapter_source(config, one)
    notes: list[str] = []
    text_config, tokenizer, generation = None, None, None
    try:
        if not isinstance(config.base_member, ApiBase):
            text_config = load_config(config, "base", config.base_member, loading)
            if text_config.model_type == ProxyTuneConfig.model_type:
                raise RecipeError(
                    f"the base {config.base_member.model!r} is itself a recipe; name the models in it instead"
                )
            text_config.name_or_path = ""  # the recipe must not contain paths of this machine
        tokenizer = load_tokenizer(config, "base", config.base_member, loading)
        generation = _generation_config(config, text_config, tokenizer, loading, notes)
    except MemberError as error:
        if not offline:
            raise MemberError(f"{error} (--offline writes the recipe without the base's files)") from error
        notes.append(
            "the base is not on this machine, so the recipe has no tokenizer of its own; the base's is used when it is "
            "loaded"
        )
    if text_config is not None and tokenizer is None:
        notes.append("the base has no tokenizer, so the recipe has none")
    if tokenizer is not None and not tokenizer.chat_template:
        notes.append("the base has no chat template; with `proxytune chat` it reads a plain transcript")

    written = ProxyTuneConfig(**{name: getattr(config, name) for name in RECIPE_FIELDS}, text_config=text_config)
    written = written.with_members(lambda _, one: moved_member(one, ".", directory))
    write_recipe(written, directory, tokenizer=tokenizer, generation_config=generation)
    return notes


def _generation_config(
    config: ProxyTuneConfig, text_config: PreTrainedConfig | None, tokenizer: Any, loading: Loading, notes: list[str]
) -> GenerationConfig:
    """The base's generation config, without unsupported settings, and with the end tokens of experts with a positive
    alpha."""

    def own(name: str, one: Member) -> GenerationConfig | None:
        try:
            return read_generation_config(config, name, one, loading)
        except OSError as error:
            reason = f"cannot be reached ({first_line(error)})"
            notes.append(f"the generation config of {name} {reason}, so its end-of-sequence tokens are not known")
            return None

    if text_config is None:  # behind an API, where the tokenizer alone says how texts end
        generation, width = GenerationConfig(eos_token_id=tokenizer.eos_token_id), len(tokenizer)
    else:
        generation = own("base", config.base_member) or GenerationConfig.from_model_config(text_config)
        width = text_config.get_text_config(decoder=True).vocab_size
    generation, left_out = adapted(generation, width, "the base's generation config")
    notes += left_out
    ends = ends_of(generation)
    for expert in config.expert_list:
        if expert.expert is not None and expert.alpha > 0:
            more = own(f"{expert.name}.expert", expert.expert)
            ends += [end for end in ends_of(more) if end not in ends]
    if ends:
        generation.eos_token_id = ends[0] if len(ends) == 1 else ends
    return generation
