"""Help and what is plainly wrong are said at once: nothing that takes seconds is imported for them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from proxytune.cli import COMMANDS
from support.commands import fails

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")

HEAVY = (
    "torch",
    "transformers",
    "numpy",
    "scipy",
    "datasets",
    "lm_eval",
    "peft",
    "trl",
    "huggingface_hub",
    "matplotlib",
)
# What is wrong -> the sentence that says so.
WRONG = {
    "generate ./nosuch hi": "there is no recipe at './nosuch'",
    "generate empty hi": "has no config.json, so it is not a recipe",
    "generate llama hi": "is a llama model, not a recipe",
    "generate torn hi": "its config.json is not valid JSON",
    "generate prompts.jsonl hi": "is a file; a recipe is a directory",
    "generate demo": "there is no prompt: give one as an argument, on stdin",
    "score demo_math prompts.jsonl": "the task 'demo_math' is scored by `eval` alone",
    "sweep demo --tasks demo_math --alpha 1:0:0.5": "STOP lies before START",
    "generate demo hi --input prompts.jsonl": "give either prompts or --input FILE",
    "generate demo --input nosuch.jsonl": "nosuch.jsonl: No such file or directory",
    "generate demo hi --alpha x": "alpha must be a number or NAME=NUMBER, not 'x'",
    "generate recipe hi --alpha nosuch=1": "no expert is called 'nosuch'; the recipe has chat",
    "generate odd hi --alpha 1": "experts[0] has an unknown field 'expret'; did you mean 'expert'",
    "chat recipe --alpha nosuch=1": "no expert is called 'nosuch'",
    "eval recipe --tasks demo_math --alpha nosuch=1": "no expert is called 'nosuch'",
    "sweep recipe --tasks demo_math --alpha nosuch=0:1:0.5": "no expert is called 'nosuch'",
    "generate demo hi --dtype int8": "--dtype 'int8' is not one of",
    "generate demo hi --speculate x": "--speculate 'x' is not auto, off or a number",
    "generate demo hi --temperature -1": "temperature must be a finite number",
    "generate demo hi --system x": "a system prompt needs chat",
    "explain ./nosuch hi": "there is no recipe at './nosuch'",
    "explain nosuch.jsonl": "there is no file 'nosuch.jsonl'",
    "explain demo hi --answer 1": "--answer chooses among the answers of a FILE",
    "explain prompts.jsonl hi": "a file contains its own prompts; leave 'hi' out",
    "explain prompts.jsonl --top-k 3": "leave --top-k out",
    "explain recipe hi --alpha nosuch=1": "no expert is called 'nosuch'",
    "explain demo hi --html /nowhere/x": "/nowhere/x cannot be written: there is no directory /nowhere",
    "generate demo hi --explain --json": "--explain is for answers that are printed as text",
    "analyze nosuch.jsonl": "nosuch.jsonl: No such file or directory",
    "analyze prompts.jsonl --plot prompts.jsonl": "is a file; --plot names a directory",
    "chat ./nosuch": "there is no recipe at './nosuch'",
    "check ./nosuch": "there is no recipe at './nosuch'",
    "serve ./nosuch": "there is no recipe at './nosuch'",
    "serve demo": "give --engine transformers or --engine vllm",
    "serve demo --engine vllm --draft-tokens 3": "--draft-tokens needs --draft",
    "serve demo --engine transformers --draft math": "--draft is for vLLM",
    "eval ./nosuch --tasks demo_math": "there is no recipe at './nosuch'",
    "eval demo --tasks nosuch": "there is no task 'nosuch'",
    "eval demo --tasks gsm8k --data ./nosuch": "the data ./nosuch does not exist",
    "eval demo --tasks gsm8k,mbpp --data prompts.jsonl": "--data is one file, but there are several tasks",
    "eval demo --tasks demo_math --tuned ./nosuch": "'./nosuch' does not exist",
    "eval demo --tasks demo_math --engine vllm --engine-option max_model_len=abc": "must be a whole number of tokens",
    "eval demo --tasks demo_math --arms tuned": "the arm tuned needs a model: --tuned MODEL",
    "sweep ./nosuch --tasks demo_math": "there is no recipe at './nosuch'",
    "sweep demo --tasks demo_math --alpha x": "--alpha is START:STOP:STEP",
    "sweep demo --tasks gsm8k --data ./nosuch": "the data ./nosuch does not exist",
    "bench ./nosuch": "there is no recipe at './nosuch'",
    "bench demo --arms x": "no arm is called 'x'",
    "bench demo --lengths x": "lengths are PROMPT/OUTPUT",
    "bench demo --prompts ./nosuch": "nosuch: No such file or directory",
    "plan ./nosuch": "there is no recipe at './nosuch'",
    "plan demo --acceptance 2": "an acceptance lies between 0 and 1",
    "score nosuch prompts.jsonl": "there is no task 'nosuch'",
    "score gsm8k nosuch.jsonl": "nosuch.jsonl: No such file or directory",
    "train out --data prompts.jsonl": "name the members with --base and --anti-expert",
    "train out --data nosuch.jsonl --recipe demo": "there is no data at 'nosuch.jsonl'",
    "train out --data prompts.jsonl --recipe ./nosuch": "there is no recipe at './nosuch'",
    "train out --data prompts.jsonl --base ./nosuch --anti-expert empty": "'./nosuch' does not exist",
    "train full --data prompts.jsonl --recipe demo": "full",
    "new made": "no base is given",
    "new made --preset nosuch": "there is no preset 'nosuch'",
    "new full --base empty --expert empty": "is not empty; give another directory",
    "new made --base ./nosuch --expert empty": "'./nosuch' does not exist",
    "eval demo --config nosuch.yaml": "nosuch.yaml: No such file or directory",
    "eval demo --config prompts.jsonl": "`eval` has no option 'prompt'; there are recipe, tasks",
    "bench demo --output /nowhere/x": "/nowhere/x: No such file",
}
SCRIPT = """
import json, os, sys
from typer.testing import CliRunner
from proxytune.cli import app
for line in sys.stdin.read().splitlines():
    if os.fork():  # each in a process of its own, with the same modules to begin with
        os.wait()
        continue
    result = CliRunner().invoke(app, line.split())
    heavy = [name for name in json.loads(sys.argv[1]) if name in sys.modules]
    print(json.dumps([result.exit_code, result.stdout, result.stderr, heavy, repr(result.exception)]), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Command line -> what one process made of it: status, stdout, stderr, heavy modules by then, the exception."""
    place = tmp_path_factory.mktemp("startup")
    recipe = '{"model_type": "proxytune", "base": "b", "experts": [{"name": "chat", "expert": "e"}]}'
    for name, text in (
        ("empty", None),
        ("full", None),
        ("llama", '{"model_type": "llama"}'),
        ("torn", '{"model'),
        ("recipe", recipe),
        ("odd", recipe.replace('"expert":', '"expret":')),
    ):
        (place / name).mkdir()
        if text is not None:
            (place / name / "config.json").write_text(text)
    (place / "full" / "notes").write_text("mine")
    (place / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    lines = [*(f"{command} --help" for command in ("", *COMMANDS)), *WRONG]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(HEAVY)],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        cwd=place,
        timeout=300,
        check=True,
    )
    return dict(zip(lines, map(json.loads, done.stdout.splitlines())))


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_heavy(told, command):
    status, stdout, _, heavy, _ = told[f"{command} --help"]
    assert (status, heavy) == (0, [])
    assert "Usage: " in stdout


@pytest.mark.parametrize("line", WRONG)
def test_what_is_plainly_wrong_is_said_at_once(told, line):
    status, stdout, stderr, heavy, exception = told[line]
    assert WRONG[line] in stderr, (stderr, exception)
    assert (status, stdout, heavy) == (2, "", [])
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1


# -- packages that are not installed --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("hidden", "command", "extra"),
    [
        ("lm_eval", "eval demo --tasks demo_math", "eval"),
        ("datasets", "eval demo --tasks demo_math", "eval"),
        ("matplotlib", "eval demo --tasks demo_math", "eval"),
        ("matplotlib", "sweep demo --tasks demo_math", "eval"),
        ("trl", "train out --data prompts.jsonl --recipe demo", "train"),
        ("tensorboard", "train out --data prompts.jsonl --recipe demo", "train"),
        ("peft", "demo --problems 1", "demo"),
        ("gguf", "demo --problems 1", "demo"),
        ("peft", "generate demo hi", "demo"),
        ("peft", "chat demo", "demo"),
        ("peft", "check demo", "demo"),
        ("gguf", "bench demo", "demo"),
        ("peft", "plan demo", "demo"),
        ("fastapi", "serve demo --engine transformers", "serve"),
        ("openai", "score truthfulqa_open answers.jsonl --judge-url http://127.0.0.1:1/v1 --judge-model m", "eval"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(hidden, command, extra, tmp_path, monkeypatch, no_progress):
    monkeypatch.setitem(sys.modules, hidden, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "answers.jsonl").write_text('{"question": "a", "output": "b"}\n')
    said = fails(*command.split())
    assert f"needs {hidden}" in said or f"need {hidden}" in said
    assert f"pip install 'proxytune[{extra}]'" in said
    assert not (tmp_path / "out").exists()
