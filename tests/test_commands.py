"""What all commands have in common: spellings, --json, --config, --quiet, --verbose, and examples in their help."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import typer
import yaml

from proxytune.cli import COMMANDS, app
from proxytune.cli.flags import Settings
from support.commands import fails, run

pytestmark = pytest.mark.usefixtures("no_progress")
PLAN = ("--device", "cpu", "--batch-size", "1")


@pytest.fixture(scope="module")
def recipe(shelf):
    return shelf / "recipe"


def commands():
    group = typer.main.get_command(app)
    return {name: group.get_command(None, name) for name in COMMANDS}


def examples():
    for command in commands().values():
        text = re.sub(r"\\\n +", "", command.help)  # lines that are continued
        yield from re.findall(r"^ {4,}(proxytune .*)$", text, re.MULTILINE)


def parsed(name, words, tmp_path, monkeypatch):
    """What a command would be called with."""
    monkeypatch.chdir(tmp_path)
    command = commands()[name]
    context = command.make_context(name, list(words))
    return context.params


# -- help -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_and_the_summary_of_its_help(name):
    text = commands()[name].help
    assert re.search(rf"Examples:\n\n\x08\n {{4,}}proxytune {name}\b.*\n {{4,}}proxytune", text)
    first = text.split("\n\n")[0].replace("\n", " ")
    verb = COMMANDS[name][1].split()[0]
    assert first.split()[0] == verb


@pytest.mark.parametrize("line", sorted(set(examples())))
def test_examples_are_commands_that_can_be_typed(line, recipe, tmp_path, monkeypatch):
    monkeypatch.delenv("PROXYTUNE_DATA", raising=False)
    _, name, *words = shlex.split(line.partition(" < ")[0])
    for mine in ("mine", "runs/mine"):
        (tmp_path / mine).mkdir(parents=True, exist_ok=True)
    (tmp_path / "mine" / "config.json").write_text((recipe / "config.json").read_text())
    (tmp_path / "runs" / "mine" / "manifest.json").write_text('{"config": {"recipe": "mine", "tasks": "gsm8k"}}')
    (tmp_path / "traces.jsonl").touch()
    (tmp_path / "mine" / "training").mkdir()
    (tmp_path / "mine" / "training" / "manifest.json").write_text('{"config": {"data": "x", "recipe": "demo"}}')
    assert parsed(name, words, tmp_path, monkeypatch)


def test_every_example_has_a_line_of_its_own_in_the_help():
    for name in COMMANDS:
        shown = [
            line.strip() for line in run(name, "--help").stdout.splitlines() if line.startswith("      proxytune ")
        ]
        assert len(shown) == len(re.findall(r"^ {4,}proxytune ", commands()[name].help, re.MULTILINE)), name


def test_a_misspelt_command_is_reported_with_the_nearest():
    assert "Did you mean 'eval'" in run("evl", "demo", status=2).stderr


# -- spellings ------------------------------------------------------------------------------------------------
def test_json_is_printed_and_output_is_written(recipe, tmp_path):
    made = run("plan", recipe, *PLAN, "--json")
    assert made.stderr == ""
    assert [lane["n_seats"] for lane in json.loads(made.stdout)["lanes"]] == [1, 1, 1]
    assert "there is no recipe" in fails("plan", "./nosuch", "--output", tmp_path / "none.json")
    assert "an acceptance" in fails("plan", recipe, "--acceptance", "2", "--output", tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()
    both = run("plan", recipe, *PLAN, "--json", "--output", tmp_path / "plan.json")
    assert both.stdout == made.stdout == (tmp_path / "plan.json").read_text()
    tables = run("plan", recipe, *PLAN, "-o", tmp_path / "other.json")
    assert "| naive" in tables.stdout
    assert (tmp_path / "other.json").read_text() == made.stdout


@pytest.mark.parametrize("words", [["--json", "FILE"], ["--json=FILE"]])
@pytest.mark.parametrize("first", [True, False])
def test_json_with_a_file_still_writes_it(words, first, recipe, tmp_path):
    words = [word.replace("FILE", str(tmp_path / "plan.json")) for word in words]
    made = run("plan", *([*words, recipe] if first else [recipe, *words]), *PLAN)
    assert (
        made.stderr
        == "note: --json FILE still works, but the JSON file is written by --output FILE; --json alone prints JSON\n"
    )
    assert "| naive" in made.stdout
    assert json.loads((tmp_path / "plan.json").read_text())["lanes"]


def test_a_recipe_after_the_flag_json_is_not_its_file(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert json.loads(run("plan", "--json", recipe, *PLAN).stdout)["lanes"]
    assert not list(tmp_path.iterdir())


def test_old_names_are_taken_with_a_notice(recipe, tmp_path, monkeypatch):
    made = run("plan", recipe, "--device", "cpu", "--batch", "1")
    assert made.stderr == "note: --batch is now --batch-size\n"
    assert made.stdout == run("plan", recipe, "--device", "cpu", "--batch-size", "1").stdout
    params = parsed("eval", [str(recipe), "-t", "gsm8k", "--out=there", "--json", "x.json"], tmp_path, monkeypatch)
    taken = [str(params[f"results_{name}"]) for name in ("directory", "output", "json")]
    assert taken == ["there", "x.json", "False"]
    assert parsed("generate", [str(recipe), "--", "--out"], tmp_path, monkeypatch)["prompts"] == ["--out"]


def test_json_of_check_new_tasks_and_presets(recipe, tmp_path):
    assert json.loads(run("check", recipe, "--json", "--output", tmp_path / "x").stdout)["works"] is True
    assert json.loads((tmp_path / "x").read_text())["works"] is True
    assert json.loads(run("tasks", "--json").stdout)["gsm8k"]["score"] is True
    assert "| demo_math " in run("tasks").stdout
    assert json.loads(run("presets", "--json").stdout)["llama2-13b-chat"]["base"] == "meta-llama/Llama-2-13b-hf"
    assert "| llama2-13b-chat " in run("presets").stdout


# -- how much is printed --------------------------------------------------------------------------------------
def test_quiet_prints_results_and_errors_alone(recipe, shelf, tmp_path):
    made = run("new", tmp_path / "made", "--base", shelf / "base", "--expert", shelf / "expert", "--quiet")
    assert (made.stdout, made.stderr) == ("", "")
    assert run("plan", recipe, "--device", "cpu", "--batch", "1", "-q").stderr  # a notice is printed while it is read
    assert "there is no recipe" in fails("plan", "./nosuch", "-q")
    assert "finite" in fails("generate", recipe, "the fox", "--alpha", "nan", "-q")


def test_verbose_says_where_an_error_comes_from(recipe):
    done = run("generate", recipe, "the fox", "--alpha", "nan", "-v", status=2)
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: alpha")


# -- config files ---------------------------------------------------------------------------------------------
def asked(name, words, tmp_path, monkeypatch):
    """What --print-config prints."""
    monkeypatch.delenv("PROXYTUNE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return yaml.safe_load(run(name, *words, "--print-config").stdout)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("eval", ["-t", "gsm8k,mbpp", "--limit", 5, "-a", "one=0.5", "-a", "two=1", "--judge", "x", "--judge", "y"]),
        ("sweep", ["-t", "gsm8k", "--alpha", "0:1:0.5", "--pack", "-o", "there", "--device-map", "0"]),
        ("bench", ["--batch-size", "1,2", "--speculate", "3", "--minutes", "0", "--options", "auto+pack,float32"]),
        ("train", ["--data", "x", "--recipe", "demo", "--no-gradient-checkpointing", "--full", "--lr", "1e-5"]),
        ("train", ["--data", "x", "--recipe", "demo", "--prompt", "Q: {q}\nA: --- 'x'", "--completion", " yes"]),
    ],
)
def test_what_is_printed_is_what_runs(name, words, recipe, tmp_path, monkeypatch):
    first = ["out"] if name == "train" else [recipe]
    printed = asked(name, [*first, *words], tmp_path, monkeypatch)
    with_defaults = asked(name, first + (words[:4] if name == "train" else words[:2]), tmp_path, monkeypatch)
    assert printed != with_defaults
    for text in (yaml.safe_dump(printed), json.dumps({"versions": {}, "config": printed})):
        (tmp_path / "run.yaml").write_text(text)
        assert asked(name, ["--config", "run.yaml"], tmp_path, monkeypatch) == printed


def test_the_command_line_comes_before_the_file_and_the_file_before_the_environment(recipe, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    file = {
        "tasks": ["gsm8k", "mbpp"],
        "limit": 5,
        "alpha": {"one": 1},
        "pack": True,
        "data": "data",
        "judge-label": None,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(file))
    monkeypatch.setenv("PROXYTUNE_DATA", "/nowhere")
    monkeypatch.chdir(tmp_path)
    words = ["eval", recipe, "--config", "run.yaml", "--limit", 7, "--alpha", "0.5", "--print-config"]
    found = yaml.safe_load(run(*words).stdout)
    assert (found["tasks"], found["limit"], found["alpha"], found["pack"]) == ("gsm8k,mbpp", 7, ["0.5"], True)
    assert (found["data"], found["recipe"], "judge_label" in found) == ("data", str(recipe), False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("task: gsm8k", "`eval` has no option 'task'; did you mean tasks?"),
        ("tasks: [gsm8k", "is not valid YAML"),
        ("- gsm8k", "holds no options"),
        ("", "holds no options"),
        ("pack: 3", "pack is true or false, not 3"),
        ("tasks: {a: {b: c}}", "tasks is a value or a list of values"),
        ("limit: -1\ntasks: gsm8k", "limit"),
        ("json: true", "has no option 'json'"),
    ],
)
def test_a_config_that_is_wrong_is_one_sentence(text, said, recipe, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    done = run("eval", recipe, "--config", tmp_path / "run.yaml", status=2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_every_long_command_takes_a_config():
    taken = {name for name, command in commands().items() if any(each.name == "config" for each in command.params)}
    assert taken == {"eval", "train", "sweep", "bench"}
    assert Settings() == {}
