"""The expert trained inside the mixture (Consistent Proxy Tuning, 2407.01155).

Plain training trains M+ by itself, but decoding uses ``base + alpha * (expert - anti_expert)``. Here the loss is that
of the mixture. With y the next token, and only M+ trained:

    loss = -log softmax(base + alpha * (expert - anti_expert))[y]        # summed over the learned positions

Base and anti-expert never change, so their outputs can be computed once. Their last hidden states at the learned
positions (much smaller than logits) are kept on disk. The heads, which stay in memory, turn them into logits.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from datasets import concatenate_datasets
from torch import Tensor, nn

from proxytune.answers.journal import write_whole
from proxytune.decoding.mixing import mix
from proxytune.errors import MemberError, ProxyTuneError
from proxytune.training.positions import PositionsTrainer, has_plain_head, last_hidden, summed

__all__ = ["ConsistentTrainer", "Frozen", "HiddenStates", "mixed_nll"]


def mixed_nll(
    hidden: Sequence[Tensor], heads: Sequence[nn.Module], targets: Tensor, alpha: float, shared_vocab: int
) -> Tensor:
    """The mixture's negative log-likelihood of ``targets``, in nats, summed; float32, a scalar.

    Args:
        hidden: last hidden states of base, expert and anti-expert, shape = (n_positions, width of the member) each.
        heads: their output embeddings, which give logits of shape (n_positions, n_vocab of the member).
        targets: shape = (n_positions,), ids below ``shared_vocab``.
    """
    base_head, expert_head, anti_head = heads
    weight = torch.tensor([[alpha]], dtype=torch.float32)

    def nll(base: Tensor, expert: Tensor, anti: Tensor, wanted: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = base_head(base)[None], anti_head(anti)[None]
        mixed = mix(frozen[0], [(expert_head(expert)[None], frozen[1])], weight, vocab_size=shared_vocab)
        return nn.functional.cross_entropy(mixed[0], wanted.to(mixed.device), reduction="sum")

    return summed(nll, *hidden, targets)


# -- what the frozen members say ------------------------------------------------------------------------------
class HiddenStates:
    """Hidden states of the learned positions of all rows, (n_positions, width), in a memory-mapped file.

    Args:
        file: the file with the states; it is created if it is missing.
        counts: the number of learned positions per row; rows follow one another.
    """

    def __init__(self, file: Path, counts: Sequence[int], width: int, dtype: torch.dtype) -> None:
        self.file = file
        self.offsets = [0, *accumulate(counts)]
        size = self.offsets[-1] * width
        needed, free = size * dtype.itemsize, shutil.disk_usage(file.parent).free
        if not file.exists() and needed > free:
            raise ProxyTuneError(
                f"the hidden states need {needed / 2**30:.1f} GiB, but {file.parent} has {free / 2**30:.1f} GiB free; "
                "give another place with --hidden-cache DIR, or --hidden-cache off"
            )
        self.states = torch.from_file(str(file), shared=True, size=size, dtype=dtype).view(-1, width)

    def rows(self, rows: Sequence[int]) -> Tensor:
        """The states of the positions of some rows, one row after another."""
        return torch.cat([self.states[self.offsets[row] : self.offsets[row + 1]] for row in rows])

    def fill(self, batches: Sequence[Sequence[int]], compute: Callable[[Sequence[int]], Tensor]) -> Iterator[int]:
        """Compute every batch of rows that an earlier, killed run has not computed; yields how many are done."""
        done = self.file.with_suffix(".done")
        n_done = int(done.read_text()) if done.exists() else 0
        for number, rows in enumerate(batches[n_done:], start=n_done + 1):
            states, start = compute(rows), 0
            for row in rows:
                count = self.offsets[row + 1] - self.offsets[row]
                self.states[self.offsets[row] : self.offsets[row + 1]] = states[start : start + count].cpu()
                start += count
            write_whole(done, str(number))
            yield number


class Frozen:
    """A frozen member: its hidden states at the learned positions, computed or read, and its head.

    Args:
        model: the member.
        hidden: from (input_ids, attention_mask) to the last hidden states; the model's own by default.
    """

    def __init__(self, name: str, model: Any, hidden: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        self.name = name
        self.model = model
        self.head: nn.Module = model.get_output_embeddings()
        self._hidden = hidden or (lambda ids, mask: last_hidden(self.model, ids, mask))
        self.kept: HiddenStates | None = None

    @torch.no_grad()
    def hidden(self, input_ids: Tensor, attention_mask: Tensor, learned: Tensor) -> Tensor:
        """The states at positions whose next token is ``learned``, (n_batch, n_columns - 1): shape (n, width)."""
        states = self._hidden(input_ids, attention_mask)[:, :-1]
        return states[learned.to(states.device)]

    def at(self, rows: Sequence[int], input_ids: Tensor, attention_mask: Tensor, learned: Tensor) -> Tensor:
        """The same states read from the file, on the head's device."""
        if self.kept is None:
            return self.hidden(input_ids, attention_mask, learned)
        return self.kept.rows(rows).to(next(self.head.parameters()).device)


