"""The command line: ``proxytune new``, ``train``, ``check``, ``generate``, ``chat``, ``serve``, ``demo``, ``eval`` …

Thin on purpose: each command reads its options, calls the module that does the work, and shows what comes back.
Results go to stdout, everything else to stderr. What was raised on purpose is told in one sentence, with status 2.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

from proxytune.errors import AlphaError, ProxyTuneError
from proxytune.presets import PRESETS
from proxytune.training.command import train

if TYPE_CHECKING:
    from proxytune.batch import Item
    from proxytune.bench import BenchResult
    from proxytune.chat import Conversation
    from proxytune.check import Report
    from proxytune.config import ProxyTuneConfig
    from proxytune.evaluation.scoring import Scores
    from proxytune.generation import Sampling
    from proxytune.modeling import ProxyTunedForCausalLM
    from proxytune.plan import Plan

__all__ = ["app", "main"]

FAILED = 2


class Commands(TyperGroup):
    """The commands, with every foreseen failure told in one sentence."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            from transformers.utils import logging  # within reach of Ctrl-C: it takes seconds

            logging.disable_progress_bar()
            value = super().invoke(ctx)
            sys.stdout.flush()  # here, where a full disk can still be told
            return value
        except ProxyTuneError as error:
            fail(str(error))
        except BrokenPipeError:  # the reader has seen enough, as in `| head`
            drop_stdout()
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(130) from None
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError":  # torch's
                raise
            fail("out of memory; `proxytune check` says what a recipe needs, --dtype and --device-map change it")
        except OSError as error:
            drop_stdout()
            where = f"{error.filename}: " if error.filename else ""
            kept = "; what was written before is kept" if where and error.errno == errno.ENOSPC else ""
            fail(f"{where}{error.strerror or error}{kept}")


