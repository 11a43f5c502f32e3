"""``proxytune explain``: why each token of an answer was chosen, in the terminal or as a page."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from proxytune.analysis.options import ExplainOptions
from proxytune.answers.options import AnswerOptions, Sampling
from proxytune.cli.flags import only
from proxytune.cli.shared import Recipe, load_model, say, show, spinner, write_out
from proxytune.errors import ProxyTuneError
from proxytune.recipe.options import LoadingOptions
from proxytune.recipe.place import check_alpha

if TYPE_CHECKING:
    from proxytune.analysis.explanation import Explanation

__all__ = ["explain", "show_explanation"]


def explain(
    recipe: Recipe,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What is to be continued.")] = None,
    *,
    view: Annotated[ExplainOptions, only("moves", "trace_top_k", "html")],
    options: AnswerOptions,
    sampling: Sampling,
    loading: LoadingOptions,
) -> None:
    """Show why each token of an answer was chosen.

    The answer is that of `proxytune generate`; without a PROMPT, the text on stdin is one. Tokens are shaded by how far
    steering moved them, and a table says of the largest moves what the base and each expert would have written. With
    --html all of it is one file that opens in a browser, with every token's candidates, a slider of alpha, and the
    answers of the base and the experts alone.

    Examples:

        proxytune explain demo "Question: Tom has 3 pens and buys 4. How many pens has he?" -n 40
        proxytune explain mine "What should I see in Lisbon?" --chat --html lisbon.html
    """
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().rstrip("\n")
    if prompt is None or not prompt.strip():
        raise ProxyTuneError("there is no prompt: give one as an argument or on stdin")
    check_alpha(recipe, options.alpha)
    from proxytune.analysis.explain import explain_prompt, own_answers
    from proxytune.answers.journal import write_whole
    from proxytune.decoding.trace import TOP_K
    from proxytune.recipe.alpha import resolve_alpha
    from proxytune.recipe.store import load_recipe

    config = load_recipe(recipe)
    names = [expert.name for expert in config.expert_list]
    alphas = resolve_alpha(options.alpha, names, config.alphas)
    model, tokenizer = load_model(config, loading)
    top_k = view.trace_top_k or TOP_K
    with spinner("answering"):
        why = explain_prompt(model, tokenizer, prompt, alphas, options, sampling, top_k)
        if view.html is not None:
            why = replace(why, own=own_answers(model, tokenizer, prompt, options, sampling))
    if view.html is None:
        show_explanation(why, view.moves)
    else:
        write_whole(view.html, why.html())
        say(f"wrote {view.html}; open it in a browser")


def show_explanation(why: Explanation, moves: int = ExplainOptions.moves) -> None:
    """Print the answer with its tokens marked, the table of the largest moves, and the totals."""
    from proxytune.analysis.terminal import legend, marked, moves_table, shaded, totals_lines

    styled = False
    if sys.stdout.isatty():
        from rich.console import Console

        console = Console(highlight=False)
        styled = console.color_system is not None
        console.print(shaded(why) if styled else marked(why), markup=False)
    else:
        write_out(marked(why) + "\n")
    write_out("\n")
    show(legend(why, styled=styled), moves_table(why, moves), totals_lines(why))
