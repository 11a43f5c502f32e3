"""Whether a pair of experts pays off for a base: the arms on a sample, and their differences.

Each example is a prompt with gold answers. Every arm writes a greedy answer, which is right if it begins with a gold
one, and gives the first gold answer a log-probability. From the same pass come the alphas under which the gold answers
are most probable (:mod:`proxytune.evaluation.fit`), what the expert learned beyond the anti-expert, how far the
anti-expert is from the base, and how far several experts conflict.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from proxytune.analysis.references import Reference
from proxytune.answers.generation import Encoded, Sampling, answer, batches, encode
from proxytune.answers.journal import Journal
from proxytune.decoding.conflict import conflicts
from proxytune.decoding.drafting import guess
from proxytune.decoding.mixing import Pairs, each_side
from proxytune.errors import ProxyTuneError
from proxytune.evaluation import ARMS
from proxytune.evaluation.arms import Arm, Arms, expand_arms, impossible
from proxytune.evaluation.fit import ALL, GRID, check_fit, curves, fits, gold_ids, log_likelihoods, read_gold
from proxytune.evaluation.statistics import bootstrap_of, interval, paired_bootstrap
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.options import LoadingOptions
from proxytune.recipe.prompts import render_chat
from proxytune.tables import Table, interval_cells

__all__ = ["Doctor", "DoctorJournal", "doctor_tables", "number_at", "summarize", "verdict"]

BASE, STEERED, MEAN, SHOTS = "base", "proxy_tuned", "mean_logits", "base_few_shot"
SPARE = 4  # new tokens beyond the longest gold answer, since the same text may have more tokens
BATCH = 8
RIGHT_ENOUGH = 0.05  # if no arm has at least this share right, greedy answers cannot tell the arms apart


# -- measuring ------------------------------------------------------------------------------------------------
class DoctorJournal(Journal):
    """The measured examples, one per line, after a first line with their settings.

    Args:
        settings: as JSON values.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(path)
        self.settings = dict(settings)

    def check(self) -> None:
        """Refuse examples of other settings."""
        if not self.lines:
            return
        before = self.lines[0].get("settings")
        if not isinstance(before, dict):
            raise self.foreign(1)
        for name in {**self.settings, **before}:
            if before.get(name) != self.settings.get(name):
                raise ProxyTuneError(f"{self.path} was made with another {name}; choose another --output")
        if not all(isinstance(line.get("number"), int) for line in self.lines[1:]):
            raise ProxyTuneError(f"{self.path} holds lines of another command; choose another --output")

    def __enter__(self) -> DoctorJournal:
        super().__enter__()
        if not self.lines:
            self.append([{"settings": self.settings}])
        return self


