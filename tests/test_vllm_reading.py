"""What each member reads of vLLM's batches, where members have prompts of their own; no vLLM is needed."""

from __future__ import annotations

import random

import numpy as np
import pytest

from proxytune.recipe.rules import Steering
from proxytune.vllm.alpha import Request, Row
from proxytune.vllm.own_prompts import KEY, as_extra_args, begin_of, block_keys, ids_in, outer_prompt, reading

BLOCK = 4
PARTS = ("base", "expert", "anti_expert")


def asked(own):
    base = own["base"]
    carried = ids_in(as_extra_args(base, own))
    own_ids = {part: np.asarray(ids) for part, ids in carried.items()}
    return Request((1.0,), Steering(), prompts=own_ids), carried


def prompts_of(rng, same=False):
    base = [rng.randrange(5, 99) for _ in range(rng.randrange(1, 30))]
    if same:
        return dict.fromkeys(PARTS, base)
    return {
        part: base if rng.random() < 0.3 else [rng.randrange(100, 199) for _ in range(rng.randrange(1, 40))]
        for part in PARTS
    }


def test_a_part_reads_its_prompt_and_the_answer_once_each_in_any_chunks():
    """A batch in ragged chunks, with requests that come and go: what a part has read is its own prompt, then the
    answer, at positions 0, 1, 2, ..., and nothing is read twice."""
    rng = random.Random(3)
    for _ in range(60):
        chunk, requests = rng.choice([1, 3, 9, 64]), []
        for _ in range(rng.randrange(1, 5)):
            own = prompts_of(rng, same=rng.random() < 0.2)
            request, carried = asked(own)
            outer = outer_prompt(own["base"], carried)
            answer = [rng.randrange(200, 299) for _ in range(rng.randrange(1, 12))]
            requests.append({"own": own, "asked": request, "text": [*outer, *answer], "n_prompt": len(outer)})
            requests[-1].update(done=0, answer=answer, seen={part: [] for part in PARTS})
        while any(each["done"] < len(each["text"]) for each in requests):
            batch = [each for each in requests if each["done"] < len(each["text"]) and rng.random() < 0.8]
            if not batch:
                continue
            rows, ids = [], []
            for each in batch:
                left = (each["n_prompt"] if each["done"] < each["n_prompt"] else len(each["text"])) - each["done"]
                n = min(rng.randrange(1, chunk + 1), left)
                rows.append(Row(each["asked"], each["done"], n, each["n_prompt"], np.array(each["text"])))
                ids += each["text"][each["done"] : each["done"] + n]
            ends = np.cumsum([row.n for row in rows])
            for part in PARTS:
                found = reading(part, rows, BLOCK, longest_decode=2)
                if found is None:
                    for each, row in zip(batch, rows):
                        shown = each["text"][row.n_read : row.n_read + row.n]
                        each["seen"][part] += list(zip(range(row.n_read, row.n_read + row.n), shown))
                    continue
                read = np.array(ids)[found.rows]
                read[found.told[0]] = found.told[1]
                assert list(np.repeat(found.requests, np.diff(found.starts))) == list(
                    np.searchsorted(ends, found.rows, side="right")
                ), "each row is its request's"
                assert list(found.requests[found.of_row]) == list(np.searchsorted(ends, found.rows, side="right"))
                for place, request in enumerate(found.requests):
                    span = slice(found.starts[place], found.starts[place + 1])
                    seen = batch[request]["seen"][part]
                    seen += list(zip(found.positions[span].tolist(), read[span].tolist()))
                    assert found.lengths[place] == len(seen)
                    assert found.begins[place] % BLOCK == 0
                lengths = np.diff(found.starts)
                assert list(lengths > 2) == sorted(lengths > 2), "short ones first"
                assert found.as_it_is == (list(found.rows) == list(range(len(ids))))
                assert list(found.back[found.rows]) == list(range(len(found.rows)))
            for each, row in zip(batch, rows):
                each["done"] += row.n
                if each["done"] >= each["n_prompt"]:  # the row of the last outer id is the last that everybody read
                    lengths = {part: len(each["seen"][part]) - len(each["own"][part]) for part in PARTS}
                    assert set(lengths.values()) == {each["done"] - each["n_prompt"]}, "all are at the same token"
        for each in requests:
            for part in PARTS:
                wanted = [*each["own"][part], *each["answer"]]
                assert each["seen"][part] == list(enumerate(wanted))


