"""Callbacks between the steps of a run: progress, finding the best checkpoint after a move, and early stopping."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

from proxytune.errors import ProxyTuneError

__all__ = ["Progress", "Reporting", "Resuming", "Stopping"]


@dataclass(frozen=True)
class Progress:
    """The progress of a run: ``step`` of ``steps``, and after each step its mean loss and learning rate.

    ``validation`` is the validation loss, in nats per token, if it was just measured; then ``loss`` is None.
    """

    doing: str
    step: int
    steps: int
    loss: float | None = None
    lr: float | None = None
    validation: float | None = None


class Reporting(TrainerCallback):  # type: ignore[misc]
    """Reports each step and each validation loss. A loss that is not a number ends the run."""

    def __init__(self, report: Callable[[Progress], None]) -> None:
        self.report = report

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """After each step, and after each evaluation."""
        now = Progress("training", state.global_step, state.max_steps)
        for name, words in (("loss", "the loss"), ("eval_loss", "the validation loss")):
            if not logs or name not in logs:
                continue
            if not math.isfinite(logs[name]):
                raise ProxyTuneError(
                    f"{words} is {logs[name]} at step {state.global_step}; train with a lower --lr, or with "
                    "--precision float32"
                )
            if name == "loss":
                self.report(Progress(now.doing, now.step, now.steps, logs["loss"], logs["learning_rate"]))
            else:
                self.report(Progress(now.doing, now.step, now.steps, validation=logs["eval_loss"]))


class Resuming(TrainerCallback):  # type: ignore[misc]
    """Corrects what transformers takes from a checkpoint, but may differ in a resumed run."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Use this command's steps between checkpoints, and look for the best checkpoint in the run's present
        directory."""
        state.compute_steps(args, state.max_steps)
        if state.best_global_step is None:
            return
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if not best.is_dir():
            raise ProxyTuneError(
                f"the checkpoint with the lowest validation loss is missing: {best}; train again in another directory"
            )
        state.best_model_checkpoint = str(best)


class Stopping(EarlyStoppingCallback):  # type: ignore[misc]
    """transformers' early stopping, but without a checkpoint at the step where it stops.

    From such a checkpoint, a run that is killed after stopping would continue training. From the one before, it reaches
    the same evaluation and stops again.
    """

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Count the evaluations without a lower loss."""
        super().on_evaluate(args, state, control, **kwargs)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_save = False
