"""`proxytune plan` of a base behind an API: its requests and tokens are those that a run uses."""

from __future__ import annotations

import json

import pytest

from proxytune import ProxyTunedForCausalLM, ProxyTuneError
from proxytune.speed.options import RequestOptions
from proxytune.speed.requests import Usage, plan_requests, usage_of
from support import tiny
from support.commands import fails, run
from support.completions import Served, serving
from support.decoding import near, new_tokens

ROWS = [[1, 40, 77, 102, 9], [1, 88, 15, 60, 4], [1, 7, 300, 41, 12]]
N_NEW = 11
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": tiny.PAD, "max_new_tokens": N_NEW}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The base, experts, and a copy of the base, whose drafts are always accepted."""
    where = tmp_path_factory.mktemp("plan")
    base = tiny.llama("base", 1)
    for name, model in {"base": base, "expert": near(base, 2), "anti": near(base, 3)}.items():
        model.save_pretrained(where / name)
        tiny.tokenizer().save_pretrained(where / name)
    return where


@pytest.fixture
def served(place):
    made = Served(tiny.LlamaForCausalLM.from_pretrained(place / "base"), tiny.tokenizer())
    with serving(made) as url:
        made.url = url
        yield made


def used(served, place, n=20, *, expert="expert", anti="anti", rows=ROWS, **options):
    """The requests and tokens of a call of generate, as the server saw them, and as the budget counted them."""
    base = {"api": served.url, "model": "tiny", "tokenizer": str(place / "base"), "top_logprobs": n}
    experts = [{"expert": str(place / expert), "anti_expert": str(place / anti)}]
    model = ProxyTunedForCausalLM.from_members(base, experts=experts, **options)
    budget = model.lanes[0].endpoint.budget
    served.requests.clear()
    calls, tokens = budget.calls, budget.tokens
    assert [len(row) for row in new_tokens(model, rows, **GREEDY)] == [N_NEW] * len(rows)
    prompts = []
    for body in served.requests:
        prompts += [body["prompt"]] if isinstance(body["prompt"][0], int) else body["prompt"]
    found = Usage(len(served.requests), sum(map(len, prompts)), len(prompts))
    assert (budget.calls - calls, budget.tokens - tokens) == (found.calls, found.tokens_in + found.tokens_out)
    return found


def planned(way, n=20, *, rows=ROWS, n_drafts=0, acceptance=0.0):
    options = RequestOptions(prompts=len(rows), prompt_tokens=len(rows[0]), new_tokens=N_NEW)
    about = {"n_drafts": n_drafts, "acceptance": acceptance, "top_logprobs": n, "n_vocab": tiny.VOCAB}
    return usage_of(way, options, batch=8, **about)


@pytest.mark.parametrize("way", ["pull", "push"])
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]])
def test_a_plan_of_one_request_per_token_is_exact(served, place, way, rows):
    low, high = planned(way, rows=rows)
    assert low == high == used(served, place, way=way, rows=rows)


@pytest.mark.parametrize("few", [1, 60])
def test_pushing_again_stays_in_its_range(served, place, monkeypatch, few):
    for module in ("lanes.completions", "speed.requests"):
        monkeypatch.setattr(f"proxytune.{module}.FEW_BIASES", few)
    low, high = planned("push")
    assert low == planned("pull")[0]
    assert high.calls == 3 * low.calls - 2  # but for the first prompt, which is asked about once more at the end
    found = used(served, place, way="push")
    for name in ("calls", "tokens_in", "tokens_out"):
        assert getattr(low, name) < getattr(found, name) <= getattr(high, name), name


@pytest.mark.parametrize("n", [5, 20, tiny.VOCAB])
def test_asking_again_stays_in_its_range(served, place, n):
    low, high = planned("ask", n)
    found = used(served, place, n, way="ask")
    for name in ("calls", "tokens_in", "tokens_out"):
        assert getattr(low, name) <= getattr(found, name) <= getattr(high, name), name
    assert (low == high) == (n == tiny.VOCAB)
    assert (found == low) == (n == tiny.VOCAB)


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("n_drafts", [1, 3])
def test_a_plan_of_drafts_that_are_all_accepted_is_exact(served, place, n_drafts, scores):
    served.scores = scores
    way = "verify, one text" if scores else "verify, list"
    found = used(served, place, expert="base", anti="base", way="verify", speculate=n_drafts)
    low, high = planned(way, n_drafts=n_drafts, acceptance=1.0)
    assert found == low
    assert low != high


