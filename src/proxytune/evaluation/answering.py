"""Answers a task with an arm: requests, writing texts, scoring continuations, and predictions on disk."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.generation.logits_process import NoBadWordsLogitsProcessor
from transformers.generation.stopping_criteria import StoppingCriteria

from proxytune.answers.generation import Answer, Encoded, Sampling, answer, batches
from proxytune.answers.journal import Journal, json_line, write_whole
from proxytune.answers.traces import is_trace, token_texts, trace_line
from proxytune.decoding.trace import TOP_K
from proxytune.errors import ProxyTuneError
from proxytune.evaluation.arms import Arm, Pair, Reader
from proxytune.evaluation.code import clean_code
from proxytune.evaluation.engine import EngineArm
from proxytune.lanes.reading import ROTATIONS, reading_of, rotations
from proxytune.recipe.families import new_cache
from proxytune.recipe.parts import Prompt
from proxytune.recipe.prompts import chat_text, left_pad

__all__ = ["Job", "Log", "TaskPlan", "TraceLog", "answer_jobs", "choice_scores", "encode_jobs", "with_own_examples"]

GENERATION_OPTIONS = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p")
Key = tuple[str, int]  # an example's id, and which of its samples
Mix = Sequence[float]  # one alpha an expert


# -- what is asked --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Job:
    """One request: a sample of an example, or the scores of all continuations of an example."""

    id: str
    sample: int
    context: str
    doc: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)  # of generation
    continuations: tuple[str, ...] = ()

    @property
    def key(self) -> Key:
        return self.id, self.sample


Asked = tuple[Job, Sequence[Pair]]  # with the ids of its context, and of each continuation that is scored


@dataclass(frozen=True)
class TaskPlan:
    """One task of a run.

    Attributes:
        jobs: kind of context (see :func:`shots_of`) -> requests, in the order of the examples.
        repeats: samples per example.
        metadata: the ``metadata`` of the task's YAML.
        likelihood: whether continuations are scored and nothing is written.
        task: lm_eval's task object, if there is one. data_sha256: hash of the examples.
    """

    name: str
    jobs: Mapping[str, Sequence[Job]]
    repeats: int = 1
    metadata: Mapping[str, Any] = field(default_factory=dict)
    likelihood: bool = False
    task: Any = None
    data_sha256: str = ""

    @property
    def examples(self) -> int:
        return len({job.id for job in self.jobs["raw"]})

    def chat_prompt(self, prompt: Prompt, tokenizer: Any) -> Prompt:
        """A member's prompt with the task's additions for chat members. Fields that the recipe sets stay."""
        given: Mapping[str, Any] = self.metadata.get("chat") or {}
        if prompt.kind != "chat" or not given:
            return prompt
        given = dict(given)
        if (prefix := given.get("response_prefix")) and tokenizer is not None and tokenizer.chat_template:
            # With a space before it, unless the template ends with white space, as in the authors' code.
            shown = chat_text(tokenizer, [{"role": "user", "content": "x"}], "a member")
            given["response_prefix"] = prefix if shown[-1:].isspace() else f" {prefix}"
        return replace(prompt, **{name: value for name, value in given.items() if not getattr(prompt, name)})


def with_own_examples(jobs: Sequence[Job], name: str) -> list[Job]:
    """Jobs with solved examples of their own kind before them. The field ``name`` of an example holds these."""
    return [replace(job, context=job.doc[name] + job.context) for job in jobs]


# -- how it is answered ---------------------------------------------------------------------------------------
def answer_jobs(
    arm: Arm | EngineArm,
    plan: TaskPlan,
    jobs: Sequence[Job],
    made: Sequence[Container[Key]] = ((),),
    mixes: Sequence[Mix] | None = None,
    *,
    batch_size: int = 8,
    seed: int = 0,
    traced: Callable[[Sequence[Mapping[str, Any]]], None] | None = None,
    read: dict[str, Any] | None = None,
) -> Iterator[list[list[dict[str, Any]]]]:
    """Answer jobs batch by batch, the longest first, so that a batch that does not fit fails immediately.

    The batches are those of the whole job, so that a resumed run has the same ones.

    Args:
        mixes: the alphas to answer with, by default only the arm's own. A prompt is read once for all of them.
        made: for each mix the existing answers, which are not made again.
        batch_size: rows per batch.
        traced: receives the traces of each batch of texts before its predictions are yielded; None: no traces.
        read: a dictionary for several arms with the same jobs in one batch. The first arm stores the base's cache of
            the prompts there, and the others use it.

    Yields:
        For each batch and each mix the new prediction lines.
    """
    mixes = [arm.alphas] if mixes is None else mixes
    # For continuations, each mix only mixes again. For writing, each mix is a row of its own.
    n_prompts = batch_size if plan.likelihood else max(1, batch_size // len(mixes))
    asked = encode_jobs(arm.reader, plan, jobs)
    n_shared = 0
    if not plan.likelihood and isinstance(arm, Arm):
        n_shared = _beginning(arm, [pair.context.ids for _, (pair,) in asked])
    text_of = token_texts(arm.tokenizer)
    for whole in batches(asked, n_prompts):
        batch = [pair for pair in whole if any(pair[0].key not in done for done in made)]
        wanted = [(row, at) for row, (job, _) in enumerate(batch) for at, of in enumerate(made) if job.key not in of]
        if not wanted:
            continue
        started = time.monotonic()
        if plan.likelihood:
            scores = score_jobs(arm, [pairs for _, pairs in batch], mixes)
            found = [_scored(batch[row], scores[at][row]) for row, at in wanted]
        else:
            asked_rows = [(row, mixes[at]) for row, at in wanted]
            top_k = None if traced is None else TOP_K
            written = generate_batch(arm, plan, batch, asked_rows, n_shared, read, seed=seed, trace_top_k=top_k)
            output = str(plan.metadata.get("output", "output"))
            found = [{output: text, **one.asked} for text, one in written]
        seconds = round((time.monotonic() - started) / len(wanted), 4)
        lines: list[list[dict[str, Any]]] = [[] for _ in mixes]
        for (row, at), of in zip(wanted, found):
            job = batch[row][0]
            fields = {name: job.doc[name] for name in plan.metadata.get("fields", ())}
            about = {"id": job.id, "sample": job.sample, "prompt": job.context}
            lines[at].append({**about, **fields, **of, "seconds": seconds})
        if traced is not None and isinstance(arm, Arm):
            of_rows = zip(asked_rows, written)
            traced([_trace(arm, batch[row][0], alphas, one, text_of) for (row, alphas), (_, one) in of_rows])
        yield lines


def _trace(arm: Arm, job: Job, alphas: Mix, one: Answer, text_of: Callable[[int], str]) -> dict[str, Any]:
    """The line of an answer's trace. Its text is everything that was written, including the stop string."""
    by_expert = dict(zip(arm.model.expert_names, alphas))
    return trace_line(job.context, by_expert, one, text_of, key={"id": job.id, "sample": job.sample})


