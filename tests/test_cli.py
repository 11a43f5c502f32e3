"""The command line: what each command prints, and every way it fails."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer

from proxytune import ProxyTunedForCausalLM, RecipeError, load_recipe
from proxytune.cli.shared import count, progress_bar, resumable, share_bar, size
from proxytune.recipe.compose import parse_expert
from proxytune.recipe.parts import Prompt
from proxytune.recipe.presets import PRESETS
from support import tiny
from support.commands import fails, run

pytestmark = pytest.mark.usefixtures("no_progress")

ROOT = Path(__file__).resolve().parents[1]


def entry(*args, **options):
    """Run the installed ``proxytune``."""
    command = [str(Path(sys.executable).with_name("proxytune")), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)


@pytest.fixture(scope="module")
def recipe(shelf):
    return shelf / "recipe"


# -- new ------------------------------------------------------------------------------------------------------
def trio(shelf):
    return "--base", shelf / "base", "--expert", shelf / "expert", "--anti-expert", shelf / "anti"


def test_new_makes_a_recipe_that_works(shelf, tmp_path):
    made = run("new", tmp_path / "made", *trio(shelf), "--alpha", "0.5", "--plausibility", "0.1", "--name", "chat")
    assert made.stdout == ""
    assert made.stderr == f"wrote {tmp_path / 'made'}; it works, and needs 314 KiB for its weights\n"
    config = load_recipe(tmp_path / "made")
    assert [(one.name, one.alpha) for one in config.expert_list] == [("chat", 0.5)]
    assert config.plausibility == 0.1
    assert config.vocab_size == tiny.VOCAB
    assert config.base_member.model == str(shelf / "base")  # absolute paths stay absolute
    assert str(tmp_path) not in json.dumps(config.text_config.to_dict())
    assert {path.name for path in (tmp_path / "made").iterdir()} >= {"tokenizer.json", "generation_config.json"}
    assert (tmp_path / "made" / "chat_template.jinja").read_text() == tiny.CHAT_TEMPLATE
    assert run("check", tmp_path / "made").stdout.endswith("the recipe works\n")


def test_new_keeps_relative_paths_relative_to_the_recipe(shelf, tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    for name in ("base", "expert", "anti"):
        (tmp_path / name).symlink_to(shelf / name)
    monkeypatch.chdir(tmp_path)
    run("new", "deep/made", "--base", "base", "--expert", "./expert", "--anti-expert", "anti")
    members = dict(load_recipe("deep/made").members())
    assert [one.model for one in members.values()] == ["../../base", "../../expert", "../../anti"]
    monkeypatch.chdir("/")
    run("check", tmp_path / "deep" / "made")


def test_new_with_everything(shelf, tmp_path):
    run(
        *("new", tmp_path / "made", "--base", shelf / "base", "--anti-expert", shelf / "anti"),
        *("--expert-adapter", shelf / "adapter", "--expert-prompt", "chat", "--system", "Be brief."),
        *("--response-prefix", "Answer:", "--base-dtype", "bfloat16", "--base-device-map", "cpu"),
        *("--add-expert", f"code={shelf / 'expert'},anti={shelf / 'anti'},alpha=-0.5,dtype=float32"),
        *("--add-expert", f"lora=,anti={shelf / 'anti'},adapter={shelf / 'adapter'},alpha=2"),
    )
    first, code, lora = load_recipe(tmp_path / "made").expert_list
    assert first.expert.model == str(shelf / "anti")
    assert first.expert.adapter == str(shelf / "adapter")
    assert first.expert.prompt == Prompt("chat", system="Be brief.", response_prefix="Answer:")
    assert first.anti_expert.prompt == Prompt()
    assert (code.alpha, code.expert.dtype, code.anti_expert.dtype) == (-0.5, "float32", None)
    assert (lora.alpha, lora.expert.model, lora.expert.adapter) == (2.0, str(shelf / "anti"), str(shelf / "adapter"))
    base = load_recipe(tmp_path / "made").base_member
    assert (base.dtype, base.device_map) == ("bfloat16", "cpu")


def test_new_ends_where_the_expert_ends(shelf, tmp_path):
    expert = tiny.write_model(tmp_path / "expert", "qwen2", "small", 2, eos_token_id=7)
    run("new", tmp_path / "made", "--base", shelf / "base", "--expert", expert, "--anti-expert", shelf / "anti")
    assert json.loads((tmp_path / "made" / "generation_config.json").read_text())["eos_token_id"] == [tiny.EOS, 7]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_recipes(preset, tmp_path):
    made = run("new", tmp_path / "made", "--preset", preset, "--offline")
    assert "the base is not on this machine" in made.stderr
    config = load_recipe(tmp_path / "made")
    assert [name.split(".")[-1] for name, _ in config.members()] == ["base", "expert", "anti_expert"]


def test_a_preset_with_parts_replaced(shelf, tmp_path):
    words = ("--preset", "llama2-13b-chat", "--base", shelf / "base", "--expert-revision", "v1")
    assert "does not work here: " in run("new", tmp_path / "unreached", *words, status=2).stderr
    made = run("new", tmp_path / "made", *words, "--offline")
    assert "not all of it can be checked offline" in made.stderr
    config = load_recipe(tmp_path / "made")
    expert = config.expert_list[0].expert
    assert config.base_member.model == str(shelf / "base")
    assert (expert.model, expert.revision) == ("meta-llama/Llama-2-7b-chat-hf", "v1")
    assert expert.prompt.kind == "chat"


def test_new_refuses_a_directory_in_use(shelf, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine").write_text("x")
    assert "is not empty" in fails("new", tmp_path / "made", *trio(shelf))
    run("new", tmp_path / "made", *trio(shelf), "--force")
    assert (tmp_path / "made" / "mine").exists()
    assert "is a file" in fails("new", tmp_path / "made" / "mine", *trio(shelf))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--expert", "EXPERT"], "no base is given"),
        (["--base", "BASE"], "no expert is given"),
        (["--base", "./gone", "--expert", "EXPERT"], "'./gone' does not exist"),
        (["--base", "BASE", "--anti-expert", "EXPERT", "--expert-adapter", "./gone"], "'./gone' does not exist; give"),
        (["--base", "BASE", "--expert", "/gone"], "'/gone' does not exist"),
        (["--base", "some/model", "--expert", "EXPERT"], "--offline writes the recipe without"),
        (["--base", "BASE", "--expert", "EXPERT", "--alpha", "nan"], "finite"),
        (["--base", "BASE", "--expert", "EXPERT", "--plausibility", "2"], "plausibility"),
        (["--base", "BASE", "--expert", "EXPERT", "--base-dtype", "int8"], "dtype 'int8'"),
        (["--base", "BASE", "--expert", "EXPERT", "--system", "x"], "needs a member whose prompt is `chat`"),
        (["--base", "BASE", "--expert", "EXPERT", "--response-prefix", "x"], "needs a member with a prompt"),
        (["--base", "BASE", "--expert", "EXPERT", "--expert-prompt", "shout"], "prompt kind 'shout'"),
        (["--base", "BASE", "--expert", "EXPERT", "--anti-expert-dtype", "float32"], "no model; name one"),
        (["--base", "BASE", "--expert-adapter", "x"], "needs a model under it"),
        (["--base", "BASE", "--add-expert", "EXPERT"], "does not begin with NAME="),
        (["--base", "BASE", "--add-expert", "a=b,what=c"], "'what=c' is not one of"),
        (["--base", "BASE", "--add-expert", "a=b,alpha=x"], "alpha must be a number"),
        (["--base", "BASE", "--add-expert", "a=EXPERT", "--alpha", "2"], "are for --expert"),
        (["--preset", "gpt5"], "there is no preset 'gpt5'; there are llama2-13b-chat"),
        (["--base", "RECIPE", "--expert", "EXPERT"], "is itself a recipe"),
    ],
)
def test_new_says_what_is_wrong(shelf, tmp_path, args, message):
    places = {"BASE": "base", "EXPERT": "expert", "RECIPE": "recipe"}
    args = [str(shelf / places[arg]) if arg in places else arg for arg in args]
    assert message in fails("new", tmp_path / "made", *args)
    assert not (tmp_path / "made").exists()


def test_add_expert_gives_a_field_once():
    with pytest.raises(RecipeError, match="alpha twice"):
        parse_expert("a=b,alpha=1,alpha=2")


# -- check ----------------------------------------------------------------------------------------------------
def test_check_shows_a_table(recipe):
    shown = run("check", recipe).stdout
    assert "expert.anti_expert" in shown
    assert "memory: weights" in shown
    assert "context: 256 tokens" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_check_prints_json(recipe):
    report = json.loads(run("check", recipe, "--json").stdout)
    assert report["works"] is True
    assert [one["name"] for one in report["members"]] == ["base", "expert.expert", "expert.anti_expert"]
    assert (report["description"], report["examples"]) == (None, [])


def test_new_keeps_what_the_recipe_is_for_and_check_shows_it(shelf, tmp_path):
    about = ("--description", "Knows [all] foxes.", "--example", "the fox", "--example", "and the dog")
    run("new", tmp_path / "made", *trio(shelf), *about)
    shown = run("check", tmp_path / "made").stdout
    command = f"try: proxytune generate {tmp_path / 'made'}"
    assert shown.startswith(f"Knows [all] foxes.\n{command} 'the fox'\n{command} 'and the dog'\n\nmember")
    report = json.loads(run("check", tmp_path / "made", "--json").stdout)
    assert (report["description"], report["examples"]) == ("Knows [all] foxes.", ["the fox", "and the dog"])


@pytest.mark.parametrize("prompt", ["word " * 40 + "end", "Question: a?\n\tAnswer:", "-it's [bold]"])
def test_an_example_prompt_can_be_copied_from_check(shelf, tmp_path, prompt):
    """Whatever the width of the terminal: the command that is shown asks for that prompt."""
    run("new", tmp_path / "made", *trio(shelf), f"--example={prompt}")
    shown = run("check", tmp_path / "made").stdout
    words = shlex.split(shown.partition("try: ")[2].partition("\n\nmember")[0])
    assert words == ["proxytune", "generate", str(tmp_path / "made"), *(["--"] if prompt[0] == "-" else []), prompt]
    run(*words[1:3], "-n", "1", *words[3:])


def test_check_shows_models_whole(shelf, tmp_path):
    """A path of more columns than a terminal has is on a line of its own, unbroken."""
    deep = tmp_path / "a-long-name-of-a-directory" / "and-another-long-name" / "base"
    deep.parent.mkdir(parents=True)
    deep.symlink_to(shelf / "base")
    run("new", tmp_path / "made", "--base", deep, "--expert", shelf / "expert", "--anti-expert", shelf / "anti")
    shown = run("check", tmp_path / "made").stdout.splitlines()
    assert f"base: {deep}" in shown
    assert all(len(line) <= 80 for line in shown[: shown.index("")])


def test_check_fails_where_the_recipe_does(tmp_path, shelf):
    config = json.loads((shelf / "recipe" / "config.json").read_text())
    config["base"] = {"model": str(shelf / "base")}
    config["experts"] = [{"name": "expert", "expert": {"model": "./gone"}}]
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run("check", tmp_path, status=2)
    assert "the recipe does not work" in result.stdout
    assert "./gone" in result.stdout


# -- generate -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model(recipe):
    return ProxyTunedForCausalLM.from_pretrained(recipe)


def test_json_has_the_prompts_in_order(recipe, model, tokenizer):
    prompts = ["the quick brown fox", "a", "Steering a large model"]
    shown = run("generate", recipe, *prompts, "--json", "-n", "9", "--alpha", "0.5", "-b", "2").stdout
    lines = [json.loads(line) for line in shown.splitlines()]
    assert [line["prompt"] for line in lines] == prompts
    for line in lines:
        assert list(line) == ["prompt", "text", "tokens", "alpha", "finish"]
        assert line["alpha"] == 0.5
        ids = torch.tensor([tokenizer(line["prompt"])["input_ids"]])
        reference = model.generate(ids, alpha=0.5, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
        assert line["tokens"] == reference.tolist()


def test_a_prompt_is_continued(recipe):
    one = run("generate", recipe, "the fox", "-n", "5").stdout
    text = json.loads(run("generate", recipe, "the fox", "-n", "5", "--json").stdout)["text"]
    assert one == text + "\n"
    assert run("generate", recipe, "the fox", "a", "-n", "5").stdout.startswith(f"> the fox\n{text}\n\n> a\n")


def test_a_prompt_comes_from_stdin(recipe):
    piped = run("generate", recipe, "--json", "-n", "5", input="the fox\nand the dog\n").stdout
    given = run("generate", recipe, "the fox\nand the dog", "--json", "-n", "5").stdout
    assert piped == given
    assert "there is no prompt" in fails("generate", recipe, input="\n")


def test_sampling_follows_the_seed(recipe):
    def sampled(*args):
        return run("generate", recipe, "the fox", "-n", "12", "--json", "--temperature", "1.5", *args).stdout

    assert sampled("--seed", "1") == sampled("--seed", "1") != sampled("--seed", "2")


@pytest.mark.parametrize("command", ["generate", "explain"])
def test_a_seed_without_sampling_is_refused(recipe, command):
    words = (command, recipe, "the fox", "-n", "2", "--seed", "1")
    for more in ((), ("--temperature", "0")):
        assert "these answers are greedy, so --seed would change nothing" in fails(*words, *more)
    run(*words, "--top-k", "3")


def test_chat_puts_the_prompt_into_the_template(recipe, model, tokenizer):
    shown = run("generate", recipe, "the fox", "--chat", "--system", "Rules", "--json", "-n", "6").stdout
    text = "<s>[system] Rules\n[user] the fox\n[assistant]"
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    assert json.loads(shown)["tokens"] == model.generate(ids, max_new_tokens=6)[0, ids.shape[1] :].tolist()


def test_alpha_by_name(shelf, tmp_path):
    experts = [
        {"name": name, "expert": {"model": str(shelf / "expert")}, "anti_expert": {"model": str(shelf / "anti")}}
        for name in ("one", "two")
    ]
    made = tiny.write_recipe(tmp_path / "r", {"base": {"model": str(shelf / "base")}, "experts": experts})
    shown = run("generate", made, "the fox", "--json", "-n", "2", "-a", "two=0.25").stdout
    assert json.loads(shown)["alpha"] == {"one": 1.0, "two": 0.25}
    assert "no expert is called 'three'" in fails("generate", made, "a", "-a", "three=1")


def test_jobs_from_stdin_name_broken_lines_and_go_on(recipe):
    lines = '{"prompt": "a", "id": 1}\nbroken\n{"prompt": "' + "the fox " * 300 + '"}\n{"prompt": "b", "alpha": 0}\n'
    result = run("generate", recipe, "--input", "-", "-n", "3", input=lines, status=2)
    made = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(one["line"], one["prompt"], one["alpha"]) for one in made] == [(1, "a", 1.0), (4, "b", 0.0)]
    assert made[0]["id"] == 1
    assert "-, line 2: it is not JSON" in result.stderr
    assert "-, line 3: the prompt has" in result.stderr
    assert "can read only 256" in result.stderr


def test_a_finished_job_is_left_as_it_is(recipe, tmp_path):
    out = tmp_path / "out.jsonl"
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    job = ("generate", recipe, "-i", source, "-o", out, "-n", "3")
    assert "wrote 2 answers" in run(*job).stderr
    before = out.read_bytes()
    assert "2 of 2 prompts are already done" in run(*job).stderr
    assert out.read_bytes() == before
    assert "other options" in fails_last(*job, "--temperature", "1")
    source.write_text('{"prompt": "z"}\n{"prompt": "b"}\n')
    assert "another prompt" in fails_last(*job)
    assert out.read_bytes() == before


def fails_last(*args):
    return run(*args, status=2).stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere", "a"], "there is no recipe at 'nowhere'"),
        (["./nowhere", "a"], "there is no recipe at './nowhere'"),
        (["some/recipe", "a"], "'some/recipe' cannot be read"),
        (["EXPERT", "a"], "is a qwen2 model, not a recipe"),
        (["RECIPE", ""], "the prompt is empty"),
        (["RECIPE", "a", " "], "the prompt is empty"),
        (["RECIPE"], "there is no prompt: give one as an argument, on stdin"),
        (["RECIPE", "a", "--input", "x"], "give either prompts or --input"),
        (["RECIPE", "--input", "/gone.jsonl"], "/gone.jsonl: No such file"),
        (["RECIPE", "a", "--output", "/gone/out.jsonl"], "/gone/out.jsonl: No such file"),
        (["RECIPE", "a", "--alpha", "nan"], "alpha must be a finite number"),
        (["RECIPE", "a", "--alpha", "inf"], "alpha must be a finite number"),
        (["RECIPE", "a", "--alpha", "much"], "alpha must be a number or NAME=NUMBER"),
        (["RECIPE", "a", "--alpha", "1", "--alpha", "2"], "one alpha for all experts"),
        (["RECIPE", "a", "--temperature", "-1"], "temperature"),
        (["RECIPE", "a", "--dtype", "int3"], "--dtype 'int3'"),
        (["RECIPE", "a", "--system", "x"], "a system prompt needs chat (--chat)"),
        (["RECIPE", "the fox " * 300], "can read only 256; shorten the prompt"),
    ],
)
def test_generate_says_what_is_wrong(shelf, args, message):
    places = {"EXPERT": "expert", "RECIPE": "recipe"}
    assert message in fails("generate", *[str(shelf / places[arg]) if arg in places else arg for arg in args])


def test_input_and_output_differ(recipe, tmp_path):
    (tmp_path / "x").write_text('{"prompt": "a"}\n')
    assert "the same file" in fails("generate", recipe, "-i", tmp_path / "x", "-o", tmp_path / "x")


# -- the whole ------------------------------------------------------------------------------------------------
def test_the_page_is_made_of_the_help():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "cli_docs.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [[], ["new"], ["check"], ["generate"], ["chat"], ["demo"]])
def test_help(command):
    assert "Usage: " in run(*command, "--help").stdout


@pytest.mark.slow
def test_the_entry_point(recipe):
    from proxytune import __version__

    done = entry("generate", recipe, "the fox", "--json", "-n", "3")
    assert done.returncode == 0
    assert done.stderr == ""
    assert json.loads(done.stdout)["prompt"] == "the fox"
    assert run("--version").stdout == f"proxytune {__version__}\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.slow
def test_a_full_disk(recipe):
    with open("/dev/full", "w") as full:
        command = [str(Path(sys.executable).with_name("proxytune")), "generate", str(recipe), "a", "--json", "-n", "2"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: No space left on device\n"
    told = fails_last("generate", recipe, "a", "-n", "2", "--output", "/dev/full")
    assert "error: /dev/full: No space left on device; what was written before is kept" in told


@pytest.mark.slow
def test_ctrl_c_leaves_a_job_cleanly(recipe, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f'{{"prompt": "the fox {i}"}}\n' for i in range(500)))
    command = [str(Path(sys.executable).with_name("proxytune")), "generate", str(recipe), "-n", "60", "-b", "1"]
    process = subprocess.Popen(
        [*command, "-i", str(source), "-o", str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell ignores Ctrl-C, and would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and (not out.exists() or out.read_bytes().count(b"\n") < 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in told
    assert "interrupted" in told


def test_ctrl_c_while_it_still_imports(recipe):
    """The command line answers at once, so a hurried Ctrl-C meets the seconds in which torch is imported."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "proxytune", "check", str(recipe)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert any("transformers.utils" in line for line in process.stderr), "it imported nothing"
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in told
    assert "interrupted" in told