app = typer.Typer(
    cls=Commands,
    help="Steer a language model at decoding time with two small ones: logits = base + alpha * (expert - anti_expert).",
    epilog="RECIPE is a directory made by `proxytune new`, a hub id, or the word demo for the embedded recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line (the entry point ``proxytune``)."""
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")  # their advice on options that we set ourselves is not the user's concern
    app()


# -- options that several commands take -----------------------------------------------------------------------
Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Recipe directory, hub id, or `demo`.", show_default=False)
]
Alpha = Annotated[
    list[str] | None,
    typer.Option(
        "--alpha",
        "-a",
        metavar="NUMBER|NAME=NUMBER",
        help="Strength of steering in place of the recipe's, for all experts or for one; repeatable.",
        show_default=False,
    ),
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", "-n", metavar="N", min=1, help="Most new tokens of an answer.")
]
Temperature = Annotated[
    float | None,
    typer.Option(
        metavar="T", help="Sample at this temperature; 0 is greedy.", rich_help_panel="Sampling", show_default=False
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        metavar="P",
        help="Sample from the likeliest tokens that sum to P.",
        rich_help_panel="Sampling",
        show_default=False,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        "--top-k",
        metavar="K",
        help="Sample from the K likeliest tokens.",
        rich_help_panel="Sampling",
        show_default=False,
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        "--min-p",
        metavar="P",
        help="Sample from tokens at least P times as likely as the likeliest.",
        rich_help_panel="Sampling",
        show_default=False,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="float32|float16|bfloat16|auto",
        help="Dtype of members whose entry in the recipe sets none; the checkpoint's by default.",
        rich_help_panel="Loading",
        show_default=False,
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        metavar="auto|DEVICE",
        help="Where members go whose entry sets none: auto, cpu, cuda:1.",
        rich_help_panel="Loading",
        show_default=False,
    ),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write everything there too.", show_default=False)
]
Pack = Annotated[
    bool,
    typer.Option(
        "--pack",
        help="Lay the weights out for the CPU first: several times faster there, for float32 and bfloat16.",
        rich_help_panel="Speed",
    ),
]
Speculate = Annotated[
    str,
    typer.Option(
        metavar="auto|off|N",
        help="Let an expert draft N tokens ahead, which the base then verifies at once: where it pays, never, or "
        "always. Greedy answers stay the same; sampled ones are never drafted for here.",
        rich_help_panel="Speed",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that the members bring along.", rich_help_panel="Loading"),
]
System = Annotated[
    str | None, typer.Option(metavar="TEXT", help="System prompt for the recipe's chat template.", show_default=False)
]


def _version(wanted: bool) -> None:
    if wanted:
        from proxytune import __version__

        typer.echo(f"proxytune {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


# -- new ------------------------------------------------------------------------------------------------------
def _panel(title: str, *names: str, **options: Any) -> Any:
    return typer.Option(*names, rich_help_panel=title, show_default=False, **options)


@app.command()
def new(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory to be made.", show_default=False)],
    base: Annotated[str | None, _panel("Members", "--base", metavar="MODEL", help="The model that is steered.")] = None,
    expert: Annotated[
        str | None, _panel("Members", "--expert", metavar="MODEL", help="The model it is steered towards.")
    ] = None,
    anti_expert: Annotated[
        str | None, _panel("Members", "--anti-expert", metavar="MODEL", help="What the expert was before it was tuned.")
    ] = None,
    alpha: Annotated[
        float | None, _panel("Mixing", "--alpha", "-a", metavar="NUMBER", help="Strength; 1 by default.")
    ] = None,
    name: Annotated[
        str | None, _panel("Mixing", "--name", metavar="NAME", help="The expert's name; `expert` by default.")
    ] = None,
    add_expert: Annotated[
        list[str] | None,
        _panel(
            "Members",
            "--add-expert",
            metavar="NAME=EXPERT[,FIELD=VALUE…]",
            help="One more expert; fields: anti, alpha, adapter, and prompt, dtype, revision (anti-… for the "
            "anti-expert). With no EXPERT the adapter is on the anti-expert. Repeatable.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        _panel(
            "Members",
            "--preset",
            metavar="NAME",
            help=f"A known trio, whose parts other options replace: {', '.join(PRESETS)}.",
        ),
    ] = None,
    expert_adapter: Annotated[
        str | None,
        _panel(
            "Members",
            "--expert-adapter",
            metavar="PATH",
            help="LoRA adapter on the expert, or, without one, on the anti-expert.",
        ),
    ] = None,
    base_revision: Annotated[
        str | None, _panel("Members", "--base-revision", metavar="REVISION", help="The base's branch, tag or commit.")
    ] = None,
    expert_revision: Annotated[
        str | None, _panel("Members", "--expert-revision", metavar="REVISION", help="The expert's.")
    ] = None,
    anti_expert_revision: Annotated[
        str | None, _panel("Members", "--anti-expert-revision", metavar="REVISION", help="The anti-expert's.")
    ] = None,
    base_prompt: Annotated[
        str | None,
        _panel(
            "Prompts", "--base-prompt", metavar="raw|chat|TEXT", help="What the base is shown; TEXT holds {prompt}."
        ),
    ] = None,
    expert_prompt: Annotated[
        str | None, _panel("Prompts", "--expert-prompt", metavar="raw|chat|TEXT", help="The expert's.")
    ] = None,
    anti_expert_prompt: Annotated[
        str | None, _panel("Prompts", "--anti-expert-prompt", metavar="raw|chat|TEXT", help="The anti-expert's.")
    ] = None,
    system: Annotated[
        str | None,
        _panel("Prompts", "--system", metavar="TEXT", help="System prompt of the members whose prompt is chat."),
    ] = None,
    response_prefix: Annotated[
        str | None,
        _panel(
            "Prompts",
            "--response-prefix",
            metavar="TEXT",
            help="Words that answers begin with, such as 'Answer:', moved behind the members' own prompts.",
        ),
    ] = None,
    base_dtype: Annotated[
        str | None, _panel("Loading", "--base-dtype", metavar="DTYPE", help="The base's: float32, bfloat16 …")
    ] = None,
    expert_dtype: Annotated[
        str | None, _panel("Loading", "--expert-dtype", metavar="DTYPE", help="The expert's.")
    ] = None,
    anti_expert_dtype: Annotated[
        str | None, _panel("Loading", "--anti-expert-dtype", metavar="DTYPE", help="The anti-expert's.")
    ] = None,
    base_device_map: Annotated[
        str | None, _panel("Loading", "--base-device-map", metavar="DEVICE", help="Where it goes: auto, cuda:1.")
    ] = None,
    expert_device_map: Annotated[
        str | None, _panel("Loading", "--expert-device-map", metavar="DEVICE", help="The expert.")
    ] = None,
    anti_expert_device_map: Annotated[
        str | None, _panel("Loading", "--anti-expert-device-map", metavar="DEVICE", help="The anti-expert.")
    ] = None,
    plausibility: Annotated[
        float | None,
        _panel("Mixing", "--plausibility", metavar="P", help="Choose only tokens with p_base >= P * max p_base."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write into a directory that is not empty.")] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Do not reach the hub; leave out what is not cached.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make a recipe: a model directory that names its members and how they mix.

    A member is a hub id, a local directory or a .gguf file. Its weights stay where they are; the base's config,
    tokenizer and generation config are copied. Relative paths are kept relative to DIR.
    """
    from proxytune.compose import Given, compose, configure

    config = configure(
        preset=preset,
        base=Given(base, base_revision, base_dtype, base_prompt, base_device_map),
        expert=Given(expert, expert_revision, expert_dtype, expert_prompt, expert_device_map),
        anti_expert=Given(
            anti_expert, anti_expert_revision, anti_expert_dtype, anti_expert_prompt, anti_expert_device_map
        ),
        expert_adapter=expert_adapter,
        name=name,
        alpha=alpha,
        add_expert=add_expert or (),
        system=system,
        response_prefix=response_prefix,
        plausibility=plausibility,
    )
    notes = compose(config, directory, force=force, offline=offline, trust_remote_code=trust_remote_code)
    for note in notes:
        say(f"note: {note}")
    say(f"wrote {directory}; whether it works is told by: proxytune check {directory}")


app.command()(train)


# -- check ----------------------------------------------------------------------------------------------------
@app.command()
def check(
    recipe: Recipe,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Say whether a recipe works and what memory it needs; reads configs and tokenizers alone.

    The exit status is 0 if it works and 2 if it does not.
    """
    from proxytune.check import check_recipe
    from proxytune.members import Loading
    from proxytune.recipe import load_recipe

    report = check_recipe(load_recipe(recipe), Loading(dtype=_dtype(dtype), trust_remote_code=trust_remote_code))
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
    else:
        show_report(report, Console())
    if not report.works:
        raise typer.Exit(FAILED)


def show_report(report: Report, console: Console) -> None:
    """Print what ``check`` found: a table of the members, the totals, and what is wrong."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("member", overflow="fold")
    table.add_column("model", overflow="fold")
    for heading in ("params", "dtype", "weights", "KV/token", "context"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in report.members:
        model = str(one.model) + (f" + {one.adapter}" if one.adapter else "")
        table.add_row(
            one.name,
            model + ("" if one.prompt == "raw" else f" [{one.prompt} prompt]").replace("[", "\\["),
            count(one.parameters),
            one.dtype.replace("bfloat", "bf").replace("float", "f"),
            size(one.weight_bytes) if not one.shares_with else f"+{size(one.weight_bytes)}",
            "unknown" if one.kv_bytes_per_token is None else size(one.kv_bytes_per_token),
            "any" if one.context is None else f"{one.context:,}",
        )
    if report.members:
        console.print(table)
        console.print()
    for one in report.members:
        if one.shares_with:
            console.print(f"{one.name} shares its weights with {one.shares_with}", highlight=False)
        if one.sliding_window:
            console.print(f"{one.name} has layers that keep only {one.sliding_window:,} tokens", highlight=False)
    if report.works:
        memory = f"weights {size(report.weight_bytes)}"
        if report.kv_bytes_per_token is not None:
            memory += f", cache {size(report.kv_bytes_per_token)} a token"
            if report.context is not None:
                memory += f" ({size(report.kv_bytes_per_token * report.context)} for the whole context)"
        console.print(f"memory: {memory}", highlight=False)
        if report.context is not None:
            shortest = next(one.name for one in report.members if one.context == report.context)
            console.print(f"context: {report.context:,} tokens, set by {shortest}", highlight=False)
        alpha = ", ".join(f"{name} {value:g}" for name, value in report.alpha.items())
        console.print(f"alpha: {alpha}", highlight=False)
    for note in report.notes:
        console.print(f"[yellow]note[/yellow] {note}", highlight=False)
    for problem in report.problems:
        console.print(f"[red]wrong[/red] {problem}", highlight=False)
    console.print("[green]the recipe works[/green]" if report.works else "[red]the recipe does not work[/red]")


# -- generate -------------------------------------------------------------------------------------------------
@app.command()
def generate(
    recipe: Recipe,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="What is to be continued.", show_default=False)
    ] = None,
    alpha: Alpha = None,
    max_new_tokens: MaxNewTokens = 256,
    chat_: Annotated[
        bool, typer.Option("--chat", help="Put each prompt into the recipe's chat template, as the user's turn.")
    ] = False,
    system: System = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Annotated[
        int,
        typer.Option(
            metavar="N", help="Seed of the sampling; each prompt draws by its place.", rich_help_panel="Sampling"
        ),
    ] = 0,
    input_: Annotated[
        str | None,
        typer.Option(
            "--input",
            "-i",
            metavar="FILE",
            help='JSON lines {"prompt": ..., "alpha": ...} instead of PROMPTs; - is stdin. Other fields are passed on.',
            rich_help_panel="Jobs",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write JSON lines there; what an interrupted run has left is kept, and the rest is done.",
            rich_help_panel="Jobs",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", metavar="N", min=1, help="Prompts at once.", rich_help_panel="Jobs")
    ] = 8,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a prompt, in order.", rich_help_panel="Jobs")
    ] = False,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    trust_remote_code: TrustRemoteCode = False,
    speculate: Speculate = "auto",
    pack: Pack = False,
) -> None:
    """Continue prompts, steered.

    Greedy unless --temperature, --top-p, --top-k or --min-p is given; what is not given of these is off. A single
    prompt is streamed to a terminal.

    JSON objects have the fields prompt, text, tokens (the new ids, with the end-of-sequence token where the model
    chose it, without padding), alpha (a number, or an object by name where there are several experts) and finish
    (stop, or length where the limit or a member's context ended it), in a job also line (the input's, from 1) and
    run (which recipe and options made it). A line that cannot be read is reported by its number, the others are
    answered, and the exit status is 2.
    """
    from proxytune.batch import Item, Output, fingerprint, read_items, result
    from proxytune.config import resolve_alpha
    from proxytune.generation import Printer, answer, batches, encode
    from proxytune.journal import json_line
    from proxytune.recipe import load_recipe

    if bool(prompts) == (input_ is not None):
        raise ProxyTuneError("give either prompts or --input FILE")
    if system is not None and not chat_:
        raise ProxyTuneError("--system needs --chat: a raw prompt has no place for it")
    sampling = _sampling(temperature, top_p, top_k, min_p, seed)
    drafts = _drafts(speculate, sampling)
    config = load_recipe(recipe)
    names = [expert.name for expert in config.expert_list]
    alphas = resolve_alpha(parse_alpha(alpha), names, config.alphas)
    broken = 0
    if input_ is None:
        items = [Item(line, prompt, alphas) for line, prompt in enumerate(prompts or [], start=1)]
        if any(not item.prompt.strip() for item in items):
            raise ProxyTuneError("the prompt is empty")
    else:
        if output is not None and input_ != "-" and output.exists() and output.samefile(input_):
            raise ProxyTuneError("--input and --output are the same file")
        items, unread = read_items(_lines(input_), names, alphas)
        for bad in unread:
            say(f"{input_}, line {bad.line}: {bad.reason}")
        broken = len(unread)
    settings = {"sampling": vars(sampling), "max_new_tokens": max_new_tokens, "chat": chat_, "system": system}
    run = fingerprint(config, {**settings, "dtype": dtype})

    with contextlib.ExitStack() as stack:
        remaining, sink = items, None
        if output is not None:
            sink = stack.enter_context(Output(output, items, run, names))
            remaining = sink.remaining
            if len(remaining) < len(items):
                say(f"{len(items) - len(remaining)} of {len(items)} prompts are done already in {output}")
        if not remaining:
            if broken:
                raise typer.Exit(FAILED)
            return
        model, tokenizer = _load(config, dtype, device_map, trust_remote_code, drafts, pack)
        encoded = []
        for item in remaining:
            try:
                encoded.append((item, encode(model, tokenizer, item.prompt, chat=chat_, system=system)))
            except ProxyTuneError as error:
                if input_ is None:
                    raise
                say(f"{input_}, line {item.line}: {error}")
                broken += 1
        streamed = sink is None and not as_json and len(items) == 1 and sys.stdout.isatty()
        advance = stack.enter_context(_progress(len(encoded), sink is not None or not sys.stdout.isatty()))
        for batch in batches(encoded, batch_size):
            made = answer(
                model,
                tokenizer,
                [prompt for _, prompt in batch],
                [item.alphas for item, _ in batch],
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                rows=[item.line for item, _ in batch],
                streamer=Printer(tokenizer, _write) if streamed else None,
            )
            pairs = [(item, one) for (item, _), one in zip(batch, made)]
            if sink is not None:
                sink.append([result(item, one, names, numbered=True, run=run) for item, one in pairs])
            else:
                for item, one in pairs:
                    if as_json or input_ is not None:
                        _write(json_line(result(item, one, names, numbered=input_ is not None)))
                    else:
                        _show_answer(item, "" if streamed else one.text, alone=len(items) == 1)
            advance(len(batch))
        if streamed and made[0].finish == "length" and len(made[0].tokens) < max_new_tokens:
            say("the shortest member's context is full")
    if sink is not None:
        say(f"wrote {len(encoded)} answers to {output}")
    if broken:
        say(f"{broken} lines could not be answered")
        raise typer.Exit(FAILED)


# -- chat -----------------------------------------------------------------------------------------------------
CHAT_HELP = """\
/alpha NUMBER        steer that strongly from now on (with several experts also NAME=NUMBER)
/alpha               say how strongly it steers
/reset               forget the conversation
/help                this list
/quit                leave (so does Ctrl-D)
Ctrl-C stops an answer."""


@app.command()
def chat(
    recipe: Recipe,
    alpha: Alpha = None,
    max_new_tokens: MaxNewTokens = 512,
    system: System = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Seed of the sampling; by default another each time.", rich_help_panel="Sampling"
        ),
    ] = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    trust_remote_code: TrustRemoteCode = False,
    speculate: Speculate = "auto",
    pack: Pack = False,
) -> None:
    """Talk with a steered model.

    Greedy unless a sampling option is given. The members' caches are kept from turn to turn, except where members
    have prompts of their own. While talking, /alpha 0.5 changes the strength, /reset forgets, /help lists more.
    """
    from proxytune.chat import Conversation
    from proxytune.config import resolve_alpha
    from proxytune.recipe import load_recipe

    sampling = _sampling(
        temperature, top_p, top_k, min_p, int.from_bytes(os.urandom(4), "big") if seed is None else seed
    )
    drafts = _drafts(speculate, sampling)
    config = load_recipe(recipe)
    names = [expert.name for expert in config.expert_list]
    alphas = resolve_alpha(parse_alpha(alpha), names, config.alphas)
    model, tokenizer = _load(config, dtype, device_map, trust_remote_code, drafts, pack)
    conversation = Conversation(
        model, tokenizer, alphas, sampling=sampling, max_new_tokens=max_new_tokens, system=system
    )
    if not tokenizer.chat_template:
        say("the recipe has no chat template, so its base is shown a plain transcript")
    say("/help lists the commands, /quit leaves")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (editing and history at the prompt)
    while True:
        try:
            line = input("\n> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            if sys.stdin.isatty():
                say("")
            return
        if line in ("/quit", "/exit", "/q"):
            return
        if line:
            try:
                take_turn(conversation, line, names)
            except ProxyTuneError as error:
                say(f"error: {error}")


def take_turn(conversation: Conversation, line: str, names: Sequence[str]) -> None:
    """Do what one line of a conversation asks for."""
    from proxytune.config import resolve_alpha

    command, *rest = line.split()
    if command == "/alpha":
        if rest:
            conversation.alphas = resolve_alpha(parse_alpha(rest), names, conversation.alphas)
        say("alpha: " + ", ".join(f"{name} {value:g}" for name, value in zip(names, conversation.alphas)))
    elif command == "/reset":
        conversation.reset()
        say("forgotten")
    elif command == "/help":
        say(CHAT_HELP)
    elif command.startswith("/"):
        say(f"there is no command {command}; /help lists those there are")
    else:
        with interruptible() as stopped:
            made = conversation.say(line, _write, stopped)
        _write("\n")
        if made.finish == "interrupt":
            say("(stopped)")
        elif made.finish == "length":
            say("(cut off: --max-new-tokens, or the context, is used up)")


@contextlib.contextmanager
def interruptible() -> Iterator[Any]:
    """Within it Ctrl-C makes ``stopped()`` true, so that a forward is never torn; a second one interrupts at once."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


# -- serve ----------------------------------------------------------------------------------------------------
@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    recipe: Recipe,
    engine: Annotated[
        str, typer.Option("--engine", metavar="vllm", help="What serves it; vllm.", show_default=False)
    ] = "",
    draft: Annotated[
        str | None,
        typer.Option("--draft", metavar="EXPERT", help="Let this expert draft for the mixture.", show_default=False),
    ] = None,
    draft_tokens: Annotated[
        int, typer.Option("--draft-tokens", metavar="N", min=1, help="Tokens it drafts at a time.")
    ] = 4,
    only_print: Annotated[bool, typer.Option("--print", help="Print the command and leave.")] = False,
) -> None:
    """Serve a recipe with vLLM, as an OpenAI-compatible server: print the exact command, and run it.

    All other options are vLLM's own (--tensor-parallel-size 4, --port 8000 …) and are passed on. A request sets its
    alpha in "vllm_xargs": {"alpha": 0.5}. The server of transformers needs no help: transformers serve RECIPE.
    """
    import shlex

    from proxytune.recipe import load_recipe
    from proxytune.vllm.command import serve_command

    if engine != "vllm":
        raise ProxyTuneError("say --engine vllm (transformers' own server is: transformers serve RECIPE)")
    words = serve_command(load_recipe(recipe), context.args, draft=draft, draft_tokens=draft_tokens)
    if only_print:
        typer.echo(shlex.join(words))
        return
    say(shlex.join(words))
    os.execvp(words[0], words)


# -- demo -----------------------------------------------------------------------------------------------------
@app.command()
def demo(
    problems: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="How many problems; by default what fits about a minute.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Which problems.")] = 0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the counts there too, as JSON.", show_default=False),
    ] = None,
) -> None:
    """Show proxy-tuning at work on a small real model: base, expert and both controls against proxy-tuned."""
    from proxytune.demo import run_demo

    run_demo(problems, seed, json_file)


# -- eval and sweep -------------------------------------------------------------------------------------------
Tasks = Annotated[
    str,
    typer.Option(
        "--tasks", "-t", metavar="NAME,...", help="What is evaluated; see docs/evaluation.md.", show_default=False
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="DIR",
        help="Predictions and results; a run that is there is carried on. By default eval-RECIPE or sweep-RECIPE.",
        show_default=False,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        envvar="PROXYTUNE_DATA",
        help="A file or a folder in place of the hub.",
        rich_help_panel="Data",
        show_default=False,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="So many examples of each task, drawn by --seed; all by default.",
        rich_help_panel="Data",
        show_default=False,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Samples a problem, in tasks that sample; 20 as in the paper by default.",
        rich_help_panel="Data",
        show_default=False,
    ),
]
EvalSeed = Annotated[
    int, typer.Option("--seed", metavar="N", help="Of the examples drawn and of sampling.", rich_help_panel="Data")
]
EvalBatch = Annotated[
    int, typer.Option("--batch-size", "-b", metavar="N", min=1, help="Rows at once.", rich_help_panel="Speed")
]

_judges = "Judges and code"
JudgeNames = Annotated[
    list[str] | None,
    _panel(_judges, "--judge", metavar="DIR|ID", help="A local classifier or language model, as `score` takes it."),
]
JudgeLabel = Annotated[str | None, _panel(_judges, "--judge-label", metavar="NAME", help="Its label that means yes.")]
JudgeUrl = Annotated[
    str | None, _panel(_judges, "--judge-url", metavar="URL", help="An OpenAI-compatible endpoint, with its /v1.")
]
JudgeModels = Annotated[
    list[str] | None,
    _panel(_judges, "--judge-model", metavar="NAME", help="The model there, or an annotator of alpaca_eval."),
]
JudgeChat = Annotated[
    bool, typer.Option("--judge-chat", help="The endpoint has chat completions alone.", rich_help_panel=_judges)
]
JudgeKey = Annotated[
    str, typer.Option("--judge-key", metavar="VARIABLE", help="Where its key is.", rich_help_panel=_judges)
]
Unguarded = Annotated[
    bool,
    typer.Option(
        "--unguarded",
        help="Run generated code even where it cannot be locked up: it may then do what you may do.",
        rich_help_panel=_judges,
    ),
]


def _tasks_dir(wanted: bool) -> None:
    if wanted:
        from proxytune.evaluation import TASK_DIR

        typer.echo(TASK_DIR)
        raise typer.Exit


@app.command("eval")
def evaluate(
    recipe: Recipe,
    tasks: Tasks,
    arms: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="base, anti_expert, expert, proxy_tuned, tuned, base_few_shot, mean_logits; all but tuned by default.",
            show_default=False,
        ),
    ] = None,
    tuned: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="A directly tuned model, for the gap closed.", show_default=False),
    ] = None,
    alpha: Alpha = None,
    out: Out = None,
    json_file: JsonFile = None,
    data: Data = None,
    limit: Limit = None,
    samples: Samples = None,
    seed: EvalSeed = 0,
    batch_size: EvalBatch = 8,
    judge: JudgeNames = None,
    judge_label: JudgeLabel = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModels = None,
    judge_chat: JudgeChat = False,
    judge_key: JudgeKey = "OPENAI_API_KEY",
    unguarded: Unguarded = False,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    trust_remote_code: TrustRemoteCode = False,
    speculate: Speculate = "auto",
    pack: Pack = False,
    tasks_dir: Annotated[
        bool,
        typer.Option(
            "--tasks-dir",
            callback=_tasks_dir,
            is_eager=True,
            help="Print where the tasks lie, for `lm_eval --include_path`, and leave.",
        ),
    ] = False,
) -> None:
    """Evaluate a recipe: base, experts alone, proxy-tuned and controls on the same prompts.

    Each prediction is written as it comes to DIR/TASK/ARM.jsonl, and what is there is not made again: a killed run goes
    on where it was, and arms and tasks can be added. DIR gets results.json, results.md, results.png and results.svg
    with intervals, paired tests, the gap closed and examples a second; the tables are printed.
    """
    from proxytune.evaluation.results import results_table
    from proxytune.evaluation.run import evaluate as run

    config, settings = _evaluation(
        recipe,
        tasks,
        arms,
        tuned,
        alpha,
        data,
        limit,
        samples,
        seed,
        batch_size,
        dtype,
        device_map,
        trust_remote_code,
        speculate,
        pack,
    )
    place = out or _out("eval", recipe)
    scoring = _scoring(place, data, judge, judge_label, judge_url, judge_model, judge_chat, judge_key, unguarded)
    with _judged(place), _share_bar() as bar:
        results = run(config, settings, place, scoring=scoring, progress=_counted(bar), note=say)
    typer.echo(results_table(results), nl=False)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=2) + "\n", "utf-8")