class Doctor:
    """Measures a recipe on examples.

    Args:
        config: the recipe. alphas: one value per expert.
        references: the examples. chat, system: see :func:`proxytune.answers.generation.encode`.
        shots: how many other examples the arm ``base_few_shot`` reads in front of each prompt; 0: no such arm.
    """

    def __init__(
        self,
        config: ProxyTuneConfig,
        loading: LoadingOptions,
        alphas: Sequence[float],
        references: Sequence[Reference],
        *,
        chat: bool = False,
        system: str | None = None,
        shots: int = 4,
    ) -> None:
        self.references, self.alphas, self.chat, self.system = references, tuple(alphas), chat, system
        self.shots = min(shots, len(references) - 1) if config.base_member.prompt.kind == "raw" else 0
        names = [name for name in (BASE, "expert", MEAN, STEERED) if impossible(name, config) is None]
        arms = Arms(config, names, loading, alphas=alphas)
        made = [arms.make(name) for name in reversed(expand_arms(names, config))]  # the whole recipe is loaded once
        self.arms: dict[str, Arm] = {arm.name: arm for arm in reversed(made)}
        self.alone = {name: arms.member(name) for name in self.arms if name not in (MEAN, STEERED)}  # arm -> member
        self.model, self.tokenizer = self.arms[STEERED].model, self.arms[STEERED].tokenizer
        check_fit(self.model.steering)

    def predicted_speed(self, acceptance: float) -> float:
        """Tokens per second of one steered row relative to the base alone, by the cost model that paces the drafts."""
        costs = self.model.costs
        n_drafts = costs.best_drafts(acceptance)
        return costs.base.of(1) / min(costs.per_token(0, acceptance), costs.per_token(n_drafts, acceptance))

    def measure(self, numbers: Sequence[int]) -> Iterator[list[dict[str, Any]]]:
        """The examples with these numbers, in batches, as lines of the journal.

        A line has the example's ``number``. If the example cannot be read, it has the reason as ``left_out``. Otherwise
        it has ``n_tokens`` of the gold answer; ``logprob`` and ``correct`` by arm; ``curves``; ``learned`` by expert,
        and ``distance``, summed over tokens, in nats; ``excluded`` tokens, which steering
        cannot choose; ``agreed``, see :meth:`_agreed`; ``conflict``, see :meth:`_conflict`; and ``seconds`` per token
        by arm.
        """
        for batch in batches(numbers, BATCH):
            found, read = [], []
            for number in batch:
                line: dict[str, Any] = {"number": number}
                found.append(line)
                try:
                    reference = self.references[number]
                    encoded = encode(self.model, self.tokenizer, reference.prompt, chat=self.chat, system=self.system)
                    ids = [gold_ids(self.tokenizer, encoded, text) for text in reference.completions]
                    shown = self._after_shots(number, encoded, len(ids[0]))
                    line |= self._likelihoods(encoded, shown, ids[0])
                except ProxyTuneError as error:
                    line["left_out"] = f"{reference.where}: {error}"
                    continue
                read.append((line, reference, encoded, shown, max(map(len, ids)) + SPARE))
            if read:
                self._answers(read)
            yield found

    @torch.inference_mode()
    def _likelihoods(self, encoded: Encoded, shown: Encoded | None, ids: Sequence[int]) -> dict[str, Any]:
        """The log-probabilities of the gold answer in the members; sums over its tokens, in nats."""
        logits = read_gold(self.model, encoded, ids)
        base, pairs = self.model.paired(logits)
        gold = torch.tensor(list(ids), device=base.device)
        whole = {"vocab_size": self.model.shared_vocab}

        def alone(side: torch.Tensor) -> torch.Tensor:
            return log_likelihoods((side, []), gold, (), **whole)

        arms = {name: alone(logits[member]) for name, member in self.alone.items()}
        if MEAN in self.arms:
            against = [(expert, base) for expert, _ in pairs if expert is not None]
            arms[MEAN] = log_likelihoods((base, against), gold, self.arms[MEAN].alphas, **whole)
        if shown is not None:
            arms[SHOTS] = alone(read_gold(self.arms[BASE].model, shown, ids)["base"])
        arms[STEERED] = log_likelihoods((base, pairs), gold, self.alphas, **self.model.mixing())
        # The arms are compared on the tokens that all of them can choose.
        possible = torch.stack(list(arms.values())).isfinite().all(dim=0)
        if not bool(possible.any()):
            raise ProxyTuneError("steering excludes every gold token")
        learned = {
            name: float((alone(expert) - alone(anti_expert))[possible].sum())
            for name, (expert, anti_expert) in zip(self.model.expert_names, pairs)
            if expert is not None and anti_expert is not None
        }
        distances = [self._distance(base, anti_expert)[possible] for _, anti_expert in pairs if anti_expert is not None]
        return {
            "n_tokens": int(possible.sum()),
            "excluded": len(ids) - int(possible.sum()),
            "logprob": {name: float(of_tokens[possible].sum()) for name, of_tokens in arms.items()},
            "curves": curves((base, pairs), gold, self.model.expert_names, self.alphas, **self.model.mixing()),
            "learned": learned,
            "distance": float(sum(each.sum() for each in distances)) / len(distances) if distances else None,
            "agreed": self._agreed(logits, possible),
            "conflict": self._conflict(base, pairs, possible),
        }

    def _agreed(self, logits: Mapping[str, torch.Tensor], possible: torch.Tensor) -> int | None:
        """At how many of the tokens a greedy draft would be accepted; None if no lane drafts."""
        drafting = self.model.drafting
        if drafting is None:
            return None
        alpha = torch.tensor([list(self.alphas)], dtype=torch.float32)
        blocks = [logits[seat.names[0]] for seat in self.model.lanes[drafting.lane].seats]
        width = self.model.shared_vocab
        drafts = guess(drafting, blocks, alpha)[0, :, :width].argmax(dim=-1)
        mixed = self.model.mixture(logits, alpha)[0, :, :width].argmax(dim=-1)
        return int((drafts.to(mixed.device) == mixed)[possible].sum())

    def _conflict(self, base: torch.Tensor, pairs: Pairs, possible: torch.Tensor) -> dict[str, float] | None:
        """The conflict of the experts (:class:`proxytune.decoding.conflict.Conflict`), summed over the tokens.

        ``cosines`` is the number of tokens at which there is a cosine. None for a single expert.
        """
        if len(pairs) < 2:
            return None
        counted, width = possible.nonzero()[:, 0], self.model.shared_vocab
        experts = each_side(pairs, lambda side: side[0, :, :width].to(base.device, torch.float32)[counted])
        alpha = torch.tensor([list(self.alphas)], device=base.device).expand(len(counted), -1)
        mask = self.model.config.plausibility
        found = conflicts(base[0, :, :width].float()[counted], experts, alpha, plausibility=mask)
        cosines = [one.cosine for one in found if one.cosine is not None]
        return {
            "cosine": sum(cosines),
            "cosines": len(cosines),
            "distance": sum(one.distance for one in found),
            "disagree": sum(one.disagree for one in found),
        }

    def _distance(self, base: torch.Tensor, anti_expert: torch.Tensor) -> torch.Tensor:
        """KL(base || anti-expert) at each position, over the ids that both have, (n_tokens,)."""
        width = self.model.shared_vocab
        p, q = (side[0, :, :width].float().log_softmax(dim=-1) for side in (base, anti_expert.to(base.device)))
        return torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(dim=-1)

    def _answers(self, read: Sequence[tuple[dict[str, Any], Reference, Encoded, Encoded | None, int]]) -> None:
        """Let every arm answer, and add to each line which arms are right, what was drafted, and the time."""
        for line, *_ in read:
            line |= {"correct": {}, "seconds": {}}
        n_new = max(limit for *_, limit in read)
        for name in (*self.arms, SHOTS):
            arm = self.arms[BASE if name == SHOTS else name]
            prompts = [(line, of, self._prompt(name, encoded, shown)) for line, of, encoded, shown, _ in read]
            asked = [(line, of, prompt) for line, of, prompt in prompts if prompt is not None]
            if not asked:
                continue
            began = time.monotonic()
            made = answer(
                arm.model,
                self.tokenizer,
                [prompt for *_, prompt in asked],
                [arm.alphas] * len(asked) if arm.alphas else None,
                max_new_tokens=n_new,
                sampling=Sampling(),
            )
            n_tokens = sum(len(one.tokens) for one in made)
            seconds = (time.monotonic() - began) / max(n_tokens, 1)
            for (line, reference, _), one in zip(asked, made):
                line["correct"][name] = begins_with(one.text, reference.completions)
                line["seconds"][name] = seconds

    def _prompt(self, name: str, encoded: Encoded, shown: Encoded | None) -> Encoded | None:
        """What an arm reads for a prompt that the recipe reads as ``encoded``."""
        if name == STEERED:
            return encoded
        if name == SHOTS:
            return shown
        if name == MEAN:
            own = {each: ids for each, ids in encoded.own.items() if not each.endswith(".anti_expert")}
            return replace(encoded, own=own)
        ids = encoded.own.get(self.alone[name], encoded.ids)
        return replace(encoded, ids=ids, own={})

    def _after_shots(self, number: int, alone: Encoded, n_gold: int) -> Encoded | None:
        """A prompt after other examples and their answers, as the base reads it.

        None if they do not fit, or if the chat template leaves out earlier turns, so that the base would read
        ``alone``.
        """
        others = [self.references[(number + by) % len(self.references)] for by in range(1, self.shots + 1)]
        if not others:
            return None
        prompt = self.references[number].prompt
        if self.chat:
            messages = [{"role": "system", "content": self.system}] if self.system else []
            for other in others:
                messages.append({"role": "user", "content": other.prompt})
                messages.append({"role": "assistant", "content": other.completions[0].strip()})
            ids = render_chat(self.tokenizer, [*messages, {"role": "user", "content": prompt}], "the base")
        else:
            text = "".join(f"{other.prompt}{other.completions[0]}\n\n" for other in others)
            ids = list(self.tokenizer(text + prompt)["input_ids"])
        context = self.model.context_of("base")
        room = None if context is None else context - len(ids) + 1
        too_long = room is not None and room < n_gold + SPARE
        return None if too_long or ids == alone.ids else Encoded(ids, {}, room)


