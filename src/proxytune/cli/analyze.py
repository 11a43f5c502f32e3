"""``proxytune analyze``: what steering did over a set of traces."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from proxytune.analysis.options import AnalyzeOptions
from proxytune.cli.shared import ResultOptions, say
from proxytune.errors import ProxyTuneError, need

__all__ = ["analyze"]


def analyze(
    traces: Annotated[
        list[Path],
        typer.Argument(metavar="TRACES...", help="Files that --trace of generate, chat or eval has written."),
    ],
    *,
    options: AnalyzeOptions,
    results: ResultOptions,
) -> None:
    """Show what steering did over a set of traces.

    The shift of a token is its probability in the mixture minus its probability in the base. Tables show the mean shift
    by class of token (sides of equations, digits, reasoning words, punctuation, hedges), the share of changed choices
    by position, the most promoted and most demoted tokens, and how sure base and experts were where they chose
    differently. Intervals are 95 %, from a bootstrap over whole answers.

    With several files these tables are about all of them together, and one more table has a row per file. A model
    alone, such as the arm base of `eval --trace`, steers nothing: it has that row only.

    Examples:

        proxytune analyze eval-mine/gsm8k/proxy_tuned.trace.jsonl
        proxytune analyze eval-mine/gsm8k/*.trace.jsonl
        proxytune analyze a.jsonl b.jsonl --classes mine.yaml --plot figures --output shifts.json
    """
    for path in traces:
        path.open("rb").close()  # before the seconds that the imports take
    if twice := [path for at, path in enumerate(traces) if path in traces[:at]]:
        raise ProxyTuneError(f"{twice[0]} is named twice; name each file once")
    if options.plot is not None:
        need("plots", "eval", "matplotlib")
    from proxytune.analysis.reading import read_traces
    from proxytune.analysis.tokens import analyze as analysis
    from proxytune.analysis.tokens import load_classes, measure, summary_tables

    classes = load_classes(options.classes)
    asked = {"top": options.top, "seed": options.seed}
    measured = {str(path): [measure(why, classes) for why in read_traces(path)] for path in traces}
    found = analysis((of for of in chain.from_iterable(measured.values()) if of.experts), classes, **asked)
    if not found["answers"]:
        raise ProxyTuneError(f"there is no trace of a steered answer in {', '.join(measured)}")
    files = {name: analysis(of, classes, **asked) for name, of in measured.items() if len(measured) > 1}
    results.give({**found, "files": files}, *summary_tables(found, files))
    if options.plot is not None:
        from proxytune.analysis.plots import plot_tokens

        plot_tokens(found, options.plot)
        say(f"figures: classes and positions in {options.plot}")
