"""``proxytune chat``: a conversation at the terminal, and its commands, which begin with ``/``."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from proxytune.answers.options import ChatOptions, ChatSampling, Sampling
from proxytune.cli.explain import show_explanation
from proxytune.cli.flags import only
from proxytune.cli.shared import Recipe, asked_of, complain, load_model, say, write_out
from proxytune.errors import PromptError, ProxyTuneError
from proxytune.recipe.options import LoadingOptions
from proxytune.recipe.place import check_alpha

if TYPE_CHECKING:
    from proxytune.answers.chat import Conversation
    from proxytune.answers.traces import ChatTraceFile

__all__ = ["Talk", "WordWrap", "chat", "interruptible"]


def chat(
    recipe: Recipe,
    *,
    options: Annotated[ChatOptions, only("alpha", "max_new_tokens", "system", "negative_prompt", "trace")],
    sampling: ChatSampling,
    loading: LoadingOptions,
) -> None:
    """Chat with a steered model.

    Decoding is greedy unless a sampling option is given. The members' caches are kept from turn to turn.

    Lines that begin with / are commands: /alpha 0.5 changes the strength, /compare 0 1 shows the answers at several
    alphas side by side, /why shows what steering did to the last answer. /help explains /retry, /undo, /reset, /system,
    /negative, /set, /save and /load. In a terminal Alt-Enter starts a new line, pasted text keeps its lines, and TAB
    completes commands and the recipe's example prompts.

    --trace records each answer when it ends, with the question as its prompt. Answers of /compare are not recorded.

    Examples:

        proxytune chat demo
        proxytune chat mine --alpha 0.5 --system "Answer in one sentence."
        proxytune chat mine --trace talk.jsonl
    """
    check_alpha(recipe, options.alpha)
    from proxytune.answers.traces import ChatTraceFile

    file = contextlib.nullcontext() if options.trace is None else ChatTraceFile(options.trace)
    with file as traces:  # before the seconds that loading takes
        _chat(recipe, options, sampling, loading, traces)


def _chat(
    recipe: str, options: ChatOptions, sampling: ChatSampling, loading: LoadingOptions, traces: ChatTraceFile | None
) -> None:
    from proxytune.answers.chat import Conversation

    config, alphas = asked_of(recipe, options)
    model, tokenizer = load_model(config, loading)
    if traces is not None and not model.complete:
        raise ProxyTuneError("a trace needs the base's probabilities of all tokens; leave --trace out")
    conversation = Conversation(
        model,
        tokenizer,
        alphas,
        sampling=sampling,
        max_new_tokens=options.max_new_tokens,
        system=options.system,
        negative_prompt=options.negative_prompt,
    )
    if not tokenizer.chat_template:
        say("the recipe has no chat template, so its base reads a plain transcript")
    examples = config.examples or []
    if config.description:
        say(config.description)
    for example in examples:
        say(_to_try(example))
    say("/help lists the commands, /quit leaves")
    talk, read = Talk(conversation, config.expert_names, examples, traces), _reader(examples)
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                return
            say("(Ctrl-D or /quit leaves)")
            continue
        if line in ("/quit", "/exit", "/q"):
            return
        if line:
            try:
                talk.take(line)
            except PromptError as error:
                system = ", /system off the system prompt" if conversation.system else ""
                complain(f"{error}; /undo takes back the last turn, /reset all of them{system}")
            except ProxyTuneError as error:
                complain(f"{error}")


def _to_try(example: str) -> str:
    """An example prompt in a form that can be copied: a prompt of several lines is shown on lines of its own."""
    return f"try:\n{example}" if "\n" in example else f"try: {example}"


# -- the terminal ---------------------------------------------------------------------------------------------
def _reader(examples: Sequence[str]) -> Callable[[], str]:
    """Reads the next message. At a terminal, lines can be edited, pasted, recalled, and completed with TAB."""
    if not sys.stdin.isatty():
        return input
    from platformdirs import user_state_path
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    history: History = InMemoryHistory()
    with contextlib.suppress(OSError):  # no history if the home directory cannot be written
        place = user_state_path("proxytune", ensure_exists=True) / "chat_history"
        place.touch(mode=0o600)
        history = FileHistory(str(place))
    session: PromptSession[str] = PromptSession(
        history=history,
        key_bindings=keys,
        completer=WordCompleter([*examples, *sorted(COMMANDS)], sentence=True),
        complete_while_typing=False,
        output=create_output(stdout=sys.stderr),  # stdout is for the answers alone
        prompt_continuation="  ",
    )
    return lambda: session.prompt("\n> ")


class WordWrap:
    """Writes pieces of text, with a line break in place of the space before a word that no longer fits.

    Args:
        write: takes the text. width: of a line, in cells.
    """

    HELD = 30  # hold back at most so many cells of a word: some scripts put no spaces between words

    def __init__(self, write: Callable[[str], Any], width: int) -> None:
        self.write, self.width = write, width
        self.column, self.word, self.space = 0, "", ""

    def __call__(self, text: str) -> None:
        """Take the next piece."""
        for part in re.findall(r"\s|[^\s]+", text):
            if not part.isspace():
                self.word += part
                if self._cells(self.word) > self.HELD:
                    self.end()
                continue
            self.end()
            if part == "\n":
                self.write("\n")
                self.column = 0
            else:
                self.space += part

    def end(self) -> None:
        """Write what was held back."""
        if not self.word:
            return
        cells = self._cells(self.word)
        if self.column and self.space and self.column + len(self.space) + cells > self.width:
            self.write("\n")
            self.column, self.space = 0, ""
        self.write(self.space + self.word)
        self.column += len(self.space) + cells
        self.word = self.space = ""

    @staticmethod
    def _cells(text: str) -> int:
        from rich.cells import cell_len

        return cell_len(text)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """While it is active, Ctrl-C makes ``stopped()`` true, so that a forward is never interrupted. A second Ctrl-C
    interrupts immediately."""
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


# -- what lines do --------------------------------------------------------------------------------------------
SETTINGS: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top-p": float,
    "top-k": int,
    "min-p": float,
    "seed": int,
    "max-new-tokens": int,
}


class Talk:
    """A conversation, and the commands that change it. Answers go to stdout, everything else to stderr.

    Args:
        names: the recipe's experts. examples: its example prompts.
        traces: the open file that each answer's trace is appended to.
    """

    def __init__(
        self,
        conversation: Conversation,
        names: Sequence[str],
        examples: Sequence[str] = (),
        traces: ChatTraceFile | None = None,
    ) -> None:
        self.conversation, self.names, self.examples, self.traces = conversation, names, examples, traces

    def take(self, line: str) -> None:
        """Run one line: a message or a command.

        Raises:
            ProxyTuneError: if it cannot be done; the conversation then does not change.
        """
        if not line.startswith("/"):
            self.answer(line)
            return
        word, _, rest = line.partition(" ")
        if word not in COMMANDS:
            raise ProxyTuneError(f"there is no command {word}; /help lists the commands")
        COMMANDS[word][1](self, rest.strip())

    def answer(self, text: str) -> None:
        """Send ``text`` and show the answer."""
        with interruptible() as stopped:
            if sys.stdout.isatty():
                from rich.console import Console

                wrapped = WordWrap(write_out, Console().width)
                made = self.conversation.say(text, wrapped, stopped)
                wrapped.end()
            else:
                made = self.conversation.say(text, write_out, stopped)
        write_out("\n")
        if self.traces is not None:
            self._trace(text, self.traces)
        if made.finish == "interrupt":
            say("(stopped)")
        elif made.finish == "length" and len(made.tokens) < self.conversation.max_new_tokens:
            say("(the shortest member's context is full; /undo takes back the last turn, /reset all of them)")
        elif made.finish == "length":
            say(f"(cut off after {len(made.tokens)} tokens; /set max-new-tokens N allows more)")
        elif not made.text.strip():
            say("(an empty answer: the model ended it immediately; ask in other words, or try another /alpha)")
            if others := [example for example in self.examples if example.strip() != text]:
                say(_to_try(others[0]))

    def _trace(self, question: str, traces: ChatTraceFile) -> None:
        from proxytune.answers.traces import token_texts, trace_line

        assert self.conversation.last is not None
        made, alphas = self.conversation.last
        text_of = token_texts(self.conversation.tokenizer)
        traces.append([trace_line(question, dict(zip(self.names, alphas)), made, text_of)])

    def alpha(self, rest: str) -> None:
        """Set the strength of steering (with several experts also NAME=NUMBER). Without a number: show it."""
        if rest:
            self.conversation.alphas = self._alphas(rest.split())
        say(f"alpha: {self._said(self.conversation.alphas)}")

    def compare(self, rest: str) -> None:
        """Show answers to the last question at several alphas side by side; the conversation does not change."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        if not rest:
            raise ProxyTuneError("name the alphas, as in /compare 0 1")
        alphas = [self._alphas([word]) for word in rest.split()]
        with interruptible() as stopped:
            answers = self.conversation.compare(alphas, stopped)
        table = Table(*(f"alpha {self._said(each)}" for each in alphas), expand=True)
        for column in table.columns:
            column.ratio, column.overflow = 1, "fold"
        table.add_row(*(Text(each.text.strip() or "(empty)") for each in answers))
        Console(highlight=False).print(table)

    def why(self, rest: str) -> None:
        """Show what steering did to the tokens of the last answer."""
        from proxytune.analysis.explain import explain_answer

        talk = self.conversation
        if talk.last is None:
            raise ProxyTuneError("there is no answer of this session to explain; ask something first")
        made, alphas = talk.last
        if made.trace is None:
            raise ProxyTuneError("the base's server gives only its top tokens, so an answer cannot be explained")
        question = talk.messages[-2]["content"]
        show_explanation(explain_answer(question, made, self.names, alphas, talk.tokenizer))

    def _alphas(self, words: Sequence[str]) -> tuple[float, ...]:
        from proxytune.recipe.alpha import alpha_of_text, resolve_alpha

        return resolve_alpha(alpha_of_text(words), self.names, self.conversation.alphas)

    def _said(self, alphas: Sequence[float]) -> str:
        if len(self.names) == 1:
            return f"{alphas[0]:g}"
        return ", ".join(f"{name} {value:g}" for name, value in zip(self.names, alphas))

    def set(self, rest: str) -> None:
        """Set temperature, top-p, top-k, min-p, seed or max-new-tokens; VALUE may be off. Alone: show them."""
        talk = self.conversation
        if rest:
            name, _, text = rest.partition(" ")
            if name not in SETTINGS:
                raise ProxyTuneError(f"there is no setting {name!r}; there are {', '.join(SETTINGS)}")
            value = _value(name, text.strip())
            if name == "max-new-tokens":
                talk.max_new_tokens = value
            else:
                talk.sampling = replace(talk.sampling, **{name.replace("-", "_"): value})
        shown = {f.name.replace("_", "-"): getattr(talk.sampling, f.name) for f in fields(Sampling)}
        shown["max-new-tokens"] = talk.max_new_tokens
        said = ", ".join(f"{name} {'off' if value is None else value}" for name, value in shown.items())
        say(said + (" (greedy)" if talk.sampling.greedy else ""))

    def system(self, rest: str) -> None:
        """Set the system prompt. Without a text: show it. /system off removes it."""
        if rest:
            self.conversation.set_system(None if rest == "off" else rest)
        say(f"system: {self.conversation.system or 'none'}")

    def negative(self, rest: str) -> None:
        """Set the negative prompt. Without a text: show it. /negative off goes back to the recipe's."""
        talk = self.conversation
        if rest:
            talk.set_negative(None if rest == "off" else rest)
        say(f"negative prompt: {talk.negative_prompt or 'that of the recipe'}")

    def retry(self, rest: str) -> None:
        """Ask the last question again: for another sample, or at the current alpha."""
        before = self.conversation.messages
        question = self.conversation.take_back()
        try:
            self.answer(question)
        except BaseException:
            self.conversation.messages = before
            raise

    def undo(self, rest: str) -> None:
        """Remove the last question and its answer."""
        say(f"taken back: {self.conversation.take_back()}")

    def reset(self, rest: str) -> None:
        """Forget the conversation."""
        self.conversation.reset()
        say("forgotten")

    def save(self, rest: str) -> None:
        """Write the conversation to a file, as JSON."""
        from proxytune.answers.journal import write_whole

        path = _file(rest, "save")
        with _as_sentence(path):
            if path.exists() and "messages" not in _saved(path):
                raise ProxyTuneError(f"{path} exists and is not a conversation; give another file name")
        talk = self.conversation
        told = {
            "messages": talk.messages,
            "negative_prompt": talk.negative_prompt,
            "alpha": dict(zip(self.names, talk.alphas)),
            "sampling": vars(talk.sampling),
            "max_new_tokens": talk.max_new_tokens,
        }
        with _as_sentence(path):
            write_whole(path, json.dumps(told, indent=2, ensure_ascii=False) + "\n")
        say(f"saved to {path}")

    def load(self, rest: str) -> None:
        """Continue a saved conversation."""
        from proxytune.recipe.alpha import resolve_alpha

        path, talk = _file(rest, "load"), self.conversation
        with _as_sentence(path):
            saved = _saved(path)
        try:
            messages = [{"role": str(said["role"]), "content": str(said["content"])} for said in saved["messages"]]
            sampling = Sampling(**saved.get("sampling", {}))
            limit = _value("max-new-tokens", str(saved.get("max_new_tokens", talk.max_new_tokens)))
            negative = saved.get("negative_prompt")
        except (KeyError, TypeError) as error:
            raise ProxyTuneError(f"{path} is not a conversation that /save wrote") from error
        alphas = resolve_alpha(saved.get("alpha"), self.names, talk.alphas)
        talk.set_negative(negative)
        talk.load(messages)
        talk.alphas, talk.sampling, talk.max_new_tokens = alphas, sampling, limit
        turns = sum(said["role"] == "user" for said in messages)
        say(f"loaded {turns} {'turn' if turns == 1 else 'turns'} from {path}")

    def help(self, rest: str) -> None:
        """Show this list."""
        width = max(len(usage) for usage, _ in COMMANDS.values())
        for usage, command in COMMANDS.values():
            say(f"{usage:{width}}  {(command.__doc__ or '').strip()}")
        say(f"{'/quit':{width}}  Leave (so does Ctrl-D).")
        say("Ctrl-C stops an answer. Alt-Enter begins a new line; pasted text keeps its lines; TAB completes.")


