"""The class of typer's commands: it accepts old spellings, and reads ``--config`` as options."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from proxytune.cli.shared import say
from proxytune.errors import ProxyTuneError

__all__ = ["Command", "flag_of", "option_names", "without_types"]

RENAMED = {"--out": "--output", "--batch": "--batch-size"}  # old spelling -> new
NOT_SETTINGS = ("config", "help", "json", "json_file", "print_config", "quiet", "tasks_dir", "verbose")


class Command(TyperCommand):
    """A command."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its parameters, as the help shows them."""
        return without_types(super().get_params(ctx))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The first line of the help, with arguments as they are called: RECIPE, not {RECIPE}."""
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The arguments, and the options under their headings."""
        sections: dict[str, list[Any]] = {}
        for each in self.get_params(ctx):
            if (record := each.get_help_record(ctx)) is not None:
                title = getattr(each, "rich_help_panel", None) or ("Options" if _is_option(each) else "Arguments")
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words after the command."""
        words = self._with_new_spellings(ctx, args)
        given, _, _ = self.make_parser(ctx).parse_args(list(words))
        if given.get("config"):
            words = [*_words_of_config(self, Path(str(given["config"])), given), *words]
        return super().parse_args(ctx, words)

    def _with_new_spellings(self, ctx: Any, args: list[str]) -> list[str]:
        """Replace old option names by today's, and print a note for each."""
        options = {flag for each in self.params if _is_option(each) for flag in each.opts}
        file = "--json-file" if "--json-file" in options else "--output"
        now = "results.json in the output directory" if file == "--json-file" else "written by --output FILE"
        words = list(args)
        for at, word in enumerate(words):
            if word == "--":
                break
            name, equals, value = word.partition("=")
            if name in RENAMED and name not in options and RENAMED[name] in options:
                words[at] = RENAMED[name] + equals + value
                say(f"note: {name} is now {RENAMED[name]}")
            elif name == "--json" and name in options and file in options:
                # It once took a FILE. If there is one word more than the command has arguments, that word is the file.
                rest, behind = [*words[:at], *words[at + 1 :]], words[at + 1 : at + 2]
                if equals or (behind and not behind[0].startswith("-") and self._unused(ctx, rest)):
                    words[at] = file + equals + value
                    say(f"note: --json FILE still works, but the JSON file is {now}; --json alone prints JSON")
        return words

    def _unused(self, ctx: Any, words: list[str]) -> list[str]:
        return list(self.make_parser(ctx).parse_args(list(words))[1])


def without_types(parameters: list[Any]) -> list[Any]:
    """Parameters as the help shows them: no <bool> after an option without a value, no <str> after RECIPE."""
    for each in parameters:
        if getattr(each, "is_flag", False) and each.metavar is None:
            each.metavar = ""
        if not _is_option(each):
            each.display_type_rich = lambda ctx: None
    return parameters


def _is_option(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "option")


def flag_of(option: Any) -> str:
    """An option's long name: --output, not -o."""
    return str(max(option.opts, key=len))


def option_names(command: Any) -> dict[str, Any]:
    """The names in a config file -> the command's parameters: flags without their dashes, and arguments.

    An option that the flag ``--no-NAME`` switches off is called NAME, and is true unless it is switched off.
    """
    names = {}
    for parameter in command.params:
        name = flag_of(parameter).removeprefix("--") if _is_option(parameter) else parameter.name
        name = name.removeprefix("no-").replace("-", "_")
        if name not in NOT_SETTINGS:
            names[name] = parameter
    return names


def _words_of_config(command: Any, path: Path, given: Mapping[str, Any]) -> list[str]:
    """The options in a config file as words of a command line, without options that the command line already gives.

    Raises:
        ProxyTuneError: if the file is not a mapping of the command's options; it names what is wrong.
        OSError: if the file cannot be read.
    """
    options, arguments = [], []
    names = option_names(command)
    for key, value in _read_config(path).items():
        name = str(key).replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise ProxyTuneError(f"{path}: `{command.name}` has no option {key!r}; {meant}")
        parameter = names[name]
        if value is None or _is_given(given.get(parameter.name)):
            continue
        flag = flag_of(parameter)
        if getattr(parameter, "is_flag", False):
            if not isinstance(value, bool):
                raise ProxyTuneError(f"{path}: {key} is true or false, not {value!r}")
            options += [flag] if value != flag.startswith("--no-") else []
            continue
        texts = _texts(value)
        if texts is None:
            raise ProxyTuneError(f"{path}: {key} is a value or a list of values, not {value!r}")
        if not getattr(parameter, "multiple", False):
            texts = [",".join(texts)]
        if _is_option(parameter):
            options += [f"{flag}={text}" for text in texts]
        else:
            arguments += texts
    return [*options, *arguments]


def _is_given(value: Any) -> bool:
    """Whether the parser found a value. The result for a missing argument depends on the parser's version."""
    return isinstance(value, (str, bool)) or (isinstance(value, (list, tuple)) and bool(value))


def _read_config(path: Path) -> Mapping[str, Any]:
    """The options in the file: YAML, JSON, or a manifest's entry ``config``."""
    from proxytune.answers.files import read_yaml

    values = read_yaml(path)
    if isinstance(values, Mapping) and isinstance(values.get("config"), Mapping):
        values = values["config"]
    if not isinstance(values, Mapping):
        raise ProxyTuneError(f"{path} holds no options; write `NAME: VALUE` lines, as --print-config prints them")
    return values


def _texts(value: Any) -> list[str] | None:
    """A value in the form of the command line; None if it is nested too deeply."""
    named = isinstance(value, Mapping)
    values = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
    if any(isinstance(one, (Mapping, list)) for one in values):
        return None
    texts = [str(one).lower() if isinstance(one, bool) else str(one) for one in values]
    return [f"{name}={text}" for name, text in zip(value, texts)] if named else texts
