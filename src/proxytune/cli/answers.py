"""``proxytune generate``, ``serve`` and ``demo``: commands that answer prompts."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from proxytune.answers.options import AnswerOptions, JobOptions, Sampling
from proxytune.cli.explain import show_explanation
from proxytune.cli.flags import Given
from proxytune.cli.shared import (
    FAILED,
    Recipe,
    ResultOptions,
    asked_of,
    check_seed,
    is_quiet,
    load_model,
    progress_bar,
    read_lines,
    resumable,
    say,
    write_out,
)
from proxytune.errors import ProxyTuneError, need
from proxytune.recipe.options import LoadingOptions
from proxytune.recipe.place import check_alpha

if TYPE_CHECKING:
    from proxytune.answers.batch import Item, Output
    from proxytune.answers.generation import Answer
    from proxytune.answers.traces import TraceFile

__all__ = ["demo", "generate", "serve"]


def generate(
    recipe: Recipe,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="Text to continue.")] = None,
    *,
    options: AnswerOptions,
    sampling: Sampling,
    job: JobOptions,
    loading: LoadingOptions,
    given: Given,
) -> None:
    """Continue prompts with a steered model. Without a PROMPT, read one from stdin.

    Decoding is greedy unless --temperature, --top-p, --top-k or --min-p is given; those that are not given are off. The
    answer to a single prompt is streamed to a terminal.

    JSON objects have these fields: prompt; text; tokens (the new ids without padding, and with the end-of-sequence
    token if the model chose it); alpha (a number, or an object by name if there are several experts); finish (stop, or
    length if the limit or a member's context ended the answer). With a base behind an API they also have certified (for
    each token whether it is known to be the choice of the whole mixture), calls (requests made for this answer), way
    (how the base was asked) and, with --sample-named, tv_bound (for each token how far the distribution that it was
    drawn from can be from the mixture's). In a job they also have line (the line of the input,
    from 1, or the entry of a JSON list) and run (which recipe and options made it). A line that cannot be read is
    reported by its number, the others are answered, and the exit status is 2.

    Examples:

        proxytune generate demo --chat "Which country is the city of Lyon in?"
        proxytune generate mine --chat --alpha 0.5 < prompt.txt
        proxytune generate mine --input prompts.jsonl --output answers.jsonl --batch-size 16
    """
    prompts = _prompts(prompts, job)
    check_alpha(recipe, options.alpha)
    check_seed(sampling, given)
    lines = [] if job.input is None else read_lines(job.input)  # before the seconds that the imports take
    from proxytune.answers.batch import Item, fingerprint, read_items
    from proxytune.answers.generation import Printer, answer_batches, encode
    from proxytune.answers.traces import token_texts
    from proxytune.decoding.trace import TOP_K

    # What is asked: the recipe with the call's options, and its prompts. A broken line does not end a job.
    config, alphas = asked_of(recipe, options)
    names, n_broken = config.expert_names, 0

    def broken(where: str, why: object) -> None:
        nonlocal n_broken
        n_broken += 1
        say(f"{job.input}, {where}: {why}")

    if job.input is None:
        items = [Item(line, prompt, alphas, options.negative_prompt) for line, prompt in enumerate(prompts, start=1)]
    else:
        items, rows = read_items(lines, names, alphas, options.negative_prompt)
        for row in rows:
            broken(row.where, row.broken)
        if not items and not rows:
            raise ProxyTuneError(f"{job.input} holds no prompts")
    top_k = job.trace_top_k or TOP_K if job.trace is not None or job.explain else None
    asked = {name: value for name, value in vars(options).items() if name not in ("alpha", "combine", "gate")}
    said = {"sampling": vars(sampling), **asked, "dtype": loading.dtype}
    runs = fingerprint(config, said), fingerprint(config, {**said, "trace_top_k": top_k})

    with _files(job, items, runs, names) as (sink, traces, remaining):
        if not remaining:
            if n_broken:
                raise typer.Exit(FAILED)
            return
        model, tokenizer = load_model(config, loading)
        encoded = []
        for item in remaining:
            try:
                shown = {**options.shown, "negative_prompt": item.negative_prompt}
                encoded.append((item, encode(model, tokenizer, item.prompt, **shown)))
            except ProxyTuneError as error:
                if job.input is None:
                    raise
                broken(item.where, error)
        streamed = sink is None and not job.json and len(items) == 1 and sys.stdout.isatty()
        batches = answer_batches(
            model,
            tokenizer,
            [prompt for _, prompt in encoded],
            [item.alphas for item, _ in encoded],
            rows=[item.line for item, _ in encoded],
            batch_size=job.batch_size,
            max_new_tokens=options.max_new_tokens,
            sampling=sampling,
            streamer=Printer(tokenizer, write_out) if streamed else None,
            trace_top_k=top_k,
        )
        answered_items, text_of, remote = (item for item, _ in encoded), token_texts(tokenizer), []
        with progress_bar(len(encoded), sink is not None or not sys.stdout.isatty()) as advance:
            for made in batches:
                pairs = list(zip(made, answered_items))
                if traces is not None:  # before the results, so that every finished answer has its trace
                    traces.record(pairs, text_of)
                if sink is not None:
                    sink.record(pairs)
                else:
                    _show(pairs, names, tokenizer, job, several=len(items) > 1, streamed=streamed)
                remote += [one for one in made if one.way is not None]
                advance(len(made))
        if streamed and made[0].finish == "length" and len(made[0].tokens) < options.max_new_tokens:
            say("the shortest member's context is full")
    _say_asked(remote)
    if sink is not None:
        say(f"wrote {len(encoded)} answers to {job.output}")
    if n_broken:
        say(f"{n_broken} lines could not be answered")
        raise typer.Exit(FAILED)


def _prompts(prompts: list[str] | None, job: JobOptions) -> list[str]:
    """The prompts on the command line or, where neither they nor a file are given, the one on stdin."""
    if not prompts and job.input is None and not sys.stdin.isatty():
        prompts = [sys.stdin.read().rstrip("\n")]
        if not prompts[0].strip():
            raise ProxyTuneError("there is no prompt: give one as an argument, on stdin, or many with --input FILE")
    if bool(prompts) == (job.input is not None):
        raise ProxyTuneError("give either prompts or --input FILE")
    if any(not prompt.strip() for prompt in prompts or []):
        raise ProxyTuneError("the prompt is empty")
    return prompts or []


@contextlib.contextmanager
def _files(
    job: JobOptions, items: list[Item], runs: tuple[str, str], names: Sequence[str]
) -> Iterator[tuple[Output | None, TraceFile | None, list[Item]]]:
    """The files of the answers and of their traces, and the items that have no answer yet. A finished file is not
    opened.

    Args:
        runs: the fingerprints of the job and of its traces.
    """
    from proxytune.answers.batch import Output
    from proxytune.answers.traces import TraceFile

    sink = None if job.output is None else Output(job.output, items, runs[0], names).read()
    traces, remaining = None, items
    if job.trace is not None:
        traces = TraceFile(job.trace, items, None if sink is None else runs[1], names).read()
        if sink is not None:
            traces.refuse_missing(sink.done, sink.path)
    with contextlib.ExitStack() as stack:
        if sink is not None:
            stack.enter_context(resumable(f"the answers so far are kept in {sink.path}"))
            if sink.remaining or not sink.path.exists():
                stack.enter_context(sink)
            remaining = sink.remaining
        if traces is not None and remaining:
            stack.enter_context(traces)
        if len(remaining) < len(items):
            say(f"{len(items) - len(remaining)} of {len(items)} prompts are already done in {job.output}")
        yield sink, traces, remaining


def _show(
    pairs: Sequence[tuple[Answer, Item]],
    names: Sequence[str],
    tokenizer: Any,
    job: JobOptions,
    *,
    several: bool,
    streamed: bool,
) -> None:
    """Print answers: as JSON lines, or as text; ``several`` have their prompts above them."""
    from proxytune.analysis.explain import explain_answer
    from proxytune.answers.batch import result
    from proxytune.answers.journal import json_line

    if job.json or job.input is not None:
        write_out("".join(json_line(result(item, one, names)) for one, item in pairs))
        return
    for one, item in pairs:
        if several:
            write_out(f"> {item.prompt}\n{one.text}\n\n")
        else:
            write_out("\n" if streamed else f"{one.text}\n")
        if job.explain:
            write_out("" if several else "\n")
            show_explanation(explain_answer(item.prompt, one, names, item.alphas, tokenizer))


def _say_asked(answers: Sequence[Answer]) -> None:
    """Say what a base behind an API was asked for its answers, and what is known of them."""
    n_asked = sum(one.calls or 0 for one in answers)
    bounds = [bound for one in answers for bound in one.tv_bound or ()]
    if bounds:
        say(
            "tokens were drawn from those that the base's server names: their distribution is at most "
            f"{max(bounds):.3f} from the mixture's (total variation), {sum(bounds) / len(bounds):.3f} on average; the "
            f"server was asked {n_asked} times"
        )
    elif n_asked:
        n_certain, n_written = sum(sum(one.certified or ()) for one in answers), sum(len(one.tokens) for one in answers)
        say(
            f"{n_certain} of {n_written} tokens are certain to be those of the whole mixture; the base's server was "
            f"asked {n_asked} times"
        )


def serve(
    context: typer.Context,
    recipe: Recipe,
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="transformers|vllm",
            help="Which server to run: that of transformers or that of vLLM. Required.",
            show_default=False,
        ),
    ] = "",
    draft: Annotated[
        str | None,
        typer.Option("--draft", metavar="EXPERT", help="With vLLM: the expert that drafts for the mixture."),
    ] = None,
    draft_tokens: Annotated[
        int | None,
        typer.Option(
            "--draft-tokens", metavar="N", min=1, help="With --draft: number of tokens per draft, 4 by default."
        ),
    ] = None,
    only_print: Annotated[bool, typer.Option("--print", help="Print the command and exit.")] = False,
) -> None:
    """Serve a recipe with an OpenAI-compatible server: print the exact command and run it.

    All other options (--port 8000 …) are passed on to the server. A request sets its alpha in
    "generation_config": "{\\"alpha\\": 0.5}" with transformers, and in "vllm_xargs": {"alpha": 0.5} with vLLM.

    Examples:

        proxytune serve demo --engine transformers --port 8000
        proxytune serve mine --engine vllm --tensor-parallel-size 2
        proxytune serve mine --engine vllm --draft expert --print
    """
    if engine not in ("transformers", "vllm"):
        raise ProxyTuneError("give --engine transformers or --engine vllm")
    if draft is None and draft_tokens is not None:
        raise ProxyTuneError("--draft-tokens needs --draft")
    if engine == "transformers":
        if draft is not None:
            raise ProxyTuneError("--draft is for vLLM; with transformers, experts draft by themselves where that pays")
        if not only_print:
            need("transformers' server", "serve", "fastapi", "uvicorn", "openai")
    import shlex

    from proxytune.recipe.store import load_recipe
    from proxytune.vllm.command import serve_command

    config = load_recipe(recipe)
    if engine == "transformers":
        program = "import proxytune; from transformers.cli.transformers import main; main()"
        words = [sys.executable, "-c", program, "serve", str(config.name_or_path), *context.args]
    else:
        words = serve_command(config, context.args, name=recipe, draft=draft, draft_tokens=draft_tokens)
    if only_print:
        typer.echo(shlex.join(words))
        return
    say(shlex.join(words))
    os.execvp(words[0], words)


def demo(
    task: Annotated[
        Literal["facts", "word-problems"],
        typer.Option(metavar="TASK", help="What to ask: facts (general knowledge), or word-problems."),
    ] = "facts",
    problems: Annotated[
        str | None,
        typer.Option(
            metavar="N|all", help="Number of problems, or all of the test set; by default what fits into a minute."
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Seed: which word problems are drawn, or the order of the facts.")
    ] = 0,
    models_dir: Annotated[
        bool,
        typer.Option("--models-dir", help="Print the directory of the demo's models and recipes, and exit."),
    ] = False,
    *,
    results: ResultOptions,
) -> None:
    """Show proxy-tuning at work on a small real model, for a minute.

    The base, the expert alone, controls and the proxy-tuned base answer the same held-out problems. You see some of the
    answers side by side, and a table of how many are right. The run ends when the evidence is clear or the minute is
    over. With --problems N or all it asks that many, and adds more controls.

    Task facts: questions of general knowledge, answered in a house format with made-up words. The base has the
    knowledge, the small expert has the format. Task word-problems: one step of arithmetic, in a format of its own.

    Examples:

        proxytune demo
        proxytune demo --problems all
        proxytune demo --task word-problems --problems 100 --seed 1
        proxytune demo --models-dir
    """
    began = time.monotonic()  # the imports are part of the minute
    asked = _how_many(problems)
    if models_dir:
        from proxytune.demo.assets import materialize

        write_out(f"{materialize()}\n")
        return
    from rich.console import Console

    from proxytune.demo.run import run_demo
    from proxytune.demo.tasks import TASKS

    # With --json what is shown goes to stderr, for people: the JSON has stdout for itself.
    hidden = is_quiet() or (results.json and not sys.stderr.isatty())
    console = Console(stderr=results.json, quiet=hidden, highlight=False)
    shown = run_demo(asked, seed, results.output, task=TASKS[task], console=console, began=began)
    results.give(shown.to_json(), shown.table(), shown.notes())
    if not results.json and not is_quiet():  # on lines of their own, however long, so that they can be copied
        write_out("\n".join(["", "Try next:", *(f"    {command}" for command in shown.try_next()), ""]))


def _how_many(text: str | None) -> int | Literal["all"] | None:
    """``--problems``: a number or all."""
    if text is None:
        return None
    if text == "all":
        return "all"
    if not text.isdecimal():
        raise ProxyTuneError(f"--problems takes a number from 1 on, or all, not {text!r}")
    return int(text)