def encode_jobs(reader: Reader, plan: TaskPlan, jobs: Sequence[Job]) -> list[Asked]:
    """Jobs with the ids of their context and of each continuation, the longest first. No continuation is empty.

    Raises:
        ProxyTuneError: for a job that the members cannot read; it names the job.
    """

    @functools.cache  # samples have the same context
    def encode(context: str, continuations: tuple[str, ...]) -> list[Pair]:
        if plan.likelihood:
            return reader.encode_pairs(plan, context, continuations)
        return [Pair(reader.encode(plan, context), [])]

    found = []
    for job in jobs:
        try:
            found.append((job, encode(job.context, job.continuations)))
        except ProxyTuneError as error:
            raise ProxyTuneError(f"{plan.name}, example {job.id}, {reader.name}: {error}") from error
    return sorted(found, key=lambda asked: -max(len(pair.context.ids) for pair in asked[1]))


def generate_batch(
    arm: Arm | EngineArm,
    plan: TaskPlan,
    batch: Sequence[Asked],
    wanted: Sequence[tuple[int, Mix]],
    n_shared: int,
    read: dict[str, Any] | None,
    *,
    seed: int,
    trace_top_k: int | None = None,
) -> list[tuple[str, Answer]]:
    """The texts of a batch of jobs with the same options: cut before the first stop string, and uncut.

    It answers the ``wanted`` rows, several times for several alphas. ``n_shared``: see :func:`_beginning`; ``read``:
    see :func:`answer_jobs`; ``trace_top_k``: see :func:`proxytune.answers.generation.answer`.
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
    prompts = [pair.context for _, (pair,) in batch]
    banned = _banned_ids(arm.tokenizer, plan.metadata.get("banned") or ())
    rows, mixes = [row for row, _ in wanted], [alphas for _, alphas in wanted]
    asked = [prompts[row] for row in rows]
    said: dict[str, Any] = {
        "max_new_tokens": int(options.get("max_gen_toks", 256)),
        "sampling": sampling,
        "rows": [f"{plan.name}/{batch[row][0].id}/{batch[row][0].sample}" for row in rows],
    }
    if isinstance(arm, EngineArm):
        answers = arm.write(asked, mixes, stops=until, banned=banned, **said)
    else:
        n_prompt = max(len(prompt.ids) for prompt in prompts)
        cache, n_shared = _prefilled(arm, prompts, rows, n_shared, read)
        answers = answer(
            arm.model,
            arm.tokenizer,
            asked,
            mixes if arm.alphas else None,
            processors=[NoBadWordsLogitsProcessor(banned)] if banned else [],
            criteria=[StopTexts(arm.tokenizer, until, n_prompt)] if until else [],
            past_key_values=cache,
            n_shared=n_shared,
            trace_top_k=trace_top_k,
            **said,
        )
    found = []
    for one in answers:
        ends = [at for stop in until if (at := one.text.find(stop)) >= 0]
        text = one.text[: min(ends, default=len(one.text))]
        found.append((clean_code(text) if plan.metadata.get("clean") else text, one))
    return found


@torch.inference_mode()
def _prefilled(
    arm: Arm, prompts: Sequence[Encoded], rows: Sequence[int], n_shared: int, read: dict[str, Any] | None
) -> tuple[Any, int]:
    """A cache of the part that would otherwise be read several times, and the number of tokens that all prompts begin
    with.

    A prompt that is answered with several alphas is read once, except its last column. A model alone reads the common
    beginning of its prompts, such as solved examples, once for all batches. Otherwise there is no cache. A base behind
    an API remembers nothing, so nothing is read ahead.
    """
    if arm.remote:
        return None, 0
    if len(rows) > len(prompts) and not prompts[0].own and all(len(prompt.ids) > 1 for prompt in prompts):
        ids, mask = (columns[:, :-1] for columns in left_pad([prompt.ids for prompt in prompts]))
        cache = _read(arm, ids, mask, logits_to_keep=1).past_key_values
    elif n_shared:
        shared = tuple(prompts[0].ids[:n_shared])
        if shared not in arm.begun:
            arm.begun.clear()
            arm.begun[shared] = _read(arm, *left_pad([list(shared)]), logits_to_keep=1).past_key_values
        cache = copy.deepcopy(arm.begun[shared])
        rows = [0] * len(rows)
    elif read is not None and not prompts[0].own and all(len(prompt.ids) > 1 for prompt in prompts):
        return _after_base(arm, prompts, read), 0
    else:  # a member with a prompt of its own reads all of it in the first forward
        return None, 0
    cache.reorder_cache(torch.tensor(list(rows), device=arm.model.device))  # every kind of layer supports this
    return cache, n_shared


def _after_base(arm: Arm, prompts: Sequence[Encoded], read: dict[str, Any]) -> Any:
    """A cache of prompts without their last column. The base's part comes from another arm, if there is one."""
    model = arm.model
    ids, mask = (columns[:, :-1].to(model.device) for columns in left_pad([prompt.ids for prompt in prompts]))
    cache = model.new_cache()
    cache.begin(len(prompts))
    base = model.seats["base"][0]
    for at, state in enumerate(cache.states):
        if at != base or "base" not in read:
            state.read(ids, mask, positions=1)
            state.keep()
    cache.adopt(base, read.setdefault("base", cache.states[base]))
    cache.n_columns = ids.shape[1]
    return cache