def test_ctrl_c_says_what_is_kept_and_how_to_continue(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["proxytune", "train", "my out", "--lr", "1"])
    with pytest.raises(typer.Exit) as left, resumable("the checkpoints are kept", add="--resume"):
        raise KeyboardInterrupt
    assert left.value.exit_code == 130
    assert capsys.readouterr().err == (
        "interrupted; the checkpoints are kept, and this command continues from there: proxytune train 'my out' --lr 1 "
        "--resume\n"
    )


def test_without_a_terminal_a_line_tells_how_far_it_is(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("proxytune.cli.shared.time.monotonic", lambda: now[0])
    with share_bar() as tell:
        for second, share in ((1, 0.2), (20, 0.25), (31, 0.3), (50, 0.5), (400, 0.6)):
            now[0] = 100.0 + second
            tell("gsm8k, base (1 of 2)", share)
    assert capsys.readouterr().err.splitlines() == [
        "gsm8k, base (1 of 2), 30 % after 31 s, about 4 min left",
        "gsm8k, base (1 of 2), 60 % after 7 min, about 7 min left",
    ]


def test_loading_does_not_count_in_the_time_left(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("proxytune.cli.shared.time.monotonic", lambda: now[0])
    with share_bar() as tell:
        for second, share in ((1, 0.0), (500, 0.0), (600, 0.1)):
            now[0] = 100.0 + second
            tell("bench", share)
    assert capsys.readouterr().err.splitlines() == [
        "bench, 0 % after 8 min",
        "bench, 10 % after 10 min, about 15 min left",
    ]


def test_jobs_without_a_terminal_count_their_prompts(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("proxytune.cli.shared.time.monotonic", lambda: now[0])
    with progress_bar(40, True) as advance:
        for second, n in ((20, 8), (40, 8), (50, 8), (80, 8)):
            now[0] = 100.0 + second
            advance(n)
    assert capsys.readouterr().err.splitlines() == [
        "prompts 16/40, 0.4/s, 40 % after 40 s, about 60 s left",
        "prompts 32/40, 0.4/s, 80 % after 80 s, about 20 s left",
    ]


def test_sizes_are_shown_in_common_units():
    assert [size(n) for n in (12, 2048, 5 * 2**20, 26 * 10**9)] == ["12 B", "2.0 KiB", "5.0 MiB", "24.2 GiB"]
    assert [count(n) for n in (12, 47_800, 134_515_008, 13_015_864_320)] == ["12", "47.8 k", "135 M", "13 B"]


# -- speed ----------------------------------------------------------------------------------------------------
def test_drafting_and_packing_change_no_greedy_answer(recipe):
    def tokens(*options):
        lines = run("generate", recipe, "The dog", "Question:", "--json", "--max-new-tokens", 12, *options).stdout
        return [json.loads(line)["tokens"] for line in lines.splitlines()]

    plain = tokens("--speculate", "off")
    assert tokens("--speculate", "3") == plain
    assert tokens("--pack") == plain
    assert tokens("--speculate", "3", "--batch-size", 1) == plain


@pytest.mark.parametrize("value", ["yes", "-1", "2.5", "13"])
def test_a_number_of_drafts_that_is_none(recipe, value):
    assert "speculate" in fails("generate", recipe, "The dog", f"--speculate={value}")


def test_samples_do_not_depend_on_drafts(recipe):
    with_default = run("generate", recipe, "The dog", "--temperature", 1, "--json").stdout
    for drafts in ("off", "3"):
        assert (
            run("generate", recipe, "The dog", "--temperature", 1, "--json", "--speculate", drafts).stdout
            == with_default
        )


def test_an_adapter_given_as_the_expert_is_one_on_the_anti_expert(shelf, tmp_path):
    members = ("--base", shelf / "base", "--expert", shelf / "adapter")
    run("new", tmp_path / "made", *members, "--anti-expert", shelf / "anti")
    expert = load_recipe(tmp_path / "made").expert_list[0].expert
    assert (expert.model, expert.adapter) == (str(shelf / "anti"), str(shelf / "adapter"))
    assert "needs a model under it" in fails("new", tmp_path / "alone", *members)
    members = ("--base", shelf / "adapter", "--expert", shelf / "expert")
    assert "is an adapter, not a model; give it as `adapter`" in fails("new", tmp_path / "base", *members)
