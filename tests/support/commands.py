"""Commands, run in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from proxytune.cli import app


def run(*args, input=None, status=0):
    """Run a command in this process; the result has ``stdout`` and ``stderr``."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], input=input)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.stderr + result.stdout
    return result


def fails(*args, input=None):
    """Run a command that must fail with one sentence; return it."""
    result = run(*args, input=input, status=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr
