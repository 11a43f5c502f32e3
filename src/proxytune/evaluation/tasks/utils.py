"""Loads the tasks' data, from the hub or a local path, and has the functions that the YAML files call.

Every loader gives lm_eval the splits ``test`` and, where a task has solved examples to show, ``train``; every row has
an ``id`` that does not depend on how many others are evaluated.
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset

from proxytune.answers.files import read_dataset, read_rows, read_text_lines
from proxytune.errors import ProxyTuneError
from proxytune.evaluation import data_place
from proxytune.evaluation.code import human_eval_file

__all__ = ["problems_file"]

Row = dict[str, Any]
Splits = dict[str, Dataset]
LETTERS = "ABCDE"


# -- reading files --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Line:
    """One row of a data set, and its place for messages."""

    where: str
    values: Row

    def text(self, name: str) -> str:
        """The field ``name``, which must be a text that is not empty."""
        value = self.values.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self._lacks(f"text {name!r}")
        return value

    def texts(self, name: str) -> list[str]:
        """The field ``name``, which must be a list of texts."""
        value = self.values.get(name)
        if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
            raise self._lacks(f"list of texts {name!r}")
        return value

    def _lacks(self, what: str) -> ProxyTuneError:
        return ProxyTuneError(f"{self.where} has no {what}; it has {', '.join(map(str, self.values))}")


def local(data: str | None, *names: str, optional: bool = False) -> Path | None:
    """The given file, or the first of ``names`` in the given folder; None if nothing is given.

    Args:
        optional: also return None if the folder has none of them, or if a file is given, which is for something else.
    """
    place = data_place(data)
    if place is None or place.is_file():
        return None if optional else place
    found = next((place / name for name in names if (place / name).exists()), None)
    if found is None and not optional:
        raise ProxyTuneError(
            f"the folder {place} has none of {', '.join(names)}; put one there, or give the file itself"
        )
    return found


def rows_of(path: Path | None, repository: str = "", *config: str, said: str = "", **options: Any) -> Iterator[Line]:
    """The rows of a local file or, if there is none, of a split of a data set on the hub.

    Args:
        said: the data set's name in messages. options: see :func:`proxytune.answers.files.read_dataset`.
    """
    said = str(path or said or repository)
    hint = "; give its file with --data"
    rows = read_rows(path) if path else read_dataset(repository, *config, said=said, hint=hint, **options)
    for row in rows:
        if not isinstance(row.value, dict):
            raise ProxyTuneError(f"{row.where} of {said} is not a JSON object")
        yield Line(f"{row.where} of {said}", row.value)


def splits(test: Iterable[Row], train: Iterable[Row] = ()) -> Splits:
    """A data set for lm_eval. A row without an id gets its number as id."""
    parts = {"test": test, "train": train}
    numbered = {name: [{"id": str(at), **row} for at, row in enumerate(rows)] for name, rows in parts.items()}
    if not numbered["test"]:
        raise ProxyTuneError("the data has no examples")
    return {name: Dataset.from_list(rows) for name, rows in numbered.items()}


def _lettered(choices: Sequence[str]) -> str:
    """Choices in the form of a question."""
    return "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices))


# -- the tasks ------------------------------------------------------------------------------------------------
def gsm8k(data: str | None = None, **_: Any) -> Splits:
    """Grade-school math: the final number, and the whole solution for examples in a prompt."""
    path = local(data, "gsm8k/test.jsonl", "gsm/test.jsonl", "test.jsonl")
    found = rows_of(path, "openai/gsm8k", "main", split="test")
    train_path = local(data, "gsm8k/train.jsonl", "gsm/train.jsonl", "train.jsonl", optional=True)
    shown = () if path and not train_path else rows_of(train_path, "openai/gsm8k", "main", split="train[:8]")
    return splits(map(_gsm8k, found), map(_gsm8k, islice(shown, 8)))


def _gsm8k(line: Line) -> Row:
    solution = line.text("answer")
    _, hashes, number = solution.partition("####")
    if not hashes or not number.strip():
        raise ProxyTuneError(f"{line.where} has no '#### number' at the end of its answer")
    return {
        "question": line.text("question").strip(),
        "answer": re.sub(r"(\d),(\d)", r"\1\2", number.strip()),
        "solution": re.sub(r"<<.*?>>", "", solution),
    }


def truthfulqa_open(data: str | None = None, **_: Any) -> Splits:
    """TruthfulQA's questions with their reference answers."""
    return splits(_truthful(data))


def truthfulqa_mc(data: str | None = None, **_: Any) -> Splits:
    """Four lettered answers (fewer where a question has fewer wrong ones), drawn and shuffled as the paper's code does.

    One generator with seed 42 goes through the questions in order, so the letters are those of the published runs.
    """
    rng = random.Random(42)
    rows = []
    for row in _truthful(data):
        best, wrong = row["best_answer"], row["incorrect_answers"]
        choices = [best, *rng.sample(wrong, min(3, len(wrong)))]
        rng.shuffle(choices)
        # If two choices have the same text it is the last one, as in the published files.
        right = LETTERS[max(at for at, choice in enumerate(choices) if choice == best)]
        rows.append({"question": row["question"], "options": _lettered(choices), "mc_answer_idx": right})
    return splits(rows)


def truthfulqa_choices(data: str | None = None, **_: Any) -> Splits:
    """The best answer and every wrong one, for their likelihoods (TruthfulQA's MC1)."""
    return splits(
        {"question": row["question"], "choices": [row["best_answer"], *row["incorrect_answers"]], "gold": 0}
        for row in _truthful(data)
    )


def _truthful(data: str | None) -> Iterator[Row]:
    path = local(data, "truthfulqa/TruthfulQA.csv", "TruthfulQA.csv")
    for line in rows_of(path, "truthfulqa/truthful_qa", "generation", split="validation"):
        if "Question" in line.values:
            question, best = line.text("Question"), line.text("Best Answer")
            correct, wrong = (line.text(f"{side} Answers").split(";") for side in ("Correct", "Incorrect"))
        else:
            question, best = line.text("question"), line.text("best_answer")
            correct, wrong = line.texts("correct_answers"), line.texts("incorrect_answers")
        yield {
            "question": question,
            "best_answer": _closed(best),
            "correct_answers": [_closed(each) for each in correct if each.strip()],
            "incorrect_answers": [_closed(each) for each in wrong if each.strip()],
        }


def _closed(answer: str) -> str:
    """An answer with a full stop at its end."""
    answer = answer.strip()
    return answer if answer.endswith(".") else f"{answer}."


def toxigen(data: str | None = None, groups: list[str] | None = None, per_group: int = 200, **_: Any) -> Splits:
    """Hateful prompts: ``per_group`` of each group, drawn with seed 42 in the order of the groups.

    From a folder or the hub each group has a file or split of its own. One file is read once, whatever its name: a text
    file has prompts of no group, one per line; in any other file each row has its prompt as ``text`` (or ``prompt``)
    and may say its group in ``target_groups`` (a list) or ``group``. Rows without a group are all asked.
    """
    place = data_place(data)
    prompts: dict[tuple[str, ...], list[tuple[int, str]]] = defaultdict(list)
    if place is not None and place.is_file():
        for number, text, of in _toxigen_file(place):
            prompts[of].append((number, text))
    else:
        for group in groups or []:
            prompts[(group,)] = _toxigen_group(data, group)
    rng = random.Random(42)
    rows = []
    for of, numbered in prompts.items():
        if of:
            rng.shuffle(numbered)
        for number, text in numbered[: per_group if of else None]:
            shown = text.replace("\\\\", "\\").replace("\\n", "\n")
            name = f"{'+'.join(of) or 'line'}/{number}"
            rows.append({"id": name, "text": shown, "label": "hate", "target_groups": list(of)})
    return splits(rows)


def _toxigen_group(data: str | None, group: str) -> list[tuple[int, str]]:
    """The number and the prompt of each row of one group's own file or split."""
    folders, ends = ("toxigen/prompts/", "toxigen/", ""), ("_1k", "")
    path = local(data, *(f"{folder}hate_{group}{end}.txt" for folder in folders for end in ends))
    if path is not None:
        found = [row.value for row in read_text_lines(path)]
    else:
        rows = rows_of(None, "toxigen/toxigen-data", "prompts", split=f"hate_{group}_1k")
        found = [str(line.values.get("text") or line.values.get("prompt") or "") for line in rows]
    return [(number, text.strip()) for number, text in enumerate(found, start=1) if text.strip()]


def _toxigen_file(path: Path) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """The number, the prompt and the groups of each row of one file."""
    if path.name.lower().endswith(".txt"):
        for row in read_text_lines(path):
            if row.value.strip():
                yield row.number, row.value.strip(), ()
        return
    for number, line in enumerate(rows_of(path), start=1):
        groups: Sequence[str] = [line.text("group")] if line.values.get("group") else []
        if line.values.get("target_groups"):
            groups = line.texts("target_groups")
        yield number, line.text("text" if "text" in line.values else "prompt").strip(), tuple(groups)


def triviaqa(data: str | None = None, **_: Any) -> Splits:
    """TriviaQA's questions with all aliases of the answer."""
    path = local(data, "triviaqa/dev.jsonl", "triviaqa/TriviaQA.csv", "dev.jsonl", "TriviaQA.csv")
    there = ("mandarjoshi/trivia_qa", "unfiltered.nocontext")
    found, shown = rows_of(path, *there, split="validation"), () if path else rows_of(None, *there, split="train[:8]")
    return splits(map(_trivia, found), map(_trivia, shown))


def _trivia(line: Line) -> Row:
    answer = line.values.get("answer")
    if isinstance(answer, Mapping):
        answers = [str(answer.get("value", "")), *map(str, answer.get("aliases") or [])]
    elif "answers" in line.values:
        answers = line.texts("answers")
    else:
        answers = line.text("answer").split(";")
    answers = list(dict.fromkeys(each.strip() for each in answers if each.strip()))
    if not answers:
        raise ProxyTuneError(f"{line.where} has no answer")
    return {"question": line.text("question"), "answers": answers}


def realtimeqa(data: str | None = None, **_: Any) -> Splits:
    """News questions with lettered answers. The data set is not on the hub, so a file is needed.

    Repeated questions, the few with more than five choices, and those without an answer are left out.
    """
    path = local(data, "realtimeqa/realtimeqa_all.jsonl", "realtimeqa_all.jsonl")
    if path is None:
        raise ProxyTuneError(
            "RealTimeQA is not on the hub; give its questions with --data, from github.com/realtimeqa/realtimeqa_public"
        )
    rows, seen = [], dict[str, set[str]]()
    for line in rows_of(path):
        choices, gold = line.texts("choices"), line.values.get("answer")
        gold = gold[0] if isinstance(gold, list) and gold else gold
        if gold == [] or len(choices) > len(LETTERS):
            continue
        if not str(gold).isdecimal() or not int(str(gold)) < len(choices):
            raise ProxyTuneError(f"{line.where} has the answer {gold!r}, which is none of its {len(choices)} choices")
        number, question = line.text("question_id"), line.text("question_sentence")
        asked = seen.setdefault(number, set())
        if question in asked:
            continue
        asked.add(question)
        rows.append(
            {
                "id": number if len(asked) == 1 else f"{number}/{len(asked)}",
                "question": question,
                "options": _lettered(choices),
                "mc_answer_idx": LETTERS[int(str(gold))],
            }
        )
    return splits(rows)


PROBLEMS: dict[str, tuple[str, ...]] = {
    "ds1000": ("ds1000/test.jsonl", "ds1000/ds1000.jsonl", "ds1000/ds1000.jsonl.gz", "ds1000.jsonl", "test.jsonl"),
    "humaneval": tuple(
        f"{folder}HumanEval.jsonl{end}" for folder in ("humaneval/", "codex_humaneval/", "") for end in ("", ".gz")
    ),
    "mbpp": ("mbpp/mbpp.jsonl", "mbpp.jsonl"),
}


def problems_file(task: str, data: str | None = None) -> Path | None:
    """The local file of a code task's problems: that of ``data`` or, for HumanEval, that of the package human-eval."""
    path = local(data, *PROBLEMS[task])
    return human_eval_file() if path is None and task == "humaneval" else path


def humaneval(data: str | None = None, **_: Any) -> Splits:
    """HumanEval's problems."""
    found = rows_of(problems_file("humaneval", data), "openai/openai_humaneval", split="test")
    names = ("task_id", "prompt", "test", "entry_point")
    return splits({"id": line.text("task_id"), **{name: line.text(name) for name in names}} for line in found)


def mbpp(data: str | None = None, **_: Any) -> Splits:
    """MBPP's test problems (11 to 510), the first ten to be shown as examples, and of a file those to learn from."""
    found = rows_of(problems_file("mbpp", data), "google-research-datasets/mbpp", "full", split="prompt+test")
    rows = list(map(_mbpp, found))
    test = [row for row in rows if 10 < row["task_id"] <= 510]
    return splits(test, [row for row in rows if row["task_id"] <= 10 or row["task_id"] > 600])


def _mbpp(line: Line) -> Row:
    number = str(line.values.get("task_id"))
    if not number.isdecimal():
        raise ProxyTuneError(f"{line.where} has no number `task_id`")
    return {
        "id": number,
        "task_id": int(number),
        "text": line.text("text").strip(),
        "code": line.text("code").replace("\r\n", "\n"),
        "test_list": line.texts("test_list"),
        "test_setup_code": str(line.values.get("test_setup_code") or ""),
    }


def ds1000(data: str | None = None, **_: Any) -> Splits:
    """DS-1000's problems in their completion form."""
    rows = []
    for index, line in enumerate(rows_of(problems_file("ds1000", data), "xlangai/DS-1000", split="test")):
        prompt, metadata = line.text("prompt"), line.values.get("metadata")
        if not isinstance(metadata, Mapping):
            raise ProxyTuneError(f"{line.where} has no object 'metadata'")
        name = str(metadata.get("problem_id", index))
        rows.append(
            {
                "id": name,
                "task_id": name,
                "lib": str(metadata.get("library", "")),
                "prompt": prompt if prompt.endswith("\n") else f"{prompt}\n",
                "code_context": line.text("code_context"),
                "reference_code": line.text("reference_code"),
            }
        )
    return splits(rows)