def test_places_in_the_cache():
    """Prompts and answers lie at places of their own, inside the request's blocks; blocks that two requests may share
    hold only what their keys say."""
    rng = random.Random(5)
    held = {}  # key of a block -> what each part has written in it
    shared = 0
    for number in range(400):
        own = {
            part: ids[: rng.randrange(1, len(ids) + 1)] for part, ids in prompts_of(random.Random(number % 7)).items()
        }
        _, carried = asked(own)
        outer = outer_prompt(own["base"], carried)
        text = [*outer, *[rng.randrange(200, 203) for _ in range(rng.randrange(9))]]
        parent = ()
        for start in range(0, len(text) - BLOCK + 1, BLOCK):
            end = start + BLOCK
            keys = block_keys(carried, len(outer), number, start, end)
            parent = (*parent, (tuple(text[start:end]), tuple(keys)))
            written = {}
            for part in PARTS:
                ids = carried.get(part, outer)
                begin, gap = int(begin_of(len(ids), len(outer), BLOCK)), len(outer) - len(ids)
                assert begin % BLOCK == 0
                assert begin <= max(gap, 0)
                told = [*ids, *text[len(outer) :]]
                # All that the part will ever write in this block, and what it has written when the block is full.
                written[part] = told[max(start - begin, 0) : max(end - begin, 0)]
                n_read = max(min(end - begin, len(ids) - 1), end - gap, 0)
                alone = (part, number) in keys
                assert alone or len(told[max(start - begin, 0) : min(max(end - begin, 0), n_read)]) == len(
                    written[part]
                )
            if parent in held:
                shared += 1
                assert held[parent] == written
            held[parent] = written
    assert shared > 100, "nothing was shared, so nothing was tested"


def test_requests_without_prompts_of_their_own_stay_as_they_are():
    same = {part: [5, 6, 7] for part in PARTS}
    assert as_extra_args([5, 6, 7], same) == {}
    request, _ = asked(same)
    assert reading("expert", [Row(request, 0, 3, 3, None)], BLOCK) is None


def test_the_outer_prompt_and_what_carries_it():
    longer = {"base": [5, 6], "expert": [9, 9, 9, 9]}
    assert as_extra_args([5, 6], longer) == {f"{KEY}base": [5, 6], f"{KEY}expert": [9, 9, 9, 9]}
    assert outer_prompt([5, 6], longer) == [5, 6, 6, 6]
    assert as_extra_args([5, 6], {"base": [5, 6], "expert": [9]}) == {f"{KEY}expert": [9]}, "the base is the longest"
    assert ids_in({"alpha": 1.0, f"{KEY}expert": [9]}) == {"expert": [9]}
    assert ids_in(None) == {}


@pytest.mark.parametrize(("n", "begin"), [(1, 16), (3, 16), (4, 12), (5, 12), (9, 8), (10, 0), (19, 0)])
def test_short_prompts_begin_late_and_on_a_block(n, begin):
    assert int(begin_of(n, 19, BLOCK)) == begin


def test_where_the_base_is_filled():
    request, _ = asked({"base": [5, 6], "expert": [9, 9, 9, 9], "anti_expert": [7]})
    assert Row(request, 0, 1, 4, None).filled == (1, 3)
    request, _ = asked({"base": [5, 6], "expert": [9], "anti_expert": [7]})
    assert Row(request, 0, 1, 2, None).filled is None