@app.command()
def sweep(
    recipe: Recipe,
    tasks: Tasks,
    alpha: Annotated[
        str,
        typer.Option(
            "--alpha", "-a", metavar="[NAME=]START:STOP:STEP", help="The alphas, or A,B,...; of one expert, or of all."
        ),
    ] = "0:2:0.25",
    out: Out = None,
    json_file: JsonFile = None,
    data: Data = None,
    limit: Limit = None,
    samples: Samples = None,
    seed: EvalSeed = 0,
    batch_size: EvalBatch = 8,
    judge: JudgeNames = None,
    judge_label: JudgeLabel = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModels = None,
    judge_chat: JudgeChat = False,
    judge_key: JudgeKey = "OPENAI_API_KEY",
    unguarded: Unguarded = False,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    trust_remote_code: TrustRemoteCode = False,
    pack: Pack = False,
) -> None:
    """Evaluate a recipe at several alphas: a table and a plot of the curve, with intervals.

    Each prompt is read once for all alphas. Predictions go to DIR/TASK/alpha=A.jsonl, and a killed run goes on where
    it was; alphas can be added.
    """
    from proxytune.evaluation.results import sweep_table
    from proxytune.evaluation.run import alpha_range
    from proxytune.evaluation.run import sweep as run

    expert, values = alpha_range(alpha)
    config, settings = _evaluation(
        recipe,
        tasks,
        None,
        None,
        None,
        data,
        limit,
        samples,
        seed,
        batch_size,
        dtype,
        device_map,
        trust_remote_code,
        "off",
        pack,
    )
    place = out or _out("sweep", recipe)
    scoring = _scoring(place, data, judge, judge_label, judge_url, judge_model, judge_chat, judge_key, unguarded)
    with _judged(place), _share_bar() as bar:
        results = run(config, settings, values, place, expert=expert, scoring=scoring, progress=_counted(bar), note=say)
    typer.echo(sweep_table(results), nl=False)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=2) + "\n", "utf-8")


