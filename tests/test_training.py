"""``proxytune train``: the data, the recipe it leaves, kills, bad input, and the mixture's loss against plain loops."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import SFTTrainer
from typer.testing import CliRunner

from proxytune import Expert, Member, ProxyTuneConfig, ProxyTunedForCausalLM, ProxyTuneError, load_recipe, write_recipe
from proxytune.cli import app
from proxytune.cli.training import _losses
from proxytune.recipe.check import check_recipe
from proxytune.training import TrainingOptions
from proxytune.training.data import Rows
from proxytune.training.run import Run, checked, make_trainer, read_data, resolved
from support import tiny

pytestmark = pytest.mark.usefixtures("no_progress")

# Twelve rows of unequal lengths, fast to learn by a tiny model.
TEXT = [
    {"prompt": f"Question: how many {'apples ' * (1 + i % 3)}?\nAnswer:", "completion": f" there are {i} apples."}
    for i in range(12)
]
CHAT = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
    for row in TEXT
]
FAST = ("--precision", "float32", "--batch-size", 4, "--micro-batch", 2, "--lr", "1e-2", "--rank", 4)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "text.jsonl", TEXT)


HELD_OUT = [
    {
        "prompt": f"Question: how many {'pears ' * (1 + i % 3)}?\nAnswer:",
        "completion": f" there are {i} pears" + " ." * i,
    }
    for i in range(5)
]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "held_out.jsonl", HELD_OUT)


def command(*args):
    return ["train", *map(str, args)]


def fast(*options):
    """Options with those that make a run short; --full has no adapter that has a rank."""
    return (*(FAST[:-2] if "--full" in options else FAST), *options)


def trains(shelf, out, data, *options):
    """Run the command in this process; what it says on stderr."""
    members = ("--base", shelf / "base", "--anti-expert", shelf / "anti")
    result = CliRunner().invoke(app, command(out, *members, "--data", data, *fast(*options)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    return result.stderr


def fails(*args):
    """Run the command, which must fail with one sentence; return it."""
    result = CliRunner().invoke(app, command(*args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 2, result.stderr
    assert result.stdout == ""
    doing = ("reading the data", "loading the models", "tokenizing the data")
    said = [line for line in result.stderr.splitlines() if line not in doing]
    assert len(said) == 1, result.stderr
    assert said[0].startswith("error: ")
    return said[0]


def manifest_of(out: Path) -> dict:
    return json.loads((out / "training" / "manifest.json").read_text("utf-8"))


def loss_of(recipe: Path, rows=TEXT, member=None) -> float:
    """The mean loss of the completions' tokens, by the recipe from disk, or by one of its members."""
    model = ProxyTunedForCausalLM.from_pretrained(recipe)
    tokenizer, total, count = tiny.tokenizer(), 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"]).input_ids
        ids = tokenizer(row["prompt"] + row["completion"] + "</s>").input_ids
        assert ids[: len(prompt)] == prompt
        with torch.no_grad():
            output = model(torch.tensor([ids]), output_member_logits=True)
        logits = output.logits if member is None else output.member_logits[member]
        losses = torch.nn.functional.cross_entropy(
            logits[0, len(prompt) - 1 : -1], torch.tensor(ids[len(prompt) :]), reduction="sum"
        )
        total, count = total + float(losses), count + len(ids) - len(prompt)
    return total / count


# -- the data -------------------------------------------------------------------------------------------------
def test_rows_are_the_same_from_every_kind_of_file(tmp_path, text):
    from datasets import Dataset

    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion", "note"])
        writer.writeheader()
        writer.writerows({**row, "note": "none, of ours"} for row in TEXT)
    Dataset.from_list(TEXT).to_parquet(tmp_path / "t.parquet")
    (tmp_path / "t.json").write_text("\n" + json.dumps(TEXT, indent=2))
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(text.read_bytes()))
    for path in (text, *(tmp_path / f"t.{kind}" for kind in ("csv", "parquet", "json", "jsonl.gz"))):
        rows = Rows.read(str(path))
        assert (rows.kind, rows.rows) == ("text", TEXT)
    assert Rows.read(str(tmp_path / "t.csv")).places[1] == f"line 4 of {tmp_path / 't.csv'}"  # two lines a row


def test_a_long_field_is_read_from_every_kind_of_file(tmp_path):
    """csv's own limit is 131,072 characters; it is as it was for others afterwards."""
    limit, row = csv.field_size_limit(), {"prompt": "a", "completion": " word" * 40_000}
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
    assert (
        Rows.read(str(tmp_path / "t.csv")).rows == Rows.read(str(write_rows(tmp_path / "t.jsonl", [row]))).rows == [row]
    )
    assert csv.field_size_limit() == limit


def test_a_directory_of_a_data_set_is_read_with_its_split(tmp_path):
    write_rows(tmp_path / "train.jsonl", TEXT[:5])
    write_rows(tmp_path / "test.jsonl", TEXT[5:])
    assert Rows.read(str(tmp_path), split="test").rows == TEXT[5:]
    with pytest.raises(ProxyTuneError, match="cannot be loaded"):
        Rows.read(str(tmp_path), split="dev")


def test_templates_make_prompts_of_other_columns(tmp_path):
    path = write_rows(tmp_path / "q.jsonl", [{"question": "1 + 1?", "answer": 2}])
    rows = Rows.read(str(path), prompt="Q: {question} {{so}}\nA:", completion=" {answer}")
    assert rows.rows == [{"prompt": "Q: 1 + 1? {so}\nA:", "completion": " 2"}]
    with pytest.raises(ProxyTuneError, match=r"line 1 of .*no column 'text'; it has question, answer"):
        Rows.read(str(path), prompt="{text}", completion="{answer}")
    with pytest.raises(ProxyTuneError, match="go together"):
        Rows.read(str(path), prompt="{question}")


def test_gsm8k_is_read_in_the_papers_format(data):
    prompt = "Answer the following question.\n\nQuestion: {question}\nAnswer:"
    rows = Rows.read(str(data / "gsm8k" / "train.jsonl"), prompt=prompt, completion=" {answer}")
    assert len(rows.rows) == 7473
    assert all("#### " in row["completion"] for row in rows.rows)


