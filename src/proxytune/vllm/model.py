"""The vLLM composite: every member a submodel, one batch for all, their logits mixed.

vLLM finds the attention layers of all members, so all of them are in its paged KV cache. ``forward`` returns the
members' hidden states side by side with each token's alphas. Whichever rows vLLM then picks (last tokens, drafts to
verify, prompt log-probabilities), they contain everything that ``compute_logits`` needs.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.model_loader.weight_tying import maybe_retie_word_embeddings
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import maybe_prefix
from vllm.sequence import IntermediateTensors
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.utils.torch_utils import async_tensor_h2d

from proxytune.decoding.gating import between
from proxytune.decoding.mixing import mix, scheduled
from proxytune.errors import MemberError, ProxyTuneError
from proxytune.recipe.rules import Steering
from proxytune.vllm import hooks
from proxytune.vllm.alpha import PIECES, Recipe, Row, Weights, join, split
from proxytune.vllm.attention import Now, read_own_prompts
from proxytune.vllm.members import Fitted, fit, part_config
from proxytune.vllm.own_prompts import Reading, reading
from proxytune.vllm.plan import reads_own_prompts
from proxytune.vllm.weights import read_adapter, with_adapter

__all__ = ["ProxyTunedForCausalLM"]


class ProxyTunedForCausalLM(nn.Module, SupportsPP):  # type: ignore[misc]
    """A base model steered by experts (2401.08565, eq. 1), as a vLLM model."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        hooks.wrap_v1_runner()
        self.config = vllm_config.model_config.hf_config
        self.recipe = Recipe(self.config)
        self.model_config, self.load_config = vllm_config.model_config, vllm_config.load_config
        self.dtype = vllm_config.model_config.dtype
        self.shared_vocab = vllm_config.model_config.get_vocab_size()
        self.fitted: list[Fitted] = fit(vllm_config.model_config)
        self.parts = [one.part.name for one in self.fitted]
        self.owner = {name: one.part.name for one in self.fitted for name in one.part.names}
        # A part is never given a longer text, but in a trial the runner's positions may be those of another part.
        self.contexts = [one.config.max_model_len for one in self.fitted]
        self.now: dict[str, Now] = {}  # what each part reads, in recipes with prompts of members' own
        for one in self.fitted:
            config = part_config(vllm_config, one)
            with nullcontext() if one.part.of is None else torch.device("meta"):
                model = initialize_model(config, prefix=maybe_prefix(prefix, one.part.name))
            if one.part.of is not None:
                use_weights_of(self.part(one.part.of), model)
            if reads_own_prompts(self.config):
                self.now[one.part.name] = Now(one.part.name)
                read_own_prompts(one.part.owner, model, self.now[one.part.name])
            setattr(self, one.part.name, model)
        self.widths = [one.config.get_hidden_size() for one in self.fitted]
        self.vocabs = [one.config.get_vocab_size() for one in self.fitted]
        self.kept: dict[str, Tensor] = {}
        self.passed: dict[str, list[tuple[str, int]]] | None = None  # tensor -> (part, width) in its columns
        self.make_empty_intermediate_tensors = self._make_empty_intermediate_tensors
        self.gather = self._one_gather()

        # The alphas of the batch's tokens, split so that they survive the dtype of hidden states. The buffer never
        # moves: a CUDA graph reads it at the address where it was captured.
        # Beside them stand a token's place in `hows`, and the position from which its schedule counts.
        self.n_columns = PIECES * (len(self.recipe.names) + 2)
        default = split(torch.tensor([[*self.recipe.default.alphas, 0.0, 0.0]]), self.dtype)
        n_tokens = max(vllm_config.scheduler_config.max_num_batched_tokens, vllm_config.scheduler_config.max_num_seqs)
        self.register_buffer("alphas", default.repeat(n_tokens, 1), persistent=False)
        self.default_alphas = True  # whether the buffer holds the recipe's alphas for all tokens
        self.hows: list[Steering | Weights] = [self.recipe.default.how]  # of the batch's requests, each once

    def part(self, name: str) -> Any:
        """The submodel of that name."""
        return getattr(self, name)

    @staticmethod
    def get_model_state_cls() -> Any:
        """The V2 runner's hook."""
        return hooks.state_class()

    # -- the batch ------------------------------------------------------------------------------------------
    def set_rows(self, rows: Sequence[Row] | None, longest_decode: int = 1) -> None:
        """Set the alphas of the next batch, how they steer, and what each part reads.

        Args:
            rows: None: a trial without requests. longest_decode: see :func:`proxytune.vllm.own_prompts.reading`.
        """
        for name, now in self.now.items():
            now.reading = None if rows is None else reading(name, rows, now.block, longest_decode)
        if rows is not None:
            self._set_alphas(rows)

    def _set_alphas(self, rows: Sequence[Row]) -> None:
        alphas, default = cast(Tensor, self.alphas), self.recipe.default
        if all(row.request == default for row in rows) and default.steering.schedule is None:
            self.hows = [default.how]
            if not self.default_alphas:
                async_tensor_h2d(split(torch.tensor([[*default.alphas, 0.0, 0.0]]), self.dtype), out=alphas)
                self.default_alphas = True
            return
        self.hows = list(dict.fromkeys(row.request.how for row in rows))
        values = [[*row.request.alphas, float(self.hows.index(row.request.how)), float(row.n_prompt)] for row in rows]
        columns = torch.tensor(values).repeat_interleave(torch.tensor([row.n for row in rows]), dim=0)
        at = 0
        for row in rows:
            if row.request.by_text:
                # From where to count the answer's tokens, so that the number is 1 where the gate is open and else 0.
                following = torch.arange(row.n_read + 1, row.n_read + row.n + 1)
                columns[at : at + row.n, -1] = following - self._inside(row)
            at += row.n
        async_tensor_h2d(split(columns, self.dtype), out=alphas[: len(columns)])
        self.default_alphas = False

    def _inside(self, row: Row) -> Tensor:
        """Whether the answer is between its gate's two texts, after each of the row's tokens: (n,), 0 or 1."""
        assert row.request.steering.gate is not None
        texts = row.request.steering.gate.texts
        told = [self.tokenizer.decode(answer, clean_up_tokenization_spaces=False) for answer in row.answers()]
        return torch.tensor([between(text, *texts) for text in told], dtype=torch.float32)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The recipe's, for gates that read the answer."""
        return cached_tokenizer_from_config(self.model_config)

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
        if self.now and captures_a_whole_step():
            raise ProxyTuneError(
                "members of this recipe read prompts of their own, so a CUDA graph cannot hold a whole step; start the "
                """server with --compilation-config '{"cudagraph_mode": "PIECEWISE"}' """
                "and VLLM_USE_BREAKABLE_CUDAGRAPH=0"
            )
        outputs: dict[str, Any] = {}
        received = None if intermediate_tensors is None else self._taken_apart(intermediate_tensors)
        for name, width in zip(self.parts, self.widths):
            passed, now = None if received is None else IntermediateTensors(received[name]), self.now.get(name)
            shown = None if now is None else now.reading
            if shown is not None and not len(shown.positions):
                outputs[name] = self._nothing(name, width, positions)
                continue
            output = self.part(name)(*self._read_by(name, shown, input_ids, positions), passed, None)
            # Between stages the rows stay the part's own.
            if shown is not None and not shown.as_it_is and get_pp_group().is_last_rank:
                back = async_tensor_h2d(shown.back, positions.device)
                outputs[name] = torch.cat([output[back], output[len(back) :]])
            else:
                outputs[name] = copied(output)
        if not get_pp_group().is_last_rank:
            return side_by_side(outputs)
        columns = join(cast(Tensor, self.alphas)[: outputs["base"].shape[0]])
        following = positions + 1 - columns[:, -1]  # how many tokens of the answer are before the next one
        columns = split(torch.cat([columns[:, :-1], following[:, None]], dim=-1), self.dtype)
        return torch.cat([*outputs.values(), columns], dim=-1)

    def _read_by(
        self, name: str, shown: Reading | None, input_ids: Tensor | None, positions: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """The ids and positions that a part reads, as many rows as the batch has."""
        at, ids = self.parts.index(name), None
        if shown is None:
            # An id that a member lacks is never chosen, and refused in a prompt. If one came, it must not be read out
            # of bounds, which would end the engine. The same holds for positions.
            if input_ids is not None:
                narrow = self.vocabs[at] < max(self.vocabs)
                ids = input_ids.clamp(max=self.vocabs[at] - 1) if narrow else input_ids
                ids = self._kept(f"{name} ids", ids) if narrow or self.now else ids
            if self.now:
                positions = self._kept(f"{name} positions", positions.clamp(max=self.contexts[at] - 1))
            return ids, positions
        n, device = len(shown.positions), positions.device
        places = torch.zeros_like(positions)
        places[:n] = async_tensor_h2d(shown.positions, device)
        if input_ids is not None:
            ids = torch.zeros_like(input_ids)
            ids[:n] = input_ids[:n] if shown.as_it_is else input_ids[async_tensor_h2d(shown.rows, device)]
            where, told = (async_tensor_h2d(array, device) for array in shown.told)
            ids[where] = told.to(ids.dtype)
            ids = self._kept(f"{name} ids", ids.clamp(max=self.vocabs[at] - 1))
        return ids, self._kept(f"{name} positions", places)

    def _kept(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor at an address that never changes, where a CUDA graph of the part reads it."""
        if name not in self.kept:
            self.kept[name] = tensor.new_zeros(len(cast(Tensor, self.alphas)), *tensor.shape[1:])
        return self.kept[name][: len(tensor)].copy_(tensor)

    def _nothing(self, name: str, width: int, positions: Tensor) -> Any:
        """The output of a part that reads nothing of a batch."""
        if get_pp_group().is_last_rank:
            return positions.new_zeros(len(positions), width, dtype=self.dtype)
        return self.part(name).make_empty_intermediate_tensors(len(positions), self.dtype, positions.device)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The mixture's logits for rows from :meth:`forward`: float32, shape = (n_rows, ids that all members share).

        None on ranks that gather nothing.
        """
        *states, columns = hidden_states.split([*self.widths, self.n_columns], dim=-1)
        logits = {name: self.part(name).compute_logits(state.contiguous()) for name, state in zip(self.parts, states)}
        if any(one is None for one in logits.values()):
            return None
        alpha, place, following = join(columns).split([len(self.recipe.names), 1, 1], dim=-1)
        mixed = self._mixed(logits, alpha, following, self.hows[0])
        for at, how in enumerate(self.hows[1:], start=1):  # nothing waits for the device
            mixed = torch.where(place == at, self._mixed(logits, alpha, following, how), mixed)
        if self.gather is not None:
            mixed = self.gather(mixed)
        return None if mixed is None else mixed[..., : self.shared_vocab]

    def _mixed(self, logits: dict[str, Tensor], alpha: Tensor, following: Tensor, how: Steering | Weights) -> Tensor:
        """The mixture of some rows; ``following``, (n_rows, 1): the number of the answer's token, for schedules."""

        def of(name: str) -> Tensor | None:
            return logits[self.owner[name]].unsqueeze(1) if name in self.owner else None

        width = min(one.shape[-1] for one in logits.values())
        if self.gather is None:
            width = min(width, self.shared_vocab)
        if isinstance(how, tuple):
            weighted = [logits[self.owner[name]][..., :width].float() * weight for name, weight in how]
            return torch.stack(weighted).sum(dim=0)
        return mix(
            logits["base"][..., :width].unsqueeze(1),
            [(of(f"{name}.expert"), of(f"{name}.anti_expert")) for name in self.recipe.names],
            alpha,
            **vars(how),
            opened=self._opened(how, following),
            plausibility=self.config.plausibility,
            vocab_size=width,
        ).squeeze(1)

    def _opened(self, steering: Steering, following: Tensor) -> Tensor | None:
        """How far a schedule is open, (n_rows, 1)."""
        if steering.by_text:  # it was found where the text is known
            return following
        return None if steering.schedule is None else scheduled(steering.schedule, following)

    def _one_gather(self) -> Any:
        """With tensor parallelism: mix each rank's part of the vocabulary and gather once, if the parts agree.

        They agree if all heads are split in the same way. A plausibility mask needs the largest logit of all ranks, and
        some rules and gates need all logits; with these each member is gathered.
        """
        if get_tensor_model_parallel_world_size() == 1 or self.config.plausibility is not None:
            return None
        if not self.recipe.default.steering.local:
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
            if part.of is not None:
                continue
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
                apart[name][key] = piece if len(users) == 1 else self._kept(f"{name} {key}", piece)
        return apart


def captures_a_whole_step() -> bool:
    """Whether a CUDA graph is captured around the composite. (Those of pieces are captured within a member.)"""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def copied(output: Any) -> Any:
    """A part's output where the next part does not write.

    CUDA graphs of all parts share memory, and vLLM's graphs count on it that nobody reads the output of a model after
    another graph has run.
    """
    if isinstance(output, IntermediateTensors):
        return IntermediateTensors({key: tensor.clone() for key, tensor in output.items()})
    return output.clone()


def use_weights_of(owner: nn.Module, model: nn.Module) -> None:
    """Let a model that was built without memory use the weights of another one of the same shape.

    Modules without attention are the owner's own. Modules with attention stay: a layer has a cache of its own, and what
    is compiled is compiled for one model.
    """
    for name, module in list(model.named_modules()):
        theirs = owner.get_submodule(name)
        module._parameters, module._buffers = dict(theirs._parameters), dict(theirs._buffers)
        if isinstance(module, Attention):
            module.impl = copy.copy(theirs.impl)  # it may hold tensors
        for child in list(module._modules):
            held = module._modules[child]
            if held is not None and not any(isinstance(each, Attention) for each in held.modules()):
                module._modules[child] = theirs._modules[child]


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
