"""The arms of an evaluation: the same prompts answered by the base, the experts alone, the mixture and the controls.

    base            M, as it is
    anti_expert     M-, each expert's own
    expert          M+ alone
    proxy_tuned     M + alpha * (M+ - M-), the recipe
    tuned           a model tuned itself, to say how much of the gap was closed
    base_few_shot   control: M after a few solved examples
    mean_logits     control: the mean of M and M+, no anti-expert

All but ``tuned`` are made from one loading of the recipe's members. :class:`ArmLM` is an arm as lm_eval's ``LM``: it
answers its harness's requests and appends each prediction to a file as soon as it has one.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.logits_process import LogitsProcessor, NoBadWordsLogitsProcessor
from transformers.generation.stopping_criteria import StoppingCriteria

from proxytune.answers.generation import Answer, Encoded, Sampling, answer, batches, with_room
from proxytune.answers.journal import Journal
from proxytune.decoding.mixing import mix
from proxytune.errors import MemberError, ProxyTuneError
from proxytune.evaluation.code import clean_code
from proxytune.evaluation.results import ARMS
from proxytune.lanes.kernels import pack
from proxytune.lanes.loading import load_member
from proxytune.lanes.reading import has_read, one_by_one, reading_of
from proxytune.model import ProxyTunedForCausalLM
from proxytune.recipe.config import Prompt, ProxyTuneConfig
from proxytune.recipe.members import Loading, load_recipe_tokenizer, load_tokenizer, loading_of
from proxytune.recipe.prompts import Prompter, left_pad

__all__ = [
    "Arm",
    "ArmLM",
    "Bench",
    "Job",
    "Log",
    "Pair",
    "TaskPlan",
    "choice_scores",
    "expand_arms",
    "jobs_of",
    "shots_of",
    "tuned_prompt",
]

Ids = TypeVar("Ids")  # what of a job is encoded: its context, or its pairs
GENERATION_OPTIONS = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p")


# -- what is asked --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TaskPlan:
    """One task of a run: the examples that are asked, and what the task says besides lm_eval's own fields.

    Attributes:
        task: lm_eval's task.
        requests: for each kind of context, ``raw`` or ``few_shot``, one instance a request, in the order of examples.
        repeats: samples an example.
    """

    name: str
    task: Any
    requests: Mapping[str, Sequence[Instance]]
    repeats: int

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The ``metadata`` of the task's YAML."""
        return self.task.config.metadata or {}

    @property
    def likelihood(self) -> bool:
        """Whether continuations are scored and nothing is written."""
        return str(self.task.OUTPUT_TYPE) in ("multiple_choice", "loglikelihood")

    def chat_prompt(self, prompt: Prompt, tokenizer: Any) -> Prompt:
        """The prompt of a member with what the task gives to chat members; what the recipe has set stays."""
        given: Mapping[str, Any] = self.metadata.get("chat") or {}
        if prompt.kind != "chat" or not given:
            return prompt
        given = dict(given)
        if (prefix := given.get("response_prefix")) and tokenizer is not None and tokenizer.chat_template:
            # A space before it, unless the template ends in white space of its own, as in the authors' code.
            shown = tokenizer.apply_chat_template(
                [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
            )
            given["response_prefix"] = prefix if shown[-1:].isspace() else f" {prefix}"
        return replace(prompt, **{name: value for name, value in given.items() if not getattr(prompt, name)})


@dataclass(frozen=True)
class Job:
    """One answer to be given: a sample of an example, or the scores of all continuations of an example."""

    id: str
    sample: int
    context: str
    doc: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)  # of generation
    continuations: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, int]:
        return self.id, self.sample


def jobs_of(requests: Sequence[Instance]) -> list[Job]:
    """lm_eval's requests as jobs: equal requests are samples, continuations of one context are one job."""
    jobs: list[Job] = []
    seen: dict[str, int] = {}
    for request in requests:
        name, (context, asked) = str(request.doc["id"]), request.arguments
        scored = request.request_type == "loglikelihood"
        if scored and jobs and jobs[-1].id == name and jobs[-1].context == context:
            jobs[-1] = replace(jobs[-1], continuations=(*jobs[-1].continuations, asked))
            continue
        sample = seen[name] = seen.get(name, -1) + 1
        if scored:
            jobs.append(Job(name, sample, context, request.doc, continuations=(asked,)))
        else:
            jobs.append(Job(name, sample, context, request.doc, asked))
    return jobs