def test_messages_are_a_prompt_and_a_completion_where_the_assistant_speaks_once(tmp_path):
    rows = Rows.read(str(write_rows(tmp_path / "chat.jsonl", CHAT)))
    assert rows.kind == "chat"
    assert rows.rows[0] == {"prompt": CHAT[0]["messages"][:1], "completion": CHAT[0]["messages"][1:]}
    said = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    with pytest.raises(ProxyTuneError, match="role"):  # TRL renames the keys, and takes the roles as they are
        Rows.read(str(write_rows(tmp_path / "sharegpt.jsonl", [{"conversations": said}])))
    twice = [{"messages": CHAT[0]["messages"] * 2}]
    assert Rows.read(str(write_rows(tmp_path / "turns.jsonl", twice))).kind == "turns"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no rows"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"', "line 2 of .* not JSON"),
        ("\n\n[1]\n", r"entry 1 \(line 3\) of .* not an object"),
        ('{"prompt": "a", "completion": ""}\n', "line 1 of .* completion is empty"),
        ('{"prompt": " ", "completion": "b"}\n', "line 1 of .* prompt is empty"),
        ('{"prompt": "a", "completion": ["b"]}\n', "line 1 of .* both be text, or both lists"),
        (
            '{"prompt": "a", "completion": "b"}\n{"prompt": "\\ud83d", "completion": "b"}',
            "line 2 of .* its 'prompt' contains half",
        ),
        (
            '{"messages": [{"role": "user", "content": "\\udc00"}]}\n',
            "line 1 of .* its 'messages' contains half a surrogate",
        ),
        ('{"text": "a"}\n', r"line 1 of .* neither .* \(its columns: text\)"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "line 1 of .* last message"),
        ('{"messages": [{"role": "robot", "content": "a"}]}\n', "line 1 of .* needs a role"),
        ('{"messages": "hello"}\n', "line 1 of .* list of messages"),
        ('{"prompt": "a", "completion": "b"}\n{"messages": []}\n', "line 2 of .* list of messages"),
        ('{"prompt": "a", "completion": "b", "tools": "[1]"}\n', "line 1 of .* tools"),
        ('{"prompt": "a", "completion": "b"}\n' + json.dumps(CHAT[0]) + "\n", "line 2 of .* the first row has prompt"),
        (b"\xff\xfe", "line 1 of .* not UTF-8"),
    ],
)
def test_broken_rows_are_named(tmp_path, content, said):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ProxyTuneError, match=said):
        Rows.read(str(path))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", b"prompt,completion\na,b\nc\n", "line 3 of .* 2 columns"),
        ("t.csv", b'prompt,completion\na,"b\n', "line 2 of .* not CSV"),
        ("t.csv", b"", "no rows"),
        ("t.csv", b"prompt,completion\n\n\na\n", "line 4 of .* 2 columns"),
        ("t.csv", b"prompt,completion,prompt\na,b,c\n", "line 1 of .* two columns are called 'prompt'"),
        ("t.tsv", b"prompt\tcompletion\na\tb\n\xff\tb\n", "line 3 of .* not UTF-8"),
        (
            "t.json",
            b'[{"prompt": "a",\n"completion": "b"},\n{"prompt": 1}]',
            r"entry 2 \(line 3\) of .*: it has neither",
        ),
        ("t.parquet", b"PAR0", "cannot be read as a Parquet file"),
        ("t.txt", b"hello", "has none of the known suffixes"),
    ],
)
def test_broken_files_are_reported(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ProxyTuneError, match=said):
        Rows.read(str(tmp_path / name))


# -- plain training -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(shelf, text, tmp_path_factory):
    """An adapter on ``anti``, twelve steps."""
    out = tmp_path_factory.mktemp("trained") / "recipe"
    logged = trains(shelf, out, text, "--max-steps", 12)
    return out, logged


def test_the_output_is_a_recipe_that_shares_one_set_of_weights(trained):
    out, logged = trained
    config = load_recipe(out)
    (expert,) = config.expert_list
    assert expert.expert == replace(expert.anti_expert, adapter="expert")
    report = check_recipe(config)
    assert report.works, report.problems
    assert report.members[2].shares_with == "expert.expert"
    assert len(ProxyTunedForCausalLM.from_pretrained(out).lanes) == 2
    assert "training 12/12" in logged
    assert not (out / "training" / "checkpoints").exists()


def test_the_expert_has_learned_and_its_loss_is_that_of_the_recipe_on_disk(trained):
    out, _ = trained
    before, after = (loss_of(out, member=f"expert.{side}") for side in ("anti_expert", "expert"))
    assert after < 0.8 * before


def test_the_manifest_says_what_was_run(trained, text):
    import hashlib

    import trl

    manifest = manifest_of(trained[0])
    assert manifest["steps"] == 12
    assert manifest["versions"]["trl"] == trl.__version__
    assert manifest["data"]["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert manifest["data"]["rows"] == 12
    assert manifest["arguments"]["lr"] == 1e-2
    assert manifest["arguments"]["max_length"] == tiny.CONTEXT  # 2048 is more than these can read


def test_tensorboard_has_a_loss_for_each_step(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[0] / "training" / "logs")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))


def test_trackers_of_experiments_are_given_every_loss(shelf, text, held_out, tmp_path, monkeypatch):
    from transformers import TrainerCallback
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    logged = {"train": [], "validation": []}

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                logged["train"].append((state.global_step, logs["loss"]))
            if "eval_loss" in logs:
                logged["validation"].append((state.global_step, logs["eval_loss"]))

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "json", Tracker)  # its name is a package that is installed
    options = ("--max-steps", 3, "--validation", held_out, "--eval-every", 3, "--report-to", "json")
    trains(shelf, tmp_path / "out", text, *options)
    manifest = manifest_of(tmp_path / "out")
    assert [step for step, _ in logged["train"]] == [1, 2, 3]
    assert logged["train"][-1][1] == manifest["loss"]["last"]
    assert logged["validation"] == [(3, manifest["validation"]["best"]["loss"])]
    assert any((tmp_path / "out/training/logs").iterdir())


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("json,weights", "'weights' is none of clearml, "),
        ("json,tensorboard", "is always written"),
        ("no_such_package", "needs its package: pip install no_such_package"),
        ("csv", "csv cannot be used: no key"),
        ("", "'' is none of"),
    ],
)
def test_trackers_that_cannot_be_used_are_refused_at_the_start(shelf, text, tmp_path, monkeypatch, names, said):
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    def no_key():
        raise RuntimeError("no key")

    for name, kind in (("json", object), ("no_such_package", object), ("csv", no_key)):
        monkeypatch.setitem(INTEGRATION_TO_CALLBACK, name, kind)
    members = ("--base", shelf / "base", "--anti-expert", shelf / "anti")
    assert said in fails(tmp_path / "out", *members, "--data", text, "--report-to", names)
    assert not (tmp_path / "out").exists()


def test_options_of_an_adapter_are_refused_where_none_is_trained():
    with pytest.raises(ProxyTuneError, match="with --full no adapter is trained, so leave out --rank, --targets; or"):
        TrainingOptions("d", "m", "a", full=True, rank=4, targets="q_proj")
    with pytest.raises(ProxyTuneError, match="leave out --lora-alpha; or"):
        TrainingOptions("d", "m", "a", full=True, lora_alpha=32)
    TrainingOptions("d", "m", "a", full=True, rank=16)  # as a manifest has it, with its defaults


def test_the_paper_is_the_preset():
    settings = resolved(TrainingOptions("d", "m", "a", full=True))
    assert (settings.epochs, settings.lr, settings.warmup, settings.batch_size) == (2, 2e-5, 0.03, 128)
    assert settings.batch_size % settings.micro_batch == 0
    adapter = resolved(TrainingOptions("d", "m", "a"))
    assert (adapter.lr, adapter.rank, adapter.lora_alpha) == (2e-4, 16, 32)


