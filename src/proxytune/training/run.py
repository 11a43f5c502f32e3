"""One training run: check everything that can fail early, train with TRL, and leave a recipe directory.

    OUT/config.json …        the recipe, as `proxytune new` writes it
    OUT/expert/              M+: a LoRA adapter on M-, or the whole model
    OUT/training/            arguments.json, logs (TensorBoard), manifest.json; checkpoints while it runs

Everything is written so that a kill at any moment leaves what ``resume`` continues from. Of several processes
(:mod:`proxytune.processes`) the main one writes.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch

from proxytune.answers.journal import write_whole
from proxytune.errors import MemberError, PromptError, ProxyTuneError, RecipeError, first_line, is_unwritable, need
from proxytune.lanes.loading import load_model
from proxytune.options import words
from proxytune.processes import is_main, n_processes
from proxytune.recipe.check import check_recipe
from proxytune.recipe.compose import compose
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.generation_config import ends_of, valid_generation_config
from proxytune.recipe.members import Loading, load_config, load_tokenizer
from proxytune.recipe.parts import Expert, Member, Prompt
from proxytune.recipe.store import load_recipe
from proxytune.training.callbacks import Progress, Reporting, Resuming, Stopping
from proxytune.training.data import Rows
from proxytune.training.options import TrainingOptions, has_begun

__all__ = ["Progress", "Trained", "train"]

PACKAGES = ("trl", "peft", "datasets", "accelerate", "tensorboard")
FULL_LR, LORA_LR = 2e-5, 2e-4
LONGEST = 2048
FEW_STEPS = 20  # a run with fewer gets a note
# What may differ between a run and its resumption: none of it touches a weight.
FREE = ("save_every", "hidden_cache", "data", "validation", "report_to")

# What is compared besides the options, and what a user knows it by.
COMPARED = {
    "base": "the base",
    "anti_expert": "the anti-expert",
    "data_sha256": "the training data",
    "validation_sha256": "the validation data",
    "processes": "the number of processes",
}

# Trackers that run only on the platforms of these names, where they could not be tried.
PLATFORMS = {"azure_ml", "flyte", "kubeflow"}


@dataclass(frozen=True)
class Trained:
    """What came of it. ``manifest`` is what ``training/manifest.json`` holds; ``notes`` are for people."""

    manifest: dict[str, Any]
    notes: list[str]


@dataclass(frozen=True)
class Run:
    """A run that may begin.

    Attributes:
        options: with every default filled in. folder: OUT/training. report: called with what is being done.
        config: the recipe before training, M+ being M-. shared: how many ids all its members have.
    """

    options: TrainingOptions
    folder: Path
    config: ProxyTuneConfig
    shared: int
    data: Rows
    validation: Rows | None
    report: Callable[[Progress], None]

    @property
    def loading(self) -> Loading:
        return _loading(self.options)

    @property
    def anti_expert(self) -> Member:
        return cast(Member, self.config.expert_list[0].anti_expert)

    @property
    def checkpoint(self) -> Path | None:
        """The last whole one. What a kill left half-written lacks its state, written last, and is removed."""
        for path in sorted((self.folder / "checkpoints").glob("checkpoint-*"), key=_step, reverse=True):
            try:
                json.loads((path / "trainer_state.json").read_text("utf-8"))
                return path
            except (OSError, ValueError):
                shutil.rmtree(path, ignore_errors=True)
        return None


def train(
    options: TrainingOptions,
    out: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    note: Callable[[str], None] = lambda note: None,
) -> Trained:
    """Train an expert and write its recipe into ``out``.

    Args:
        options: with ``resume``, go on in a directory where a run with the same options was killed; where none was,
            begin. A finished run is left as it is.
        settings: the command's own options, for the manifest: ``proxytune train --config`` takes it.
        report: called after each step.
        note: is given each of ``Trained.notes`` as soon as it is known, most of them before the first step.

    Raises:
        ProxyTuneError: for whatever is wrong with the options, the data, the members or the directory; before any
            training wherever it can be known before.
    """
    _need_packages()
    started, folder = time.time(), out / "training"
    if not is_main():
        report, note = (lambda progress: None), (lambda text: None)
    notes: list[str] = []

    def tell(texts: Sequence[str]) -> None:
        for text in texts:
            note(text)
            notes.append(text)

    options = resolved(options)
    options.check(out)
    reporters = _reporters(options.report_to or ())
    config, options, shared = checked(options)
    report(Progress("reading the data", 0, 1))
    data, validation = read_data(options)
    arguments = _arguments(options, config)
    hashes = {"data_sha256": data.sha256, "validation_sha256": validation and validation.sha256}
    begun, made = has_begun(out), [place for place in folder.parents if not place.exists()]
    _begin(folder, {**arguments, **hashes}, begun)
    if (folder / "manifest.json").exists():
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        if is_main():
            _clean(folder)
        tell(["the run was finished already; nothing was done"])
        return Trained(manifest, notes)

    run = Run(options, folder, config, shared, data, validation, report)
    try:
        trainer, found, facts = make_trainer(run)
    except Exception:
        if is_main() and not begun:
            _withdraw(folder, made)
        raise
    for reporter in reporters:
        trainer.add_callback(reporter)
    checkpoint = run.checkpoint
    resumed_from = None if checkpoint is None else _step(checkpoint)
    tell(found)
    if checkpoint is not None:
        tell([f"resumed from step {resumed_from}"])
    tell(_few_steps(options, len(data.rows)))
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        report(Progress("writing the recipe", trainer.state.global_step, trainer.state.global_step))
        if is_main():
            _save_expert(trainer, run, out)
    except Exception as error:
        if is_unwritable(error):
            raise ProxyTuneError(
                f"{out} cannot be written: {first_line(error)}; --resume continues from there"
            ) from error
        raise

    if not is_main():
        trainer.accelerator.wait_for_everyone()
        return Trained(json.loads((folder / "manifest.json").read_text("utf-8")), notes)

    later = compose(_recipe_of(run, out), out, force=True, trust_remote_code=options.trust_remote_code)
    checks = check_recipe(load_recipe(out), run.loading)
    if checks.problems:
        raise RecipeError(f"the recipe that was trained does not work: {'; '.join(checks.problems)}")
    if validation is not None:
        facts["validation"] |= _validated(trainer.state)
        later += _notes_of_validation(facts["validation"])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    manifest = {
        "versions": {name: version(name) for name in ("proxytune", "torch", "transformers", *PACKAGES)}
        | {"python": platform.python_version()},
        "config": dict(settings or {}),
        "arguments": arguments,
        "seed": options.seed,
        **facts,
        "steps": trainer.state.global_step,
        "epochs": round(float(trainer.state.epoch or 0), 4),
        "loss": {"first": losses[0], "last": losses[-1]} if losses else None,
        "trained_parameters": trained,
        "device": str(trainer.accelerator.device),
        "resumed_from_step": resumed_from,
        "seconds": round(time.time() - started, 1),  # of this process, if it was resumed
    }
    _write_json(folder / "manifest.json", manifest)  # last: with it the run is finished
    _clean(folder)
    trainer.accelerator.wait_for_everyone()
    tell(later)
    return Trained(manifest, notes)


# -- before the training --------------------------------------------------------------------------------------
def _need_packages() -> None:
    need("training", "train", *PACKAGES)
    if n_processes() == 1 and (n_gpus := torch.cuda.device_count()) > 1:
        raise ProxyTuneError(
            f"one process trains on one GPU, but {n_gpus} are visible; begin the command with `accelerate launch "
            f"--multi_gpu --num_processes {n_gpus} -m proxytune train`, or make one visible with CUDA_VISIBLE_DEVICES"
        )


def _reporters(names: Sequence[str]) -> list[Any]:
    """transformers' callbacks for trackers of experiments, whose names are those of their packages too."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    known = sorted(INTEGRATION_TO_CALLBACK.keys() - PLATFORMS - {"tensorboard"})
    reporters = []
    for name in dict.fromkeys(names):
        if name == "tensorboard":
            raise ProxyTuneError(
                "leave tensorboard out of --report-to: its log is always written, in OUT/training/logs"
            )
        if name not in known:
            raise ProxyTuneError(f"--report-to {name!r} is none of {', '.join(known)}")
        if find_spec(name) is None:
            raise ProxyTuneError(f"--report-to {name} needs its package: pip install {name}")
        try:
            reporters.append(INTEGRATION_TO_CALLBACK[name]())
        except Exception as error:  # a missing key or setting: each raises something of its own
            raise ProxyTuneError(f"--report-to {name} cannot be used: {first_line(error)}") from error
    return reporters


