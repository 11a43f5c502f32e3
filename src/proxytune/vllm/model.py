"""The vLLM composite: every member a submodel, one batch for all, their logits mixed.

vLLM finds the attention layers of all members, so all of them are in its paged KV cache. ``forward`` returns the
members' hidden states side by side with each token's alphas. Whichever rows vLLM then picks (last tokens, drafts to
verify, prompt log-probabilities), they contain everything that ``compute_logits`` needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.model_loader.weight_tying import maybe_retie_word_embeddings
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import maybe_prefix
from vllm.sequence import IntermediateTensors

from proxytune.decoding.mixing import mix, scheduled
from proxytune.errors import MemberError
from proxytune.recipe.rules import Steering
from proxytune.vllm import hooks
from proxytune.vllm.alpha import PIECES, Request, join, split
from proxytune.vllm.members import Fitted, fit, part_config
from proxytune.vllm.weights import read_adapter, with_adapter

__all__ = ["ProxyTunedForCausalLM"]


class ProxyTunedForCausalLM(nn.Module, SupportsPP):  # type: ignore[misc]
    """A base model steered by experts (2401.08565, eq. 1), as a vLLM model."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        hooks.wrap_v1_runner()
        self.config = vllm_config.model_config.hf_config
        self.recipe = hooks.Recipe(self.config)
        self.load_config = vllm_config.load_config
        self.dtype = vllm_config.model_config.dtype
        self.shared_vocab = vllm_config.model_config.get_vocab_size()
        self.fitted: list[Fitted] = fit(vllm_config.model_config)
        self.parts = [one.part.name for one in self.fitted]
        self.owner = {name: one.part.name for one in self.fitted for name in one.part.names}
        for one in self.fitted:
            own = part_config(vllm_config, one)
            setattr(self, one.part.name, initialize_model(own, prefix=maybe_prefix(prefix, one.part.name)))
        self.widths = [one.config.get_hidden_size() for one in self.fitted]
        self.vocabs = [one.config.get_vocab_size() for one in self.fitted]
        self.passed: dict[str, list[tuple[str, int]]] | None = None  # tensor -> (part, width) in its columns
        self.make_empty_intermediate_tensors = self._make_empty_intermediate_tensors
        self.gather = self._one_gather()

        # The alphas of the batch's tokens, split so that they survive the dtype of hidden states. The buffer never
        # moves: a CUDA graph reads it at the address where it was captured.
        # Beside them stand a token's place in `steerings`, and the length of its prompt, from which schedules count.
        self.n_columns = PIECES * (len(self.recipe.names) + 2)
        default = split(torch.tensor([[*self.recipe.own.alphas, 0.0, 0.0]]), self.dtype)
        n_tokens = max(vllm_config.scheduler_config.max_num_batched_tokens, vllm_config.scheduler_config.max_num_seqs)
        self.register_buffer("alphas", default.repeat(n_tokens, 1), persistent=False)
        self.default_alphas = True  # whether the buffer holds the recipe's alphas for all tokens
        self.steerings = [self.recipe.own.steering]  # of the batch

    def part(self, name: str) -> Any:
        """The submodel of that name."""
        return getattr(self, name)

    @staticmethod
    def get_model_state_cls() -> Any:
        """The V2 runner's hook."""
        return hooks.alpha_state_class()

    # -- the batch ------------------------------------------------------------------------------------------
    def set_alphas(
        self, rows: Sequence[Request], n_tokens: np.ndarray[Any, Any], n_prompt: np.ndarray[Any, Any]
    ) -> None:
        """Set the alphas of the next batch, and how they steer.

        Args:
            rows, n_tokens, n_prompt: of each request what it asks for, the number of its tokens in the batch, and the
                length of its prompt.
        """
        alphas, own = cast(Tensor, self.alphas), self.recipe.own
        if all(row is own for row in rows) and own.steering.schedule is None:
            self.steerings = [own.steering]
            if not self.default_alphas:
                alphas.copy_(split(torch.tensor([[*own.alphas, 0.0, 0.0]]), self.dtype))
                self.default_alphas = True
            return
        self.steerings = list(dict.fromkeys(row.steering for row in rows))
        values = [
            [*row.alphas, float(self.steerings.index(row.steering)), float(length)]
            for row, length in zip(rows, n_prompt)
        ]
        columns = split(torch.tensor(values, dtype=torch.float32), self.dtype)
        repeated = columns.repeat_interleave(torch.from_numpy(np.ascontiguousarray(n_tokens)).long(), dim=0)
        alphas[: len(repeated)].copy_(repeated)
        self.default_alphas = False

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The base's embeddings. vLLM asks every model for them, although a recipe reads only ids."""
        return self.part("base").embed_input_ids(input_ids)  # type: ignore[no-any-return]

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | IntermediateTensors:
        """Run all members on one batch: shape = (n_tokens, sum of hidden sizes + PIECES * (n_experts + 2)).

        On all but the last pipeline stage, what the members pass to the next, side by side.
        """
        outputs: dict[str, Any] = {}
        received = None if intermediate_tensors is None else self._taken_apart(intermediate_tensors)
        for name, vocab in zip(self.parts, self.vocabs):
            # An id that a member lacks is never chosen, and refused in a prompt. If one came, it must not be read out
            # of bounds, which would end the engine.
            ids = input_ids if input_ids is None or vocab == max(self.vocabs) else input_ids.clamp(max=vocab - 1)
            own = None if received is None else IntermediateTensors(received[name])
            outputs[name] = self.part(name)(ids, positions, own, None)
        if not get_pp_group().is_last_rank:
            return side_by_side(outputs)
        columns = join(cast(Tensor, self.alphas)[: outputs["base"].shape[0]])
        following = positions + 1 - columns[:, -1]  # how many tokens of the answer are before the next one
        columns = split(torch.cat([columns[:, :-1], following[:, None]], dim=-1), self.dtype)
        return torch.cat([*outputs.values(), columns], dim=-1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The mixture's logits for rows from :meth:`forward`: float32, shape = (n_rows, ids that all members share).

        None on ranks that gather nothing.
        """
        *states, columns = hidden_states.split([*self.widths, self.n_columns], dim=-1)
        logits = {name: self.part(name).compute_logits(state.contiguous()) for name, state in zip(self.parts, states)}
        if any(one is None for one in logits.values()):
            return None
        alpha, place, following = join(columns).split([len(self.recipe.names), 1, 1], dim=-1)
        mixed = self._mixed(logits, alpha, following, self.steerings[0])
        for at, steering in enumerate(self.steerings[1:], start=1):  # nothing waits for the device
            mixed = torch.where(place == at, self._mixed(logits, alpha, following, steering), mixed)
        if self.gather is not None:
            mixed = self.gather(mixed)
        return None if mixed is None else mixed[..., : self.shared_vocab]

    def _mixed(self, logits: dict[str, Tensor], alpha: Tensor, following: Tensor, steering: Steering) -> Tensor:
        """The mixture of some rows; ``following``, (n_rows, 1): the number of the answer's token, for schedules."""

        def of(name: str) -> Tensor | None:
            return logits[self.owner[name]].unsqueeze(1) if name in self.owner else None

        width = min(one.shape[-1] for one in logits.values())
        if self.gather is None:
            width = min(width, self.shared_vocab)
        return mix(
            logits["base"][..., :width].unsqueeze(1),
            [(of(f"{name}.expert"), of(f"{name}.anti_expert")) for name in self.recipe.names],
            alpha,
            **vars(steering),
            opened=None if steering.schedule is None else scheduled(steering.schedule, following),
            plausibility=self.config.plausibility,
            vocab_size=width,
        ).squeeze(1)

    def _one_gather(self) -> Any:
        """With tensor parallelism: mix each rank's part of the vocabulary and gather once, if the parts agree.

        They agree if all heads are split in the same way. A plausibility mask needs the largest logit of all ranks, and
        some rules and gates need all logits; with these each member is gathered.
        """
        if get_tensor_model_parallel_world_size() == 1 or self.config.plausibility is not None:
            return None
        if not self.recipe.own.steering.local:
            return None
        heads = [head for name in self.parts if (head := hooks.shards_of(self.part(name))) is not None]
        if len(heads) < len(self.parts) or len({width for _, width in heads}) > 1:
            return None
        gather = heads[0][0]._gather_logits  # returns None on ranks that gather nothing
        for processor, _ in heads:  # from now on compute_logits returns only this rank's ids
            processor._gather_logits = lambda logits: logits
        return gather

    # -- weights and pipeline stages ------------------------------------------------------------------------
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load every member from its own place. ``weights`` are the recipe's own, and there are none."""
        loader = get_model_loader(self.load_config)
        if not isinstance(loader, DefaultModelLoader):
            raise MemberError(f"--load-format {self.load_config.load_format} does not load a recipe's members")
        loaded: set[str] = set()
        for one in self.fitted:
            part = one.part
            stream = loader._get_weights_iterator(
                DefaultModelLoader.Source(model_or_path=one.config.model, revision=one.config.revision)
            )
            if part.adapter is not None:
                stream = with_adapter(stream, read_adapter(part.owner, part.adapter))
            model = self.part(part.name)
            loaded |= {f"{part.name}.{name}" for name in model.load_weights(stream)}
            maybe_retie_word_embeddings(model, one.config)
        return loaded

    def _make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        return side_by_side(
            {name: self.part(name).make_empty_intermediate_tensors(batch_size, dtype, device) for name in self.parts}
        )

    def _taken_apart(self, tensors: IntermediateTensors) -> dict[str, dict[str, Tensor]]:
        """The reverse of :func:`side_by_side`."""
        if self.passed is None:
            self.passed = {}
            for name in self.parts:
                empty = self.part(name).make_empty_intermediate_tensors(1, self.dtype, torch.device("meta"))
                for key, tensor in empty.items():
                    self.passed.setdefault(key, []).append((name, tensor.shape[-1]))
        apart: dict[str, dict[str, Tensor]] = {name: {} for name in self.parts}
        for key, users in self.passed.items():
            pieces = tensors[key].split([width for _, width in users], dim=-1)
            for (name, _), piece in zip(users, pieces):
                apart[name][key] = piece.contiguous()
        return apart


def side_by_side(outputs: Mapping[str, Any]) -> IntermediateTensors:
    """What the members pass to the next pipeline stage, tensors of one name joined along their last dimension.

    So the next stage gets only as many tensors as from one model. vLLM's shared-memory channel between CPU workers
    carries only a few at a time.
    """
    joined: dict[str, list[Tensor]] = {}
    for output in outputs.values():
        for key, tensor in output.items():
            joined.setdefault(key, []).append(tensor)
    return IntermediateTensors({key: torch.cat(tensors, dim=-1) for key, tensors in joined.items()})
