"""A base that a real vLLM server has, over its API: every way gives the plain loop's tokens."""

from __future__ import annotations

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from transformers import AutoModelForCausalLM

from proxytune import ProxyTunedForCausalLM, ProxyTuneError, load_recipe
from proxytune.answers.generation import Sampling, answer, encode
from proxytune.answers.text import load, loaded
from proxytune.demo.assets import materialize
from proxytune.generation_mixin import last_asked
from proxytune.recipe.options import LoadingOptions
from support import faults, tiny
from support.commands import run
from support.completions import Proxy, Served, serving
from support.decoding import near, new_tokens
from support.oracle import Oracle, assert_same_tokens
from support.pages import ROOT, blocks, commands
from support.served import running, wide

pytestmark = pytest.mark.slow
ROWS = [[1, 40, 77, 102, 9], [1, 88, 15]]
N_NEW = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    model = wide(root / "base", "llama", "base", 1)
    # vLLM takes this as the default of each request; steering is of the model's own probabilities.
    (model / "generation_config.json").write_text('{"repetition_penalty": 1.3}')
    return root


@pytest.fixture(scope="module")
def url(place):
    words = ["--model", str(place / "base"), "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"]
    words += ["--max-logprobs", "-1", "--max-num-seqs", "16"]
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words]
    with running(program, place / "log", VLLM_ENABLE_V1_MULTIPROCESSING="1") as own:
        yield own


@pytest.fixture(scope="module")
def oracle(place):
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    return Oracle(base, [("e", near(base, 2), near(base, 3), 1.0)])


def behind_api(place, oracle, url, n, way):
    """The composite whose base is at a URL."""
    member = {"api": url, "model": "tiny", "tokenizer": str(place / "base"), "top_logprobs": n}
    experts = [{"expert": e, "anti_expert": a, "alpha": alpha} for _, e, a, alpha in oracle.experts]
    return ProxyTunedForCausalLM.from_members(member, experts=experts, way=way)


def answers(model, rows=ROWS):
    tokens = new_tokens(model, rows, max_new_tokens=N_NEW)
    return tokens, last_asked(model).certified


def assert_marks_are_right(oracle, rows, tokens, certified):
    for row, own, marks in zip(rows, tokens, certified):
        for at, (token, certain) in enumerate(zip(own, marks)):
            assert not certain or token == int(oracle.logits(row, own[:at])[-1].argmax())


@pytest.mark.parametrize("n", [5, tiny.VOCAB])
@pytest.mark.parametrize("way", ["pull", "ask", "verify", "push"])
def test_every_way(place, oracle, url, n, way):
    model = behind_api(place, oracle, url, n, way)
    offer = model.lanes[0].endpoint.offer
    assert offer.ids
    assert offer.lists
    assert offer.numbered
    assert offer.named
    assert offer.echoes
    assert model.lanes[0].endpoint.same_tokenizer
    tokens, certified = answers(model)
    assert_marks_are_right(oracle, ROWS, tokens, certified)
    if way != "pull" or n == tiny.VOCAB:
        for row, own, marks in zip(ROWS, tokens, certified):
            assert_same_tokens(own, oracle.greedy(row, N_NEW))
            assert all(marks)


# -- faults between the client and the server ----------------------------------------------------------------------
@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    faults.hurry(monkeypatch)


@pytest.fixture(scope="module")
def whole_proxy(url):
    proxy = Proxy(url)
    with serving(proxy):
        yield proxy


@pytest.fixture
def proxy(whole_proxy, url):
    yield whole_proxy
    whole_proxy.target, whole_proxy.faults, whole_proxy.altered = url, None, None


def behind(place, oracle, proxy, way):
    """The composite whose base is behind the proxy, and its answers without faults."""
    model = behind_api(place, oracle, proxy.url, 5, way)
    expected = answers(model)
    assert all(map(all, expected[1]))
    return model, expected


@pytest.fixture(scope="module", params=["ask", "verify", "push"])
def through(request, place, oracle, whole_proxy):
    return behind(place, oracle, whole_proxy, request.param)


@pytest.fixture(scope="module")
def asking(place, oracle, whole_proxy):
    return behind(place, oracle, whole_proxy, "ask")


@pytest.mark.parametrize("fault", faults.PASSING)
def test_a_fault_that_passes_changes_nothing(through, proxy, fault):
    model, expected = through
    began = len(proxy.requests)
    proxy.faults = lambda number, made: faults.PASSING[fault](made) if number - began in (0, 2, 3) else made
    assert answers(model) == expected


@pytest.mark.parametrize("fault", faults.PASSING)
def test_a_fault_that_stays_gives_no_wrong_answer(asking, proxy, fault):
    """By one way alone: replies are checked in one place."""
    model, expected = asking
    proxy.faults = lambda number, made: faults.PASSING[fault](made)
    if fault == "another text":  # vLLM gives the place of a token in the answer alone
        assert answers(model) == expected
    else:
        with pytest.raises(ProxyTuneError, match="the server of the base tiny"):
            answers(model)
    proxy.faults = None
    assert answers(model) == expected


