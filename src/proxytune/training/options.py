"""The options of a training run. The defaults are those of the paper's task experts, except for the LoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from proxytune.answers.files import data_file
from proxytune.errors import ProxyTuneError
from proxytune.options import Options, option, words
from proxytune.processes import check_launch, n_processes
from proxytune.recipe.options import TRUST
from proxytune.recipe.place import check_place
from proxytune.recipe.source import resolve

__all__ = ["TrainingOptions", "has_begun"]

# The headings of the options in the help.
_data, _members, _trained, _how, _run = (
    partial(option, panel=panel) for panel in ("Data", "Members", "What is trained", "How", "The run")
)
PRECISIONS = ("auto", "bf16", "fp16", "float32")


@dataclass(frozen=True)
class TrainingOptions(Options):
    """What is trained, on what, and how."""

    data: str = _data(
        help="Training data: JSONL, JSON, CSV, TSV or Parquet, or a data set (NAME or NAME:CONFIG), with the columns "
        "prompt and completion, or messages.",
        metavar="FILE|NAME",
    )
    base: str | None = _members(None, "M, the large model to steer.", metavar="MODEL")
    anti_expert: str | None = _members(None, "M-, the small model to finetune.", metavar="MODEL")
    recipe: str | None = _members(
        None, "Take base and anti-expert from this recipe (or from `demo`) instead of naming them.", metavar="RECIPE"
    )
    name: str | None = _members(None, "Name of the expert; by default the recipe's, or `expert`.", metavar="NAME")
    alpha: float | None = _members(
        None, "Strength of the expert; by default the recipe's, or 1.", flag="--alpha -a", metavar="NUMBER"
    )
    split: str = _data("train", "Split of the data set.", metavar="SPLIT")
    prompt: str | None = _data(
        None, "Template that makes prompts from other columns: 'Question: {question}'.", metavar="TEXT"
    )
    completion: str | None = _data(None, "Template that makes completions: ' {answer}'.", metavar="TEXT")
    validation: str | None = _data(
        None,
        "Rows for validation, in the formats of --data. Their loss is measured during training, and the checkpoint "
        "with the lowest loss is kept.",
        metavar="FILE|NAME",
    )
    validation_split: str | None = _data(
        None,
        "Split of the data set of --validation (by default `validation`). Without --validation: a split of --data.",
        metavar="SPLIT",
    )
    max_length: int | None = _data(
        None,
        "Maximum number of tokens per row; by default 2048, or what the members can read. Longer rows are cut and"
        " counted.",
        metavar="N",
        min=1,
    )
    full: bool = _trained(False, "Train all weights of M-, not a LoRA adapter.")
    rank: int = _trained(16, "Rank of the adapter.", metavar="N", min=1)
    lora_alpha: int | None = _trained(None, "LoRA's own alpha; by default twice the rank.", metavar="N", min=1)
    targets: str = _trained(
        "all-linear", "Modules that get an adapter: all-linear, or q_proj,v_proj …", metavar="NAME,…"
    )
    consistent: bool = _trained(
        False, "Train inside the mixture, with the loss of base + alpha * (expert - anti-expert)."
    )
    hidden_cache: str = _trained(
        "auto",
        "With --consistent: where to keep the hidden states of the frozen members. auto: in OUT during training, if "
        "that is longer than an epoch. off: nowhere. DIR: there, also for later runs.",
        metavar="auto|off|DIR",
    )
    epochs: float = _how(2.0, "Passes over the data.", metavar="N")
    max_steps: int | None = _how(None, "Number of steps, instead of epochs.", metavar="N", min=1)
    lr: float | None = _how(
        None, "Peak learning rate; by default 2e-4 for an adapter, 2e-5 with --full.", metavar="RATE"
    )
    warmup: float = _how(
        0.03, "Share of the steps in which the learning rate rises. Then it falls to 0.", metavar="SHARE"
    )
    batch_size: int = _how(128, "Rows per step.", metavar="N", min=1)
    micro_batch: int | None = _how(
        None, "Rows in memory at the same time; must divide the batch. By default at most 8.", metavar="N", min=1
    )
    precision: str = _how(
        "auto", "Mixed precision; auto is bf16 if the hardware has it.", metavar="auto|bf16|fp16|float32"
    )
    gradient_checkpointing: bool = _how(
        True, "Do not recompute activations: faster, with more memory.", flag="--no-gradient-checkpointing"
    )
    seed: int = _how(0, "Seed for the adapter and the order of rows.", metavar="N")
    save_every: int | None = _run(None, "Steps between checkpoints; by default a tenth of the run.", metavar="N", min=1)
    eval_every: int | None = _run(
        None,
        "Steps between measurements of the validation loss, each with a checkpoint; by default a tenth of the run.",
        metavar="N",
        min=1,
    )
    early_stopping: int | None = _run(
        None, "Stop if the validation loss has not fallen in this many measurements.", metavar="N", min=1
    )
    report_to: tuple[str, ...] | None = _run(
        None,
        "Also send the losses to these trackers: wandb, mlflow, trackio …, as transformers names them. The "
        "TensorBoard log is always written.",
        metavar="NAME,…",
        parse=words,
    )
    resume: bool = _run(False, "Continue a killed run that had the same options.")
    trust_remote_code: bool = _run(False, TRUST)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recipe is None and (self.base is None or self.anti_expert is None):
            raise ProxyTuneError("name the members with --base and --anti-expert, or take them with --recipe")
        if self.recipe is not None and (self.base is not None or self.anti_expert is not None):
            raise ProxyTuneError("--recipe names the members; leave out --base and --anti-expert")
        for name in ("epochs", "lr"):
            if (value := getattr(self, name)) is not None and not (0 < value < math.inf):
                raise ProxyTuneError(f"{name} must be a positive number, not {value}")
        if not 0 <= self.warmup < 1:
            raise ProxyTuneError(f"warmup is a share of the steps, at least 0 and below 1, not {self.warmup}")
        if self.precision not in PRECISIONS:
            raise ProxyTuneError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise ProxyTuneError(
                f"a batch of {self.batch_size} rows cannot be made of micro batches of {self.micro_batch}"
            )
        if not self.validates:
            for name in ("eval_every", "early_stopping"):
                if getattr(self, name) is not None:
                    flag = "--" + name.replace("_", "-")
                    raise ProxyTuneError(f"{flag} needs validation data; give --validation or --validation-split")
        elif None not in (self.save_every, self.eval_every) and self.save_every != self.eval_every:
            raise ProxyTuneError(
                "with validation data a checkpoint is written at each measurement, so that the best one can be kept; "
                "leave out --save-every, or make it the same as --eval-every"
            )
        if self.full:
            of_adapter = ("rank", "lora_alpha", "targets")
            if given := [name for name in of_adapter if getattr(self, name) != getattr(TrainingOptions, name)]:
                flags = ", ".join("--" + name.replace("_", "-") for name in given)
                raise ProxyTuneError(f"with --full no adapter is trained, so leave out {flags}; or leave out --full")
        if self.hidden_cache != "auto" and not self.consistent:
            raise ProxyTuneError("a hidden cache is for consistent training; nothing else has use for it")

    @property
    def validates(self) -> bool:
        """Whether the options name validation data."""
        return self.validation is not None or self.validation_split is not None

    @property
    def validation_source(self) -> tuple[str, str]:
        """The file or data set of the validation data, and its split."""
        return self.validation or self.data, self.validation_split or "validation"

    def check(self, out: Path) -> None:
        """Check the data, the members and the directory, as far as this needs no slow imports.

        Raises:
            ProxyTuneError: if something does not exist, or the directory is in use.
        """
        self._check_processes()
        data_file(self.data)
        if self.validates:
            source, _ = self.validation_source
            if data_file(source) is not None and self.validation_split is not None:
                raise ProxyTuneError(
                    f"--validation-split is the name of a data set's split, but {source!r} is a file; give the "
                    "validation data as a file of their own with --validation FILE"
                )
        for model in (self.base, self.anti_expert):
            if model is not None:
                resolve(model, None)
        if self.recipe is not None:
            check_place(self.recipe)
        if out.is_file():
            raise ProxyTuneError(f"{str(out)!r} is a file; give the name of a new directory")
        inside = {path.name for path in out.iterdir()} if out.is_dir() else set()
        if not inside or (inside == {"training"} and not has_begun(out)):
            return
        if not self.resume:
            raise ProxyTuneError(
                f"{str(out)!r} is not empty; give another directory, or --resume a run that was killed"
            )
        if "training" not in inside:
            raise ProxyTuneError(f"{str(out)!r} holds no training run to resume; give another directory")

    def _check_processes(self) -> None:
        check_launch()
        if (n := n_processes()) == 1:
            return
        if self.consistent:
            raise ProxyTuneError("--consistent trains in one process; start it without a launcher")
        if self.batch_size % n:
            raise ProxyTuneError(
                f"a batch of {self.batch_size} rows cannot be shared by {n} processes; {n} must divide --batch-size"
            )
        if self.micro_batch is not None and self.batch_size % (n * self.micro_batch):
            raise ProxyTuneError(
                f"a batch of {self.batch_size} rows cannot be made by {n} processes of micro batches of "
                f"{self.micro_batch}"
            )


def has_begun(out: Path) -> bool:
    """Whether there is something to resume: a checkpoint, or the files of a finished run. Before that, options may
    change."""
    folder = out / "training"
    return any((folder / "checkpoints").glob("checkpoint-*")) or (folder / "manifest.json").exists()