def _evaluation(
    recipe: str,
    tasks: str,
    arms: str | None,
    tuned: str | None,
    alpha: Sequence[str] | None,
    data: str | None,
    limit: int | None,
    samples: int | None,
    seed: int,
    batch_size: int,
    dtype: str | None,
    device_map: str | None,
    trust_remote_code: bool,
    speculate: str,
    pack: bool,
) -> tuple[ProxyTuneConfig, Any]:
    """What ``eval`` and ``sweep`` evaluate: the recipe, and the settings as the run takes them."""
    from proxytune.compose import device_map as parsed
    from proxytune.config import resolve_alpha
    from proxytune.evaluation import EVAL_TASKS, check_tasks
    from proxytune.generation import Sampling
    from proxytune.recipe import load_recipe

    names = check_tasks(_parts(tasks), EVAL_TASKS)
    try:
        from proxytune.evaluation.run import Settings
    except ImportError as error:
        raise ProxyTuneError(f"evaluating needs {error.name}: pip install 'proxytune[eval]'") from error
    config = load_recipe(recipe)
    experts = [expert.name for expert in config.expert_list]
    settings = Settings(
        names,
        arms=None if arms is None else _parts(arms),
        tuned=tuned,
        limit=limit,
        samples=samples,
        seed=seed,
        batch_size=batch_size,
        alphas=resolve_alpha(parse_alpha(alpha), experts, config.alphas),
        data=data,
        dtype=_dtype(dtype),
        device_map=parsed(device_map),
        trust_remote_code=trust_remote_code,
        pack=pack,
        speculate=_drafts(speculate, Sampling()),
    )
    return config, settings