def shots_of(arm: str) -> str:
    """Which of a plan's contexts an arm is shown."""
    return "few_shot" if arm == "base_few_shot" else "raw"


# -- who answers ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Arm:
    """A model, what its members are shown, and how its logits are read.

    Attributes:
        model: a recipe's composite, or a plain transformers model where ``alphas`` is None.
        prompts: member name -> its prompt and tokenizer, of those that are not raw; "" is a plain model's own.
        alphas: one value an expert.
        scale: what the logits are multiplied by (a mean of n models is a sum, scaled).
    """

    name: str
    model: Any
    tokenizer: Any
    prompts: Mapping[str, tuple[Prompt, Any]]
    alphas: tuple[float, ...] | None = None
    scale: float = 1.0
    speculate: Any = None

    @property
    def shots(self) -> str:
        """Which contexts it is shown."""
        return shots_of(self.name)

    def encode(self, plan: TaskPlan, context: str) -> Encoded:
        """The ids that each member reads for a context that an answer is written behind."""
        own = self._own_prompts(plan, context)
        ids = own.pop("") if "" in own else list(self.tokenizer(context)["input_ids"])
        return self._with_room(ids, own)

    def encode_pairs(self, plan: TaskPlan, context: str, continuations: Sequence[str]) -> list[Pair]:
        """The ids of a context and each of its continuations, as lm_eval's HFLM encodes them.

        White space at the end of the context belongs to the continuation, an empty context is the token that begins a
        text, and what is longer than the model's context loses its beginning. A prompt of a member's own is made of the
        context without that white space; it is never cut.

        Raises:
            ProxyTuneError: for a continuation without a token, and for texts that no member's context can hold.
        """
        pairs = []
        limit = self._raw_limit()
        for raw, scored in _encoded_as_lm_eval(self.tokenizer, context, continuations):
            own = self._own_prompts(plan, context.rstrip())
            cut = 0
            if "" not in own and limit is not None:  # the last token is foretold and never read
                cut = max(0, len(raw) + len(scored) - (limit + 1))
            if cut >= len(raw):
                raise ProxyTuneError(f"a continuation has {len(scored)} tokens, but the model can read only {limit}")
            encoded = self._with_room(own.pop("", raw[cut:]), own)
            if encoded.room is not None and len(scored) > encoded.room:
                raise ProxyTuneError(
                    f"behind its prompt a continuation has {len(scored)} tokens, but there is room for {encoded.room}"
                )
            pairs.append(Pair(encoded, scored, cut))
        return pairs

    def _own_prompts(self, plan: TaskPlan, text: str) -> dict[str, list[int]]:
        """Member name -> the ids of its own prompt, of members that have one."""
        prompts = {name: (plan.chat_prompt(prompt, of), of) for name, (prompt, of) in self.prompts.items()}
        return {name: list(rows[0]) for name, rows in Prompter(self.tokenizer, prompts).from_texts([text]).items()}

    def _raw_limit(self) -> int | None:
        """How many tokens those members can read that are shown the raw text; None where nothing limits it."""
        if self.alphas is None:
            limits = [self._plain_limit()]
        else:
            limits = [self.model.context_of(name) for name in self.model.seats if name not in self.prompts]
        return min((limit for limit in limits if limit is not None), default=None)

    def _plain_limit(self) -> int | None:
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    def _with_room(self, ids: list[int], own: dict[str, list[int]]) -> Encoded:
        """What the members read, where all of them have room for it."""
        if self.alphas is not None:
            return with_room(self.model, ids, own)
        limit = self._plain_limit()
        if limit is not None and len(ids) > limit:
            raise ProxyTuneError(f"the prompt has {len(ids)} tokens, but the model can read only {limit}")
        return Encoded(ids, {}, None if limit is None else limit - len(ids) + 1)


@dataclass(frozen=True)
class Pair:
    """A context and a continuation of it that is scored.

    Attributes:
        context: what the members read before it. continuation: its ids, at least one.
        cut: how many tokens the raw context lost at its beginning.
    """

    context: Encoded
    continuation: list[int]
    cut: int = 0