def test_a_plan_of_drafts_is_an_expected_value():
    options = RequestOptions(prompts=1, prompt_tokens=10, new_tokens=3)
    about = {"batch": 1, "n_drafts": 1, "acceptance": 0.5, "top_logprobs": 500, "n_vocab": 500}
    check = Usage(1, 10, 1)
    # The prompt; a draft behind one token; and, where it is rejected, the third token.
    assert usage_of("verify, list", options, **about)[0] == Usage(1 + 1 + 0.5, 10 + 23 + 6, 1 + 2 + 0.5).plus(check)
    # 500 numbers for each of 12 tokens are few enough for one reply.
    assert usage_of("verify, one text", options, **about)[0] == Usage(2.5, 10 + 12 + 6, 1 + 1 + 0.5).plus(check)
    assert usage_of("plain", options, **about)[0] == Usage(1, 10, 3)


def test_the_range_ends_where_the_server_names_all_tokens():
    options = RequestOptions(prompts=1, prompt_tokens=10, new_tokens=1)
    about = {"batch": 1, "n_drafts": 0, "acceptance": 0.0}
    for n, n_vocab, again in ((20, 80, 1), (20, 81, 2), (20, 20, 0), (5, 384, 4)):
        low, high = usage_of("ask", options, top_logprobs=n, n_vocab=n_vocab, **about)
        assert (low.calls, high.calls) == (2, 2 + again)


def test_the_command(served, place, tmp_path):
    where = ["--base-api", served.url, "--base-model", "tiny", "--base-tokenizer", place / "base"]
    run("new", tmp_path / "r", *where, "--expert", place / "expert", "--anti-expert", place / "anti")
    asked = ["--prompts", 100, "--prompt-tokens", 50, "-n", 10, "--drafts", "2,4", "--acceptance", "0.5,0.9"]
    prices = ["--price-in", 2, "--price-out", 8]
    found = json.loads(run("plan", tmp_path / "r", *asked, *prices, "--json").stdout)
    assert served.requests == []
    by_way = {(one["way"], one["drafts"], one["acceptance"]): one for one in found["ways"]}
    assert len(by_way) == 4 + 2 * 4
    pull = by_way["pull", None, None]
    assert pull["low"] == {"calls": 1013, "tokens_in": 100 * (500 + 45) + 13 * 50, "tokens_out": 1013}
    assert pull["cost"] == pytest.approx([(2 * 55150 + 8 * 1013) / 1e6] * 2)
    assert by_way["verify, list", 4, 0.9]["low"]["calls"] < by_way["verify, list", 4, 0.5]["low"]["calls"] < 1013
    assert [one["name"] for one in found["members"]] == ["expert.expert", "expert.anti_expert"]
    assert found["weight_bytes"] == sum(p.nbytes for p in tiny.llama("base").parameters()) * 2
    table = run("plan", tmp_path / "r", *asked, *prices).stdout
    assert "Memory on this machine: expert.expert, expert.anti_expert" in table
    assert "| plain" in table
    assert "1,013" in table
    assert "cost" not in run("plan", tmp_path / "r").stdout.partition("verify")[0]
    for more, said in (
        (["--price-in", 1], "a cost needs both prices"),
        (["--prompts", 0], "--prompts must be at least 1, not 0"),
        (["--max-new-tokens", 0], "--max-new-tokens must be at least 1, not 0"),
        (["--probe"], "is behind an API, so --probe would change nothing"),
        (["--device", "cpu"], "so --device would change nothing"),
        (["-b", "1,2"], "takes one --batch-size"),
        (["--drafts", "0"], "at least 1 and each once"),
    ):
        assert said in fails("plan", tmp_path / "r", *more)


def test_a_base_on_this_machine_asks_nobody(shelf):
    for flag, value in (("--prompts", 3), ("--price-in", 1), ("--max-new-tokens", 5)):
        more = ["--price-out", 1] if flag == "--price-in" else []
        assert f"so {flag} would change nothing" in fails("plan", shelf / "recipe", flag, value, *more)
    from proxytune import load_recipe

    with pytest.raises(ProxyTuneError, match="which no request asks"):
        plan_requests(load_recipe(shelf / "recipe"), RequestOptions(), acceptances=(0.7,), batch=1)