def test_only_completions_are_learned(shelf, text, tmp_path):
    trainer, _, facts = made_trainer(shelf, tmp_path, text)
    tokenizer = tiny.tokenizer()
    for row, made in zip(TEXT, trainer.train_dataset):
        learned = [label for label in made["labels"] if label != -100]
        assert tokenizer.decode(learned) == row["completion"] + "</s>"
    assert facts["data"]["learned_tokens"] == sum(
        len([label for label in made["labels"] if label != -100]) for made in trainer.train_dataset
    )
    assert trainer.args.gradient_checkpointing
    assert trainer.args.weight_decay == 0
    assert trainer.args.lr_scheduler_type == "linear"


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
def test_the_loss_of_learned_positions_is_trls_own(shelf, text, tmp_path, full):
    trainer, _, _ = made_trainer(shelf, tmp_path, text, full=full)
    assert type(trainer).__name__ == "PositionsTrainer"
    if not full:
        tiny.shake(trainer.model)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(5)])
    gradients, losses = [], []
    for compute in (type(trainer).compute_loss, SFTTrainer.compute_loss):
        trainer.model.zero_grad()
        loss = compute(trainer, trainer.model, dict(batch), num_items_in_batch=torch.tensor(70))
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(losses[0], losses[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_a_model_that_caps_its_logits_is_trained_with_trls_own_loss(shelf, text, tmp_path):
    capped = tiny.write_model(tmp_path / "capped", "gemma3", "small", 4, final_logit_softcapping=5.0)
    trainer, _, _ = made_trainer(shelf, tmp_path, text, anti=capped, max_steps=1)
    assert type(trainer).compute_loss is SFTTrainer.compute_loss
    assert trainer.train().global_step == 1


def test_all_weights_can_be_trained(shelf, text, tmp_path):
    trains(shelf, tmp_path / "full", text, "--full", "--max-steps", 6, "--lr", "3e-3")
    recipe = tmp_path / "full"
    assert check_recipe(load_recipe(recipe)).works
    assert loss_of(recipe, member="expert.expert") < loss_of(recipe, member="expert.anti_expert")
    before, after = (load_file(place / "model.safetensors") for place in (shelf / "anti", recipe / "expert"))
    assert {name for name in before if torch.equal(before[name], after[name])} == set()


def test_an_expert_taught_by_chat_messages_is_shown_the_chat_format(shelf, tmp_path):
    data = write_rows(tmp_path / "chat.jsonl", CHAT)
    logged = trains(shelf, tmp_path / "out", data, "--max-steps", 1)
    (expert,) = load_recipe(tmp_path / "out").expert_list
    assert (expert.expert.prompt.kind, expert.anti_expert.prompt.kind) == ("chat", "raw")
    assert "may not know when to stop" in logged  # the tiny template ends turns with a newline
    assert check_recipe(load_recipe(tmp_path / "out")).works


def test_rows_that_are_too_long_are_counted_and_a_lost_completion_is_refused(shelf, tmp_path):
    long = {"prompt": TEXT[0]["prompt"], "completion": " apples" * 60}
    data = write_rows(tmp_path / "long.jsonl", [*TEXT, long])
    logged = trains(shelf, tmp_path / "out", data, "--max-steps", 1, "--max-length", 60)
    assert "1 of 13 rows are longer than 60 tokens and were cut there" in logged
    assert manifest_of(tmp_path / "out")["data"]["cut"] == 1
    lost = {"prompt": "apples " * 60, "completion": " none"}
    data = write_rows(tmp_path / "lost.jsonl", [*TEXT, lost])
    members = ("--base", shelf / "base", "--anti-expert", shelf / "anti")
    said = fails(tmp_path / "lost", *members, "--data", data, "--max-length", 60, *FAST)
    assert "line 13 of" in said
    assert "1 of 13 rows" in said


@pytest.mark.slow
def test_few_steps_are_noted_before_the_training(shelf, text, tmp_path):
    logged = trains(shelf, tmp_path / "few", text, "--epochs", 6)
    note = "note: 12 rows in batches of 4 make 18 steps in 6 epochs, which is little training; take a smaller"
    assert 0 <= logged.index(note) < logged.index("training 1/18")
    assert "resumed" not in logged
    assert "little training" not in trains(shelf, tmp_path / "asked", text, "--max-steps", 1)
    assert "little training" not in trains(shelf, tmp_path / "enough", text, "--epochs", 6.5)  # 20 steps


def test_members_come_from_a_recipe(shelf, text, tmp_path):
    before = load_recipe(shelf / "recipe")
    before.plausibility, before.renamed_tokens = 0.25, {"7": ["a", "b"]}
    write_recipe(before, tmp_path / "before")
    args = (tmp_path / "out", "--recipe", tmp_path / "before", "--data", text, *FAST, "--max-steps", 1, "--name", "new")
    assert CliRunner().invoke(app, command(*args)).exit_code == 0
    config = load_recipe(tmp_path / "out")
    assert (config.plausibility, config.renamed_tokens) == (0.25, {"7": ["a", "b"]})
    assert config.base_member.model == str(shelf / "base")
    assert config.expert_list[0].name == "new"
    assert "leave out --base" in fails(*args[1:], "--base", "x", tmp_path / "two")


MARKED = (  # marks what the assistant says, and ends it with a token that ends answers
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] "
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def test_every_turn_of_the_assistant_is_learned_where_the_template_marks_them(shelf, tmp_path):
    data = write_rows(tmp_path / "turns.jsonl", [{"messages": row["messages"] * 2} for row in CHAT])
    marked = tiny.tokenizer(chat_template=MARKED)
    place = tiny.write_model(tmp_path / "marked", "qwen2", "small", 3, tokenizer_=marked)
    trainer, notes, _ = made_trainer(shelf, tmp_path, data, anti=place)
    for row, made in zip(CHAT, trainer.train_dataset):
        learned = [label for label in made["labels"] if label != -100]
        assert marked.decode(learned) == (row["messages"][1]["content"] + "</s>") * 2
    assert notes == []
    members = ("--base", shelf / "base", "--anti-expert", shelf / "anti")
    assert "TRL cannot train this" in fails(tmp_path / "out", *members, "--data", data, *FAST)


def test_inside_the_mixture_all_members_read_one_text(shelf, tmp_path):
    data = write_rows(tmp_path / "chat.jsonl", CHAT)
    trains(shelf, tmp_path / "out", data, "--max-steps", 1, "--consistent")
    assert {member.prompt.kind for _, member in load_recipe(tmp_path / "out").members()} == {"raw"}


# -- kills and resumption -------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("options", [pytest.param((), id="plain"), pytest.param(("--consistent",), id="consistent")])
def test_a_killed_run_resumes_to_the_weights_of_the_unbroken_one(shelf, text, tmp_path, options):
    options = (*options, "--max-steps", 20, "--save-every", 1, "--seed", 7)
    members = ("--base", shelf / "base", "--anti-expert", shelf / "anti")
    args = command(tmp_path / "out", *members, "--data", text, *FAST, *options)
    entry = str(Path(sys.executable).with_name("proxytune"))
    killed = subprocess.Popen([entry, *args], stderr=subprocess.DEVNULL)
    state = tmp_path / "out/training/checkpoints/checkpoint-4/trainer_state.json"  # the one before is whole then
    deadline = time.monotonic() + 300
    while not state.exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert not (tmp_path / "out/config.json").exists()
    torn = tmp_path / "out/training/checkpoints/checkpoint-19"  # a kill in the middle of writing one
    torn.mkdir()
    (torn / "adapter_model.safetensors").write_bytes(b"torn")

    assert "not empty" in fails(*args[1:])
    changed = [*args[1:], "--resume", "--seed", "8"]
    assert "started with other options (--seed); repeat" in fails(*changed)
    logged = trains(shelf, tmp_path / "out", text, *options, "--resume")
    assert "resumed from step" in logged
    assert manifest_of(tmp_path / "out")["resumed_from_step"] in range(3, 19)
    trains(shelf, tmp_path / "unbroken", text, *options)
    resumed, unbroken = (
        load_file(tmp_path / name / "expert/adapter_model.safetensors") for name in ("out", "unbroken")
    )
    assert resumed.keys() == unbroken.keys()
    for name, tensor in unbroken.items():  # several threads may add in another order
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    assert "finished already" in trains(shelf, tmp_path / "out", text, *options, "--resume")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="adapter"),
        pytest.param(("--full",), id="full"),
        pytest.param(("--validation",), id="validation"),
        pytest.param(("--consistent", "--validation"), id="consistent"),
    ],
)
def test_a_run_that_is_killed_after_its_last_step_resumes_without_another(
    shelf, text, held_out, tmp_path, monkeypatch, options
):
    """The last step is in the middle of an epoch: a new epoch's end would be noticed by transformers itself."""
    from proxytune.training import run

    class Killed(BaseException):
        pass

    def dies(*args):
        raise Killed

    given = (*options, *([held_out] if "--validation" in options else []), "--lr", "3e-2", "--max-steps", 5)
    with monkeypatch.context() as patched:
        patched.setattr(run, "_save_expert", dies)
        with pytest.raises(Killed):
            trains(shelf, tmp_path / "killed", text, *given)
    logged = trains(shelf, tmp_path / "killed", text, *given, "--resume")
    assert "resumed from step 5" in logged
    assert "training" not in logged.partition("resumed from step 5")[2].partition("writing the recipe")[0]
    trains(shelf, tmp_path / "unbroken", text, *given)
    killed, unbroken = manifest_of(tmp_path / "killed"), manifest_of(tmp_path / "unbroken")
    assert (killed.pop("resumed_from_step"), unbroken.pop("resumed_from_step")) == (5, None)
    for own in ("seconds", "config"):  # the second holds the name of OUT
        del killed[own], unbroken[own]
    assert killed == unbroken
    for file in (tmp_path / "unbroken/expert").iterdir():
        assert file.read_bytes() == (tmp_path / "killed/expert" / file.name).read_bytes(), file.name