def alpacafarm(data: str | None = None, **_: Any) -> Splits:
    """AlpacaFarm's 805 instructions with the reference answers of text-davinci-003."""
    path = local(
        data, "alpaca_farm/alpaca_eval.json", "alpacafarm/alpaca_eval.json", "alpaca_eval.json", "alpaca_eval.jsonl"
    )
    # The hub's copy needs a loading script, which datasets no longer runs; its file is plain JSON.
    address = "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json"
    found = rows_of(path, "json", said="tatsu-lab/alpaca_eval", data_files=address, split="train")
    return splits(
        {
            "instruction": line.text("instruction"),
            "reference_output": str(line.values.get("reference_output") or line.values.get("output") or ""),
            "dataset": str(line.values.get("dataset") or ""),
        }
        for line in found
    )


def demo_math(data: str | None = None, split: str = "test", problems: int = 1000, seed: int = 0, **_: Any) -> Splits:
    """The demo's own problems: made, not read, so no data is needed."""
    from proxytune.evaluation.problems import FEW_SHOT, make_problems

    found = make_problems(split, problems, seed)  # type: ignore[arg-type]
    return splits(*([problem.row(at) for at, problem in enumerate(each)] for each in (found, FEW_SHOT)))


def demo_facts(data: str | None = None, split: str = "test", wordings: str = "seen", **_: Any) -> Splits:
    """The demo's facts, which come with the package. Examples are one training fact per relation."""
    from proxytune.evaluation.facts import facts, shown

    found = facts(split, wordings)  # type: ignore[arg-type]
    return splits(*([fact.row(at) for at, fact in enumerate(each)] for each in (found, shown())))


def ecqa_json(data: str | None = None, **_: Any) -> Splits:
    """ECQA as FLAN CoT has it (Apache-2.0), a TSV of question with options, answer and reason; the last 500 to test."""
    path = local(data, "flan_cot/ecqa_train.tsv", "ecqa_train.tsv")
    if path is None:
        raise ProxyTuneError("ecqa_json needs FLAN CoT's ecqa_train.tsv: give it, or its folder, with --data")
    rows = []
    for row in read_text_lines(path):
        if not row.value.strip():
            continue
        cells = row.value.split("\t")
        question, mark, listed = cells[0].partition("\\nOptions:\\n- ")
        options = [option.strip() for option in listed.split("\\n- ")]
        if not mark or len(cells) < 2 or cells[1].strip() not in options:
            raise ProxyTuneError(f"{row.where} of {path} is not a question with options, its answer and a reason")
        answer = cells[1].strip()
        solution = json.dumps({"answer": answer}, ensure_ascii=False)
        shown = {"id": str(row.number), "question": question, "options": options}
        rows.append({**shown, "answer": answer, "solution": solution})
    return splits(rows[-500:], rows[:-500])


# -- what lm_eval's own command line needs --------------------------------------------------------------------
def scorer(task: str, output: str) -> Callable[[Mapping[str, Any], list[Any]], dict[str, float]]:
    """``process_results`` of a task: its own scorer on one example's predictions, in the field ``output``."""

    def process_results(doc: Mapping[str, Any], results: list[Any]) -> dict[str, float]:
        from proxytune.evaluation.scoring import score_lines

        found = [each for result in results for each in (result if isinstance(result, list) else [result])]
        if output == "loglikelihoods":  # pairs of a sum and whether it was the greedy choice
            found = [[value] for value, _ in found]
            doc = {**doc, "continuations": [f"\n{doc['code']}"]}
        scores = score_lines(task, [{**doc, "sample": at, output: one} for at, one in enumerate(found)])
        return {name: float(value) for name, value in scores.metrics.items()}

    return process_results


score_ecqa_json = scorer("ecqa_json", "model_output")
score_gsm8k = scorer("gsm8k", "model_output")
score_truthfulqa_mc = scorer("truthfulqa_mc", "mc_output")
score_triviaqa = scorer("triviaqa", "output")
score_realtimeqa = scorer("realtimeqa", "mc_output")
score_humaneval = scorer("humaneval", "completion")
score_mbpp = scorer("mbpp", "completion")
score_ds1000 = scorer("ds1000", "completion")
score_demo_facts = scorer("demo_facts", "model_output")
score_demo_math = scorer("demo_math", "model_output")
score_mbpp_likelihood = scorer("mbpp_likelihood", "loglikelihoods")