def _scoring(
    out: Path,
    data: str | None,
    names: list[str] | None,
    label: str | None,
    url: str | None,
    models: list[str] | None,
    chat: bool,
    key: str,
    unguarded: bool,
) -> Any:
    """What each task's scorer takes besides the predictions."""
    from proxytune.evaluation.results import JUDGED
    from proxytune.evaluation.scoring import CODE

    def options(task: str) -> dict[str, Any]:
        if task in CODE:
            from proxytune.evaluation.code import limits_of
            from proxytune.evaluation.tasks.utils import problems_file

            # pass@10 first, the paper's; where there are fewer samples it is left out.
            return {"data": problems_file(task, data), "ks": (10, 1), "limits": limits_of(task), "unguarded": unguarded}
        if task not in JUDGED or not (names or url or models):
            return {}
        from proxytune.evaluation.judges import choose

        kept = out / task / "verdicts.jsonl"
        judge = choose(
            task, names or (), url=url, models=models or (), key_variable=key, chat=chat, label=label, kept=kept
        )
        return {"judge": judge, "kept": kept}

    return options


@contextlib.contextmanager
def _judged(out: Path) -> Iterator[None]:
    """A judge that does not answer ends the command with status 3; everything until then is kept."""
    try:
        yield
    except ProxyTuneError as error:
        if type(error).__name__ != "JudgeDown":
            raise
        say(f"error: {error}; all until here is kept in {out}, and the same command goes on from there")
        raise typer.Exit(3) from None


def _out(command: str, recipe: str) -> Path:
    """Where a run goes by default."""
    return Path(f"{command}-{Path(recipe.rstrip('/')).name or 'recipe'}")


def _counted(bar: Any) -> Any:
    return lambda said, done, total: bar(f"{said} {done}/{total}", done / max(total, 1))