def test_what_differs_from_the_run_that_was_started_is_named_as_the_user_names_it(
    shelf, text, held_out, tmp_path, monkeypatch
):
    from proxytune.training import run

    class Kill(run.Reporting):
        def on_save(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    members = ("--base", shelf / "base", "--anti-expert", shelf / "anti")
    given = (tmp_path / "out", *members, *FAST, "--max-steps", 4, "--save-every", 2)
    with monkeypatch.context() as patched:
        patched.setattr(run, "Reporting", Kill)
        assert CliRunner().invoke(app, command(*given, "--data", text, "--validation", held_out)).exit_code == 130
    changed = write_rows(tmp_path / "changed.jsonl", HELD_OUT[:3])
    for validation, more, named in (
        (changed, (), "the validation data"),
        (held_out, ("--seed", 1), "--seed"),
        (held_out, ("--alpha", 2, "--no-gradient-checkpointing"), "--alpha, --no-gradient-checkpointing"),
        (changed, ("--lora-alpha", 3, "--seed", 1), "--lora-alpha, --seed, the validation data"),
    ):
        said = fails(*given, "--data", text, "--validation", validation, *more, "--resume")
        assert f"was started with other options ({named}); repeat" in said
    rows = write_rows(tmp_path / "rows.jsonl", TEXT[:6])
    said = fails(*given, "--data", rows, "--validation", held_out, "--resume")
    assert "started with other options (the training data); repeat" in said
    monkeypatch.setattr(run, "n_processes", lambda: 2)
    monkeypatch.setattr(run, "is_main", lambda: True)
    said = fails(*given, "--data", text, "--validation", held_out, "--resume")
    assert "started with other options (the number of processes); repeat" in said


@pytest.mark.slow
def test_a_seed_makes_a_run_repeatable_and_another_differs(shelf, text, tmp_path):
    made = {}
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        trains(shelf, tmp_path / name, text, "--max-steps", 2, "--seed", seed)
        made[name] = load_file(tmp_path / name / "expert/adapter_model.safetensors")
    for name, tensor in made["one"].items():
        assert torch.equal(tensor, made["again"][name])
    assert any(not torch.equal(tensor, made["other"][name]) for name, tensor in made["one"].items())


# -- validation -----------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="adapter"),
        pytest.param(("--full", "--lr", "1e-2"), id="full"),
        pytest.param(("--consistent",), id="consistent"),
        pytest.param(("--consistent", "--hidden-cache", "off"), id="consistent without a cache"),
    ],
)
def test_the_checkpoint_with_the_lowest_validation_loss_is_kept(shelf, text, held_out, tmp_path, options):
    options = ("--lr", "3e-2", *options, "--max-steps", 40, "--eval-every", 4)
    logged = trains(shelf, tmp_path / "out", text, "--validation", held_out, *options)
    validation = manifest_of(tmp_path / "out")["validation"]
    losses = {entry["step"]: entry["loss"] for entry in validation["losses"]}
    assert list(losses) == list(range(4, 41, 4))
    best = validation["best"]
    assert best == {"step": min(losses, key=losses.get), "loss": min(losses.values())}
    assert losses[40] > best["loss"] * 1.01, "it must get worse, or this shows nothing"
    member = None if "--consistent" in options else "expert.expert"
    assert loss_of(tmp_path / "out", HELD_OUT, member=member) == pytest.approx(best["loss"], rel=1e-4)
    assert validation["source"] == str(held_out)
    assert (validation["rows"], validation["stopped_early"]) == (5, False)
    assert manifest_of(tmp_path / "out")["trained_parameters"] > 0
    assert f"at step {best['step']}, which is kept" in logged
    assert f"training 8/40  validation loss {losses[8]:.4f}" in logged