class _Encoder(HFLM):  # type: ignore[misc]
    """lm_eval's own encoding of pairs, without a model: TemplateLM's ``loglikelihood`` gives the ids to be scored."""

    def __init__(self, tokenizer: Any) -> None:
        LM.__init__(self)
        self.tokenizer = tokenizer
        self.backend, self.add_bos_token, self.custom_prefix_token_id = "causal", None, None

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        return [(context, continuation) for _, context, continuation in requests]


def _encoded_as_lm_eval(
    tokenizer: Any, context: str, continuations: Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """The ids of a context and of each continuation, neither of them empty.

    Raises:
        ProxyTuneError: for a continuation without a token, and for a tokenizer that lm_eval cannot use.
    """
    encoder = _Encoder(tokenizer)
    if encoder.prefix_token_id is None:
        raise ProxyTuneError("the tokenizer has neither a bos_token nor an eos_token, one of which lm_eval needs")
    if not all(continuations):
        raise ProxyTuneError("a continuation is empty")
    requests = [Instance("loglikelihood", {}, (context, text), at) for at, text in enumerate(continuations)]
    pairs = TemplateLM.loglikelihood(encoder, requests, disable_tqdm=True)
    if not all(scored for _, scored in pairs):
        raise ProxyTuneError("a continuation has no token of its own behind its context")
    # A context of white space alone has moved into the continuation; lm_eval has no rule for what is left.
    return [(list(ids) or [encoder.prefix_token_id], list(scored)) for ids, scored in pairs]


class Bench:
    """Makes the arms, one after another, each set of weights loaded once.

    Args:
        names: the arms that will be asked for; without ``proxy_tuned`` no member is loaded that no arm needs.
        tuned: a path or hub id of the directly tuned model.
        loading: what ``from_pretrained`` of the recipe takes: dtype, device_map, pack, speculate …
    """

    def __init__(
        self,
        config: ProxyTuneConfig,
        names: Sequence[str],
        *,
        alphas: Sequence[float] | None = None,
        tuned: str | None = None,
        dtype: str | None = None,
        device_map: Any = None,
        trust_remote_code: bool = False,
        pack: bool = False,
        speculate: Any = "auto",
    ) -> None:
        self.config, self.names, self.tuned = config, list(names), tuned
        self.alphas = tuple(config.alphas if alphas is None else alphas)
        self.loading = Loading(dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code, pack=pack)
        self.speculate = speculate
        self.members = dict(config.members())
        self.steered: ProxyTunedForCausalLM | None = None
        self.alone: dict[str, Any] = {}  # member name -> lane, where the recipe is not loaded whole
        self.tokenizers: dict[str, Any] = {}

    @contextlib.contextmanager
    def arm(self, name: str) -> Iterator[Arm]:
        """One arm, ready to answer."""
        if name == "tuned":
            self.close()  # nothing else is needed beside it
            yield self._tuned()
        elif name == "proxy_tuned":
            model = self._whole()
            yield Arm(name, model, self.tokenizer, model.prompter.own, self.alphas, speculate=self.speculate)
        elif name == "mean_logits":
            with self._mean() as arm:
                yield arm
        else:
            member = self._member_of(name)
            model = self._lane(member).alone(member)
            prompt, tokenizer = self.members[member].prompt, self._tokenizer(member)
            shown = {} if prompt.kind == "raw" else {"": (prompt, tokenizer)}
            yield Arm(name, model, tokenizer, shown)

    def close(self) -> None:
        """Let go of every model."""
        self.steered, self.alone = None, {}
        gc.collect()

    @property
    def tokenizer(self) -> Any:
        """The recipe's, or where it has none the base's."""
        return self._tokenizer("base")

    # -- the models -----------------------------------------------------------------------------------------
    def _whole(self) -> ProxyTunedForCausalLM:
        if self.steered is None:
            self.close()
            self.steered = ProxyTunedForCausalLM.from_pretrained(
                str(self.config.name_or_path),
                config=self.config,
                dtype=self.loading.dtype,
                device_map=self.loading.device_map,
                member_trust_remote_code=self.loading.trust_remote_code,
                pack=self.loading.pack,
                speculate=self.speculate,
            )
        return self.steered

    def _member_of(self, arm: str) -> str:
        if arm in ("base", "base_few_shot"):
            return "base"
        if arm in self.members:
            return arm
        return next(name for name in self.members if name.endswith(f".{arm}"))

    def _lane(self, member: str) -> Any:
        """The lane of a member: of the whole recipe where that is loaded or will be, otherwise its own."""
        if self.steered is not None or "proxy_tuned" in self.names:
            steered = self._whole()
            return steered.lanes[steered.seats[member][0]]
        if member not in self.alone:
            self.alone[member] = load_member(self.config, member, self.members[member], self.loading)
        return self.alone[member]

    @contextlib.contextmanager
    def _mean(self) -> Iterator[Arm]:
        """The mean of base and experts as a composite: their sum, scaled."""
        experts = [e for e in self.config.expert_list if e.expert is not None]
        summed = [replace(e, anti_expert=None, alpha=1.0) for e in experts]
        names = ["base", *(f"{e.name}.expert" for e in experts)]
        config = self.config.with_members(lambda _, member: member)
        config.experts, config.plausibility = [e.to_json() for e in summed], None
        given = {name: self._lane(name).alone(name) for name in names}
        loading = {"dtype": self.loading.dtype, "device_map": self.loading.device_map, "pack": self.loading.pack}
        loading |= {"member_trust_remote_code": self.loading.trust_remote_code, "speculate": False}
        tokenizers = {name: self._tokenizer(name) for name in names}
        model = ProxyTunedForCausalLM._load(config, given, self.tokenizer, tokenizers, loading)
        alphas = (1.0,) * len(experts)
        yield Arm(
            "mean_logits",
            model,
            self.tokenizer,
            model.prompter.own,
            alphas,
            1 / (1 + len(experts)),
            speculate=False,
        )

    def _tuned(self) -> Arm:
        assert self.tuned is not None
        options = {"dtype": self.loading.dtype, "device_map": self.loading.device_map}
        trust = self.loading.trust_remote_code
        with loading_of("the tuned model", self.tuned):
            model: Any = AutoModelForCausalLM.from_pretrained(
                self.tuned, trust_remote_code=trust, **{key: value for key, value in options.items() if value}
            ).eval()
            tokenizer: Any = AutoTokenizer.from_pretrained(self.tuned, trust_remote_code=trust)
        if self.loading.pack:
            pack(model)
        prompt = tuned_prompt(self.config)
        return Arm("tuned", model, tokenizer, {} if prompt.kind == "raw" else {"": (prompt, tokenizer)})

    def _tokenizer(self, member: str) -> Any:
        if member not in self.tokenizers:
            found = None
            if self.steered is not None:
                found = self.steered.tokenizers.get(member)
            if found is None and (member != "base" or self.steered is None):
                found = load_tokenizer(self.config, member, self.members[member], self.loading)
            if member == "base":
                own = load_recipe_tokenizer(self.config, self.loading)
                found = found if own is None else own
            self.tokenizers[member] = found if found is not None or member == "base" else self.tokenizer
            if self.tokenizers[member] is None:
                raise MemberError("neither the recipe nor its base has a tokenizer; copy the base's into the recipe")
        return self.tokenizers[member]


def tuned_prompt(config: ProxyTuneConfig) -> Prompt:
    """What the directly tuned model is shown: the one prompt that all experts have.

    Raises:
        ProxyTuneError: if they have several.
    """
    prompts = {name: member.prompt for name, member in config.members() if name.endswith(".expert")}
    first = next(iter(prompts.values()), Prompt())
    if other := next((name for name, prompt in prompts.items() if prompt != first), None):
        raise ProxyTuneError(
            f"the tuned model is shown what the expert is shown, but {next(iter(prompts))} and {other} have different "
            "prompts; evaluate it with a recipe whose experts have one, or leave --tuned out"
        )
    return first


def expand_arms(names: Sequence[str], config: ProxyTuneConfig) -> list[str]:
    """The arms by the names that files have: with several experts, ``expert`` stands for each of them.

    Raises:
        ProxyTuneError: naming an arm that this recipe does not have.
    """
    members = [name for name, _ in config.members()]
    several = len(config.expert_list) > 1
    found: list[str] = []
    for name in names:
        if name in ("expert", "anti_expert"):
            sides = [member for member in members if member.endswith(f".{name}")]
            if not sides:
                raise ProxyTuneError(f"the recipe has no {ARMS[name]}; leave the arm {name} out")
            found += sides if several else [name]
        elif name in ARMS or (several and name in members):
            if name == "mean_logits" and not any(member.endswith(".expert") for member in members):
                raise ProxyTuneError("the recipe has no expert to take a mean with; leave the arm mean_logits out")
            found.append(name)
        else:
            raise ProxyTuneError(f"there is no arm {name!r}; the arms are {', '.join(ARMS)}")
    return list(dict.fromkeys(found))


# -- how it answers -------------------------------------------------------------------------------------------
class ArmLM(LM):
    """An arm as lm_eval's model, which remembers what it has answered.

    Args:
        log: where predictions go, and which are there already: those are not made again.
        advance: is told how many answers more there are.
    """

    def __init__(
        self,
        arm: Arm,
        plan: TaskPlan,
        log: Log,
        *,
        batch_size: int = 8,
        seed: int = 0,
        advance: Any = lambda n: None,
    ) -> None:
        super().__init__()
        self.arm, self.plan, self.log = arm, plan, log
        self.batch_size, self.seed, self.advance = batch_size, seed, advance

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Each request's text, up to the first of its stop strings."""
        jobs = jobs_of(requests)
        output = str(self.plan.metadata.get("output", "output"))
        for batch in self._batches(jobs, encode_jobs):
            started = time.monotonic()
            texts = self._generate(batch)
            seconds = (time.monotonic() - started) / len(batch)
            self.log.append([line_of(self.plan, job, seconds, {output: text}) for (job, _), text in zip(batch, texts)])
            self.advance(len(batch))
        made = self.log.made
        return [str(made[job.key][output]) for job in jobs]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Each continuation's log-probability behind its context, in nats, and whether it is the greedy one."""
        jobs = jobs_of(requests)
        alphas = None if self.arm.alphas is None else [self.arm.alphas]
        for batch in self._batches(jobs, encode_choices):
            started = time.monotonic()
            (scores,) = score_jobs(self.arm, batch, alphas)
            seconds = (time.monotonic() - started) / len(batch)
            self.log.append(
                [choices_line(self.plan, job, seconds, pairs, of) for (job, pairs), of in zip(batch, scores)]
            )
            self.advance(len(batch))
        lines = [self.log.made[job.key] for job in jobs]
        return [pair for line in lines for pair in zip(line["loglikelihoods"], line["greedy"])]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Not offered: no task of the paper asks for it."""
        raise ProxyTuneError("perplexity tasks are for lm_eval's own command line: lm_eval --model hf")

    def _batches(
        self, jobs: Sequence[Job], encode: Callable[[Arm, TaskPlan, Sequence[Job]], list[tuple[Job, Ids]]]
    ) -> Iterator[list[tuple[Job, Ids]]]:
        """What is left to do, like lengths together, the longest first: a batch that does not fit fails at once.

        The batches are those of the whole job, so that a resumed run has the rest of the same ones.
        """
        done = self.log.made
        if all(job.key in done for job in jobs):
            return
        for batch in batches(encode(self.arm, self.plan, jobs), self.batch_size):
            if left := [pair for pair in batch if pair[0].key not in done]:
                yield left

    def _generate(self, batch: Sequence[tuple[Job, Encoded]]) -> list[str]:
        alphas = None if self.arm.alphas is None else [self.arm.alphas] * len(batch)
        return generate_batch(self.arm, self.plan, batch, alphas, seed=self.seed)


def encode_jobs(arm: Arm, plan: TaskPlan, jobs: Sequence[Job]) -> list[tuple[Job, Encoded]]:
    """Jobs with the ids of their contexts, the longest first."""
    seen: dict[str, Encoded] = {}
    for job in jobs:
        if job.context not in seen:
            with _naming(arm, plan, job):
                seen[job.context] = arm.encode(plan, job.context)
    return sorted(((job, seen[job.context]) for job in jobs), key=lambda pair: -len(pair[1].ids))


def encode_choices(arm: Arm, plan: TaskPlan, jobs: Sequence[Job]) -> list[tuple[Job, list[Pair]]]:
    """Jobs with their context and each of their continuations, the longest first."""
    found = []
    for job in jobs:
        with _naming(arm, plan, job):
            found.append((job, arm.encode_pairs(plan, job.context, job.continuations)))
    return sorted(found, key=lambda each: -max(len(pair.context.ids) for pair in each[1]))


@contextlib.contextmanager
def _naming(arm: Arm, plan: TaskPlan, job: Job) -> Iterator[None]:
    """An error within names the task, the example and the arm."""
    try:
        yield
    except ProxyTuneError as error:
        raise ProxyTuneError(f"{plan.name}, example {job.id}, {arm.name}: {error}") from error


def generate_batch(
    arm: Arm,
    plan: TaskPlan,
    batch: Sequence[tuple[Job, Encoded]],
    alphas: Sequence[Sequence[float]] | None,
    *,
    seed: int,
    past_key_values: Any = None,
) -> list[str]:
    """The texts of a batch of jobs, which have the same options, each cut before its first stop string.

    Args:
        alphas: one tuple a job, None for a plain model.
        past_key_values: a cache that has read the first columns of the batch.
    """
    options = dict(batch[0][0].options)
    if unknown := [name for name in options if name not in GENERATION_OPTIONS]:
        raise ProxyTuneError(f"{plan.name} has the generation option {unknown[0]!r}, which is not known here")
    until = options.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    chosen = {name: options.get(name) for name in ("temperature", "top_p", "top_k", "min_p")}
    sampling = Sampling(seed=seed)
    if options.get("do_sample", False):
        sampling = Sampling(**({"temperature": 1.0} if set(chosen.values()) == {None} else chosen), seed=seed)
    n_prompt = max(len(encoded.ids) for _, encoded in batch)
    processors: list[LogitsProcessor] = []
    if arm.scale != 1 and not sampling.greedy:
        processors.append(_Scaled(arm.scale))
    if banned := _banned_ids(arm.tokenizer, plan.metadata.get("banned") or ()):
        processors.append(NoBadWordsLogitsProcessor(banned))
    texts = answer(
        arm.model,
        arm.tokenizer,
        [encoded for _, encoded in batch],
        alphas,
        max_new_tokens=int(options.get("max_gen_toks", 256)),
        sampling=sampling,
        rows=[f"{plan.name}/{job.id}/{job.sample}" for job, _ in batch],
        processors=processors,
        criteria=[StopTexts(arm.tokenizer, until, n_prompt)] if until else [],
        speculate=arm.speculate,
        past_key_values=past_key_values,
    )
    found = [_before(one, until) for one in texts]
    return [clean_code(text) for text in found] if plan.metadata.get("clean") else found


def _before(one: Answer, until: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    ends = [at for stop in until if (at := one.text.find(stop)) >= 0]
    return one.text[: min(ends, default=len(one.text))]


def _banned_ids(tokenizer: Any, banned: Sequence[str]) -> list[list[int]]:
    """The ids of banned strings, as they stand at the beginning of a text and behind a space."""
    rows = [
        tokenizer(f"{space}{text}", add_special_tokens=False)["input_ids"] for text in banned for space in ("", " ")
    ]
    return [list(row) for row in dict.fromkeys(tuple(row) for row in rows) if row]


class _Scaled(LogitsProcessor):
    """Logits times a number."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Shape (n_batch, n_vocab), in and out."""
        return scores * self.scale


class StopTexts(StoppingCriteria):
    """A row is done when what it has written holds one of the texts; what the prompt holds does not count."""

    row_by_row = True  # rows of unequal lengths may be given one by one

    def __init__(self, tokenizer: Any, texts: Sequence[str], n_prompt: int) -> None:
        self.tokenizer, self.texts, self.n_prompt = tokenizer, texts, n_prompt
        # A token has at least one byte, and what is looked for ends in the newest one.
        self.window = max(len(text.encode()) for text in texts) + 4

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Shape (n_batch,), True where the row is finished."""
        newest = input_ids[:, max(self.n_prompt, input_ids.shape[1] - self.window) :]
        found = [any(text in row for text in self.texts) for row in self.tokenizer.batch_decode(newest)]
        return torch.tensor(found, device=input_ids.device)


# -- likelihoods ----------------------------------------------------------------------------------------------
Score = tuple[float, bool]


def score_jobs(
    arm: Arm, batch: Sequence[tuple[Job, Sequence[Pair]]], alphas: Sequence[Sequence[float]] | None
) -> list[list[list[Score]]]:
    """For each tuple of alphas (one for a plain model), for each job, each continuation's score."""
    results = []
    for found in choice_scores(arm, [pair for _, pairs in batch for pair in pairs], alphas):
        scores = iter(found)
        results.append([[next(scores) for _ in pairs] for _, pairs in batch])
    return results


@torch.inference_mode()
def choice_scores(arm: Arm, pairs: Sequence[Pair], alphas: Sequence[Sequence[float]] | None) -> list[list[Score]]:
    """Score continuations behind their contexts: each context is read once, its continuations as rows behind it.

    Every member makes two forwards, whatever the number of alphas: what they differ in is how its logits are mixed.

    Args:
        alphas: the tuples (one value an expert) to mix with; None for a plain model.

    Returns:
        [alpha][pair] -> (log-probability in nats, whether each token was the likeliest).
    """
    prompts: list[Encoded] = []
    for pair in pairs:
        if pair.context not in prompts:
            prompts.append(pair.context)
    of_prompt = torch.tensor([prompts.index(pair.context) for pair in pairs])  # (n_rows,)
    flat = [pair.continuation for pair in pairs]
    ids, mask = left_pad([prompt.ids for prompt in prompts])  # (n_prompts, width)
    own = {name: left_pad([prompt.own[name] for prompt in prompts]) for name in prompts[0].own}
    reader = _Reader(arm, mask, own)
    first = reader.read(ids, last_only=True)  # the first token is foretold by the prompt's last position
    # The last token of a continuation is foretold, never read. Padding stands on the right, where it changes nothing.
    longest = max(map(len, flat))
    rest = torch.tensor([row[:-1] + [0] * (longest - len(row)) for row in flat], dtype=torch.long)
    rest_mask = torch.tensor([[1] * (len(row) - 1) + [0] * (longest - len(row)) for row in flat], dtype=torch.long)
    behind = None
    if longest > 1:
        reader.select(of_prompt, rest_mask)
        behind = reader.read(rest.reshape(len(flat), longest - 1))
    results = []
    for mixed_by in [None] if alphas is None else alphas:
        logits = reader.mix(first, mixed_by)[of_prompt.to(reader.device)]  # (n_rows, 1, n_vocab)
        if behind is not None:
            logits = torch.cat([logits, reader.mix(behind, mixed_by)], dim=1)
        results.append(_scores(logits * arm.scale, flat))
    return results


def _scores(logits: Tensor, rows: Sequence[Sequence[int]]) -> list[Score]:
    """Sums of log-probabilities of each row's tokens, logits of shape (n_rows, longest, n_vocab)."""
    found = []
    for row, row_logits in zip(rows, logits):
        log_p = row_logits[: len(row)].float().log_softmax(dim=-1)
        tokens = torch.tensor(list(row), device=log_p.device)
        chosen = log_p.gather(1, tokens[:, None]).double().sum()
        found.append((float(chosen), bool((log_p.argmax(dim=-1) == tokens).all())))
    return found


class _Reader:
    """Reads columns behind a left-padded batch of prompts, with every member of an arm."""

    def __init__(self, arm: Arm, mask: Tensor, own: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.arm, self.model, self.mask, self.own = arm, arm.model, mask, own
        self.device = self.model.device
        self.cache: Any = None
        self.n_read = 0

    def read(self, ids: Tensor, *, last_only: bool = False) -> dict[str, Tensor]:
        """Member name -> logits (n_rows, n_positions, n_vocab); "" for a plain model."""
        n_columns = ids.shape[1]
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, self.n_read : self.n_read + n_columns]
        inputs: dict[str, Any] = {
            "input_ids": ids.to(self.device),
            "attention_mask": self.mask.to(self.device),
            "position_ids": positions.to(self.device),
            "past_key_values": self.cache,
            "use_cache": True,
        }
        if self.arm.alphas is None:
            keep = {"logits_to_keep": 1} if last_only and self.model._supports_logits_to_keep() else {}

            def read(input_ids: Tensor, **inputs: Any) -> Tensor:
                output = self.model(input_ids=input_ids, **inputs, **keep)
                self.cache = output.past_key_values
                return output.logits[:, -1:] if last_only else output.logits

            ids = inputs.pop("input_ids")
            in_pieces = not has_read(self.cache) or reading_of(self.model).in_pieces
            logits = {"": read(ids, **inputs) if in_pieces else one_by_one(read, ids, inputs)}
        else:
            if self.own and self.n_read == 0:
                inputs["member_input_ids"] = {name: pair[0] for name, pair in self.own.items()}
                inputs["member_attention_mask"] = {name: pair[1] for name, pair in self.own.items()}
                inputs["prompt_length"] = n_columns
            output = self.model(**inputs, logits_to_keep=int(last_only), output_member_logits=True)
            logits = output.member_logits
            self.cache = output.past_key_values
        self.n_read += n_columns
        return logits

    def select(self, rows: Tensor, more_mask: Tensor) -> None:
        """Carry on with these rows (repeated where several continue one prompt), and mask the columns to come."""
        self.cache.reorder_cache(rows.to(self.device))  # every kind of layer can do that
        self.mask = torch.cat([self.mask[rows], more_mask], dim=1)

    def mix(self, logits: Mapping[str, Tensor], alphas: Sequence[float] | None) -> Tensor:
        """The arm's logits, (n_rows, n_positions, n_vocab)."""
        if alphas is None:
            return logits[""]
        model = self.model
        pairs = [(logits.get(f"{e.name}.expert"), logits.get(f"{e.name}.anti_expert")) for e in model.experts]
        return mix(
            logits["base"],
            pairs,
            torch.tensor([list(alphas)], dtype=torch.float32),
            plausibility=model.config.plausibility,
            vocab_size=model.shared_vocab,
        )


# -- predictions on disk --------------------------------------------------------------------------------------
class Log(Journal):
    """One arm's prediction file: what is in it, by (id, sample), and where more is appended.

    Raises:
        ProxyTuneError: on opening, naming what is no prediction of one example, or where another process writes it.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.made: dict[tuple[str, int], dict[str, Any]] = {}

    def __enter__(self) -> Log:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return super().__enter__()

    def check(self) -> None:
        """Hold what was read against what this command writes."""
        self.made = {}
        for number, line in enumerate(self.lines, start=1):
            if "id" not in line or "seconds" not in line:
                raise ProxyTuneError(
                    f"line {number} of {self.path} is not a prediction of this command; choose another --out"
                )
            if (key := (str(line["id"]), line.get("sample", 0))) in self.made:
                raise ProxyTuneError(f"{self.path} has two predictions for example {key[0]}, sample {key[1]}")
            self.made[key] = line

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write some predictions, and return when they are on disk."""
        super().append(lines)
        self.made |= {(line["id"], line["sample"]): dict(line) for line in lines}


# -- prediction lines -----------------------------------------------------------------------------------------
def line_of(plan: TaskPlan, job: Job, seconds: float, made: Mapping[str, Any]) -> dict[str, Any]:
    """One prediction: what it answers, the task's public fields, what was made, and how long it took."""
    fields = {name: copy.copy(job.doc[name]) for name in plan.metadata.get("fields", ())}
    return {"id": job.id, "sample": job.sample, "prompt": job.context, **fields, **made, "seconds": round(seconds, 4)}


def choices_line(
    plan: TaskPlan, job: Job, seconds: float, pairs: Sequence[Pair], scores: Sequence[Score]
) -> dict[str, Any]:
    """One example whose continuations were scored; ``cut``: the tokens that each context lost, where one lost any."""
    made = {
        "continuations": list(job.continuations),
        "loglikelihoods": [value for value, _ in scores],
        "greedy": [greedy for _, greedy in scores],
    }
    if any(pair.cut for pair in pairs):
        made["cut"] = [pair.cut for pair in pairs]
    return line_of(plan, job, seconds, made)