# -- bench ----------------------------------------------------------------------------------------------------
@app.command()
def bench(
    recipe: Recipe,
    batch: Annotated[str, typer.Option(metavar="N,...", help="Batch sizes.")] = "1,4,16",
    lengths: Annotated[
        str, typer.Option(metavar="PROMPT/OUTPUT,...", help="Tokens of the prompt and new tokens.")
    ] = "64/128,8/512,512/8",
    arms: Annotated[
        str, typer.Option(metavar="NAME,...", help="What is compared; ratios need base and plain_loop.")
    ] = "base,base_lookup,plain_loop,composite,shared,speculative",
    options: Annotated[
        str,
        typer.Option(
            metavar="NAME+NAME,...",
            help="Sets of member options, each on for every arm, the base alone too: a dtype (auto is the recipe's).",
        ),
    ] = "auto",
    speculate: Annotated[
        str,
        typer.Option(
            metavar="auto|N", help="What the arm speculative asks; a number of drafts copies none from the text."
        ),
    ] = "auto",
    temperature: Annotated[
        float | None,
        typer.Option(metavar="T", help="Sample in all arms, with seeds; greedy by default.", show_default=False),
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Rounds, of which the median is told.")] = 5,
    minutes: Annotated[
        float,
        typer.Option(
            metavar="M",
            min=0,
            help="Cases beyond it get fewer rounds or none, which is told; 64/128 at batch 1 always has its own. "
            "0 is no limit.",
        ),
    ] = 18,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text that prompts are cut from; the demo's held-out problems by default.",
            show_default=False,
        ),
    ] = None,
    json_file: JsonFile = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the prompts, and of the order within a round.")] = 0,
    device_map: DeviceMap = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure what steering costs: against the base alone and against the plain three-forward loop, in one run.

    All arms are greedy unless --temperature is given, read the same prompts and write the same number of tokens (end
    tokens are put off until then, so that long outputs repeat themselves); they take turns round by round.
    The arms: base, base_lookup (with prompt-lookup drafts), plain_loop (three models, three forwards a token),
    composite (the recipe, nothing shared), shared (members of one set of weights in one forward) and speculative (the
    recipe as it is loaded by default). The result is a Markdown table. Ctrl-C ends with what was measured until then.
    The exit status is 2 if steered arms wrote different tokens that no near tie explains.
    """
    from proxytune.bench import MemberOptions, Settings, load_subject, problem_texts, run_bench, texts_of_file
    from proxytune.compose import device_map as parsed
    from proxytune.recipe import load_recipe
    from proxytune.speculation import parse_speculate

    try:
        batches = tuple(int(part) for part in batch.split(","))
    except ValueError as error:
        raise ProxyTuneError(f"--batch is numbers, such as 1,16, not {batch!r}") from error
    settings = Settings(
        batches, _parts(lengths), _parts(arms), repeats=repeats, budget=60 * minutes or None, seed=seed,
        speculate=parse_speculate(int(speculate) if speculate.isdecimal() else speculate), temperature=temperature,
    )  # fmt: skip
    wanted = [MemberOptions.parse(text) for text in _parts(options)]
    if len(set(wanted)) < len(wanted):
        raise ProxyTuneError(f"--options {options!r} names one set twice")
    texts = problem_texts(seed) if prompts is None else texts_of_file(prompts)
    config = load_recipe(recipe)
    if json_file is not None:
        json_file.open("a").close()  # now, not after twenty minutes, is when to say that it cannot be written
    with _share_bar() as progress:
        loading = {"device_map": parsed(device_map), "member_trust_remote_code": trust_remote_code}
        subjects = []
        for one in wanted:
            progress(f"loading, {one.dtype or 'auto'}", 0.0)
            subjects.append(load_subject(config, one, **loading))
        result = run_bench(subjects, settings, texts, progress=progress)
    show_bench(result)
    if json_file is not None:
        json_file.write_text(json.dumps(result.to_json(), indent=2) + "\n", "utf-8")
    for bad in result.mismatches():
        say(
            f"error: {bad.arm} ({bad.options}, {bad.case}) wrote another token at {bad.differs_at} than "
            f"{bad.reference}, with logits {bad.gap:.2g} apart"
        )
    if result.interrupted:
        raise typer.Exit(130)
    if result.mismatches():
        raise typer.Exit(FAILED)


def show_bench(result: BenchResult) -> None:
    """Print what ``bench`` found, as Markdown: the machine, a table of each case, the overhead, the outputs."""
    machine = result.machine
    memory = "" if machine["memory_bytes"] is None else f", {size(machine['memory_bytes'])} of memory"
    typer.echo(
        f"{machine['gpu'] or machine['cpu']}; {machine['cores']} cores, {machine['threads']} threads{memory}; "
        f"torch {machine['torch']}, transformers {machine['transformers']}, Python {machine['python']}\n"
    )
    for case in dict.fromkeys((row.batch, row.prompt, row.output) for row in result.rows):
        typer.echo(f"**prompt/output {case[1]}/{case[2]}, batch {case[0]}**\n")
        show_table(
            "arm|options|tokens/s|min – max|to base|to plain loop|acceptance|first token|memory|rounds",
            [
                (
                    row.arm,
                    row.options,
                    f"{row.tokens_per_second:.1f}",
                    f"{row.tokens_per_second_low:.1f} – {row.tokens_per_second_high:.1f}",
                    _number(row.ratio_to_base),
                    _number(row.ratio_to_plain_loop),
                    _number(row.acceptance),
                    f"{1000 * row.time_to_first_token_s:.0f} ms",
                    size(row.peak_memory_bytes),
                    str(row.repeats),
                )
                for row in result.rows
                if (row.batch, row.prompt, row.output) == case
            ],
        )
        for row in result.rows:
            if row.speculation and (row.batch, row.prompt, row.output) == case:
                said = (
                    "Drafts ({options}): {drafted} by an expert, {accepted} accepted; "
                    "{looked_up} copied from the text, {lookups_accepted} accepted; {cycles} cycles.\n"
                )
                typer.echo(said.format(options=row.options, **row.speculation))
    if result.overheads:
        typer.echo("**a step of `generate` beyond the forwards in it**\n")
        show_table(
            "arm|options|batch|step|its forwards|overhead",
            [
                (
                    one.arm,
                    one.options,
                    str(one.batch),
                    f"{1000 * one.step_seconds:.2f} ms",
                    f"{1000 * one.forwards_seconds:.2f} ms",
                    f"{100 * one.overhead:+.1f} %",
                )
                for one in result.overheads
            ],
        )
    outputs = result.outputs()
    if outputs["compared"]:
        said = f"{outputs['identical']} of {outputs['compared']} steered rows are token-identical"
        if outputs["near_ties"]:
            said += f", {outputs['near_ties']} first differ at a near tie"
        if result.mismatches():
            said += f", {len(result.mismatches())} differ"
        typer.echo(f"Outputs: {said}.")
    typer.echo(f"Memory: {machine['memory']}. Tokens/s include the prompt. {result.seconds:.0f} s.")
    for note in result.notes:
        typer.echo(f"Note: {note}.")


def show_table(headings: str, rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table, numbers to the right, as wide as it needs to be; ``headings`` with | between them."""
    from rich import box
    from rich.table import Table

    table = Table(*headings.split("|"), box=box.MARKDOWN, highlight=False)
    for column, cells in zip(table.columns, zip(*rows)):
        column.no_wrap = True
        if any(cell[:1].isdigit() or cell[:1] in "+-–" for cell in cells):
            column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console = Console(width=250, highlight=False)
    with console.capture() as captured:
        console.print(table)
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines() if line.strip()) + "\n")


