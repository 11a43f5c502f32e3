"""A base that a real vLLM server has, over its API: every way gives the plain loop's tokens."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from transformers import AutoModelForCausalLM

from proxytune import ProxyTunedForCausalLM
from proxytune.generation_mixin import last_asked
from support import tiny
from support.decoding import near, new_tokens
from support.oracle import Oracle, assert_same_tokens
from support.served import wide

pytestmark = pytest.mark.slow
ROWS = [[1, 40, 77, 102, 9], [1, 88, 15]]
N_NEW = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    wide(root / "base", "llama", "base", 1)
    return root


@pytest.fixture(scope="module")
def url(place):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--model", str(place / "base"), "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"]
    words += ["--port", str(port), "--host", "127.0.0.1", "--max-logprobs", "-1", "--max-num-seqs", "16"]
    with open(place / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        )
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, (place / "log").read_text()[-2000:]
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


@pytest.mark.parametrize("n", [5, tiny.VOCAB])
@pytest.mark.parametrize("way", ["pull", "ask", "verify", "push"])
def test_every_way(place, url, n, way):
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    oracle = Oracle(base, [("e", near(base, 2), near(base, 3), 1.0)])
    member = {"api": url, "model": "tiny", "tokenizer": str(place / "base"), "top_logprobs": n}
    experts = [{"expert": e, "anti_expert": a, "alpha": alpha} for _, e, a, alpha in oracle.experts]
    model = ProxyTunedForCausalLM.from_members(member, experts=experts, way=way)
    offer = model.lanes[0].endpoint.offer
    assert offer.ids
    assert offer.lists
    assert offer.numbered
    assert offer.named
    assert offer.echoes
    assert model.lanes[0].endpoint.same_tokenizer
    tokens = new_tokens(model, ROWS, max_new_tokens=N_NEW)
    asked = last_asked(model)
    for row, own, marks in zip(ROWS, tokens, asked.certified):
        expected = oracle.greedy(row, N_NEW)
        if way != "pull" or n == tiny.VOCAB:
            assert_same_tokens(own, expected)
            assert all(marks)
        for at, (token, certain) in enumerate(zip(own, marks)):
            assert not certain or token == int(oracle.logits(row, own[:at])[-1].argmax())
