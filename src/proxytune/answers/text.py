"""From texts to texts in one call: ``proxytune.generate``, and the loading that the commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from proxytune.answers.generation import answer_batches, encode
from proxytune.answers.options import AnswerOptions, JobOptions, Sampling
from proxytune.assembling import config_of_members
from proxytune.errors import PromptError, ProxyTuneError
from proxytune.model import ProxyTunedForCausalLM
from proxytune.recipe.alpha import alpha_rows
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.options import LoadingOptions
from proxytune.recipe.store import load_recipe

if TYPE_CHECKING:
    from typing_extensions import TypedDict, Unpack

    class _Call(TypedDict, total=False):
        """The options of :func:`generate`."""

        alpha: Any
        max_new_tokens: int
        chat: bool
        system: str | None
        negative_prompt: str | None
        temperature: float | None
        top_p: float | None
        top_k: int | None
        min_p: float | None
        seed: int | None
        batch_size: int


__all__ = ["alone", "generate", "load", "loaded"]


def load(config: ProxyTuneConfig, loading: LoadingOptions) -> tuple[ProxyTunedForCausalLM, Any]:
    """A recipe's model, and its tokenizer.

    Raises:
        ProxyTuneError: if neither the recipe nor its base has a tokenizer.
    """
    model = ProxyTunedForCausalLM.from_pretrained(str(config.name_or_path), config=config, **loading.of_model())
    return model, _tokenizer_of(model)


def loaded(recipe: str | Path | ProxyTunedForCausalLM) -> tuple[ProxyTunedForCausalLM, Any]:
    """The result of :func:`load`; a recipe that is already loaded stays as it is."""
    if isinstance(recipe, ProxyTunedForCausalLM):
        return recipe, _tokenizer_of(recipe)
    return load(load_recipe(recipe), LoadingOptions())


def _tokenizer_of(model: ProxyTunedForCausalLM) -> Any:
    if model.recipe_tokenizer is None:
        raise ProxyTuneError("neither the recipe nor its base has a tokenizer; copy the base's into the recipe")
    return model.recipe_tokenizer


def alone(model: Any, tokenizer: Any) -> ProxyTunedForCausalLM:
    """One model as a composite without experts."""
    config, given = config_of_members(model, [{"expert": model}], {})
    config.experts = []
    return ProxyTunedForCausalLM._load(config, {"base": given["base"]}, tokenizer, {}, {"speculate": False})


@overload
def generate(recipe: str | Path | ProxyTunedForCausalLM, prompts: str, **options: Unpack[_Call]) -> str: ...


@overload
def generate(
    recipe: str | Path | ProxyTunedForCausalLM, prompts: list[str] | tuple[str, ...], **options: Unpack[_Call]
) -> list[str]: ...


def generate(
    recipe: str | Path | ProxyTunedForCausalLM,
    prompts: str | list[str] | tuple[str, ...],
    *,
    alpha: Any = None,
    max_new_tokens: int = AnswerOptions.max_new_tokens,
    chat: bool = AnswerOptions.chat,
    system: str | None = None,
    negative_prompt: str | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    batch_size: int = JobOptions.batch_size,
) -> str | list[str]:
    """Continue prompts with a steered model: texts in, texts out, like the command ``proxytune generate``.

    Decoding is greedy unless ``temperature``, ``top_p``, ``top_k`` or ``min_p`` is given. Those that are not given are
    off, even if the recipe's generation config sets them.

    Args:
        recipe: a directory, a hub id or ``"demo"``, which is loaded for this call; or a loaded model, which saves the
            loading time of each further call.
        prompts: one text, or a list of texts.
        alpha: the strength, instead of the recipe's: a number, a list with one per expert, a mapping by name or, for a
            list of prompts, a list with one per prompt.
        max_new_tokens: maximum number of new tokens per answer.
        chat: put each prompt into the recipe's chat template, as the user's turn.
        system: a system prompt for the chat templates; needs ``chat``.
        negative_prompt: a negative prompt instead of the recipe's, for recipes that have one.
        temperature, top_p, top_k, min_p: how the next token is sampled; temperature 0 is greedy.
        seed: for sampling; 0 by default. An answer depends on it and on its place in the list, not on the batch.
        batch_size: prompts per batch.

    Returns:
        The new text without special tokens; for a list of prompts a list of texts in the same order.

    Raises:
        PromptError: if a prompt is empty or too long.
        AlphaError: if alpha does not fit the experts or the prompts.
        ProxyTuneError: for another value that is not allowed.

    Example:
        >>> import proxytune
        >>> answer = proxytune.generate("my-recipe", "What should I see in Lisbon?", max_new_tokens=5)
        >>> model = proxytune.ProxyTunedForCausalLM.from_pretrained("my-recipe")  # loaded once for several calls
        >>> answers = proxytune.generate(model, ["The fox", "The dog"], max_new_tokens=5, alpha=0.5, temperature=0.7)
        >>> len(answers)
        2
    """
    options = AnswerOptions(max_new_tokens=max_new_tokens, chat=chat, system=system, negative_prompt=negative_prompt)
    sampling = Sampling.of_call(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)
    job = JobOptions(batch_size=batch_size)
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise PromptError("prompts must be a text or a list of texts")
    model, tokenizer = loaded(recipe)
    default = [expert.alpha for expert in model.experts]
    alphas = alpha_rows(alpha, model.expert_names, default, None if isinstance(prompts, str) else len(texts))
    encoded = []
    for index, text in enumerate(texts):
        try:
            encoded.append(encode(model, tokenizer, text, **options.shown))
        except PromptError as error:
            raise PromptError(str(error) if isinstance(prompts, str) else f"prompts[{index}]: {error}") from error
    answered = answer_batches(
        model,
        tokenizer,
        encoded,
        alphas,
        rows=range(1, len(texts) + 1),
        batch_size=job.batch_size,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
    )
    answers = [one.text for made in answered for one in made]
    return answers[0] if isinstance(prompts, str) else answers