# -- score ----------------------------------------------------------------------------------------------------
@app.command()
def score(
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK",
            help="gsm8k, truthfulqa_mc, truthfulqa_open, toxigen, triviaqa, humaneval, ds1000, mbpp, alpacafarm or "
            "realtimeqa.",
            show_default=False,
        ),
    ],
    predictions: Annotated[
        Path, typer.Argument(metavar="PREDICTIONS", help="JSON lines, or a JSON list.", show_default=False)
    ],
    json_file: JsonFile = None,
    rerun: Annotated[
        bool, typer.Option("--rerun", help="Judge those lines too that carry a verdict already (passed, is_toxic, …).")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|ID",
            help="The problems of a code task, or the reference answers of alpacafarm: JSON lines, or a hub data set; "
            "the hub's own by default.",
            show_default=False,
        ),
    ] = None,
    k: Annotated[
        str,
        typer.Option(
            "--k", metavar="K,...", help="pass@k, for every k that the samples allow.", rich_help_panel="Code"
        ),
    ] = "1,10",
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Programs at once; by default one a core.",
            rich_help_panel="Code",
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            min=1,
            help="CPU time of a program, by default 3 (ds1000: 60); 7 more of wall time (ds1000: twice as much).",
            rich_help_panel="Code",
            show_default=False,
        ),
    ] = None,
    unguarded: Annotated[
        bool,
        typer.Option(
            "--unguarded",
            help="Run generated code even where it cannot be locked up: it may then do what you may do.",
            rich_help_panel="Code",
        ),
    ] = False,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR|ID",
            help="A local classifier or language model. truthfulqa_open takes two: of truth, of information.",
            rich_help_panel="Judges",
            show_default=False,
        ),
    ] = None,
    judge_label: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The classifier's label that means yes (or toxic), where its config does not say.",
            rich_help_panel="Judges",
            show_default=False,
        ),
    ] = None,
    judge_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="An OpenAI-compatible endpoint, with its /v1.",
            rich_help_panel="Judges",
            show_default=False,
        ),
    ] = None,
    judge_model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="The model there; truthfulqa_open takes two. For alpacafarm an annotator of alpaca_eval.",
            rich_help_panel="Judges",
            show_default=False,
        ),
    ] = None,
    judge_chat: Annotated[
        bool, typer.Option("--judge-chat", help="The endpoint has chat completions alone.", rich_help_panel="Judges")
    ] = False,
    judge_key: Annotated[
        str, typer.Option(metavar="VARIABLE", help="The environment variable with its key.", rich_help_panel="Judges")
    ] = "OPENAI_API_KEY",
    verdicts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where a judge's verdicts are kept, and taken from; by default beside the predictions.",
            rich_help_panel="Judges",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Score a file of predictions, ours or those that the paper's authors published.

    The figures are theirs: the same rules, on the same field names. Code is run in a sandbox; where it cannot be locked
    up it is not run. Verdicts of a judge are kept as they come: the exit status is 3 if the judge does not answer, and
    the same command then goes on from there.
    """
    from proxytune.evaluation import check_tasks, records
    from proxytune.evaluation import score as scored
    from proxytune.evaluation.scoring import CODE

    check_tasks([task])
    lines = records.read(predictions)
    if json_file is not None:
        json_file.open("a").close()  # now, not after an hour, is when to say that it cannot be written
    try:
        ks = [int(part) for part in k.split(",")]
    except ValueError as error:
        raise ProxyTuneError(f"--k is numbers, such as 1,10, not {k!r}") from error
    if min(ks) < 1:
        raise ProxyTuneError(f"--k is numbers from 1 on, not {k!r}")
    kept = verdicts or predictions.with_name(f"{predictions.name}.verdicts.jsonl")
    options: dict[str, Any] = {}
    if task in CODE:
        from proxytune.evaluation.code import limits_of

        options = {
            "data": data,
            "ks": ks,
            "workers": workers,
            "limits": limits_of(task, seconds),
            "unguarded": unguarded,
        }
    given = [judge, judge_label, judge_url, judge_model]
    if any(given) or task == "alpacafarm":
        from proxytune.evaluation import judges

        options["judge"] = judges.choose(
            task,
            judge or (),
            url=judge_url,
            models=judge_model or (),
            key_variable=judge_key,
            chat=judge_chat,
            label=judge_label,
            reference=data,
            kept=kept,
        )
    total = len(records.parse(task, lines))
    with _progress(total, True) as advance:
        try:
            result = scored(task, lines, rerun=rerun, kept=kept, progress=advance, **options)
        except ProxyTuneError as error:
            if type(error).__name__ != "JudgeDown":
                raise
            say(f"error: {error}; its verdicts until here are kept in {kept}, and the same command goes on from there")
            raise typer.Exit(3) from None
    show_scores(result)
    if json_file is not None:
        said = {"task": task, "metrics": result.metrics, **({"outcomes": result.outcomes} if result.outcomes else {})}
        json_file.write_text(json.dumps(said, indent=2) + "\n", "utf-8")


def show_scores(result: Scores) -> None:
    """Print a task's figures: the headline with its interval, then the others."""
    from proxytune.statistics import wilson

    counts = {name: value for name, value in result.metrics.items() if isinstance(value, int)}
    # The headline is a mean over the examples, but for invalid answers; Wilson is a little wide for pass@k.
    total = counts["total"] - counts.get("num_invalid_predictions", 0)
    value = result.metrics[result.headline]
    low, high = wilson(value * total, total)
    whole = abs(value * total - round(value * total)) < 1e-6
    headline = f"{round(value * total)}/{total}" if whole else f"mean of {total}"
    rows = [(result.headline, headline, f"{100 * value:.1f} %", f"{100 * low:.1f} – {100 * high:.1f}")]
    rows += [(name, "", f"{100 * v:.1f} %", "") for name, v in list(result.metrics.items())[1:] if name not in counts]
    rows += [(name.replace("_", " "), str(value), "", "") for name, value in counts.items()]
    rows += [(f"samples: {name}", str(value), "", "") for name, value in result.outcomes.items()]
    show_table(f"{result.task}|count|share|95 % interval", rows)


# -- plan -----------------------------------------------------------------------------------------------------
@app.command()
def plan(
    recipe: Recipe,
    acceptance: Annotated[
        str, typer.Option(metavar="A,...", help="Shares of drafts that the mixture accepts.")
    ] = "0.7",
    batch: Annotated[str, typer.Option(metavar="N,...", help="Batch sizes.")] = "1,4,16",
    options: Annotated[
        str,
        typer.Option(metavar="NAME+NAME", help="What is on in the members, as for bench: a dtype, pack."),
    ] = "auto",
    device: Annotated[
        str | None,
        typer.Option(
            metavar="cpu|cuda", help="What it shall run on; a GPU where this machine has one.", show_default=False
        ),
    ] = None,
    measured: Annotated[
        bool, typer.Option("--probe", help="Load the recipe and time it for about ten seconds.")
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --probe: hold it against what `bench --json FILE` has measured.",
            show_default=False,
        ),
    ] = None,
    json_file: JsonFile = None,
    device_map: DeviceMap = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Predict what steering will cost beside the base alone, before anything is loaded.

    From the members' configs: neither weights nor tokenizers need to be there. Costs are of one more token of every
    row, where the base alone costs 1: naive is a forward of every member, shared one of every set of weights, and
    speculative lets the cheapest of them draft, as many tokens as pay best. With --probe the recipe is loaded and its
    forwards are timed; without, a step costs the bytes of weights that it moves.
    """
    from proxytune.bench import MemberOptions, load_subject
    from proxytune.compose import device_map as parsed
    from proxytune.members import Loading
    from proxytune.plan import compare_with_bench, plan_probed, plan_recipe, probe, read_bench
    from proxytune.recipe import load_recipe

    batches, wanted = _batches(batch), MemberOptions.parse(options)
    try:
        acceptances = [float(part) for part in acceptance.split(",")]
    except ValueError as error:
        raise ProxyTuneError(f"--acceptance is numbers, such as 0.6,0.8, not {acceptance!r}") from error
    if not all(0 <= value <= 1 for value in acceptances):
        raise ProxyTuneError(f"an acceptance lies between 0 and 1, not at {acceptance}")
    if not measured and (against is not None or device_map is not None):
        raise ProxyTuneError("--against and --device-map need --probe: without it nothing is loaded")
    if measured and device is not None:
        raise ProxyTuneError("--device is for a prediction without --probe; --device-map says where to probe")
    if device not in (None, "cpu", "cuda"):
        raise ProxyTuneError(f"--device is cpu or cuda, not {device!r}")
    config = load_recipe(recipe)
    compared = []
    if measured:
        bench_rows = None if against is None else read_bench(against)
        subject = load_subject(
            config, wanted, device_map=parsed(device_map), member_trust_remote_code=trust_remote_code
        )
        costs = probe(subject, batches)
        loading = Loading(dtype=wanted.dtype, pack=wanted.pack, trust_remote_code=trust_remote_code)
        found = plan_probed(config, subject, costs, acceptances, loading)
        if bench_rows is not None:
            compared = compare_with_bench(costs, subject.options, subject.shares, bench_rows)
            if not compared:
                raise ProxyTuneError(f"{against} has no row with the options {subject.options} and these batch sizes")
    else:
        import torch

        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        found = plan_recipe(
            config, wanted, device=kind, batches=batches, acceptances=acceptances, trust_remote_code=trust_remote_code
        )
    show_plan(found)
    if compared:
        typer.echo("**held against the bench: a step after the prompt**\n")
        show_table(
            "arm|prompt/output|batch|predicted|measured|error",
            [
                (
                    one.arm,
                    f"{one.prompt}/{one.output}",
                    str(one.batch),
                    f"{1000 * one.predicted:.1f} ms",
                    f"{1000 * one.measured:.1f} ms",
                    f"{100 * one.error:+.0f} %",
                )
                for one in compared
            ],
        )
    if json_file is not None:
        values = {**found.to_json(), "compared": [vars(one) for one in compared]}
        json_file.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def show_plan(plan: Plan) -> None:
    """Print what ``plan`` predicts, as Markdown: the sets of weights, memory, and the predictions."""
    show_table(
        "weights of|dtype|seats|size|read a step|KV/token",
        [
            (
                ", ".join(lane.members),
                lane.dtype,
                str(lane.n_seats),
                size(lane.weight_bytes),
                size(lane.read_bytes),
                "unknown" if lane.kv_bytes_per_token is None else size(lane.kv_bytes_per_token),
            )
            for lane in plan.lanes
        ],
    )
    kinds = {"base": "base alone", "naive": "every member apart", "shared": "the recipe"}
    cache = {
        kind: "" if grown is None else f" + {size(grown)}/token" for kind, grown in plan.kv_bytes_per_token.items()
    }
    memory = ", ".join(f"{said} {size(plan.weight_bytes[kind])}{cache[kind]}" for kind, said in kinds.items())
    typer.echo(f"Memory: {memory}.\n")
    timed = plan.predictions[0].base_seconds is not None
    show_table(
        "batch|acceptance|naive|shared|speculative|drafts|tokens/s to base|to naive" + ("|tokens/s" if timed else ""),
        [
            (
                str(one.batch),
                f"{one.acceptance:g}",
                f"{one.naive:.2f}",
                f"{one.shared:.2f}",
                f"{one.speculative:.2f}",
                str(one.n_drafts),
                f"{one.ratio_to_base:.2f}",
                f"{one.ratio_to_naive:.2f}",
                *((f"{one.batch / (one.speculative * one.base_seconds):.1f}",) if one.base_seconds is not None else ()),
            )
            for one in plan.predictions
        ],
    )
    typer.echo(f"Costs are of a token after the prompt; the base alone costs 1. From {plan.basis}.")
    if not any(one.n_drafts for one in plan.predictions):
        typer.echo("Note: drafting cannot pay here.")
    for note in plan.notes:
        typer.echo(f"Note: {note}.")


# -- helpers --------------------------------------------------------------------------------------------------
def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _batches(text: str) -> tuple[int, ...]:
    try:
        batches = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ProxyTuneError(f"--batch is numbers, such as 1,16, not {text!r}") from error
    if min(batches) < 1 or len(set(batches)) < len(batches):
        raise ProxyTuneError(f"--batch is numbers of rows, at least 1 and each once, not {text!r}")
    return batches


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def fail(message: str) -> NoReturn:
    """Tell what is wrong in one line and leave."""
    say(f"error: {' '.join(message.split())}")
    raise typer.Exit(FAILED)


def say(message: str) -> None:
    """Tell the user something that is no result."""
    typer.echo(message, err=True)


def drop_stdout() -> None:
    """Let what is still buffered go nowhere, so that leaving does not fail on it a second time."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse_alpha(given: Sequence[str] | None) -> float | Mapping[str, float] | None:
    """Read ``0.5`` or ``NAME=0.5`` ...; None where nothing was given."""
    if not given:
        return None
    named: dict[str, float] = {}
    for text in given:
        name, equals, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError as error:
            raise AlphaError(f"alpha must be a number or NAME=NUMBER, not {text!r}") from error
        if not equals and len(given) > 1:
            raise AlphaError("give one alpha for all experts, or NAME=NUMBER for each")
        if not equals:
            return value
        named[name.strip()] = value
    return named


