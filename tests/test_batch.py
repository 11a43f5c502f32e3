"""Jobs of JSON lines: what is read, what is written, and what a kill leaves behind."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from proxytune import AlphaError, ProxyTunedForCausalLM, ProxyTuneError, load_recipe
from proxytune.answers.batch import Output, fingerprint, read_items, result
from proxytune.answers.generation import Answer, Printer, Sampling, answer, encode, new_text
from proxytune.answers.journal import json_line
from proxytune.decoding.noise import RowSampler
from proxytune.recipe.alpha import resolve_alpha
from support import tiny


# -- reading --------------------------------------------------------------------------------------------------
def read(*lines, names=("expert",), default=(1.0,)):
    return read_items([line if isinstance(line, bytes) else line.encode() for line in lines], names, default)


def test_lines_are_numbered_and_other_fields_kept():
    items, broken = read('{"prompt": "a", "id": 7}\n', "\n", '{"prompt": "b", "alpha": 0.5}')
    assert [(item.line, item.prompt, item.alphas, item.extra) for item in items] == [
        (1, "a", (1.0,), {"id": 7}),
        (3, "b", (0.5,), {}),
    ]
    assert not broken


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("no json", "it is not JSON"),
        ('{"prompt": "a"', "it is not JSON"),
        ("[1]", "it is not an object"),
        ('{"text": "a"}', 'its "prompt" is missing or is not a string'),
        ('{"prompt": 3}', 'its "prompt" is missing or is not a string'),
        ('{"prompt": "  "}', "the prompt is empty"),
        ('{"prompt": "\\ud800"}', "surrogate"),
        ('{"prompt": "a", "tokens": []}', "'tokens' is one of the result's own"),
        ('{"prompt": "a", "alpha": NaN}', "NaN is not a JSON number"),
        ('{"prompt": "a", "alpha": 1e999}', "finite"),
        ('{"prompt": "a", "alpha": 1e39}', "finite"),
        ('{"prompt": "a", "alpha": "x"}', "finite"),
        ('{"prompt": "a", "alpha": {"nobody": 1}}', "no expert is called 'nobody'"),
        ('{"prompt": "a", "alpha": [1, 2]}', "2 alphas for 1 expert"),
        ('{"prompt": "a", "n": ' + "9" * 5000 + "}", "cannot be read"),
        ("[" * 100_000, "cannot be read|not JSON"),
        (b"\xff\xfe", "it is not UTF-8"),
    ],
)
def test_broken_lines_are_named_and_the_rest_continues(line, reason):
    items, broken = read('{"prompt": "a"}', line, '{"prompt": "c"}')
    assert [item.line for item in items] == [1, 3]
    assert [one.number for one in broken] == [2]
    assert re.search(reason, broken[0].broken)


@pytest.mark.parametrize(("said", "alphas"), tiny.SPELLINGS, ids=repr)
def test_alpha_in_every_form(said, alphas):
    (item,), broken = read(json.dumps({"prompt": "p", "id": 1, **said}), names=("a", "b"), default=(1.0, 0.4))
    assert list(item.alphas) == alphas
    assert item.extra == {"id": 1}, "alphas are no fields of the user's"
    assert not broken


@pytest.mark.parametrize(("said", "message"), tiny.MISSPELLINGS, ids=repr)
def test_a_misspelt_alpha_breaks_its_line(said, message):
    items, (broken,) = read(json.dumps({"prompt": "p", **said}), names=("a", "b"), default=(1.0, 0.4))
    assert not items
    assert re.search(message, broken.broken)


def test_an_infinite_alpha_is_refused():
    with pytest.raises(AlphaError):
        resolve_alpha({"code": float("inf")}, ["chat", "code"], [1.0, 2.0])


def test_a_json_list_is_read_however_it_is_laid_out():
    rows = [{"prompt": "a"}, {"prompt": "b", "alpha": 0.5}, {"prompt": ""}]
    for indent in (None, 2):
        items, (bad,) = read(*json.dumps(rows, indent=indent).splitlines(keepends=True))
        assert [(item.line, item.prompt) for item in items] == [(1, "a"), (2, "b")]
        assert bad.where == ("entry 3 (line 1)" if indent is None else "entry 3 (line 9)")
    items, (bad,) = read('{"prompt": "a"}\n', '[{"prompt": "b"}]\n', '{"prompt": "c"}\n')
    assert ([item.line for item in items], bad.number) == ([1, 3], 2)  # no list where lines have begun


# -- writing --------------------------------------------------------------------------------------------------
def job(n=3):
    items, _ = read(*(f'{{"prompt": "p{i}"}}' for i in range(n)))
    return items, [result(item, Answer("t", [i], "stop"), ["expert"], "r") for i, item in enumerate(items)]


def test_results_are_appended_and_resumed(tmp_path):
    path = tmp_path / "out.jsonl"
    items, results = job()
    with Output(path, items, "r", ["expert"]) as output:
        output.append(results[:2])
    with Output(path, items, "r", ["expert"]) as output:
        assert [item.line for item in output.remaining] == [3]
        output.append(results[2:])
    assert [json.loads(line) for line in path.read_text().splitlines()] == results


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "out.jsonl"
    items, results = job()
    path.write_text("".join(map(json_line, results[:2])).rstrip("\n"))
    with Output(path, items, "r", ["expert"]) as output:
        assert [item.line for item in output.remaining] == [3]
        output.append(results[2:])
    assert path.read_text() == "".join(map(json_line, results))


@pytest.mark.parametrize("end", ["", "\n", '\n{"line": 3, "pro'])
def test_reading_changes_nothing(tmp_path, end):
    """No lock, no new file, and a torn or unended last line stays as it is, whoever may be writing it."""
    path = tmp_path / "place" / "out.jsonl"
    items, results = job()
    assert Output(path, items, "r", ["expert"]).read().remaining == items
    assert not path.parent.exists()
    path.parent.mkdir()
    path.write_text("".join(map(json_line, results[:2])).rstrip("\n") + end)
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    with open(path, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # another process is writing
        assert [item.line for item in Output(path, items, "r", ["expert"]).read().remaining] == [3]
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("text", ["hello", "[1, 2", '{"run": "r"}', "12"])
def test_a_last_line_that_was_never_ours_is_not_cut_off(tmp_path, text):
    path = tmp_path / "notes.txt"
    items, results = job()
    path.write_text(json_line(results[0]) + text)
    with pytest.raises(ProxyTuneError, match=r"line 2 of .*not a result"), Output(path, items, "r", ["expert"]):
        pass
    assert path.read_text() == json_line(results[0]) + text


@pytest.mark.parametrize("cut", [2, 5, 40])
def test_a_torn_line_is_dropped(tmp_path, cut):
    path = tmp_path / "out.jsonl"
    items, results = job()
    whole = "".join(map(json_line, results))
    path.write_text(whole[:-cut])
    with Output(path, items, "r", ["expert"]) as output:
        assert [item.line for item in output.remaining] == [3]
        output.append(results[2:])
    assert path.read_text() == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": "other"}, "another recipe or other options"),
        ({"prompt": "q"}, "another prompt, negative prompt or alpha"),
        ({"alpha": 2.0}, "another prompt, negative prompt or alpha"),
        ({"line": 9}, "another prompt, negative prompt or alpha"),
        (None, "not a result of this command"),
    ],
)
def test_the_output_of_another_job_is_left_alone(tmp_path, change, message):
    path = tmp_path / "out.jsonl"
    items, results = job()
    before = "hello\n" if change is None else json_line({**results[0], **change})
    path.write_text(before)
    with pytest.raises(ProxyTuneError, match=message), Output(path, items, "r", ["expert"]):
        pass
    assert path.read_text() == before


def test_two_results_for_a_line_are_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    items, results = job()
    path.write_text(json_line(results[0]) * 2)
    with pytest.raises(ProxyTuneError, match="two results for line 1"), Output(path, items, "r", ["expert"]):
        pass


def test_one_process_writes_at_a_time(tmp_path):
    items, _ = job()
    with (
        Output(tmp_path / "o", items, "r", ["expert"]),
        pytest.raises(ProxyTuneError, match="another process"),
        Output(tmp_path / "o", items, "r", ["expert"]),
    ):
        pass


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_names_the_file():

    items, results = job()
    with (
        pytest.raises(OSError, match=r"No space left.*dev/full"),
        Output(Path("/dev/full"), items, "r", ["expert"]) as o,
    ):
        o.append(results)


def test_passed_on_text_that_is_not_a_character_is_written_all_the_same():
    assert json.loads(json_line({"note": "\ud800"})) == {"note": "\ud800"}


def test_the_fingerprint_follows_members_and_settings_but_not_alpha(shelf):
    config = load_recipe(shelf / "recipe")
    same = fingerprint(config, {"n": 1})
    assert fingerprint(config.with_alpha(0.3), {"n": 1}) == same
    config.description, config.examples = "Knows foxes.", ["the fox"]
    assert fingerprint(config, {"n": 1}) == same
    assert fingerprint(config, {"n": 2}) != same
    config.base = {"model": "other"}
    assert fingerprint(config, {"n": 1}) != same


# -- generation -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model(shelf):
    return ProxyTunedForCausalLM.from_pretrained(shelf / "recipe")


PROMPTS = ["The quick brown fox", "Question: how many", "the", "Steering a large model with two small ones"]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.3, top_k=50), Sampling(top_p=0.9, seed=4)])
def test_a_row_is_the_same_in_any_batch(model, tokenizer, sampling):
    prompts = [encode(model, tokenizer, prompt) for prompt in PROMPTS]
    alphas = [(1.0,), (0.5,), (0.0,), (-1.0,)]
    together = answer(model, tokenizer, prompts, alphas, max_new_tokens=12, sampling=sampling, rows=[1, 2, 3, 4])
    alone = [
        answer(model, tokenizer, [prompt], [alpha], max_new_tokens=12, sampling=sampling, rows=[row])[0]
        for row, prompt, alpha in zip([1, 2, 3, 4], prompts, alphas)
    ]
    assert together == alone
    if not sampling.greedy:
        other = answer(model, tokenizer, prompts[:1], [(1.0,)], max_new_tokens=12, sampling=sampling, rows=[2])
        assert other[0].tokens != alone[0].tokens


def test_greedy_is_generate(model, tokenizer):
    prompt = encode(model, tokenizer, PROMPTS[0])
    made = answer(model, tokenizer, [prompt], [(0.7,)], max_new_tokens=20, sampling=Sampling())[0]
    ids = torch.tensor([prompt.ids])
    reference = model.generate(ids, alpha=0.7, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
    assert made.tokens == reference


def test_rows_are_drawn_from_the_distribution():
    """Chi-square of 20,000 draws; 99.9 % quantile with 4 degrees of freedom."""
    scores = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])
    sampler = RowSampler(list(range(2000)))
    draws = torch.cat([sampler(None, scores.expand(2000, 5)).argmax(-1) for _ in range(10)])
    expected = torch.softmax(scores[0], 0) * len(draws)
    chi = ((torch.bincount(draws, minlength=5) - expected) ** 2 / expected).sum()
    assert chi < 18.5


def test_an_answer_ends_where_the_context_does(model, tokenizer):
    prompt = encode(model, tokenizer, " the" * 120)
    assert prompt.room is not None
    assert prompt.room < 200
    made = answer(model, tokenizer, [prompt], [(1.0,)], max_new_tokens=400, sampling=Sampling())[0]
    assert (made.finish, len(made.tokens)) == ("length", prompt.room)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top-p"),
        ({"top_k": 0}, "top-k"),
        ({"min_p": 1.5}, "min-p"),
        ({"temperature": 0, "top_p": 0.9}, "temperature 0 is greedy, so top-p has no effect"),
        ({"temperature": 0.0, "min_p": 0.1}, "temperature 0 is greedy, so min-p has no effect"),
    ],
)
def test_bad_sampling_options_are_refused(values, message):
    with pytest.raises(ProxyTuneError, match=message):
        Sampling(**values)


def test_temperature_zero_is_greedy():
    assert Sampling(temperature=0.0).greedy
    assert not Sampling(top_p=0.5).greedy


def test_the_pieces_add_up_to_the_text(tokenizer):
    text = " jumps — über 漢字 🦊 over"
    prompt, new = tokenizer("the fox")["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = []
    printer = Printer(tokenizer, pieces.append)
    printer.put(torch.tensor([prompt]))
    for token in new:
        printer.put(torch.tensor([token]))
    printer.end()
    assert "".join(pieces) == new_text(tokenizer, prompt, new) == text
    assert len(pieces) > 5


# -- through the real entry point -----------------------------------------------------------------------------
@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_file(tmp_path, shelf):
    """kill -9 in the middle, twice; the end is the file of an uninterrupted run."""
    source = tmp_path / "in.jsonl"
    lines = [json.dumps({"prompt": f"the fox {i}", "id": i, "alpha": i / 10}) + "\n" for i in range(40)]
    source.write_text("".join([*lines[:5], "broken\n", *lines[5:]]))
    command = [sys.executable, "-m", "proxytune", "generate", str(shelf / "recipe"), "--input", str(source)]
    options = ["--temperature", "1", "-n", "40", "--dtype", "float32"]

    def start(output, size):
        return subprocess.Popen(
            [*command, "--output", str(output), "--batch-size", size, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    straight = start(whole, "8")
    process = start(killed, "1")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and (not killed.exists() or killed.read_bytes().count(b"\n") < 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = killed.read_bytes().count(b"\n")
    assert 3 <= done < 40
    killed.write_bytes(killed.read_bytes() + b'{"line": 40, "prom')  # as a kill within a write leaves it
    again = start(killed, "3")
    _, told = again.communicate(timeout=300)
    assert again.returncode == 2  # of the broken line
    assert "line 6: it is not JSON" in told
    assert f"{done} of 40 prompts are already done" in told
    straight.communicate(timeout=300)
    assert straight.returncode == 2
    assert killed.read_text() == whole.read_text()
    made = [json.loads(line) for line in killed.read_text().splitlines()]
    assert [one["id"] for one in made] == list(range(40))
    assert [one["line"] for one in made] == [*range(1, 6), *range(7, 42)]
    assert max(max(one["tokens"]) for one in made) < tiny.VOCAB