def _beginning(arm: Arm, prompts: Sequence[list[int]]) -> int:
    """The number of tokens that all prompts begin with, if a model alone can read them once for all; otherwise 0."""
    if arm.alphas or len(prompts) < 2 or arm.remote:
        return 0
    # In sorted order, the first and the last share what all share. The last token must be read for its prediction.
    first, last = min(prompts), max(prompts)
    common = min(next((at for at, pair in enumerate(zip(first, last)) if pair[0] != pair[1]), len(first)), len(last))
    common = min(common, min(map(len, prompts)) - 1)
    # The cache of earlier jobs may be a little shorter, since these jobs may begin alike by chance.
    if (kept := next((len(ids) for ids in arm.begun if first[: len(ids)] == list(ids)), 0)) > common - 32:
        common = min(common, kept)
    model = arm.model.base
    if (
        common < 32
        # Padding follows the shared part, where a sliding window would count it and a running state would read it.
        or not all(type(layer) is DynamicLayer for layer in new_cache(model).layers)
        or not reading_of(model).in_pieces
        or rotations(model) - ROTATIONS
    ):
        return 0
    return common


def _read(arm: Arm, ids: Tensor, mask: Tensor, **more: Any) -> Any:
    """The output of every member for columns; ``mask`` covers all columns so far."""
    device = arm.model.device
    # Each mix is made later.
    return arm.model(ids.to(device), mask.to(device), use_cache=True, gate="none", output_member_logits=True, **more)