def count(number: int) -> str:
    """A count of parameters: 6.74 B, 135 M."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return str(number)


def size(n_bytes: int) -> str:
    """Bytes in binary units: 12.6 GiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:,.{0 if n_bytes >= 100 * scale else 1}f} {unit}"
    return f"{n_bytes} B"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _show_answer(item: Item, text: str, *, alone: bool) -> None:
    """An answer for people: of several prompts, each is told before its answer."""
    _write(f"{text}\n" if alone else f"> {item.prompt}\n{text}\n\n")


def _sampling(
    temperature: float | None, top_p: float | None, top_k: int | None, min_p: float | None, seed: int
) -> Sampling:
    from proxytune.generation import Sampling

    return Sampling(temperature, top_p, top_k, min_p, seed)


def _drafts(text: str, sampling: Sampling) -> str | bool | int:
    """What ``--speculate`` says, as `generate` takes it."""
    if text not in ("auto", "off") and not text.isdecimal():
        raise ProxyTuneError(f"--speculate {text!r} is not auto, off or a number of drafts")
    if text.isdecimal() and not sampling.greedy:
        raise ProxyTuneError(f"--speculate {text} is for greedy answers: a sampled one must not depend on its drafts")
    return int(text) if text.isdecimal() else (text if text == "auto" else False)


def _dtype(text: str | None) -> str | None:
    from proxytune.config import DTYPES

    if text is not None and text not in DTYPES:
        raise ProxyTuneError(f"--dtype {text!r} is not one of {', '.join(DTYPES)}")
    return text


def _lines(path: str) -> list[bytes]:
    if path == "-":
        return sys.stdin.buffer.readlines()
    with open(path, "rb") as file:
        return file.readlines()


def _load(
    config: ProxyTuneConfig,
    dtype: str | None,
    device_map: str | None,
    trust_remote_code: bool,
    speculate: str | bool | int,
    pack: bool,
) -> tuple[ProxyTunedForCausalLM, Any]:
    """The model, and the recipe's tokenizer (the base's where the recipe has none)."""
    from transformers import AutoTokenizer

    from proxytune.compose import device_map as parsed
    from proxytune.modeling import ProxyTunedForCausalLM

    console = Console(stderr=True)
    with console.status("loading the members") if console.is_terminal else contextlib.nullcontext():
        model = ProxyTunedForCausalLM.from_pretrained(
            str(config.name_or_path),
            config=config,
            dtype=_dtype(dtype),
            device_map=parsed(device_map),
            member_trust_remote_code=trust_remote_code,
            speculate=speculate,
            pack=pack,
        )
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(config.name_or_path)
        except (OSError, ValueError, KeyError):
            tokenizer = model.tokenizer
    if tokenizer is None:
        raise ProxyTuneError("neither the recipe nor its base has a tokenizer; copy the base's into the recipe")
    return model, tokenizer


@contextlib.contextmanager
def _progress(total: int, shown: bool) -> Iterator[Any]:
    """A progress bar on stderr; yields a function that advances it by a number of prompts."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # Never let rich redirect stdout: it carries the results.
    bar = Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=True)
    if not (shown and total > 1 and console.is_terminal):
        yield lambda n: None
        return
    with bar:
        task = bar.add_task("prompts", total=total)
        yield lambda n: bar.advance(task, n)


@contextlib.contextmanager
def _share_bar() -> Iterator[Any]:
    """A progress bar on stderr; yields a function that is told what is being done and the share that is done."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    bar = Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=True)
    if not console.is_terminal:
        yield lambda said, share: None
        return
    with bar:
        task = bar.add_task("", total=1.0)
        yield lambda said, share: bar.update(task, completed=share, description=said)


if __name__ == "__main__":
    main()