def test_losses_are_shown_with_the_same_decimals():
    validated = {"losses": [{"step": 4, "loss": 1.5}, {"step": 8, "loss": 1.25004}], "stopped_early": True}
    manifest = {"loss": {"first": 2.826, "last": 2.85}, "steps": 8}
    assert list(_losses(manifest)) == ["loss 2.8260 -> 2.8500 in 8 steps"]
    assert list(_losses({**manifest, "validation": {**validated, "best": validated["losses"][1]}}))[1:] == [
        "validation loss 1.5000 at step 4 -> 1.2500 at step 8, which is kept; stopped early, at step 8"
    ]
    assert list(_losses({"loss": None, "steps": 0})) == []


@pytest.mark.slow
def test_validation_changes_no_step_of_the_training(shelf, text, held_out, tmp_path):
    trains(shelf, tmp_path / "with", text, "--max-steps", 8, "--validation", held_out, "--eval-every", 8)
    trains(shelf, tmp_path / "without", text, "--max-steps", 8)
    both = [load_file(tmp_path / name / "expert/adapter_model.safetensors") for name in ("with", "without")]
    for name, tensor in both[0].items():
        torch.testing.assert_close(both[1][name], tensor, rtol=1e-5, atol=1e-7, msg=name)


def test_early_stopping_ends_the_run(shelf, text, held_out, tmp_path):
    options = ("--lr", "3e-2", "--max-steps", 40, "--eval-every", 2, "--early-stopping", 3)
    logged = trains(shelf, tmp_path / "out", text, "--validation", held_out, *options)
    manifest = manifest_of(tmp_path / "out")
    validation = manifest["validation"]
    assert manifest["steps"] == validation["best"]["step"] + 6 < 40
    assert validation["stopped_early"]
    assert f"stopped early, at step {manifest['steps']}" in logged
    best = pytest.approx(validation["best"]["loss"], rel=1e-4)
    assert loss_of(tmp_path / "out", HELD_OUT, member="expert.expert") == best


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 3, "end"])
def test_a_killed_run_with_validation_resumes_to_the_unbroken_one(shelf, text, held_out, tmp_path, monkeypatch, at):
    """The kill comes at an evaluation after the best one, moved to another directory, or when all steps are done."""
    from proxytune.training import run

    options = ("--lr", "3e-2", "--max-steps", 40, "--eval-every", 2, "--early-stopping", 3, "--validation", held_out)
    trains(shelf, tmp_path / "unbroken", text, *options)
    unbroken = manifest_of(tmp_path / "unbroken")
    last = unbroken["steps"] if at == "end" else unbroken["validation"]["best"]["step"] + 2 * (at - 1)

    class Killed(BaseException):
        pass

    class Kill(run.Reporting):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == last:
                raise Killed

    def dies(*args):
        raise Killed

    with monkeypatch.context() as patched:
        if at == "end":
            patched.setattr(run, "_save_expert", dies)
        else:
            patched.setattr(run, "Reporting", Kill)
        with pytest.raises(Killed):
            trains(shelf, tmp_path / "killed", text, *options)
    (tmp_path / "killed").rename(tmp_path / "moved")
    members = ("--base", shelf / "base", "--anti-expert", shelf / "anti")
    changed = (tmp_path / "moved", *members, "--data", text, *FAST, *options, "--resume", "--early-stopping", 4)
    assert "started with other options (--early-stopping); repeat" in fails(*changed)
    trains(shelf, tmp_path / "moved", text, *options, "--resume")
    resumed = manifest_of(tmp_path / "moved")
    assert resumed["resumed_from_step"] is not None
    assert resumed["steps"] == unbroken["steps"]
    assert resumed["validation"]["best"]["step"] == unbroken["validation"]["best"]["step"]
    assert [entry["step"] for entry in resumed["validation"]["losses"]] == [
        entry["step"] for entry in unbroken["validation"]["losses"]
    ]
    for one, other in zip(resumed["validation"]["losses"], unbroken["validation"]["losses"]):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    both = [load_file(tmp_path / name / "expert/adapter_model.safetensors") for name in ("moved", "unbroken")]
    for name, tensor in both[0].items():
        torch.testing.assert_close(both[1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_a_missing_best_checkpoint_is_an_error(shelf, text, held_out, tmp_path, monkeypatch):
    from proxytune.training import run

    class Kill(run.Reporting):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step > state.best_global_step:
                best.append(state.best_global_step)
                raise KeyboardInterrupt

    best = []
    options = (*FAST, "--lr", "3e-2", "--max-steps", 40, "--eval-every", 2, "--validation", held_out)
    given = (tmp_path / "out", "--base", shelf / "base", "--anti-expert", shelf / "anti", "--data", text, *options)
    with monkeypatch.context() as patched:
        patched.setattr(run, "Reporting", Kill)
        assert CliRunner().invoke(app, command(*given)).exit_code == 130
    shutil.rmtree(tmp_path / f"out/training/checkpoints/checkpoint-{best[0]}")
    result = CliRunner().invoke(app, command(*given, "--resume"))
    assert result.exit_code == 2
    assert "the checkpoint with the lowest validation loss is missing" in result.stderr


def test_the_validation_loss_of_trls_own_loss_is_a_mean_over_tokens_too(shelf, text, held_out, tmp_path):
    capped = tiny.write_model(tmp_path / "capped", "gemma3", "small", 4, final_logit_softcapping=5.0)
    options = {"validation": str(held_out), "micro_batch": 2, "batch_size": 4}
    trainer, _, _ = made_trainer(shelf, tmp_path, text, anti=capped, **options)
    rows = [trainer.data_collator([row]) for row in trainer.eval_dataset]
    model = AutoModelForCausalLM.from_pretrained(capped).eval()
    total, count = 0.0, 0
    for row in rows:
        learned = int((row["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            logits = model(input_ids=row["input_ids"]).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], row["labels"][0, 1:], reduction="sum")
        total, count = total + float(loss), count + learned
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.slow
def test_checkpoints_keep_the_rhythm_of_the_resumed_command(shelf, text, tmp_path, monkeypatch):
    from proxytune.training import run

    saved = []

    class Watch(run.Reporting):
        def on_save(self, args, state, control, **kwargs):
            saved.append(state.global_step)
            if len(saved) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(run, "Reporting", Watch)
    members = ("--base", shelf / "base", "--anti-expert", shelf / "anti")
    args = command(tmp_path / "out", *members, "--data", text, *FAST, "--max-steps", 12)
    assert CliRunner().invoke(app, [*args, "--save-every", "4"]).exit_code == 130
    trains(shelf, tmp_path / "out", text, "--max-steps", 12, "--save-every", 3, "--resume")
    assert saved == [4, 6, 9, 12]


@pytest.mark.slow
def test_validation_data_come_from_a_split(shelf, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for split, written in (("train", TEXT), ("validation", HELD_OUT), ("test", HELD_OUT[:2])):
        write_rows(data / f"{split}.jsonl", written)
    for given, rows in (
        (("--validation-split", "test"), 2),
        (("--validation", data), 5),
        (("--validation", data, "--validation-split", "test[1:]"), 1),
    ):
        out = tmp_path / f"out{rows}"
        trains(shelf, out, data, *given, "--max-steps", 1)
        assert manifest_of(out)["validation"]["rows"] == rows


def test_validation_rows_are_cut_counted_and_checked_like_the_others(shelf, text, tmp_path):
    long = {"prompt": TEXT[0]["prompt"], "completion": " apples" * 60}
    data = write_rows(tmp_path / "long.jsonl", [*HELD_OUT, long])
    logged = trains(shelf, tmp_path / "out", text, "--max-steps", 1, "--max-length", 60, "--validation", data)
    assert "1 of 6 validation rows are longer than 60 tokens and were cut there" in logged
    assert manifest_of(tmp_path / "out")["validation"]["cut"] == 1
    lost = write_rows(tmp_path / "lost.jsonl", [*HELD_OUT, {"prompt": "apples " * 60, "completion": " none"}])
    members = ("--base", shelf / "base", "--anti-expert", shelf / "anti", "--data", text, *FAST)
    assert "line 6 of" in fails(tmp_path / "two", *members, "--validation", lost, "--max-length", 60)


def test_turns_are_validated_by_messages_with_one_answer_too(shelf, tmp_path):
    turns = write_rows(tmp_path / "turns.jsonl", [{"messages": row["messages"] * 2} for row in CHAT])
    chat = write_rows(tmp_path / "chat.jsonl", CHAT)
    marked = tiny.tokenizer(chat_template=MARKED)
    place = tiny.write_model(tmp_path / "marked", "qwen2", "small", 3, tokenizer_=marked)
    trainer, _, _ = made_trainer(shelf, tmp_path, turns, anti=place, validation=str(chat))
    for row, made in zip(CHAT, trainer.eval_dataset):
        learned = [label for label in made["labels"] if label != -100]
        assert marked.decode(learned) == row["messages"][1]["content"] + "</s>"


def test_validation_that_cannot_be_is_refused_in_one_sentence(shelf, text, held_out, tmp_path):
    out = tmp_path / "out"
    given = (out, "--base", shelf / "base", "--anti-expert", shelf / "anti", "--data", text)
    assert "--eval-every needs validation data" in fails(*given, "--eval-every", 2)
    assert "--early-stopping needs validation data" in fails(*given, "--early-stopping", 2)
    assert "no data at" in fails(*given, "--validation", tmp_path / "none.jsonl")
    assert "is a file" in fails(*given, "--validation-split", "test")
    assert "is a file" in fails(*given, "--validation", held_out, "--validation-split", "test")
    assert "are the training data" in fails(*given, "--validation", text)
    copied = write_rows(tmp_path / "copied.jsonl", TEXT)
    assert "are the training data" in fails(*given, "--validation", copied)
    chat = write_rows(tmp_path / "chat.jsonl", CHAT)
    assert "give both in one form" in fails(*given, "--validation", chat)
    assert "leave out --save-every" in fails(*given, "--validation", held_out, "--eval-every", 2, "--save-every", 4)
    assert "at least 1" in fails(*given, "--validation", held_out, "--early-stopping", 0)
    broken = write_rows(tmp_path / "broken.jsonl", [*HELD_OUT, {"prompt": "a"}])
    assert "line 6 of" in fails(*given, "--validation", broken)
    assert not out.exists()


# -- several processes ----------------------------------------------------------------------------------------
LAUNCHER = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "proxytune")  # accelerate's own


def launched(*args, **environment):
    """The command in two processes on the CPU."""
    return subprocess.run(
        [sys.executable, *LAUNCHER, *command(*args)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--full", "--lr", "3e-3")], ids=["adapter", "full"])
def test_two_processes_train_what_one_does(shelf, text, held_out, tmp_path, options):
    """``--batch-size`` is of all of them, and accelerate's precision is not ours."""
    options = (*fast(*options), "--micro-batch", 1, "--max-steps", 6, "--validation", held_out, "--eval-every", 2)
    given = ("--base", shelf / "base", "--anti-expert", shelf / "anti", "--data", text, *options)
    done = launched(tmp_path / "two", *given, ACCELERATE_MIXED_PRECISION="bf16")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("wrote ") == done.stderr.count("loading the models") == 1
    assert done.stderr.count("training 6/6  loss") == 1
    assert len(list((tmp_path / "two/training/logs").iterdir())) == 1
    trains(shelf, tmp_path / "one", text, *options)
    one, two = manifest_of(tmp_path / "one"), manifest_of(tmp_path / "two")
    assert two["arguments"]["processes"] == 2
    assert two["loss"]["last"] == pytest.approx(one["loss"]["last"], rel=1e-4)
    for ours, theirs in zip(one["validation"]["losses"], two["validation"]["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    name = "model" if "--full" in options else "adapter_model"
    both = [load_file(tmp_path / place / f"expert/{name}.safetensors") for place in ("one", "two")]
    assert both[0].keys() == both[1].keys()
    for key, tensor in both[0].items():
        torch.testing.assert_close(both[1][key], tensor, rtol=1e-3, atol=1e-5, msg=key)
    again = launched(tmp_path / "two", *given, "--resume")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("finished already") == 1


@pytest.mark.slow
def test_two_processes_that_were_ended_resume_to_what_one_trains(shelf, text, tmp_path):
    options = (*FAST, "--micro-batch", 1, "--max-steps", 20, "--save-every", 1)
    given = ("--base", shelf / "base", "--anti-expert", shelf / "anti", "--data", text, *options)
    ended = subprocess.Popen(
        [sys.executable, *LAUNCHER, *command(tmp_path / "two", *given)],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    state = tmp_path / "two/training/checkpoints/checkpoint-3/trainer_state.json"
    deadline = time.monotonic() + 300
    while not state.exists() and ended.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    ended.terminate()  # the launcher ends its processes
    ended.wait()
    assert not (tmp_path / "two/config.json").exists(), "it was done before it could be ended"
    assert "started with other options (the number of processes); repeat" in fails(tmp_path / "two", *given, "--resume")
    done = launched(tmp_path / "two", *given, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resumed from step" in done.stderr
    trains(shelf, tmp_path / "one", text, *options)
    both = [load_file(tmp_path / place / "expert/adapter_model.safetensors") for place in ("one", "two")]
    for key, tensor in both[0].items():
        torch.testing.assert_close(both[1][key], tensor, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.slow
def test_several_processes_print_an_error_once(shelf, text, tmp_path):
    given = ("--base", shelf / "base", "--anti-expert", shelf / "anti", "--data", text)
    done = launched(tmp_path / "out", *given, *FAST, "--lr", "1e30")
    assert done.returncode != 0
    assert done.stderr.count("error: the loss is ") == 1
    assert "exitcode  : 2" in done.stderr
    done = launched(tmp_path / "other", *given, "--batch-size", 3)
    assert done.stderr.count("error: a batch of 3 rows cannot be shared by 2 processes") == 1
    assert not (tmp_path / "other").exists()


def test_what_several_processes_cannot_do_is_refused(shelf, text, tmp_path, monkeypatch):
    given = (tmp_path / "out", "--base", shelf / "base", "--anti-expert", shelf / "anti", "--data", text)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert "accelerate launch --multi_gpu --num_processes 3 -m proxytune train" in fails(*given)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "RANK or LOCAL_RANK is not set" in fails(*given)
    for name, value in (("LOCAL_WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert "--consistent trains in one process" in fails(*given, "--consistent")
    assert "2 must divide --batch-size" in fails(*given, "--batch-size", 9)
    assert "micro batches of 4" in fails(*given, "--batch-size", 4, "--micro-batch", 4)
    recipe = ProxyTuneConfig(
        base=Member(str(shelf / "base")),
        experts=[Expert("e", placed := Member(str(shelf / "anti"), device_map="cpu"), placed)],
    )
    write_recipe(recipe, tmp_path / "placed")
    assert "has a device_map" in fails(tmp_path / "out", "--recipe", tmp_path / "placed", "--data", text)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "cannot use FSDP" in fails(*given)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert "on one machine" in fails(*given)
    assert not (tmp_path / "out").exists()


# -- bad input ------------------------------------------------------------------------------------------------
def test_bad_input_is_reported_in_one_sentence(shelf, text, tmp_path, monkeypatch):
    members = ("--base", shelf / "base", "--anti-expert", shelf / "anti")
    out = tmp_path / "out"
    assert "no data at" in fails(out, *members, "--data", tmp_path / "none.jsonl")
    assert "cannot be loaded" in fails(out, *members, "--data", "no-such/data-set")
    assert "name the members" in fails(out, "--data", text, "--base", shelf / "base")
    (tmp_path / "x.gguf").touch()
    assert "GGUF file, which cannot be trained" in fails(
        out, "--base", shelf / "base", "--anti-expert", tmp_path / "x.gguf", "--data", text
    )
    assert "does not exist" in fails(out, "--base", shelf / "base", "--anti-expert", "./nowhere", "--data", text)
    assert "longer than the 256 tokens" in fails(out, *members, "--data", text, "--max-length", 300)
    assert "micro batches" in fails(out, *members, "--data", text, "--batch-size", 8, "--micro-batch", 3)
    assert "not one of auto" in fails(out, *members, "--data", text, "--precision", "int8")
    assert "hidden cache is for consistent" in fails(out, *members, "--data", text, "--hidden-cache", "off")
    (tmp_path / "file").write_text("")
    assert "is a file" in fails(tmp_path / "file", *members, "--data", text)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thing").write_text("")
    assert "not empty" in fails(tmp_path / "used", *members, "--data", text)
    assert "no training run to resume" in fails(tmp_path / "used", *members, "--data", text, "--resume")
    monkeypatch.setattr("proxytune.training.run.PACKAGES", ("trl", "no_such_package"))
    assert "pip install 'proxytune[train]'" in fails(out, *members, "--data", text)


def test_a_target_that_is_not_a_module_is_named_before_the_training(shelf, text, tmp_path):
    given = ("--base", shelf / "base", "--anti-expert", shelf / "anti", "--data", text, *FAST)
    there = "there are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    for targets, wrong in (("q_prj,v_proj", "'q_prj'"), ("no,v_proj,nor", "'no', 'nor'"), ("q_proj,", "''")):
        said = fails(tmp_path / "new/out", *given, "--targets", targets)
        assert said == f"error: --targets names no module of the anti-expert: {wrong}; {there}"
        assert not (tmp_path / "new").exists()  # nothing is left of what has not begun
    assert "cannot train this" in fails(tmp_path / "out", *given, "--targets", "mlp")  # a module, but PEFT's refusal
    (tmp_path / "out/training/hidden").mkdir(parents=True)  # hours of work, say
    fails(tmp_path / "out", *given, "--targets", "mlp")
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["training", "hidden"]
    trains(shelf, tmp_path / "out", text, "--max-steps", 1, "--targets", "q_proj, layers.1.self_attn.v_proj")
    made = json.loads((tmp_path / "out/expert/adapter_config.json").read_text())
    assert set(made["target_modules"]) == {"q_proj", "layers.1.self_attn.v_proj"}


def test_a_loss_that_is_not_a_number_ends_the_run(shelf, text, tmp_path):
    members = ("--base", shelf / "base", "--anti-expert", shelf / "anti")
    args = (tmp_path / "out", *members, "--data", text, *FAST, "--lr", "1e30")
    result = CliRunner().invoke(app, command(*args))
    assert result.exit_code == 2
    assert "error: the loss is " in result.stderr
    assert "lower --lr" in result.stderr
    assert not (tmp_path / "out/config.json").exists()


@pytest.mark.slow
def test_a_disk_that_takes_no_more_is_reported(shelf, text, tmp_path):
    """The system refuses to let any file grow beyond 8 KiB; the checkpoint is larger."""
    members = ("--base", shelf / "base", "--anti-expert", shelf / "anti")
    args = command(tmp_path / "out", *members, "--data", text, *FAST, "--max-steps", 2, "--save-every", 1)
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)); from proxytune.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_members_that_cannot_be_trained_are_refused(shelf, text, tmp_path):
    quantized = tmp_path / "quantized"
    tiny.write_model(quantized, "qwen2", "small", 3)
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantized / "config.json").write_text(json.dumps(config))
    base = ("--base", shelf / "base", "--data", text)
    assert "only an adapter" in fails(tmp_path / "out", *base, "--anti-expert", quantized, "--full")
    adapted = Member(str(shelf / "anti"), adapter="x")
    recipe = ProxyTuneConfig(base=Member(str(shelf / "base")), experts=[Expert("e", adapted, adapted)])
    write_recipe(recipe, tmp_path / "adapted")
    assert "has an adapter" in fails(tmp_path / "out", "--recipe", tmp_path / "adapted", "--data", text)
    tiny.write_model(tmp_path / "swapped", "qwen2", "small", 3, tokenizer_=tiny.tokenizer(swap=("a", "b")))
    assert "share the base's vocabulary" in fails(tmp_path / "out", *base, "--anti-expert", tmp_path / "swapped")


def test_chat_messages_need_a_chat_template_that_takes_them(shelf, tmp_path):
    plain = tiny.write_model(tmp_path / "plain", "qwen2", "small", 3, tokenizer_=tiny.tokenizer(chat_template=None))
    data = write_rows(tmp_path / "chat.jsonl", CHAT)
    base = ("--base", shelf / "base", "--data", data)
    assert "no chat template" in fails(tmp_path / "out", *base, "--anti-expert", plain)
    picky = "{% if 5 in messages[0]['content'] %}{% endif %}{{ raise_exception('no') }}"
    other = tiny.write_model(tmp_path / "picky", "qwen2", "small", 3, tokenizer_=tiny.tokenizer(chat_template=picky))
    assert "line 1 of" in fails(tmp_path / "out2", *base, "--anti-expert", other)


# -- training inside the mixture ------------------------------------------------------------------------------
def made_trainer(shelf, folder, data, anti=None, **options):
    """The trainer as a run makes it, before its first step; its settings may differ by ``options``."""
    wanted = TrainingOptions(
        str(data),
        str(shelf / "base"),
        str(anti or shelf / "anti"),
        **({} if options.get("full") else {"rank": 4}),
        **{"batch_size": 4, "micro_batch": 4, "precision": "float32", **options},
    )
    config, wanted, shared = checked(resolved(wanted))
    return make_trainer(Run(wanted, folder, config, shared, *read_data(wanted), lambda progress: None))


def three_forwards(base, expert, anti, batch, alpha):
    """The loss by hand: whole logits of three models, mixed, and the mean over the learned positions."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        frozen = [base(**inputs).logits, anti(**inputs).logits]
    logits = frozen[0] + alpha * (expert(**inputs).logits - frozen[1])
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
@pytest.mark.parametrize("cache", ["auto", "off"])
@pytest.mark.parametrize("chunk", [5, 1024])
def test_the_loss_and_the_gradient_are_those_of_the_plain_three_forward_loop(
    shelf, text, tmp_path, monkeypatch, full, cache, chunk
):
    monkeypatch.setattr("proxytune.training.positions.CHUNK", chunk)
    trainer, _, _ = made_trainer(
        shelf, tmp_path, text, consistent=True, alpha=0.7, full=full, hidden_cache=cache, seed=3
    )
    assert (trainer.frozen[0].kept is None) == (cache == "off")
    model = trainer.model
    with torch.no_grad():  # away from M-, where expert and anti-expert would cancel
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    rows = [7, 2, 9]
    batch = trainer.data_collator([trainer.train_dataset[row] for row in rows])
    model.train()
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    model.zero_grad()
    model.gradient_checkpointing_disable()
    base, anti = (AutoModelForCausalLM.from_pretrained(shelf / name).eval() for name in ("base", "anti"))
    expected = three_forwards(base, model, anti, batch, 0.7)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_in_bf16_the_kept_states_lose_nothing(shelf, text, tmp_path):
    losses = []
    for cache in ("auto", "off"):
        trainer, _, _ = made_trainer(shelf, tmp_path, text, consistent=True, hidden_cache=cache, precision="bf16")
        assert trainer.accelerator.mixed_precision == "bf16"
        tiny.shake(trainer.model, std=0.05)
        if cache == "auto":
            weights = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
            assert trainer.frozen[0].kept.states.dtype == torch.bfloat16
        for parameter, same in zip((p for p in trainer.model.parameters() if p.requires_grad), weights):
            parameter.data.copy_(same)
        batch = trainer.data_collator([trainer.train_dataset[row] for row in (1, 4, 3)])
        losses.append(trainer.compute_loss(trainer.model, batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)  # the padding of their batches differs
    trainer, _, _ = made_trainer(shelf, tmp_path, text, consistent=True, hidden_cache="off")
    assert trainer.accelerator.mixed_precision == "no"  # a process is not bound to its first precision


def test_with_alpha_zero_nothing_is_learned(shelf, text, tmp_path):
    trainer, _, _ = made_trainer(shelf, tmp_path, text, consistent=True, alpha=0.0)
    tiny.shake(trainer.model)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(3)])
    trainer.compute_loss(trainer.model, batch).backward()
    gradients = [p.grad for p in trainer.model.parameters() if p.requires_grad]
    assert gradients
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
def test_training_moves_the_expert_and_no_frozen_weight(shelf, text, tmp_path, full):
    trainer, _, _ = made_trainer(
        shelf, tmp_path, text, consistent=True, hidden_cache="off", full=full, max_steps=3, lr=1e-2
    )
    base, anti = (frozen.model for frozen in trainer.frozen)

    def frozen_weights():
        states = {"base": base, "anti": anti}
        return {
            (side, name): tensor.clone()
            for side, model in states.items()
            for name, tensor in model.state_dict().items()
            if ".lora_" not in name
        }

    before = frozen_weights()
    moving = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = frozen_weights()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert any(not torch.equal(moving[n], p) for n, p in trainer.model.named_parameters() if p.requires_grad)
    assert not any(p.requires_grad for p in base.parameters())


def test_a_consistent_run_lowers_the_loss_of_its_recipe(shelf, text, tmp_path):
    trains(shelf, tmp_path / "out", text, "--consistent", "--max-steps", 12, "--alpha", 0.5)
    recipe = tmp_path / "out"
    assert loss_of(recipe) < loss_of(recipe, member="base") - 0.3  # the mixture began as the base
    loss = manifest_of(recipe)["loss"]
    assert loss["last"] < loss["first"]
    assert not (recipe / "training" / "hidden").exists()


@pytest.mark.slow
def test_runs_share_hidden_states_of_the_same_data_and_models_only(shelf, text, tmp_path):
    cache = tmp_path / "cache"
    options = ("--consistent", "--max-steps", 1, "--hidden-cache", cache)
    trains(shelf, tmp_path / "one", text, *options)
    made = {path.name: path.stat().st_mtime_ns for path in cache.glob("*.bin")}
    assert len(made) == 2
    trains(shelf, tmp_path / "two", text, *options, "--seed", 5)
    assert {path.name: path.stat().st_mtime_ns for path in cache.glob("*.bin")} == made
    trains(shelf, tmp_path / "three", write_rows(tmp_path / "fewer.jsonl", TEXT[1:]), *options)
    assert len(list(cache.glob("*.bin"))) == 4


def test_a_killed_pass_over_the_data_continues_where_it_was(tmp_path):
    from proxytune.training.consistent import HiddenStates

    counts, batches = [2, 1, 3], [[1, 0], [2]]
    calls = []

    def compute(rows):
        calls.append(list(rows))
        return torch.cat([torch.full((counts[row], 4), float(row)) for row in rows])

    first = HiddenStates(tmp_path / "h.bin", counts, 4, torch.float32)
    next(first.fill(batches, compute))
    del first
    second = HiddenStates(tmp_path / "h.bin", counts, 4, torch.float32)
    assert list(second.fill(batches, compute)) == [2]
    assert calls == [[1, 0], [2]]
    assert second.rows([2, 0])[:, 0].tolist() == [2, 2, 2, 0, 0]


def test_a_model_that_caps_its_logits_is_refused_for_consistent_training(shelf, text, tmp_path):
    capped = tiny.write_model(tmp_path / "capped", "gemma3", "small", 4, final_logit_softcapping=5.0)
    members = ("--base", shelf / "base", "--anti-expert", capped)
    assert "behind its head" in fails(tmp_path / "out", *members, "--data", text, "--consistent", *FAST)
    members = ("--base", capped, "--anti-expert", shelf / "anti")
    said = fails(tmp_path / "out2", *members, "--data", text, "--consistent", *FAST)
    assert "base changes its logits behind its head" in said