def _banned_ids(tokenizer: Any, banned: Sequence[str]) -> list[list[int]]:
    """The ids of banned strings, at the beginning of a text and after a space."""
    texts = [f"{space}{text}" for text in banned for space in ("", " ")]
    rows = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return [list(row) for row in dict.fromkeys(rows) if row]


class StopTexts(StoppingCriteria):
    """Ends a row when its new text contains one of the texts. The prompt does not count."""

    row_by_row = True  # rows of different lengths may be passed one by one

    def __init__(self, tokenizer: Any, texts: Sequence[str], n_prompt: int) -> None:
        self.tokenizer, self.texts, self.n_prompt = tokenizer, texts, n_prompt
        # A token has at least one byte, and a match ends in the newest token.
        self.window = max(len(text.encode()) for text in texts) + 4

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Shape (n_batch,), True where the row is finished."""
        newest = input_ids[:, max(self.n_prompt, input_ids.shape[1] - self.window) :]
        found = [any(text in row for text in self.texts) for row in self.tokenizer.batch_decode(newest)]
        return torch.tensor(found, device=input_ids.device)


# -- likelihoods ----------------------------------------------------------------------------------------------
Score = tuple[float, bool]


def score_jobs(arm: Arm | EngineArm, batch: Sequence[Sequence[Pair]], mixes: Sequence[Mix]) -> list[list[list[Score]]]:
    """The score of each continuation: mix -> job -> scores."""
    pairs = [pair for job in batch for pair in job]
    of_mixes = map(iter, arm.score(pairs, mixes) if isinstance(arm, EngineArm) else choice_scores(arm, pairs, mixes))
    return [[list(islice(scores, len(pairs))) for pairs in batch] for scores in of_mixes]


@torch.inference_mode()
def choice_scores(arm: Arm, pairs: Sequence[Pair], mixes: Sequence[Mix]) -> list[list[Score]]:
    """Score continuations after their contexts. Each context is read once, and its continuations are rows after it.

    Every member makes two forwards, whatever the number of mixes, because mixes differ only in how logits are mixed.

    Returns:
        [mix][pair] -> (log-probability in nats, whether each token was the most probable).
    """
    prompts: list[Encoded] = []
    for pair in pairs:
        if pair.context not in prompts:
            prompts.append(pair.context)
    of_prompt = torch.tensor([prompts.index(pair.context) for pair in pairs])  # (n_rows,)
    flat = [pair.continuation for pair in pairs]
    ids, mask = left_pad([prompt.ids for prompt in prompts])  # (n_prompts, width)
    own: dict[str, Any] = {}
    if prompts[0].own:
        padded = {name: left_pad([prompt.own[name] for prompt in prompts]) for name in prompts[0].own}
        own_ids, own_masks = ({name: pair[at] for name, pair in padded.items()} for at in (0, 1))
        own = {"member_input_ids": own_ids, "member_attention_mask": own_masks, "prompt_length": ids.shape[1]}
    first = _read(arm, ids, mask, logits_to_keep=1, **own)  # its last position predicts the first token
    # The last token of a continuation is predicted, never read. Padding is on the right, where it changes nothing.
    longest = max(map(len, flat))
    rest = torch.tensor([row[:-1] + [0] * (longest - len(row)) for row in flat], dtype=torch.long)
    rest_mask = torch.tensor([[1] * (len(row) - 1) + [0] * (longest - len(row)) for row in flat], dtype=torch.long)
    behind = None
    if longest > 1:
        cache = first.past_key_values
        cache.reorder_cache(of_prompt.to(arm.model.device))  # a prompt's row, repeated for each of its continuations
        behind = _read(arm, rest, torch.cat([mask[of_prompt], rest_mask], dim=1), past_key_values=cache)
    # Member name -> logits, (n_rows, longest, n_vocab).
    logits = {name: each[of_prompt.to(each.device)] for name, each in first.member_logits.items()}
    if behind is not None:
        logits = {name: torch.cat([each, behind.member_logits[name]], dim=1) for name, each in logits.items()}
    return [_scores(arm.model.mixture(logits, torch.tensor([list(mix)], dtype=torch.float32)), flat) for mix in mixes]


def _scores(logits: Tensor, rows: Sequence[Sequence[int]]) -> list[Score]:
    """Sums of log-probabilities of each row's tokens, logits of shape (n_rows, longest, n_vocab)."""
    found = []
    for row, row_logits in zip(rows, logits):
        log_p = row_logits[: len(row)].float().log_softmax(dim=-1)
        tokens = torch.tensor(list(row), device=log_p.device)
        chosen = log_p.gather(1, tokens[:, None]).double().sum()
        found.append((float(chosen), bool((log_p.argmax(dim=-1) == tokens).all())))
    return found


