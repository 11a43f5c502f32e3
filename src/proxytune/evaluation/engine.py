"""The arms from one vLLM engine, which has loaded the recipe: each request says which members' logits count.

A member alone and a mean of logits are weights of members, and the mixture is alphas. So one engine answers all arms,
hundreds of prompts at a time. Prompts are those of transformers' arms, id for id, and texts are cut in the same way.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig

from proxytune.answers.generation import Answer, Encoded, Sampling, cut
from proxytune.decoding.noise import row_seed
from proxytune.errors import ProxyTuneError, first_line, reason_of
from proxytune.evaluation import MEANS
from proxytune.evaluation.arms import Arms, Pair, Reader
from proxytune.recipe.gates import gate_of
from proxytune.recipe.generation_config import (
    SCORES,
    adapted,
    asks,
    base_generation_config,
    ends_of,
    plain_generation_config,
    read_generation_config,
)
from proxytune.recipe.members import load_config
from proxytune.recipe.parts import ApiBase, Member
from proxytune.recipe.source import resolve

if TYPE_CHECKING:
    from proxytune.evaluation.answering import TaskPlan

__all__ = ["EngineArm", "EngineArms", "refuse_of_engine"]

DTYPES = (None, "auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class EngineArm:
    """An arm that a vLLM engine answers.

    Attributes:
        name, tokenizer, reader: as of :class:`proxytune.evaluation.arms.Arm`.
        engine: a ``vllm.LLM`` that has loaded the recipe.
        how: what its requests say in ``extra_args``, besides alphas and prompts.
        own: the recipe's members that have prompts of their own.
        generation: how texts end.
        alphas: one value per expert; none for an arm of weights.
    """

    name: str
    tokenizer: Any
    reader: Reader
    engine: Any
    how: Mapping[str, Any]
    own: Sequence[str]
    generation: GenerationConfig
    alphas: tuple[float, ...] = ()

    def write(
        self,
        prompts: Sequence[Encoded],
        alphas: Sequence[Sequence[float]],
        *,
        rows: Sequence[str],
        max_new_tokens: int,
        sampling: Sampling,
        stops: Sequence[str],
        banned: list[list[int]],
    ) -> list[Answer]:
        """Answer prompts; see :func:`proxytune.answers.generation.answer`.

        Args:
            alphas: one tuple per prompt, empty for an arm of weights. rows: determines each row's random numbers,
                together with the seed. stops: an answer may end where it contains one. banned: ids never written.
        """
        ends, own_stops = ends_of(self.generation), self.generation.stop_strings or []
        own_stops = [own_stops] if isinstance(own_stops, str) else list(own_stops)
        said: dict[str, Any] = {
            "temperature": 0.0,
            "stop": [stop for stop in (*stops, *own_stops) if stop],
            "ignore_eos": True,  # of the base; the arm's own are named
            "stop_token_ids": ends,
            "repetition_penalty": self.generation.repetition_penalty or 1.0,
        }
        if not sampling.greedy:
            said |= {"temperature": sampling.temperature or 1.0, "min_p": sampling.min_p or 0.0}
            said |= {"top_p": sampling.top_p or 1.0, "top_k": sampling.top_k or 0}
        limits = [max_new_tokens if p.room is None else min(max_new_tokens, p.room) for p in prompts]
        params = []
        for prompt, row_alphas, row, limit in zip(prompts, alphas, rows, limits):
            seed = None if sampling.greedy else row_seed(sampling.seed, row)
            params.append(self._params(prompt, row_alphas, max_tokens=limit, seed=seed, **said))
            if banned:  # as ids: from words vLLM would make them in its own way
                params[-1]._bad_words_token_ids = banned
        outputs = self._outputs([prompt.ids for prompt in prompts], params)
        written = [list(output.outputs[0].token_ids) for output in outputs]
        return [
            cut(self.tokenizer, prompt.ids, new, limit, ends, own_stops, False)
            for prompt, new, limit in zip(prompts, written, limits)
        ]

    def score(self, pairs: Sequence[Pair], mixes: Sequence[Sequence[float]]) -> list[list[tuple[float, bool]]]:
        """Score continuations after their contexts, whatever the number of ``mixes`` each in a request of its own.

        Returns:
            [mix][pair] -> (log-probability in nats, whether each token was the most probable).
        """
        whole = [replace(p.context, ids=[*p.context.ids, *p.continuation]) for p in pairs]
        params = [
            self._params(each, mix, max_tokens=1, temperature=0.0, prompt_logprobs=0) for mix in mixes for each in whole
        ]
        outputs = self._outputs([each.ids for each in whole] * len(mixes), params)
        scores = []
        for pair, output in zip([*pairs] * len(mixes), outputs):
            found = [
                each[token] for each, token in zip(output.prompt_logprobs[-len(pair.continuation) :], pair.continuation)
            ]
            scores.append((math.fsum(one.logprob for one in found), all(one.rank == 1 for one in found)))
        return [scores[at : at + len(pairs)] for at in range(0, len(scores), len(pairs))]

    def _params(self, prompt: Encoded, alphas: Sequence[float], **said: Any) -> Any:
        from vllm import SamplingParams

        # Members with prompts of their own read the arm's prompt too where it has none for them.
        read = {f"member_input_ids.{name}": prompt.own.get(name, prompt.ids) for name in self.own}
        steered = {"alpha": [float(alpha) for alpha in alphas]} if self.alphas else {}
        return SamplingParams(extra_args={**self.how, **steered, **read}, **said)

    def _outputs(self, prompts: Sequence[list[int]], params: Sequence[Any]) -> list[Any]:
        try:
            return list(
                self.engine.generate([{"prompt_token_ids": ids} for ids in prompts], list(params), use_tqdm=False)
            )
        except ValueError as error:  # what vLLM answers with 400
            raise ProxyTuneError(f"vLLM: {first_line(error)}") from error


class EngineArms(Arms):
    """Makes the arms of a recipe from one vLLM engine.

    Args:
        options: vLLM's own, as ``vllm.LLM`` takes them. The others: see :class:`proxytune.evaluation.arms.Arms`.
    """

    def __init__(self, *args: Any, options: Mapping[str, Any], **more: Any) -> None:
        super().__init__(*args, **more)
        self.options, self.engine = dict(options), None
        # Why an engine of a model did not start, which takes minutes to find out again.
        self.failed: dict[str, ProxyTuneError] = {}
        self.own = [name for name, member in self.members.items() if member.prompt.kind != "raw"]

    def make(self, name: str) -> Any:
        """One arm, ready to answer. The first one starts the engine; ``tuned`` ends it and starts one of its own."""
        reader, generation = self.reader(name), self._generation(name)
        if name == "tuned":
            self.close()
            self.engine = self._start(str(self.tuned))
            return EngineArm(name, reader.tokenizer, reader, self.engine, {}, (), generation)
        how: dict[str, Any] = {f"weight.{member}": weight for member, weight in self._weights(name).items()}
        if not how:  # a command may have its own rule and gate
            how = {"combine": self.config.combine, "gate": self.config.gate or "none"}
        self.engine = self.engine or self._start(str(self.config.name_or_path))
        alphas = self.alphas if name == "proxy_tuned" else ()
        return EngineArm(name, reader.tokenizer, reader, self.engine, how, self.own, generation, alphas)

    def reader(self, name: str) -> Reader:
        """How an arm will read, from only configs and tokenizers. Every member reads every prompt, whatever its weight.

        Raises:
            ProxyTuneError: if a config or a tokenizer cannot be loaded, and for a generation config that vLLM cannot
                follow.
        """
        self._generation(name)
        read = super().reader(name)
        contexts = dict(read.contexts)
        if name != "tuned":
            contexts = {member: self._context(member) for member in self.members}
        if asked := self.options.get("max_model_len"):
            contexts = {member: asked if limit is None else min(limit, asked) for member, limit in contexts.items()}
        # One place is for the token that each request writes.
        reads = {member: None if limit is None else limit - 1 for member, limit in contexts.items()}
        return replace(read, contexts=reads, reads_all=True)

    def refuse(self, reader: Reader, plan: TaskPlan) -> None:
        """Refuse to score continuations where members read several prompts, or the gate is a schedule."""
        if not plan.likelihood:
            return
        why = f"{plan.name} scores given continuations, which needs --engine transformers"
        gate = gate_of(self.config.gate)
        if reader.name == "proxy_tuned" and gate is not None and gate.scheduled:
            raise ProxyTuneError(f"{why} with the gate {gate.kind}")
        if any(reader.own):  # a model alone, whose name is empty there, reads one prompt
            raise ProxyTuneError(f"{why} where members of {reader.name} read prompts of their own")

    def close(self) -> None:
        if self.engine is not None:
            self.engine.llm_engine.engine_core.shutdown()
            self.engine = None
        super().close()

    def _weights(self, name: str) -> dict[str, float]:
        """The weights of the members in an arm; empty for the recipe's own mixture."""
        if name == "proxy_tuned":
            return {}
        if name not in MEANS:
            return {self.member(name): 1.0}
        weight = 1.0 if name == "mean_logits" else self.mean_weight
        assert weight is not None
        experts = [member for member in self.members if member.endswith(".expert")]
        total = 1 + len(experts) * weight
        return {"base": 1 / total, **dict.fromkeys(experts, weight / total)}

    def _generation(self, name: str) -> GenerationConfig:
        """How an arm's texts end: from the file of the recipe or, for a member alone, of the member.

        Raises:
            ProxyTuneError: for a setting that changes scores and was not tried with vLLM.
        """
        found = None
        if name == "proxy_tuned" or name in MEANS:
            member, one = "base", self.config.base_member
            found = base_generation_config(self.config, self._loading)
        else:
            member = name if name == "tuned" else self.member(name)
            one = Member(resolve(str(self.tuned), None).path) if name == "tuned" else self.members[member]
            with suppress(OSError):  # the hub cannot be reached
                found = read_generation_config(self.config, member, one, self._loading)
        config: Any = load_config(self.config, member, one, self._loading)
        found = found or GenerationConfig.from_model_config(config)
        found, _ = adapted(found, config.get_text_config().vocab_size, "the generation config")
        plain = plain_generation_config(SimpleNamespace(generation_config=found), 1)
        for field in sorted({*SCORES, "min_new_tokens"} - {"repetition_penalty"}):
            if asks(field, value := getattr(plain, field)):
                raise ProxyTuneError(
                    f"the generation config of {member} asks for {field}={value!r}, which was not tried with vLLM; use "
                    f"--engine transformers, or leave the arm {name} out"
                )
        return plain

    def _start(self, model: str) -> Any:
        if model in self.failed:
            raise self.failed[model]
        # Standard output is for results. vLLM reads both when it is imported.
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM

        ours = {"model": model, "dtype": self.loading.dtype or "auto", "generation_config": "vllm"}
        try:
            return LLM(**ours, **self.options)
        except Exception as error:  # pydantic's ValidationError, TypeError of an option, RuntimeError of a worker
            self.failed[model] = ProxyTuneError(f"vLLM did not start: {reason_of(error)}")
            raise self.failed[model] from error


