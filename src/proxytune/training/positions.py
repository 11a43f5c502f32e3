"""TRL's trainer, changed to project only the learned positions, and to weight them equally in validation.

On GPUs TRL does this itself. Elsewhere it projects every position through the head. For a small model with a large
vocabulary this is most of the work, and with short answers most of it is wasted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from trl import SFTTrainer

__all__ = ["PositionsTrainer", "TokenMeanTrainer", "has_plain_head", "last_hidden", "summed"]

CHUNK = 1024  # positions whose logits are in memory at once


def last_hidden(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The input of the model's head, shape = (n_batch, n_columns, width)."""
    device = model.device
    output = model.base_model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False)
    return output.last_hidden_state  # type: ignore[no-any-return]


@torch.no_grad()
def has_plain_head(model: Any) -> bool:
    """Whether the logits are the head's output for the last hidden states, without a soft cap or scale after it."""
    if model.base_model is model or model.get_output_embeddings() is None:
        return False
    training = model.training
    model.eval()
    ids = torch.arange(16, device=model.device)[None]
    made = model.get_output_embeddings()(last_hidden(model, ids, torch.ones_like(ids))).float()
    logits = model(input_ids=ids, use_cache=False).logits.float()
    model.train(training)
    return made.shape == logits.shape and float((made - logits).abs().max()) <= 1e-4 * float(logits.abs().max())


def summed(loss: Callable[..., Tensor], *positions: Tensor) -> Tensor:
    """``loss`` summed over all positions, a float32 scalar. It is computed ``CHUNK`` positions at a time, and again for
    the gradient.

    Args:
        positions: the arguments of ``loss``, each of shape (n_positions, ...).
    """
    if 0 < len(positions[0]) <= CHUNK:  # all fit at once, so nothing is computed twice
        return loss(*positions)
    total = torch.zeros((), device=positions[0].device)
    for start in range(0, len(positions[0]), CHUNK):
        part = slice(start, start + CHUNK)
        chunk = checkpoint(loss, *(tensor[part] for tensor in positions), use_reentrant=False)
        total = total + cast(Tensor, chunk).to(total.device)
    return total


class TokenMeanTrainer(SFTTrainer):
    """TRL's trainer, whose validation loss is the mean over all learned tokens, and which trains no step too many.

    (TRL's is a mean over batches of each batch's mean, so it would depend on which rows share a batch.)

    Attributes:
        validation_tokens: how many tokens of ``eval_dataset`` are learned; must be set before it is evaluated.
    """

    validation_tokens: int

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """transformers checks only after each step whether all steps are done, so a run that was killed after its last
        step would resume with another one."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The summed loss divided by the average number of tokens of these rows, so that the mean over rows is the mean
        over tokens."""
        inputs = self._prepare_inputs(inputs)
        rows: Any = self.eval_dataset
        tokens = len(inputs["labels"]) * self.validation_tokens / len(rows)
        # A mixture-of-experts model adds a load-balancing loss, which is not part of the text's loss.
        balanced, self.aux_loss_enabled = self.aux_loss_enabled, False
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(
                    model, inputs, num_items_in_batch=torch.tensor(tokens, device=inputs["labels"].device)
                )
        finally:
            self.aux_loss_enabled = balanced
        return loss / self.accelerator.num_processes, None, None  # TRL multiplies by it, for the mean of the gradients


class PositionsTrainer(TokenMeanTrainer):
    """TRL's trainer with the same loss, but computed only at the learned positions; for a model with a plain head."""

    @property
    def expert(self) -> Any:
        """The transformers model that is trained, without PEFT's wrapper."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean loss over all learned positions of this optimiser step."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        learned = inputs["labels"][:, 1:] != -100  # (n_batch, n_columns - 1): is the next token learned
        targets = inputs["labels"][:, 1:][learned]
        with self.accelerator.autocast():
            hidden = last_hidden(self.expert, ids, mask)[:, :-1]
            total = self.total_loss(hidden[learned.to(hidden.device)], targets, inputs)
        loss = total / (len(targets) if num_items_in_batch is None else num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def total_loss(self, hidden: Tensor, targets: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The summed loss, in nats.

        Args:
            hidden: the expert's last hidden states at the learned positions, shape = (n_positions, width).
            targets: the tokens that follow them, shape = (n_positions,).
            inputs: the whole batch.
        """
        head: nn.Module = self.expert.get_output_embeddings()

        def nll(states: Tensor, wanted: Tensor) -> Tensor:
            return nn.functional.cross_entropy(head(states).float(), wanted, reduction="sum")

        return summed(nll, hidden, targets.to(hidden.device))