def _scored(asked: Asked, scores: Sequence[Score]) -> dict[str, Any]:
    """The fields of a prediction for an example's continuations. ``cut``: the tokens that each context lost, if any."""
    job, pairs = asked
    cut = [pair.cut for pair in pairs]
    return {
        "continuations": list(job.continuations),
        "loglikelihoods": [value for value, _ in scores],
        "greedy": [greedy for _, greedy in scores],
        **({"cut": cut} if any(cut) else {}),
    }


# -- predictions on disk --------------------------------------------------------------------------------------
class Log(Journal):
    """One arm's prediction file: its contents by (id, sample), and appending to it.

    Raises:
        ProxyTuneError: on opening, for a line that is not a prediction of one example, or if another process writes the
            file.
    """

    holds = "prediction of this command"

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.made: dict[tuple[str, int], dict[str, Any]] = {}

    def __enter__(self) -> Log:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return super().__enter__()

    def check(self) -> None:
        self.made = {}
        for number, line in enumerate(self.lines, start=1):
            if "id" not in line or "seconds" not in line:
                raise self.foreign(number)
            if (key := (str(line["id"]), line.get("sample", 0))) in self.made:
                raise ProxyTuneError(f"{self.path} has two predictions for example {key[0]}, sample {key[1]}")
            self.made[key] = line

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write some predictions, and return when they are on disk."""
        super().append(lines)
        self.made |= {(line["id"], line["sample"]): dict(line) for line in lines}


class TraceLog(Journal):
    """The traces beside one arm's predictions. A batch's traces are on disk before its predictions are.

    So a traced prediction has its trace, whenever the run is killed. Opening the file removes the traces of answers
    that have no prediction yet, since they are answered again.

    Args:
        log: the predictions, read or open.
    """

    holds = "trace of this command"

    def __init__(self, path: str | Path, log: Log) -> None:
        super().__init__(path)
        self.log = log
        self.traced: set[Key] = set()

    def __enter__(self) -> TraceLog:
        self.read()
        kept = [line for line in self.lines if _key(line) in self.log.made]
        if len(kept) < len(self.lines):
            write_whole(self.path, "".join(map(json_line, kept)))
        return super().__enter__()

    def check(self) -> None:
        self.traced = set()
        for number, line in enumerate(self.lines, start=1):
            if not is_trace(line, id=str, sample=int):
                raise self.foreign(number)
            self.traced.add(_key(line))

    def refuse_missing(self) -> None:
        """Refuse predictions without a trace, because they are not made again."""
        if missing := sorted(self.log.made.keys() - self.traced):
            raise ProxyTuneError(
                f"{self.log.path} has the prediction of example {missing[0][0]} already, but {self.path} has no trace "
                "of it; remove the predictions, choose another --output, or leave --trace out"
            )


def _key(line: Mapping[str, Any]) -> Key:
    return str(line["id"]), line["sample"]
