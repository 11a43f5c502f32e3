"""``proxytune explain``: why each token of an answer was chosen, in the terminal or as a page."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxytune.analysis.options import ExplainOptions
from proxytune.answers.options import AnswerOptions, Sampling
from proxytune.cli.flags import Given
from proxytune.cli.shared import asked_of, check_seed, load_model, say, show, spinner, write_out
from proxytune.errors import ProxyTuneError
from proxytune.recipe.options import LoadingOptions
from proxytune.recipe.place import check_alpha, check_place

if TYPE_CHECKING:
    from proxytune.analysis.explanation import Explanation

__all__ = ["explain", "show_explanation"]

OF_VIEW = ("--html", "--moves", "--quiet", "--verbose")  # options that do not change the answer


def _placed(source: str) -> str:
    """Refuse a source that is neither a file nor a recipe, before importing modules that take seconds."""
    if os.path.isfile(source):
        return source
    if source.endswith((".json", ".jsonl")) and not os.path.isdir(source):
        raise ProxyTuneError(f"there is no file {source!r}")
    check_place(source)
    return source


def explain(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|FILE",
            help="A recipe, or a file with traces or with OpenAI responses with logprobs.",
            callback=_placed,
        ),
    ],
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="The prompt; not with a FILE.")] = None,
    *,
    view: ExplainOptions,
    options: AnswerOptions,
    sampling: Sampling,
    loading: LoadingOptions,
    given: Given,
) -> None:
    """Show why each token of an answer was chosen.

    The answer is the one that `proxytune generate` gives. Without a PROMPT, the prompt is read from stdin. Tokens are
    shaded by how far steering moved them. A table shows the largest moves, with what the base and each expert would
    have written there. --html writes all of it as one page for the browser, with the candidates of every token, a
    slider for alpha, and the answers of the base and the experts alone.

    --branch 3:TOKEN keeps the first two tokens of the answer, puts TOKEN after them, and continues from there:
    steered, or with --branch-alpha 0 unsteered.

    A FILE is what `proxytune generate --trace` writes, or JSON of OpenAI's chat completions or completions with
    logprobs. What it does not record is shown as unknown.

    Examples:

        proxytune explain demo "Which country is the city of Lyon in?" --chat
        proxytune explain mine "What should I see in Lisbon?" --chat --html lisbon.html
        proxytune explain mine "What should I see in Lisbon?" --chat --branch "1:The" --branch-alpha 0
        proxytune explain traces.jsonl --answer 3
    """
    if os.path.isfile(source):
        if prompt is not None:
            raise ProxyTuneError(f"a file contains its own prompts; leave {prompt!r} out, or name a recipe")
        if flags := [flag for flag in given if flag not in (*OF_VIEW, "--answer")]:
            raise ProxyTuneError(f"a file already contains its answers; leave {', '.join(flags)} out")
        why = _read(source, view.answer)
    else:
        if view.answer is not None:
            raise ProxyTuneError("--answer chooses among the answers of a FILE; a recipe gives one")
        why = _made(source, prompt, view, options, sampling, loading, given)
    if view.html is None:
        show_explanation(why, view.moves)
        return
    from proxytune.answers.journal import write_whole

    write_whole(view.html, why.html())
    say(f"wrote {view.html}; open it in a browser")


def _read(file: str, number: int | None) -> Explanation:
    """Read one answer from a file."""
    from proxytune.analysis.reading import read_explanations

    answers = read_explanations(Path(file))
    if number is None and len(answers) > 1:
        say(f"this is answer 1 of {len(answers)}; --answer N shows another")
    if number is not None and number > len(answers):
        raise ProxyTuneError(f"--answer {number}: {file} has only {len(answers)}")
    return answers[(number or 1) - 1]()


def _made(
    recipe: str,
    prompt: str | None,
    view: ExplainOptions,
    options: AnswerOptions,
    sampling: Sampling,
    loading: LoadingOptions,
    given: Given,
) -> Explanation:
    """Make an answer with a recipe. For a page it also has the answers of the base and the experts alone."""
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().rstrip("\n")
    if prompt is None or not prompt.strip():
        raise ProxyTuneError("there is no prompt: give one as an argument or on stdin")
    check_alpha(recipe, options.alpha)
    check_alpha(recipe, view.branch_alpha)
    check_seed(sampling, given)
    from proxytune.analysis.explain import explain_branch, explain_prompt, own_answers
    from proxytune.decoding.trace import TOP_K
    from proxytune.recipe.alpha import resolve_alpha

    config, alphas = asked_of(recipe, options)
    model, tokenizer = load_model(config, loading)
    after = resolve_alpha(view.branch_alpha, config.expert_names, alphas)
    top_k = view.trace_top_k or TOP_K
    with spinner("answering"):
        why = explain_prompt(model, tokenizer, prompt, alphas, options, sampling, top_k)
        for branch in view.branch:
            why = explain_branch(model, tokenizer, why, branch, after, options, sampling, top_k)
        if view.html is not None:
            why = replace(why, own=own_answers(model, tokenizer, prompt, options, sampling))
    words = [word for flag, words in given.items() if flag not in OF_VIEW for word in words]
    rest = [recipe, prompt]
    # A prompt that begins with a dash must not be read as an option.
    command = [*words, "--", *rest] if any(word.startswith("-") for word in rest) else [*rest, *words]
    return replace(why, command=["proxytune", "explain", *command])


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
    show(legend(why, styled=styled))
    write_out("\n")
    show(moves_table(why, moves), totals_lines(why))