class ConsistentTrainer(PositionsTrainer):
    """TRL's trainer with the mixture's loss. :meth:`mix_with` must be called before training."""

    def mix_with(self, base: Any, anti_expert: Any, alpha: float, shared_vocab: int) -> None:
        """Name the frozen members; without ``anti_expert`` it is the trained model with its adapter turned off."""
        self.alpha, self.shared_vocab = alpha, shared_vocab
        for frozen in (base, anti_expert):
            if frozen is not None:
                frozen.requires_grad_(False).eval()
                if getattr(frozen, "hf_device_map", None) is None:
                    frozen.to(self.accelerator.device)
        if anti_expert is None:
            anti = Frozen("anti_expert", self.expert, self._without_adapter)
        else:
            anti = Frozen("anti_expert", anti_expert)
        self.frozen = (Frozen("base", base), anti)
        for member in self.frozen:
            if not has_plain_head(member.model):
                raise MemberError(
                    f"{member.name} changes its logits behind its head (a soft cap or a scale), or has no head apart "
                    "from its body, which --consistent cannot do for it"
                )

    def _without_adapter(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The trained model's hidden states as M-, without dropout; training goes on afterwards."""
        training = self.expert.training
        self.expert.eval()
        try:
            with cast(Any, self.model).disable_adapter():
                return last_hidden(self.expert, input_ids, attention_mask)
        finally:
            self.expert.train(training)

    def keep_hidden(self, directory: Path, report: Callable[[str, int, int], None]) -> None:
        """Compute the frozen members' hidden states for all rows once, or find those of an earlier run.

        This includes the rows of validation. The files are named by a hash of the rows and of the member's weights, so
        that they never belong to other ones.

        Args:
            report: called with the member, the number of finished batches and the number of all batches.
        """
        dataset: Any = self.train_dataset
        if self.eval_dataset is not None:  # the numbers of its rows continue those
            dataset = concatenate_datasets([dataset, cast(Any, self.eval_dataset)])
        ids, labels = dataset["input_ids"], dataset["labels"]
        counts = [sum(label != -100 for label in row[1:]) for row in labels]
        size = self.args.per_device_train_batch_size
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))  # similar lengths, so little padding
        batches = [order[start : start + size] for start in range(0, len(order), size)]

        # Under mixed precision the heads multiply in this dtype, so nothing is lost.
        kept_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(self.accelerator.mixed_precision))

        def compute(frozen: Frozen, rows: Sequence[int]) -> Tensor:
            batch = self.data_collator([dataset[row] for row in rows])
            with self.accelerator.autocast():
                states = frozen.hidden(batch["input_ids"], batch["attention_mask"], batch["labels"][:, 1:] != -100)
            return states if kept_dtype is None else states.to(kept_dtype)

        for frozen in self.frozen:
            probe = compute(frozen, batches[0])
            said = repr((ids[:], labels[:], size, probe.dtype, self.accelerator.mixed_precision, frozen.name)).encode()
            digest = hashlib.sha256(said)
            _hash_weights(digest, frozen.model)
            directory.mkdir(parents=True, exist_ok=True)
            file = directory / f"{frozen.name}-{digest.hexdigest()[:24]}.bin"
            kept = HiddenStates(file, counts, probe.shape[-1], probe.dtype)
            for done in kept.fill(batches, lambda rows, frozen=frozen: compute(frozen, rows)):  # type: ignore[misc]
                report(frozen.name, done, len(batches))
            frozen.kept = kept
            if frozen.model is not self.expert:
                frozen.model = None  # its body is no longer needed

    def total_loss(self, hidden: Tensor, targets: Tensor, inputs: dict[str, Any]) -> Tensor:
        rows, learned = inputs["row"].tolist(), inputs["labels"][:, 1:] != -100
        base, anti = (frozen.at(rows, inputs["input_ids"], inputs["attention_mask"], learned) for frozen in self.frozen)
        heads = (self.frozen[0].head, self.expert.get_output_embeddings(), self.frozen[1].head)
        return mixed_nll((base, hidden, anti), heads, targets, self.alpha, self.shared_vocab)


def _hash_weights(digest: Any, model: nn.Module) -> None:
    """A hash of every weight, byte for byte: little work compared with one pass over the data.

    An adapter's weights are left out: they are turned off in a frozen member.
    """
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name:
            plain = tensor.detach().cpu().contiguous()
            digest.update(f"{name.replace('.base_layer.', '.')} {plain.dtype} {tuple(plain.shape)}".encode())
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
