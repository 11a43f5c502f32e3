"""From predictions to the paper's figures: one scorer a task.

The rules are those of the public proxy-tuning repository, so that its published prediction files give its published
figures. Text tasks are scored by pure functions here. Code is run in :mod:`proxytune.evaluation.sandbox`, and answers
that need a judge are given to one of :mod:`proxytune.evaluation.judges`.
"""

from __future__ import annotations

import re
import string
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proxytune.errors import ProxyTuneError
from proxytune.evaluation import check_tasks
from proxytune.evaluation.records import Prediction, parse

__all__ = [
    "SCORERS",
    "Scores",
    "choice_letter",
    "exact_match",
    "gsm8k_answer",
    "gsm8k_reference",
    "score",
    "trim_gsm8k",
    "triviaqa_match",
]


@dataclass(frozen=True)
class Scores:
    """A task's figures.

    Attributes:
        metrics: the headline first; shares as fractions, counts as ints.
        headline: the metric that tables compare.
        ids: of the examples (not their samples), in order of first appearance.
        examples: what each is worth, in [0, 1]. Their mean is the headline, except in multiple choice, where the
            headline leaves invalid answers out, as the paper does, and they are worth 0 here.
    """

    task: str
    metrics: dict[str, float | int]
    headline: str
    ids: list[str]
    examples: list[float]


# -- GSM8K ----------------------------------------------------------------------------------------------------
_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")  # so the sign of a whole number is no part of it
_THOUSANDS = re.compile(r"(\d),(\d)")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def trim_gsm8k(output: str) -> str:
    """What comes before the output begins a new problem or a comment."""
    for beginning in ("Answer the following question", "Question:", "Comment:"):
        output = output.split(beginning, maxsplit=1)[0]
    return output


def gsm8k_answer(output: str) -> str:
    """The last number of an output without thousands commas; the output itself where there is none."""
    output = _THOUSANDS.sub(r"\1\2", trim_gsm8k(output))
    numbers: list[str] = _NUMBER.findall(output)
    return numbers[-1] if numbers else output


def gsm8k_reference(answer: str) -> str:
    """The reference, from a data set's whole solution (``… #### 1,000``) or from what it ends with."""
    return _THOUSANDS.sub(r"\1\2", answer.split("####")[1].strip() if "####" in answer else answer)


def exact_match(prediction: str, reference: str) -> bool:
    """Are they the same but for case and punctuation (a sign and a decimal point are punctuation too)."""
    return prediction.lower().translate(_NO_PUNCTUATION) == reference.lower().translate(_NO_PUNCTUATION)


# -- multiple choice ------------------------------------------------------------------------------------------
# These three give all seven published files their published figures. The code that was published with them strips four
# more (``<blockquote>``, `` **``, ``>``, a code fence), which would save 50 of the 70B base's 108 invalid answers.
_MARKUP = ("(", "\\begin{blockquote}", "\\begin{code}")


def choice_letter(output: str, letters: str = "ABCD") -> str | None:
    """The letter that an output begins with, without brackets and markup; None if it is not one of ``letters``."""
    for markup in _MARKUP:
        output = output.replace(markup, "")
    first = output.lstrip()[:1]
    return first if first and first in letters else None


# -- TriviaQA -------------------------------------------------------------------------------------------------
def triviaqa_match(output: str, answers: Iterable[str]) -> bool:
    """Is the output one of the aliases, whatever the case."""
    return output.strip().lower() in {answer.strip().lower() for answer in answers}


# -- from predictions to scores -------------------------------------------------------------------------------
def _means(predictions: Sequence[Prediction], values: Sequence[float]) -> tuple[list[str], list[float]]:
    """The examples, and for each the mean over its samples."""
    of: dict[str, list[float]] = defaultdict(list)
    for prediction, value in zip(predictions, values, strict=True):
        of[prediction.id].append(value)
    return list(of), [sum(some) / len(some) for some in of.values()]


def _matched(task: str, predictions: Sequence[Prediction], right: Callable[[Prediction], bool]) -> Scores:
    ids, examples = _means(predictions, [float(right(one)) for one in predictions])
    metrics = {"exact_match": sum(examples) / len(examples), "total": len(examples)}
    return Scores(task, metrics, "exact_match", ids, examples)


def _gsm8k(predictions: Sequence[Prediction]) -> Scores:
    return _matched(
        "gsm8k", predictions, lambda one: exact_match(gsm8k_answer(one["model_output"]), gsm8k_reference(one["answer"]))
    )


def _triviaqa(predictions: Sequence[Prediction]) -> Scores:
    return _matched("triviaqa", predictions, lambda one: triviaqa_match(one["output"], one["answers"]))


def _multiple_choice(task: str, letters: str) -> Callable[[Sequence[Prediction]], Scores]:
    def scored(predictions: Sequence[Prediction]) -> Scores:
        for one in predictions:
            if one["mc_answer_idx"] not in tuple(letters):
                reason = f"its 'mc_answer_idx' is not one of {', '.join(letters)}"
                raise ProxyTuneError(f"line {one.line} cannot be scored as {task}: {reason}")
        chosen = [choice_letter(one["mc_output"], letters) for one in predictions]
        right = [float(letter == one["mc_answer_idx"]) for letter, one in zip(chosen, predictions)]
        invalid = chosen.count(None)
        ids, examples = _means(predictions, right)
        valid = len(chosen) - invalid
        metrics = {
            "acc": sum(right) / valid if valid else 0.0,
            "num_invalid_predictions": invalid,
            "acc_of_all": sum(examples) / len(examples),
            "total": len(examples),
        }
        return Scores(task, metrics, "acc", ids, examples)

    return scored


SCORERS: dict[str, Callable[[Sequence[Prediction]], Scores]] = {
    "gsm8k": _gsm8k,
    "realtimeqa": _multiple_choice("realtimeqa", "ABCDE"),
    "triviaqa": _triviaqa,
    "truthfulqa_mc": _multiple_choice("truthfulqa_mc", "ABCD"),
}


def score(task: str, lines: Iterable[Mapping[str, Any]], *, judge: Any = None, limits: Any = None) -> Scores:
    """Score the lines of a prediction file.

    Args:
        lines: as :func:`proxytune.evaluation.records.read` reads them.

    Raises:
        ProxyTuneError: for a task that does not exist, and for lines that cannot be scored, each named.
    """
    check_tasks([task])
    predictions = parse(task, lines)
    if task not in SCORERS:
        raise ProxyTuneError(f"{task} cannot be scored yet")
    return SCORERS[task](predictions)
