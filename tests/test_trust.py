"""Code that a repository brings along is never run, and nobody is asked on stdin, unless the user said so."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import proxytune
from proxytune.cli import app
from support import tiny

pytestmark = pytest.mark.usefixtures("no_progress")

SOURCE = Path(proxytune.__file__).parent
AUTO_CLASSES = ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "loader")
COMMANDS = {
    "check": ["check", "{recipe}"],
    "generate": ["generate", "{recipe}", "hello", "-n", "2"],
    "chat": ["chat", "{recipe}", "-n", "2"],
    "eval": ["eval", "{recipe}", "--tasks", "gsm8k", "--data", "{data}", "--output", "{out}"],
    "base alone": ["eval", "{recipe}", "--tasks", "gsm8k", "--data", "{data}", "--output", "{out}", "--arms", "base"],
    "sweep": ["sweep", "{recipe}", "--tasks", "gsm8k", "--data", "{data}", "--output", "{out}", "--alpha", "0,1"],
    "bench": ["bench", "{recipe}", "--batch-size", "1", "--lengths", "2/2", "--repeats", "1"],
    "plan": ["plan", "{recipe}"],
    "train": ["train", "{out}", "--recipe", "{recipe}", "--data", "{data}"],
    "new": ["new", "{out}", "--base", "{base}", "--expert", "{shelf}/expert", "--anti-expert", "{shelf}/anti"],
    "judge": ["score", "toxigen", "{predictions}", "--judge", "{base}"],
}
# What brings code: the member's config, its tokenizer, the recipe's own tokenizer, or what claims to be a recipe.
PLACES = ("config", "tokenizer", "recipe's tokenizer", "recipe")


def traps(directory: Path, marker: Path, *, file: str = "config.json") -> None:
    """Let a file of a model directory ask for a module that writes ``marker``."""
    (directory / "trap.py").write_text(
        f"from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        f"import pathlib; pathlib.Path({str(marker)!r}).write_text('ran')\n"
        "class C(LlamaConfig):\n    model_type = 'trap'\nclass M(LlamaForCausalLM):\n    config_class = C\n"
        "class T(PreTrainedTokenizerFast):\n    pass\n"
    )
    values = json.loads((directory / file).read_text())
    if file == "config.json":
        values |= {"model_type": "trap", "auto_map": {"AutoConfig": "trap.C", "AutoModelForCausalLM": "trap.M"}}
    else:
        values |= {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["trap.T", "trap.T"]}}
    (directory / file).write_text(json.dumps(values))


@pytest.fixture
def trapped(tmp_path, shelf):
    """Makes a recipe that one of PLACES traps; the words of the commands, and the marker."""

    def make(place):
        marker, recipe, base = tmp_path / "marker", tmp_path / "recipe", tmp_path / "base"
        tiny.write_model(base, "llama", "base", 1)
        members = {"expert": {"model": str(shelf / "expert")}, "anti_expert": {"model": str(shelf / "anti")}}
        tiny.write_recipe_alone(recipe, {"base": {"model": "../base"}, "experts": [members]})
        where, file = {
            "config": (base, "config.json"),
            "tokenizer": (base, "tokenizer_config.json"),
            "recipe's tokenizer": (recipe, "tokenizer_config.json"),
            "recipe": (recipe, "config.json"),
        }[place]
        traps(where, marker, file=file)
        data, predictions = tmp_path / "gsm8k.jsonl", tmp_path / "p.jsonl"
        data.write_text(json.dumps({"question": "How many?", "answer": "2\n#### 2", "prompt": "a", "completion": "b"}))
        predictions.write_text(json.dumps({"prompt": "a", "text": "b", "outputs": ["b"], "group": "g"}) + "\n")
        words = {"recipe": recipe, "base": base, "data": data, "out": tmp_path / "out", "shelf": shelf}
        return {**words, "predictions": predictions}, marker

    return make


@pytest.mark.parametrize(
    ("command", "place"),
    [
        (command, place)
        for command, words in COMMANDS.items()
        for place in PLACES
        if "{recipe}" in words or (place in ("config", "tokenizer") and "{base}" in words)
    ],
)
def test_no_command_runs_it_or_asks(trapped, command, place):
    words, marker = trapped(place)
    result = CliRunner().invoke(app, [word.format(**words) for word in COMMANDS[command]], input="y\ny\ny\ny\n")
    assert not marker.exists(), result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "[y/N]" not in result.output
    if result.exit_code == 0:  # only a command that has no use for the file goes on
        assert place in ("tokenizer", "recipe's tokenizer")


def test_the_sentence_names_the_remedy_and_the_remedy_works(trapped):
    words, marker = trapped("config")
    for command in ("check", "generate", "new"):
        result = CliRunner().invoke(app, [word.format(**words) for word in COMMANDS[command]], input="y\n")
        assert result.exit_code == 2
        assert "base" in result.output
        assert "needs code of its own; if you trust it, add --trust-remote-code" in " ".join(result.output.split())
    assert not marker.exists()
    with pytest.raises(proxytune.MemberError, match="member_trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(words["recipe"])
    command = [word.format(**words) for word in COMMANDS["generate"]]
    assert CliRunner().invoke(app, [*command, "--trust-remote-code"]).exit_code == 0
    assert marker.exists()


def test_the_recipes_own_module_is_not_run(trapped, shelf):
    """A recipe is read as data, also by whoever trusts the members."""
    words, marker = trapped("recipe's tokenizer")
    (words["recipe"] / "proxytune_shim.py").write_text((words["recipe"] / "trap.py").read_text())
    (words["recipe"] / "tokenizer_config.json").unlink()
    assert CliRunner().invoke(app, ["generate", str(words["recipe"]), "hello", "--trust-remote-code"]).exit_code == 0
    AutoModelForCausalLM.from_pretrained(words["recipe"], trust_remote_code=True)
    assert not marker.exists()


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_call_that_could_ask_says_whether_code_is_trusted(path):
    for call in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
            continue
        if call.func.attr not in ("from_pretrained", "from_config") or "demo" in path.parts:  # the demo's are its own
            continue
        if isinstance(call.func.value, ast.Name) and call.func.value.id in AUTO_CLASSES:
            said = {keyword.arg for keyword in call.keywords}
            assert "trust_remote_code" in said, f"{path.name}, line {call.lineno}"
