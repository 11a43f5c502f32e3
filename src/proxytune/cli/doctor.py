"""``proxytune doctor``: whether a pair of experts pays off for a base."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from proxytune.analysis.options import DoctorOptions, gate
from proxytune.answers.options import AnswerOptions
from proxytune.cli.flags import only
from proxytune.cli.shared import (
    FAILED,
    Recipe,
    RunOptions,
    complain,
    progress_bar,
    read_gold,
    read_lines,
    resumable,
    say,
    spinner,
)
from proxytune.errors import ProxyTuneError
from proxytune.recipe.options import LoadingOptions
from proxytune.recipe.parts import ApiBase
from proxytune.recipe.place import check_alpha

__all__ = ["doctor"]


def doctor(
    recipe: Recipe,
    *,
    options: DoctorOptions,
    answers: Annotated[AnswerOptions, only("alpha", "chat", "system")],
    loading: LoadingOptions,
    results: Annotated[RunOptions, only("json", "directory")],
) -> None:
    """Examine on a sample whether steering with this pair pays off, and why.

    The base, the experts alone, the mean of logits, the base with solved examples and the steered base answer the same
    prompts. An answer is right if it begins with a gold one; and each arm gives the gold answer a log-probability. The
    verdict is one sentence with its uncertainty. Below it you see the alpha under which the gold answers are most
    probable, what the expert learned beyond its anti-expert, how far the anti-expert is from the base, how far several
    experts conflict, how many drafts were accepted, and what that does for speed. DIR gets doctor.json, doctor.md, and
    alpha.png and alpha.svg.

    Examples:

        proxytune doctor mine --data sample.jsonl
        proxytune doctor mine --data sample.jsonl --chat --gate "differences.base.correct.low>=0" --json
    """
    check_alpha(recipe, answers.alpha)
    lines = read_lines(options.data)  # before the seconds that the imports take
    from proxytune.analysis.doctor import Doctor, DoctorJournal, doctor_tables, number_at, summarize
    from proxytune.answers.journal import write_whole
    from proxytune.recipe.check import check_recipe
    from proxytune.recipe.members import Loading
    from proxytune.recipe.store import load_recipe
    from proxytune.tables import markdown

    references, broken = read_gold(options.data, lines)
    config = load_recipe(recipe)
    if isinstance(config.base_member, ApiBase):
        raise ProxyTuneError(
            "doctor compares the members' log-probabilities of gold answers, and the base of this recipe is behind an "
            "API; eval compares the answers of the arms"
        )
    names, alphas = config.expert_names, config.alphas_of(answers.alpha)
    place = results.place("doctor", recipe)
    place.mkdir(parents=True, exist_ok=True)
    settings = {
        "recipe": recipe,
        "alpha": dict(zip(names, alphas)),
        "data_sha256": hashlib.sha256(b"".join(lines)).hexdigest(),
        "chat": answers.chat,
        "system": answers.system,
        "shots": options.shots,
        "dtype": loading.dtype,
    }
    kept = f"the measured examples are kept in {place}"
    with DoctorJournal(place / "examples.jsonl", settings) as journal, resumable(kept):
        measured = journal.lines[1:]
        done = {line["number"] for line in measured}
        left = [number for number in range(len(references)) if number not in done]
        with spinner("loading the members"):
            report = check_recipe(config, Loading.of(loading))
            sick = Doctor(
                config,
                loading,
                alphas,
                references,
                chat=answers.chat,
                system=answers.system,
                shots=options.shots,
            )
        began = time.monotonic()
        with progress_bar(len(references), shown=True) as advance:
            advance(len(done))
            for batch in sick.measure(left):
                journal.append(batch)
                measured += batch
                advance(len(batch))
                if options.minutes and time.monotonic() - began > 60 * options.minutes:
                    break
    if len(measured) < len(references):
        say(f"{len(measured)} of {len(references)} examples in {options.minutes:g} minutes; the same command continues")
    found = summarize(
        measured,
        names,
        alphas,
        n_examples=len(references),
        warnings=[*report.notes, *broken],
        speed=sick.predicted_speed,
        seed=options.seed,
    )
    failed = []
    for name, least in map(gate, options.gates):
        if not (value := number_at(found, name)) >= least:
            failed.append(f"{name} is {value:.4g}, which is below {least:g}")
    tables = doctor_tables(found)
    write_whole(place / "doctor.md", "\n".join(t + "\n" if isinstance(t, str) else markdown([t]) for t in tables))
    replace(results, output=place / "doctor.json").give(found, *tables)
    _draw(found, place)
    for why in failed:
        complain(f"--gate: {why}")
    if failed:
        raise typer.Exit(FAILED)


def _draw(found: dict[str, object], place: Path) -> None:
    """Draw the curve of alpha, if matplotlib is installed."""
    try:
        from proxytune.analysis.plots import plot_alpha
    except ImportError:
        say("no figure: matplotlib comes with the extra eval")
        return
    plot_alpha(found, place / "alpha")
