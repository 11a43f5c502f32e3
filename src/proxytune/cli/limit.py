"""``proxytune limit``: which gold answers steering can reach."""

from __future__ import annotations

from typing import Annotated

import typer

from proxytune.analysis.options import LimitOptions
from proxytune.answers.options import AnswerOptions
from proxytune.cli.flags import only
from proxytune.cli.shared import (
    FAILED,
    Recipe,
    ResultOptions,
    asked_of,
    load_model,
    progress_bar,
    read_gold,
    read_lines,
    say,
)
from proxytune.errors import ProxyTuneError
from proxytune.recipe.options import LoadingOptions
from proxytune.recipe.place import check_alpha

__all__ = ["limit"]


def limit(
    recipe: Recipe,
    *,
    options: LimitOptions,
    answers: Annotated[AnswerOptions, only("alpha", "chat", "system", "negative_prompt")],
    loading: LoadingOptions,
    results: ResultOptions,
) -> None:
    """Show which gold answers steering can reach, and where the base cannot say them.

    A gold answer is an answer that you consider right. It is read token by token, each token after the gold tokens
    before it. For each token you see whether greedy decoding chooses it at the recipe's alpha, and whether it would at
    another strength: some factor, from 0 on, on the alphas of all experts. If no factor reaches a token, the base
    cannot say it with these experts. This is a bound for exactly these tokens: another wording of the same answer may
    be within reach.

    Examples:

        proxytune limit mine --input gold.jsonl
        proxytune limit mine --input gold.jsonl --samples 20 --json
    """
    check_alpha(recipe, answers.alpha)
    lines = read_lines(options.input)  # before the seconds that the imports take
    from proxytune.analysis.limit import limit as within_reach
    from proxytune.analysis.limit import limit_tables, summary
    from proxytune.answers.generation import Sampling

    references, broken = read_gold(options.input, lines)
    config, alphas = asked_of(recipe, answers)
    model, tokenizer = load_model(config, loading)
    if not model.complete:
        raise ProxyTuneError(
            "limit compares the gold tokens with all others, and the base's server does not give all log-probabilities"
        )

    def left_out(text: str) -> None:
        broken.append(text)
        say(f"{options.input}, {text}")

    found = []
    with progress_bar(len(references), shown=True) as advance:
        for one in within_reach(
            model,
            tokenizer,
            references,
            alphas,
            shown=answers.shown,
            samples=options.samples,
            sampling=Sampling(temperature=options.temperature, seed=options.seed),
            note=left_out,
        ):
            found.append(one)
            advance(1)
    if not found:
        raise ProxyTuneError(f"none of the gold answers in {options.input} could be read")
    told = summary(found, options.samples)
    results.give(told, *limit_tables(told))
    if broken:
        say(f"{len(broken)} gold answers could not be read")
        raise typer.Exit(FAILED)
