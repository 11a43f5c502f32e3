"""Options classes as flags: what a command is given, and that every flag says what it does."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from proxytune.cli import app as proxytune
from proxytune.cli.flags import flat, only
from proxytune.errors import ProxyTuneError
from proxytune.options import Options as Limited
from proxytune.options import TooSmall, numbers, option, words

COUNTER = iter(range(100))


@dataclass(frozen=True)
class Part:
    model: str | None = option(None, flag="")
    revision: str | None = option(None, "The MEMBER's.")


@dataclass(frozen=True)
class Options(Limited):
    needed: str = option(help="Must be given.")
    sizes: tuple[int, ...] = option((1, 2), "Sizes.", flag="--size -s", parse=numbers("--size", "1,2"))
    names: tuple[str, ...] = option((), "Several times.", flag="--name", many=True, parse=tuple)
    arms: tuple[str, ...] | None = option(None, "Words.", parse=words)
    limit: int | None = option(None, "At least 1.", min=1)
    cached: bool = option(True, "Without a cache.", flag="--no-cache")
    quick: bool = option(False, "Quickly.")
    seed: int = option(lambda: next(COUNTER), "Another each time.")
    base_model: Part = option(Part(), "The model.")


@dataclass(frozen=True)
class Loading:
    dtype: str | None = option(None, "Dtype.")
    pack: bool = option(False, "Packed.")


def given(*words, shown=Loading):
    """What a command with these options is called with."""
    seen = []

    def command(what: str, *, options: Options, loud: bool = False, loading: shown) -> None:
        seen.extend([what, options, loud, loading])

    command.__annotations__ |= {"what": str, "options": Options, "loud": bool, "loading": shown, "return": None}
    app = typer.Typer()
    app.command()(flat(command))
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return seen or result


def test_a_command_is_given_its_options_whole():
    words = ["--needed", "x", "-s", "3,4", "--name", "a", "--name", "b", "--arms", "p,q", "--limit", "5", "--no-cache"]
    words += ["--quick", "--seed", "7", "--base-model", "m", "--base-model-revision", "r"]
    words += ["--dtype", "float32", "--pack", "--loud"]
    options = Options("x", (3, 4), ("a", "b"), ("p", "q"), 5, False, True, 7, Part("m", "r"))
    assert given("it", *words) == ["it", options, True, Loading("float32", True)]


def test_what_is_not_given_has_its_default():
    first, second = (given("it", "--needed", "x")[1] for _ in range(2))
    assert first.seed != second.seed
    assert first == Options("x", seed=first.seed)


def test_only_some_fields_have_flags():
    shown = Annotated[Loading, only("pack")]
    assert given("it", "--needed", "x", "--pack", shown=shown)[3] == Loading(None, True)
    assert "No such option" in given("it", "--needed", "x", "--dtype", "float32", shown=shown).output


def test_what_cannot_be_read_is_reported():
    assert "Missing option" in given("it").output
    with pytest.raises(ProxyTuneError, match=r"^--limit must be at least 1, not 0$"):
        given("it", "--needed", "x", "--limit", "0")
    with pytest.raises(ProxyTuneError, match=r"^limit must be at least 1, not 0$"):
        Options("x", limit=0)
    with pytest.raises(ProxyTuneError, match="--size is numbers, such as 1,2, not '1,x'"):
        given("it", "--needed", "x", "--size", "1,x")
    with pytest.raises(TypeError, match="takes no pannel"):
        option(None, pannel="Loading")


def test_a_limit_that_nobody_looks_at_is_refused():
    @dataclass(frozen=True)
    class Unlimited:
        most: int = option(1, "At most.", min=1)

    with pytest.raises(TypeError, match=r"Unlimited\.most has a min, so the class must derive from Options"):
        given("it", "--needed", "x", shown=Unlimited)


def test_every_class_looks_at_its_limits():
    """Before all else, so that the other options may be anything."""
    for package in ("analysis", "answers", "evaluation", "recipe", "speed", "training"):
        import_module(f"proxytune.{package}.options")
    kinds = [kind for kind in Limited.__subclasses__() if kind.__module__.startswith("proxytune")]
    kinds += [kind for each in kinds for kind in each.__subclasses__()]
    found = set()
    for kind in kinds:
        needed = {one.name: None for one in fields(kind) if MISSING is one.default is one.default_factory}
        for one in fields(kind):
            if (least := one.metadata.get("min")) is not None:
                with pytest.raises(TooSmall, match=f"^{one.name} must be at least {least}, not "):
                    kind(**{**needed, one.name: least - 1})
                found.add(kind.__name__)
    assert {"TrainingOptions", "EvaluationOptions", "BenchOptions", "AnswerOptions", "DoctorOptions"} <= found


def test_every_flag_says_what_it_does():
    for name, command in typer.main.get_command(proxytune).commands.items():
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.opts}"
            assert "MEMBER" not in parameter.help