def begins_with(text: str, gold: Sequence[str]) -> bool:
    """Whether an answer begins with a gold one that no letter or digit follows."""
    written = text.strip()
    return any(written.startswith(one.strip()) and not written[len(one.strip()) :][:1].isalnum() for one in gold)


# -- what it says ---------------------------------------------------------------------------------------------
def summarize(
    lines: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    alphas: Sequence[float],
    *,
    n_examples: int,
    warnings: Sequence[str] = (),
    speed: Callable[[float], float] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The summary of all examples, as JSON. Means have the bounds of their 95 % interval, or None instead.

    Args:
        lines: the lines of :meth:`Doctor.measure`. names, alphas: those of the experts. n_examples: their total number.
        warnings: warnings that need no measurement. speed: predicts the speed relative to the base from the acceptance.
        seed: seed of the bootstrap.
    """
    measured = [line for line in lines if "n_tokens" in line]
    if not measured:
        raise ProxyTuneError("no example could be measured: " + "; ".join(str(one["left_out"]) for one in lines[:3]))
    tokens = [line["n_tokens"] for line in measured]

    def per_token(sums: Sequence[float], counts: Sequence[int] = tokens) -> dict[str, Any]:
        return _bounds(sum(sums) / sum(counts), bootstrap_of(lambda total, n: total / n, [sums, counts], seed))

    arms: dict[str, Any] = {}
    for arm in _arms_of(measured):
        of = [line for line in measured if arm in line["correct"]]
        if len(of) == len(measured):
            right = interval([float(line["correct"][arm]) for line in of], seed)
            logprob = per_token([line["logprob"][arm] for line in of])
            arms[arm] = {"correct": _bounds(right.value, (right.low, right.high)), "logprob": logprob}
    metric = "correct" if max(of["correct"]["mean"] for of in arms.values()) >= RIGHT_ENOUGH else "logprob"

    def difference(arm: str) -> dict[str, Any]:
        first, second = ([float(line["correct"][name]) for line in measured] for name in (STEERED, arm))
        low, high, _ = paired_bootstrap(first, second, seed)
        right = _bounds(sum(first) / len(first) - sum(second) / len(second), (low, high) if len(measured) > 1 else None)
        sums = [line["logprob"][STEERED] - line["logprob"][arm] for line in measured]
        return {"correct": right, "logprob": per_token(sums)}

    alpha = fits([line["curves"] for line in measured], sum(tokens), seed)
    alpha["recipe"] = dict(zip(names, alphas))
    alpha["curve"] = [
        {"alpha": at, "logprob": sum(line["curves"][ALL][step] for line in measured) / sum(tokens)}
        for step, at in enumerate(GRID)
    ]
    drafted = [line["agreed"] for line in measured]
    acceptance = None if None in drafted else per_token(drafted)
    seconds = {arm: sum(line["seconds"][arm] for line in measured) / len(measured) for arm in arms}
    distances = [line["distance"] for line in measured]
    found: dict[str, Any] = {
        "verdict": "",
        "metric": metric,
        "examples": len(measured),
        "of": n_examples,
        "tokens": sum(tokens),
        "excluded": sum(line["excluded"] for line in measured),
        "arms": arms,
        "differences": {arm: difference(arm) for arm in arms if arm != STEERED},
        "alpha": alpha,
        "learned": {name: per_token([line["learned"][name] for line in measured]) for name in measured[0]["learned"]},
        "distance": None if None in distances else per_token(distances),
        "conflict": _conflict_of(measured, per_token),
        "speed": {
            "acceptance": acceptance,
            "to_base": seconds[BASE] / seconds[STEERED],
            "predicted_to_base": None if speed is None else speed(acceptance["mean"] if acceptance else 0.0),
        },
        "warnings": list(warnings),
        "left_out": [line["left_out"] for line in lines if "left_out" in line],
    }
    found["verdict"] = verdict(found)
    return found


def _conflict_of(lines: Sequence[Mapping[str, Any]], per_token: Callable[..., dict[str, Any]]) -> dict[str, Any] | None:
    """The means of the conflict's measures, or None; no cosine if some expert never moves the base."""
    apart = [line["conflict"] for line in lines if line.get("conflict")]
    if len(apart) < len(lines):  # one expert, or examples that were measured before there was a conflict
        return None
    cosine, cosines = ([one[name] for one in apart] for name in ("cosine", "cosines"))
    found = {name: per_token([one[name] for one in apart]) for name in ("distance", "disagree")}
    return {"cosine": per_token(cosine, cosines) if sum(cosines) else None, **found}


def _arms_of(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """All arms of the examples."""
    found = dict.fromkeys(arm for line in lines for arm in line["correct"])
    return [*(arm for arm in found if arm != STEERED), STEERED]


def _bounds(mean: float, bounds: tuple[float, float] | None) -> dict[str, float | None]:
    low, high = bounds or (None, None)
    return {"mean": mean, "low": low, "high": high}


def verdict(found: Mapping[str, Any]) -> str:
    """One sentence: whether to steer with this pair, and how certain that is."""
    metric = found["metric"]
    against = {arm: of[metric] for arm, of in found["differences"].items()}
    of_base = against[BASE]
    n = f"{found['examples']} examples"
    if of_base["low"] is None:
        return "One example says nothing about a recipe; give more with --data, at best a hundred or more."
    gain = _amount(of_base, metric, n)
    if of_base["high"] < 0:
        return f"Do not steer with this pair: it makes the base worse, {gain}, because {_why_worse(found)}."
    if of_base["low"] <= 0:
        return f"No clear effect: steering adds {gain} to the base; {_why_unclear(found)}."
    better = [arm for arm, of in against.items() if arm != BASE and of["high"] < 0]
    equal = [arm for arm, of in against.items() if arm != BASE and of["low"] <= 0 <= of["high"]]
    if better:
        return f"Steering adds {gain} to the base, but {_named(better[0])} does better: {_so(better[0])}."
    if equal:
        return f"Steering adds {gain} to the base, but {_named(equal[0])} does as well: {_so(equal[0])}."
    return f"Steer: it adds {gain} to the base, and is ahead of {', '.join(map(_named, list(against)[1:]))} too."


CONTROLS = {
    "expert": "the expert alone",
    MEAN: "the mean of logits",
    SHOTS: "the base with solved examples in its prompt",
}
SO = {
    "expert": "the base adds nothing here that the small model lacks",
    MEAN: "the anti-expert adds nothing here",
    SHOTS: "examples in the prompt need no expert",
}
CONFLICT = {
    "cosine": "cosine of their offsets",
    "distance": "distance of what each steers to",
    "disagree": "share of tokens at which they choose differently",
}


def _kind(arm: str) -> str:
    return "expert" if arm.endswith(".expert") else arm


def _named(arm: str) -> str:
    return f"the expert {arm.removesuffix('.expert')} alone" if arm.endswith(".expert") else CONTROLS[arm]


def _so(arm: str) -> str:
    return SO[_kind(arm)]


def _amount(of: Mapping[str, float], metric: str, n: str) -> str:
    """A difference with its interval."""
    if metric == "correct":
        mean, low, high = (100 * of[key] for key in ("mean", "low", "high"))
        return f"{mean:+.1f} points of right answers (95 % interval {low:+.1f} to {high:+.1f}, {n})"
    return f"{of['mean']:+.3f} nats per gold token (95 % interval {of['low']:+.3f} to {of['high']:+.3f}, {n})"


def _why_worse(found: Mapping[str, Any]) -> str:
    """The part of the numbers that explains a loss."""
    unlearned = [name for name, of in found["learned"].items() if of["low"] is None or of["low"] <= 0]
    if found["learned"] and len(unlearned) == len(found["learned"]):
        return "on these answers the expert is no better than its anti-expert"
    arms, best = found["arms"], found["alpha"]["best"]
    weak = [
        arm for arm in arms if _kind(arm) == "expert" and arms[arm]["logprob"]["mean"] < arms[BASE]["logprob"]["mean"]
    ]
    if weak:
        expert, base = (arms[arm]["logprob"]["mean"] for arm in (weak[0], BASE))
        return (
            f"the base knows these answers better than the expert ({base:.3f} against {expert:.3f} nats per token): "
            "what the expert learned beyond its anti-expert the base knew already, and the difference overshoots "
            f"(the most likely alpha is {_alpha(found)})"
        )
    if max(found["alpha"]["recipe"].values()) > (found["alpha"]["high"] or best):
        return f"its alpha is too large (the most likely alpha is {_alpha(found)})"
    return "it moves probability away from the gold answers where that decides which is written"


def _why_unclear(found: Mapping[str, Any]) -> str:
    if found["alpha"]["best"] == 0:
        return "the gold answers are most probable without steering at all"
    return f"the most likely alpha is {_alpha(found)}, and more examples narrow this down"


def _alpha(found: Mapping[str, Any]) -> str:
    alpha = found["alpha"]
    best = f"{'at least ' if alpha['at_end'] else ''}{alpha['best']:.2f}"
    return best if alpha["low"] is None else f"{best}, interval {alpha['low']:.2f} to {alpha['high']:.2f}"


def number_at(found: Mapping[str, Any], path: str) -> float:
    """A number of the results, by its path of names, such as ``arms.proxy_tuned.correct.mean``.

    Raises:
        ProxyTuneError: if there is none.
    """
    value: Any = found
    names = path.split(".")
    while names:
        # An expert's name may contain dots, so the longest existing name comes first.
        sizes = [n for n in range(len(names), 0, -1) if isinstance(value, Mapping) and ".".join(names[:n]) in value]
        if not sizes:
            known = ", ".join(value) if isinstance(value, Mapping) else "nothing more"
            raise ProxyTuneError(f"--gate: there is no {path!r} in the results; at {names[0]!r} there is {known}")
        value, names = value[".".join(names[: sizes[0]])], names[sizes[0] :]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ProxyTuneError(f"--gate: {path!r} is not a number in these results")
    return float(value)


# -- tables ---------------------------------------------------------------------------------------------------
def doctor_tables(found: Mapping[str, Any]) -> list[Table | str]:
    """The verdict and the tables after it."""
    rows = []
    for arm, of in found["arms"].items():
        title = f"expert {arm.removesuffix('.expert')}" if arm.endswith(".expert") else ARMS.get(arm, arm)
        rows.append((title, *interval_cells(of["correct"], 100), *interval_cells(of["logprob"])))
    about = f", {found['examples']} of {found['of']} examples, {found['tokens']} gold tokens"
    heads = ("arm", "right, %", "95 % interval", "log-probability per token", "95 % interval")
    legend = {"right": "the greedy answer begins with a gold one"}
    tables: list[Table | str] = [found["verdict"], Table(heads, rows, "arms", about, (len(rows) - 1,), legend)]
    alpha = found["alpha"]
    facts = [
        ("most likely alpha", _alpha(found), f"the recipe has {', '.join(f'{a:g}' for a in alpha['recipe'].values())}")
    ]
    for name, of in alpha["by_expert"].items():
        facts.append(
            (f"… of {name}, the others as they are", f"{of['best']:.2f}", f"{of['low']:.2f} to {of['high']:.2f}")
        )
    for name, of in found["learned"].items():
        facts.append((f"{name}: expert beyond anti-expert, nats per token", *interval_cells(of)))
    if found["distance"] is not None:
        facts.append(("KL(base ‖ anti-expert), nats per token", *interval_cells(found["distance"])))
    for name, of in (found["conflict"] or {}).items():
        if of is not None:
            facts.append((f"conflict of the experts: {CONFLICT[name]}", *interval_cells(of)))
    speed = found["speed"]
    if speed["acceptance"] is not None:
        facts.append(("acceptance of greedy drafts", *interval_cells(speed["acceptance"])))
    predicted = speed["predicted_to_base"]
    facts.append(
        (
            "speed to the base's, batch of 8, here",
            f"{speed['to_base']:.2f}",
            "" if predicted is None else f"predicted for one row: {predicted:.2f}",
        )
    )
    tables.append(Table(("what", "value", "95 % interval, or beside it"), facts, "why"))
    tables += [f"Note: {text}" for text in (*found["warnings"], *found["left_out"])]
    return tables