def refuse_of_engine(arms: EngineArms, names: Sequence[str], asked: Mapping[str, bool]) -> None:
    """Refuse what vLLM cannot do, before anything is loaded. For a task that one arm cannot answer see
    :meth:`EngineArms.refuse`.

    Args:
        names: the run's arms. asked: options of the command that need the other engine -> whether they were given.

    Raises:
        ProxyTuneError: names the option or the arm.
    """
    config, loading = arms.config, arms.loading
    if loading.dtype not in DTYPES:
        raise ProxyTuneError(f"--dtype {loading.dtype} is not one of vLLM's; use float32, bfloat16, float16 or auto")
    if isinstance(config.base_member, ApiBase):
        raise ProxyTuneError("--engine vllm needs the base's weights, and they are behind an API; leave it out")
    others = {
        "--device-map": loading.device_map is not None,
        "--trust-remote-code": loading.trust_remote_code,
        "--speculate": loading.speculate not in ("auto", False),
        "--pack": loading.pack,
        **asked,
        "the arm steering_vector": "steering_vector" in names,
    }
    if wanted := next((what for what, given in others.items() if given), None):
        raise ProxyTuneError(f"{wanted} needs --engine transformers; leave one of the two out")
    found = find_spec("vllm")
    if found is None or found.origin is None:  # a directory of that name has no origin
        raise ProxyTuneError("--engine vllm needs vllm: pip install 'proxytune[vllm]' (Python 3.11 or newer)")
