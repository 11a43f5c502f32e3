"""From a recipe and a prompt to an explanation, and to the explanation of a branch with another token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessor

from proxytune.analysis.explanation import Explanation
from proxytune.analysis.options import Branch
from proxytune.answers.generation import Answer, answer, encode, with_room
from proxytune.answers.options import AnswerOptions, Sampling
from proxytune.answers.text import alone, loaded
from proxytune.answers.traces import token_texts, trace_line
from proxytune.decoding.trace import TOP_K
from proxytune.errors import PromptError, ProxyTuneError
from proxytune.model import ProxyTunedForCausalLM

__all__ = ["explain", "explain_answer", "explain_branch", "explain_prompt", "own_answers"]


def explain(
    recipe: str | Path | ProxyTunedForCausalLM,
    prompt: str,
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
    trace_top_k: int = TOP_K,
) -> Explanation:
    """Answer a prompt and explain why each token was chosen. A notebook shows the result as a page.

    Args:
        recipe, alpha, max_new_tokens, chat, system, negative_prompt, temperature, top_p, top_k, min_p, seed: as in
            :func:`proxytune.generate`.
        prompt: one text.
        trace_top_k: how many of each model's most probable tokens to record.

    Returns:
        The answer that :func:`proxytune.generate` gives, its trace, and the answers of the base and of each expert
        alone. ``html()`` gives a page that needs no network and no other file.

    Raises:
        PromptError: if the prompt is empty or too long.
        AlphaError: if alpha does not fit the experts.
        ProxyTuneError: for another value that is not allowed.

    Example:
        >>> import proxytune
        >>> why = proxytune.explain("my-recipe", "The fox", max_new_tokens=5)
        >>> why.text == proxytune.generate("my-recipe", "The fox", max_new_tokens=5)
        True
        >>> why.totals.n_tokens
        5
    """
    options = AnswerOptions(max_new_tokens=max_new_tokens, chat=chat, system=system, negative_prompt=negative_prompt)
    sampling = Sampling.of_call(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)
    if not isinstance(prompt, str):
        raise PromptError("the prompt must be a text")
    model, tokenizer = loaded(recipe)
    alphas = model.config.alphas_of(alpha)
    made = explain_prompt(model, tokenizer, prompt, alphas, options, sampling, trace_top_k)
    return replace(made, own=own_answers(model, tokenizer, prompt, options, sampling))


def explain_prompt(
    model: ProxyTunedForCausalLM,
    tokenizer: Any,
    prompt: str,
    alphas: Sequence[float],
    options: AnswerOptions,
    sampling: Sampling,
    top_k: int,
    given: Sequence[int] = (),
) -> Explanation:
    """Answer a prompt and explain the answer.

    Args:
        alphas: one value per expert. top_k: candidates per distribution.
        given: ids that the answer begins with, whatever the models would choose.
    """
    encoded = encode(model, tokenizer, prompt, **options.shown)
    made = answer(
        model,
        tokenizer,
        [encoded],
        [alphas],
        rows=[1],  # as `generate` draws for its first prompt
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        processors=[Given(len(encoded.ids), given)] if given else [],
        trace_top_k=top_k,
    )[0]
    return replace(explain_answer(prompt, made, model.expert_names, alphas, tokenizer), n_given=len(given))


def explain_branch(
    model: ProxyTunedForCausalLM,
    tokenizer: Any,
    before: Explanation,
    branch: Branch,
    alphas: Sequence[float],
    options: AnswerOptions,
    sampling: Sampling,
    top_k: int,
) -> Explanation:
    """Another answer: it begins like ``before``, has another token at one place, and continues from there.

    Args:
        before: the answer to branch from. branch: the place and the other token.
        alphas: one value per expert, from that place on.

    Raises:
        ProxyTuneError: if the answer has no such place, or the place no such candidate.
    """
    assert before.prompt is not None
    if branch.number > len(before.tokens):
        raise ProxyTuneError(f"--branch {branch}: the answer has only {len(before.tokens)} tokens")
    token = _chosen(branch, before.tokens[branch.number - 1]["candidates"], model.shared_vocab)
    given = [*(each["id"] for each in before.tokens[: branch.number - 1]), token]
    return explain_prompt(model, tokenizer, before.prompt, alphas, options, sampling, top_k, given)


def _chosen(branch: Branch, candidates: Sequence[Mapping[str, Any]], n_shared: int) -> int:
    """The id that a branch names."""
    if branch.id is not None:
        if branch.id >= n_shared:
            raise ProxyTuneError(f"--branch {branch}: the models share {n_shared} tokens, numbered from 0")
        return branch.id
    ids = [each["id"] for each in candidates if each["token"] == branch.text]
    if len(ids) == 1:
        return int(ids[0])
    if ids:
        ways = " or ".join(f"{branch.number}:#{id_}" for id_ in ids)
        raise ProxyTuneError(f"--branch {branch}: several candidates have this text; name one by its id: {ways}")
    texts = ", ".join(repr(each["token"]) for each in candidates)
    raise ProxyTuneError(
        f"--branch {branch}: no candidate at token {branch.number} is {branch.text!r}; there are {texts} (any other "
        "token can be named by its id, as #ID)"
    )


class Given(LogitsProcessor):
    """At the first places of the answer, allows only the given tokens."""

    row_by_row = True  # it depends only on the length of its row

    def __init__(self, n_prompt: int, tokens: Sequence[int]) -> None:
        self.n_prompt, self.tokens = n_prompt, list(tokens)

    def __call__(self, input_ids: Any, scores: Any) -> Tensor:
        """The scores, shape (1, n_vocab), or 0 for the given token and -inf for all others."""
        at = input_ids.shape[1] - self.n_prompt
        if at >= len(self.tokens):
            return scores
        only = torch.full_like(scores, -torch.inf)
        only[:, self.tokens[at]] = 0.0
        return only


def explain_answer(
    prompt: str, made: Answer, names: Sequence[str], alphas: Sequence[float], tokenizer: Any
) -> Explanation:
    """The explanation of a traced answer; ``names`` are the recipe's experts."""
    text_of = token_texts(tokenizer)
    line = trace_line(prompt, dict(zip(names, alphas)), made, text_of)
    # A flip may choose a token that is not among the candidates, so its text is kept too.
    tokens = [
        {**token, "texts": {id_: text_of(id_) for steps in token["flips"].values() for _, id_ in steps}}
        for token in line["tokens"]
    ]
    return Explanation(prompt, made.text, line["alpha"], tokens)


def own_answers(
    model: ProxyTunedForCausalLM, tokenizer: Any, prompt: str, options: AnswerOptions, sampling: Sampling
) -> dict[str, str]:
    """The answers of the base and of each expert alone, each to its own prompt: name -> text."""
    encoded = encode(model, tokenizer, prompt, **options.shown)
    members = {"base": "base", **{name: f"{name}.expert" for name in model.expert_names}}
    texts = {}
    for title, member in members.items():
        if member in model.seats:
            one = alone(model.member(member), tokenizer)
            shown = with_room(one.contexts, encoded.own.get(member, encoded.ids), {})
            limit = options.max_new_tokens
            made = answer(one, tokenizer, [shown], None, rows=[1], max_new_tokens=limit, sampling=sampling)
            texts[title] = made[0].text
    return texts
