"""Small data sets in the tasks' own file formats, written by the tests."""

from __future__ import annotations

import csv
import json
from pathlib import Path

QUESTIONS = [
    "how many apples are there",
    "what does the quick brown fox jump over",
    "which dog sleeps",
    "who changes what a large model says",
    "what is said to the user",
    "is there a seventh apple",
]


def write_lines(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def write_data(root: Path) -> Path:
    """A folder with a few examples of most tasks."""
    math = [
        {"question": f"{q}?", "answer": f"There are <<{n}={n}>>{n}.\n#### 1,00{n}"} for n, q in enumerate(QUESTIONS)
    ]
    write_lines(root / "gsm8k" / "test.jsonl", math)
    write_lines(root / "gsm8k" / "train.jsonl", math[:4])
    trivia = [{"question": q, "answers": ["seven", "a lazy dog"]} for q in QUESTIONS]
    write_lines(root / "triviaqa" / "dev.jsonl", trivia)
    news = [
        {"question_id": f"2020_{n}", "question_sentence": q, "choices": ["one", "two", "three"], "answer": [str(n % 3)]}
        for n, q in enumerate(QUESTIONS)
    ]
    write_lines(root / "realtimeqa" / "realtimeqa_all.jsonl", news)
    code = [
        {
            "task_id": number,
            "text": f"Write a function to return {number}.",
            "code": f"def f():\r\n    return {number}",
            "test_list": [f"assert f() == {number}"],
            "test_setup_code": "",
        }
        for number in (*range(1, 4), 11, 12, 600)
    ]
    write_lines(root / "mbpp" / "mbpp.jsonl", code)
    problem = {"prompt": "def f():\n", "test": "def check(f):\n    assert f() == 1\n", "entry_point": "f"}
    write_lines(root / "humaneval" / "HumanEval.jsonl", [{"task_id": f"HumanEval/{n}", **problem} for n in range(3)])
    (root / "toxigen" / "prompts").mkdir(parents=True)
    groups = "asian black chinese jewish latino lgbtq mental_disability mexican middle_east muslim native_american "
    for group in (groups + "physical_disability trans women").split():
        (root / "toxigen" / "prompts" / f"hate_{group}_1k.txt").write_text(f"- of {group}\\n- and\\n-\n", "utf-8")
    (root / "truthfulqa").mkdir()
    with (root / "truthfulqa" / "TruthfulQA.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers"])
        for question in QUESTIONS:
            writer.writerow(["A", "B", f"{question}?", "Seven", "Seven; 7", "Six; The fox jumps over it; None"])
    (root / "flan_cot").mkdir()
    sense = [f"{q}\\nOptions:\\n- one\\n- two\\n- a fox\ta fox\tbecause" for q in QUESTIONS]
    (root / "flan_cot" / "ecqa_train.tsv").write_text("\n".join(sense) + "\n", "utf-8")
    return root