def resolved(options: TrainingOptions) -> TrainingOptions:
    """With every default that depends on others, or on the number of processes, filled in."""
    share = max(1, options.batch_size // n_processes())
    return replace(
        options,
        lr=options.lr or (FULL_LR if options.full else LORA_LR),
        lora_alpha=None if options.full else options.lora_alpha or 2 * options.rank,
        micro_batch=options.micro_batch or max(n for n in range(1, 9) if share % n == 0),
        precision=_precision(options.precision),
        eval_every=options.eval_every or (options.save_every if options.validates else None),
    )


def _precision(asked: str) -> str:
    """``auto`` is bf16 where the hardware multiplies in it, else fp16 on a GPU and float32 on a CPU."""
    if asked != "auto":
        return asked
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "float32"


def _few_steps(options: TrainingOptions, rows: int) -> list[str]:
    """A note where the rows make few steps and the user may not know it: they gave no number of steps."""
    steps = math.ceil(options.epochs * math.ceil(rows / options.batch_size))
    if options.max_steps is not None or steps >= FEW_STEPS:
        return []
    made, epochs = (f"{n:g} {word}{'' if n == 1 else 's'}" for n, word in ((steps, "step"), (options.epochs, "epoch")))
    return [
        f"{rows} rows in batches of {options.batch_size} make {made} in {epochs}, which is little "
        "training; take a smaller --batch-size or more --epochs"
    ]


def read_data(options: TrainingOptions) -> tuple[Rows, Rows | None]:
    """The rows that are trained on, and those of validation."""

    def read(source: str, split: str) -> Rows:
        return Rows.read(source, split=split, prompt=options.prompt, completion=options.completion)

    data = read(options.data, options.split)
    return data, read(*options.validation_source).beside(data) if options.validates else None


def _loading(options: TrainingOptions) -> Loading:
    return Loading(trust_remote_code=options.trust_remote_code)


def before_training(recipe: str, name: str | None, alpha: float | None) -> ProxyTuneConfig:
    """A recipe with one expert, M+ being M-; local members by absolute paths. None: its own name and alpha."""
    config = load_recipe(recipe)
    if len(config.expert_list) != 1 or (anti := config.expert_list[0].anti_expert) is None:
        raise RecipeError(f"the recipe {recipe!r} must have one expert with an anti-expert to train a new one from")

    def placed(member: Member) -> Member:
        if member.model is None:
            raise MemberError(f"the recipe {recipe!r} has a member that was in memory; save it first")
        source = config.locate(member.model, member.revision)
        if source.subfolder:
            raise MemberError(f"member {member.model!r} lies inside the hub recipe {recipe!r}; download that first")
        return replace(member, model=source.path, prompt=Prompt())

    if config.base_member.adapter is not None:
        raise MemberError("the base has an adapter; merge it into its model first")
    if config.base_member.prompt.kind != "raw" or anti.prompt.kind != "raw":
        raise RecipeError(f"base or anti-expert of {recipe!r} has a prompt of its own; train from members without")
    (expert,) = config.expert_list
    anti = placed(anti)
    return ProxyTuneConfig(
        base=placed(config.base_member),
        experts=[Expert(name or expert.name, anti, anti, expert.alpha if alpha is None else alpha)],
        plausibility=config.plausibility,
        renamed_tokens=config.renamed_tokens,
    )


def checked(options: TrainingOptions) -> tuple[ProxyTuneConfig, TrainingOptions, int]:
    """The recipe before training, M+ being M-; the options, with the length that all members can read; and how many
    ids all of them have.

    What cannot work, or cannot be trained, is refused here, before a weight is loaded.
    """
    name, alpha = options.name, options.alpha
    if options.recipe is not None:
        config = before_training(options.recipe, name, alpha)
    else:
        anti = Member(options.anti_expert)
        expert = Expert(name or "expert", anti, anti, 1.0 if alpha is None else alpha)
        config = ProxyTuneConfig(base=Member(options.base), experts=[expert])
    anti = cast(Member, config.expert_list[0].anti_expert)
    if anti.model is not None and (anti.gguf_file or anti.model.endswith(".gguf")):
        raise MemberError(
            f"the anti-expert {anti.model!r} is a GGUF file, which cannot be trained; name the model it was made of"
        )
    if anti.adapter is not None:
        raise MemberError("the anti-expert has an adapter; merge it into its model first, and name that")
    found = check_recipe(config, _loading(options))
    if found.problems:
        raise RecipeError(found.problems[0])
    own = load_config(config, "the anti-expert", anti, _loading(options))
    quantized = anti.quantization_config or getattr(own, "quantization_config", None)
    if options.full and quantized:
        raise MemberError("the anti-expert is quantized, so only an adapter can be trained on it; leave out --full")
    if n_processes() > 1 and (quantized or anti.device_map is not None):
        raise MemberError(
            "the anti-expert is quantized or has a device_map, which takes one process; start it without a launcher"
        )
    context = found.context or LONGEST
    if options.max_length is not None and options.max_length > context:
        raise ProxyTuneError(
            f"--max-length {options.max_length} is longer than the {context} tokens that all members can read"
        )
    assert found.shared_vocab is not None
    return config, replace(options, max_length=options.max_length or min(LONGEST, context)), found.shared_vocab


def _arguments(options: TrainingOptions, config: ProxyTuneConfig) -> dict[str, Any]:
    """What is written down of a run: its options, and the members themselves in place of their recipe's name."""
    said = {name: value for name, value in asdict(options).items() if name not in ("recipe", "resume")}
    (expert,) = config.expert_list
    members = {"base": config.base, "anti_expert": config.experts[0]["anti_expert"]}
    processes = n_processes() if n_processes() > 1 else None
    return {**said, **members, "name": expert.name, "alpha": expert.alpha, "processes": processes}


def _begin(folder: Path, arguments: dict[str, Any], begun: bool) -> None:
    """Write down what is run; where a run has begun, compare with it."""
    file = folder / "arguments.json"
    if begun and file.exists():
        before, now = json.loads(file.read_text("utf-8")), json.loads(json.dumps(arguments))
        if differing := [name for name in now if name not in FREE and before.get(name) != now[name]]:
            named = ", ".join(COMPARED.get(name) or _flag(name) for name in differing)
            raise ProxyTuneError(
                f"the run in this directory was started with other options ({named}); repeat that run's command with "
                "--resume, or start again in another directory"
            )
        return
    if not is_main():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(file, arguments)
    except OSError as error:
        raise ProxyTuneError(f"{folder} cannot be written: {error.strerror or error}") from error


def _flag(name: str) -> str:
    (flag,) = (field.metadata.get("flag", "") for field in fields(TrainingOptions) if field.name == name)
    return flag.partition(" ")[0] or "--" + name.replace("_", "-")


def _withdraw(folder: Path, made: Sequence[Path]) -> None:
    """Remove what :func:`_begin` wrote of a run that cannot begin, and the directories that were made for it; not what
    lies in them besides, such as hidden states."""
    (folder / "arguments.json").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty
        for place in (folder, *made):
            place.rmdir()


def _clean(folder: Path) -> None:
    """Remove what only an unfinished run has use for."""
    for leftover in ("checkpoints", "hidden"):
        shutil.rmtree(folder / leftover, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_whole(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


# -- the trainer ----------------------------------------------------------------------------------------------
def make_trainer(run: Run) -> tuple[Any, list[str], dict[str, Any]]:
    """TRL's trainer with its data and, for consistent training, the frozen members; notes; facts of ``data`` and of
    ``validation``."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers.integrations import TensorBoardCallback
    from transformers.trainer_callback import PrinterCallback, ProgressCallback
    from trl import SFTConfig

    from proxytune.training.positions import PositionsTrainer, TokenMeanTrainer, has_plain_head

    options, config, data, validation, report = run.options, run.config, run.data, run.validation, run.report
    # Members that read what the caller gives read what the base's tokenizer made. An expert that is shown a chat
    # format is shown its own; but inside the mixture all read one text.
    reader = "base" if options.consistent or data.kind == "text" else f"{config.expert_list[0].name}.anti_expert"
    tokenizer = load_tokenizer(config, reader, dict(config.members())[reader], run.loading)
    if tokenizer is None:
        raise MemberError(f"the {reader} has no tokenizer; put one into its directory")
    if tokenizer.eos_token is None:
        raise MemberError(f"the tokenizer of the {reader} has no end-of-sequence token, so nothing could end an answer")
    for rows in (data, validation):
        if rows is not None:
            _refuse_unrendered(rows, tokenizer, reader)

    report(Progress("loading the models", 0, 1))
    dtype = "float32" if options.full else run.anti_expert.dtype  # small steps would be lost in 16 bits
    model: Any = load_model(config, "the anti-expert", replace(run.anti_expert, dtype=dtype), run.loading)
    model.generation_config = valid_generation_config(model.generation_config)
    targets = "all-linear" if options.targets == "all-linear" else _checked_targets(options.targets, model)
    assert options.micro_batch is not None
    assert options.lr is not None
    arguments = SFTConfig(
        output_dir=str((run.folder / "checkpoints").resolve()),  # the best checkpoint is found by it
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        learning_rate=options.lr,
        lr_scheduler_type="linear",
        warmup_steps=options.warmup,
        weight_decay=0.0,
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=options.batch_size // (options.micro_batch * n_processes()),
        max_length=None,  # rows are cut below, where it is counted
        completion_only_loss=None if data.kind == "turns" else True,
        assistant_only_loss=data.kind == "turns",
        bf16=options.precision == "bf16",
        fp16=options.precision == "fp16",
        use_cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        gradient_checkpointing=options.gradient_checkpointing,
        ddp_find_unused_parameters=False,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        save_strategy="steps",
        save_steps=options.eval_every or options.save_every or 0.1,
        save_total_limit=2,
        eval_strategy="no" if validation is None else "steps",
        eval_steps=options.eval_every or 0.1,
        per_device_eval_batch_size=_validation_batch(options.micro_batch, validation),
        load_best_model_at_end=validation is not None,
        metric_for_best_model=None if validation is None else "eval_loss",
        restore_callback_states_from_checkpoint=True,  # how many evaluations brought nothing
        seed=options.seed,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,  # a row's number goes with it
    )
    arguments.mixed_precision = options.precision if options.precision in ("bf16", "fp16") else "no"  # not accelerate's
    lora = None
    if not options.full:
        assert options.lora_alpha is not None
        lora = LoraConfig(
            r=options.rank,
            lora_alpha=options.lora_alpha,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
    kind: Any = TokenMeanTrainer
    if options.consistent:
        from proxytune.training.consistent import ConsistentTrainer as kind
    elif n_processes() == 1 and arguments.device.type == "cpu" and not hasattr(model.config, "output_router_logits"):
        kind = PositionsTrainer if has_plain_head(model) else TokenMeanTrainer
    frozen_copy = copy.deepcopy(model) if options.consistent and options.full else None
    report(Progress("tokenizing the data", 0, 1))
    try:
        trainer = kind(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(data.rows),
            eval_dataset=None if validation is None else Dataset.from_list(validation.rows),
            processing_class=tokenizer,
            peft_config=lora,
        )
    except ProxyTuneError:
        raise
    except (ValueError, RuntimeError, TypeError) as error:  # what TRL and PEFT refuse: targets, templates, quantization
        raise ProxyTuneError(f"TRL cannot train this: {first_line(error)}") from error
    trainer.train_dataset, notes, facts = _fit(trainer, run, data, trainer.train_dataset)
    facts = {"data": facts, "validation": None}
    if validation is not None:
        trainer.eval_dataset, more, facts["validation"] = _fit(trainer, run, validation, trainer.eval_dataset)
        trainer.validation_tokens = facts["validation"]["learned_tokens"]
        notes += more
    if options.consistent:
        trainer.data_collator = _with_rows(trainer.data_collator)
        _mix(trainer, run, frozen_copy)

    from torch.utils.tensorboard import SummaryWriter

    checkpoint = run.checkpoint
    purge = None if checkpoint is None else _step(checkpoint) + 1  # what a killed run logged after it
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if is_main():
        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(run.folder / "logs"), purge_step=purge)))
    trainer.add_callback(Reporting(report))
    trainer.add_callback(Resuming())
    if options.early_stopping is not None:
        trainer.add_callback(Stopping(options.early_stopping))
    return trainer, notes, facts


def _checked_targets(asked: str, model: Any) -> list[str]:
    """The modules that ``--targets`` names. (PEFT is content if one of them exists.)"""
    from transformers.pytorch_utils import Conv1D

    targets, names = list(words(asked)), [name for name, _ in model.named_modules()]
    if wrong := [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names if name)]:
        head = model.get_output_embeddings()
        linear = {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
        }
        there = f"; there are {', '.join(sorted(linear))}" if linear else ""
        raise ProxyTuneError(f"--targets names no module of the anti-expert: {', '.join(map(repr, wrong))}{there}")
    return targets


def _validation_batch(micro_batch: int, validation: Rows | None) -> int:
    """Rows at once in validation. Several processes fill the last round up with rows that they have read already, and
    then leave these out batch by batch: none must be half filled."""
    if validation is None or n_processes() == 1:
        return micro_batch
    return max(n for n in range(1, micro_batch + 1) if len(validation.rows) % n == 0)


def _mix(trainer: Any, run: Run, frozen_copy: Any) -> None:
    """Load the base, and keep what the frozen members say of the data where that pays."""
    options = run.options
    base = load_model(run.config, "base", run.config.base_member, run.loading)
    trainer.mix_with(base, frozen_copy, run.config.alphas[0], run.shared)
    steps_an_epoch = math.ceil(len(run.data.rows) / options.batch_size)
    epochs = options.epochs if options.max_steps is None else options.max_steps / steps_an_epoch
    if options.hidden_cache == "off" or (options.hidden_cache == "auto" and epochs <= 1):
        return
    place = run.folder / "hidden" if options.hidden_cache == "auto" else Path(options.hidden_cache).expanduser()
    trainer.keep_hidden(place, lambda name, done, of: run.report(Progress(f"hidden states of the {name}", done, of)))


def _refuse_unrendered(data: Rows, tokenizer: Any, reader: str) -> None:
    """Refuse rows that the chat template does not take, naming the first."""
    if data.kind == "text":
        return
    if not tokenizer.chat_template:
        raise PromptError(
            f"the data are chat messages, but the tokenizer of the {reader} has no chat template; give prompts and "
            "completions as text"
        )
    for place, row in zip(data.places, data.rows):
        try:
            tokenizer.apply_chat_template(row.get("messages") or row["prompt"] + row["completion"], tokenize=False)
        except Exception as error:  # a chat template is a program, and raises what it likes
            raise PromptError(f"{place}: the chat template refuses it: {first_line(error)}") from error


def _fit(trainer: Any, run: Run, data: Rows, dataset: Any) -> tuple[Any, list[str], dict[str, Any]]:
    """Cut TRL's tokenized rows at ``max_length``; say how many, and refuse to lose a whole completion.

    (TRL would cut them silently, and drop those of which nothing is left to learn.) Rows are numbered, those of
    validation after those of training.
    """
    notes = []
    validates = data is run.validation
    what = "validation rows" if validates else "rows"
    longest = cast(int, run.options.max_length)
    n_long, n_learned, lost, ended = 0, 0, [], validates
    ends = {trainer.processing_class.eos_token_id, *ends_of(trainer.model.generation_config)}
    for place, ids, labels in zip(data.places, dataset["input_ids"], dataset["labels"]):
        n_long += len(ids) > longest
        learned = [label for label in labels[1:longest] if label != -100]
        n_learned += len(learned)
        if not learned:
            lost.append(place)
        elif max(learned) >= run.shared:
            raise ProxyTuneError(f"{place}: its completion has token {max(learned)}, which not all members have")
        ended = ended or any(label in ends for label in learned[-2:])  # a template may put a newline after it
    if lost:
        raise ProxyTuneError(
            f"{lost[0]}: the prompt fills all {longest} tokens, so nothing of the completion would be learned "
            f"({len(lost)} of {len(data.rows)} rows are like that); give a larger --max-length, or shorter prompts"
        )
    if n_long:
        notes.append(f"{n_long} of {len(data.rows)} {what} are longer than {longest} tokens and were cut there")
        dataset = dataset.map(lambda row: {name: row[name][:longest] for name in ("input_ids", "labels")})
    if not ended:
        notes.append(
            "no completion ends with a token that ends an answer, so the steered base may not know when to stop"
        )
    first = len(run.data.rows) if validates else 0
    numbers = list(range(first, first + len(dataset)))
    facts = {"rows": len(dataset), "cut": n_long, "learned_tokens": n_learned}
    return (
        dataset.select_columns(["input_ids", "labels"]).add_column("row", numbers),
        notes,
        {"source": data.source, "sha256": data.sha256, "kind": data.kind, **facts},
    )


def _with_rows(collate: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """TRL's collator, and which rows of the data the batch holds."""
    return lambda examples: {**collate(examples), "row": torch.tensor([example["row"] for example in examples])}


# -- after the training ---------------------------------------------------------------------------------------
def _validated(state: Any) -> dict[str, Any]:
    """What the validation losses were, in nats per token, and which checkpoint is kept."""
    losses = [{"step": e["step"], "loss": e["eval_loss"]} for e in state.log_history if "eval_loss" in e]
    best = {"step": state.best_global_step, "loss": state.best_metric}
    return {"losses": losses, "best": best, "stopped_early": state.global_step < state.max_steps}


def _notes_of_validation(validated: dict[str, Any]) -> list[str]:
    """What to try next, where the lowest loss came with the first or the last measurement."""
    losses, best = validated["losses"], validated["best"]
    if len(losses) > 1 and best["step"] == losses[-1]["step"]:
        return ["the validation loss was lowest at the end; with more --epochs it may fall further"]
    if len(losses) > 1 and best["step"] == losses[0]["step"]:
        return ["the validation loss was lowest at the first measurement; try a lower --lr, or a smaller --eval-every"]
    return []


def _save_expert(trainer: Any, run: Run, out: Path) -> None:
    part, place, anti = out / "expert.part", out / "expert", run.anti_expert
    shutil.rmtree(part, ignore_errors=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if run.options.full:
        said = anti.dtype or getattr(load_config(run.config, "the anti-expert", anti, run.loading), "dtype", None)
        if said not in (None, "auto"):
            model.to(said if isinstance(said, torch.dtype) else getattr(torch, str(said)))  # as M- is kept
        model.save_pretrained(part)
        if (tokenizer := load_tokenizer(run.config, "the anti-expert", anti, run.loading)) is not None:
            tokenizer.save_pretrained(part)
    else:
        model.save_pretrained(part, save_embedding_layers=False)
        (part / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    shutil.rmtree(place, ignore_errors=True)
    part.rename(place)


def _recipe_of(run: Run, out: Path) -> ProxyTuneConfig:
    """The recipe, paths as from the current directory. An expert that was taught a chat format is shown it."""
    place = os.path.relpath(out / "expert")  # relative: OUT can be moved
    own = {"model": place, "revision": None} if run.options.full else {"adapter": place}
    prompt = Prompt("chat") if run.data.kind != "text" and not run.options.consistent else Prompt()
    expert: Any = replace(run.anti_expert, prompt=prompt, **own)
    return run.config.with_members(lambda name, member: expert if name.endswith(".expert") else member)