def test_slow_replies_are_asked_for_again(through, proxy, monkeypatch):
    model, expected = through
    monkeypatch.setattr(model.lanes[0].endpoint.client, "timeout", 1.0)
    began = len(proxy.requests)
    proxy.faults = lambda number, made: ("slow", 1.5, made) if number == began else made
    assert answers(model) == expected


def test_replies_to_other_prompts_are_asked_for_again(through, proxy):
    """Of the same length, so that only the returned ids tell."""
    model, expected = through
    began = len(proxy.requests)

    def altered(number, body):
        prompt = body["prompt"]
        if number - began not in (0, 1, 4):
            return body
        other = [
            [*one[:-1], (one[-1] + 1) % tiny.VOCAB] for one in (prompt if isinstance(prompt[0], list) else [prompt])
        ]
        return {**body, "prompt": other if isinstance(prompt[0], list) else other[0]}

    proxy.altered = altered
    assert answers(model) == expected
    began = -(10**9)
    proxy.altered = lambda number, body: altered(began, body)
    with pytest.raises(ProxyTuneError, match="the reply to another prompt"):
        answers(model)


def test_choices_in_another_order(through, proxy):
    model, expected = through
    proxy.faults = lambda number, made: {**made, "choices": made["choices"][::-1]}
    assert answers(model) == expected


@pytest.mark.parametrize("short", [faults.padded, faults.first_two])
def test_fewer_log_probabilities(oracle, through, proxy, short):
    model, expected = through
    began = len(proxy.requests)
    proxy.faults = lambda number, made: short(made) if number - began in (0, 3) else made
    assert answers(model) == expected
    proxy.faults = lambda number, made: short(made)
    tokens, certified = answers(model)
    assert_marks_are_right(oracle, ROWS, tokens, certified)
    proxy.faults = None
    assert answers(model) == expected


def test_a_model_that_is_swapped_ends_the_run(through, proxy):
    """Under its name, and under another one."""
    model, _ = through
    other = Served(tiny.llama("base", 7), tiny.tokenizer(), words=True, scores=True)
    began, target = len(proxy.requests), proxy.target

    def altered(number, body):
        proxy.target = other if number - began >= 3 else target
        return body

    proxy.altered = altered
    with pytest.raises(ProxyTuneError, match=r"two different replies to one prompt|named twice|cannot be right"):
        answers(model)
    proxy.target, proxy.altered = target, None
    began = len(proxy.requests)
    proxy.faults = lambda number, made: {**made, "model": "another"} if number - began >= 2 else made
    with pytest.raises(ProxyTuneError, match="answered as 'tiny' first and now as 'another'"):
        answers(model)


# -- the demo, as docs/api-base.md says ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def told():
    """The page's commands for the demo, without the first two: what threads that wait do, and where its models are."""
    (block,) = [each for each in blocks(ROOT / "docs" / "api-base.md") if "--models-dir)" in each.text]
    quiet, assign, *rest = commands(block)
    assert quiet.text == "export OMP_WAIT_POLICY=passive"
    assert assign.text == "MODELS=$(proxytune demo --models-dir)"
    return rest


@pytest.fixture(scope="module", autouse=True)
def starting(told, tmp_path_factory):
    """A server of the demo's base, as the page starts it. It starts while the other tests run."""
    python, *words = [word.replace("$MODELS", str(materialize())) for word in told[0].words if word != "&"]
    at = words.index("--port")
    assert python == "python"
    program = [sys.executable, *words[:at], *words[at + 2 :]]
    log = tmp_path_factory.mktemp("demo") / "log"
    with ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        server = running(program, log, VLLM_ENABLE_V1_MULTIPROCESSING="1", OMP_WAIT_POLICY="passive")
        yield pool.submit(stack.enter_context, server)


@pytest.fixture(scope="module")
def page(told, starting):
    """The words of the page's other commands, with that server's URL, and what the page shows below them."""
    serve, *rest = told
    port = serve.words[serve.words.index("--port") + 1]
    changed = {"$MODELS": str(materialize()), f"http://127.0.0.1:{port}/v1": starting.result()}
    pattern = re.compile("|".join(map(re.escape, changed)))
    return [([pattern.sub(lambda m: changed[m[0]], word) for word in each.words[1:]], each.output) for each in rest]


def test_the_page_from_start_to_end(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [words[0] for words, _ in page] == ["new", "check", "generate"]
    for words, output in page:
        result = run(*words)
        if output:  # how often the server is asked depends on how its replies round
            made, shown = ({**json.loads(text), "calls": None} for text in (result.stdout, output))
            assert made == shown


@pytest.mark.parametrize("way", ["pull", "push"])
def test_a_server_that_names_all_tokens_gives_the_demos_own_answer(page, tmp_path, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    white, tokenizer = loaded("demo")
    run(*page[0][0], "--base-top-logprobs", white.config.get_text_config().vocab_size)
    remote, _ = load(load_recipe("remote"), LoadingOptions(way=way))
    prompt = [encode(white, tokenizer, "Name the capital of France.", chat=True)]
    options = {"max_new_tokens": 12, "sampling": Sampling()}
    (expected,), (made,) = (answer(model, tokenizer, prompt, None, **options) for model in (white, remote))
    assert made.tokens == expected.tokens
    assert made.text == "quendrax: France\n"
    assert all(made.certified)