COMMANDS: dict[str, tuple[str, Callable[[Talk, str], None]]] = {
    "/alpha": ("/alpha [NUMBER]", Talk.alpha),
    "/compare": ("/compare A B ...", Talk.compare),
    "/why": ("/why", Talk.why),
    "/retry": ("/retry", Talk.retry),
    "/undo": ("/undo", Talk.undo),
    "/reset": ("/reset", Talk.reset),
    "/system": ("/system [TEXT]", Talk.system),
    "/negative": ("/negative [TEXT]", Talk.negative),
    "/set": ("/set [NAME VALUE]", Talk.set),
    "/save": ("/save FILE", Talk.save),
    "/load": ("/load FILE", Talk.load),
    "/help": ("/help", Talk.help),
}


def _value(name: str, text: str) -> Any:
    """The value of a setting, from its text."""
    if text in ("off", "none") and name not in ("seed", "max-new-tokens"):
        return None
    try:
        value = SETTINGS[name](text)
    except ValueError as error:
        raise ProxyTuneError(f"{name} must be a number, not {text!r}") from error
    return ChatOptions(max_new_tokens=value).max_new_tokens if name == "max-new-tokens" else value


def _file(rest: str, command: str) -> Path:
    if not rest:
        raise ProxyTuneError(f"name the file, as in /{command} talk.json")
    return Path(rest).expanduser()


@contextlib.contextmanager
def _as_sentence(path: Path) -> Iterator[None]:
    """Turn errors of reading or writing a file into one sentence."""
    try:
        yield
    except OSError as error:
        raise ProxyTuneError(f"{path}: {error.strerror or error}") from error


def _saved(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file holds anything else."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
