"""The OpenAI server as `proxytune serve --engine vllm` starts it, and the real client."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
import urllib.request
from types import SimpleNamespace

import openai
import pytest

from support.served import ROWS, Reference, assert_all_same, expert

N_CLIENTS = 32
N_NEW = 16


@pytest.fixture(scope="module")
def server(shelf, tmp_path_factory):
    recipe = shelf.recipe("of-server", "llama", experts=[expert("e", "qwen2-small", "qwen2-anti", 0.8)])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [
        "-m",
        "proxytune",
        "serve",
        str(recipe),
        "--engine",
        "vllm",
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
    ]
    words += ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16", "--served-model-name", "steered"]
    log = tmp_path_factory.mktemp("log") / "server.log"
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *words], stdout=file, stderr=file, env=environment)
    try:
        for _ in range(600):
            if process.poll() is not None:
                pytest.fail(f"the server ended: {log.read_text()[-3000:]}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}/v1", reference=Reference(recipe), process=process)
    finally:
        process.terminate()
        process.wait(60)


async def stream(client, row, alpha, n_new=N_NEW):
    """The tokens of one streamed completion."""
    chunks = await client.completions.create(
        model="steered",
        prompt=row,
        max_tokens=n_new,
        temperature=0,
        stream=True,
        extra_body={"vllm_xargs": {"alpha": alpha}, "ignore_eos": True, "return_token_ids": True},
    )
    tokens = []
    async for chunk in chunks:
        tokens += chunk.choices[0].token_ids or [] if chunk.choices else []
    return tokens


def test_many_clients_stream_each_at_its_own_alpha(server):
    rows = [[*ROWS[index % 4], 5 + index] for index in range(N_CLIENTS)]
    alphas = [index / 16 - 0.5 for index in range(N_CLIENTS)]

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", timeout=120) as client:
            return await asyncio.gather(*[stream(client, row, alpha) for row, alpha in zip(rows, alphas)])

    tokens = asyncio.run(all_of_them())
    assert_all_same(tokens, server.reference.greedy(rows, N_NEW, alpha=[[alpha] for alpha in alphas]))


@pytest.mark.parametrize(
    ("xargs", "said"),
    [
        ({"alpha": "high"}, "finite number"),
        ({"alpha": [1.0, 2.0]}, "2 alphas for 1 expert"),
        ({"alpha.other": 1.0}, "no expert is called 'other'"),
    ],
    ids=["text", "length", "name"],
)
def test_a_bad_alpha_is_400_and_the_server_lives_on(server, xargs, said):
    with openai.OpenAI(base_url=server.url, api_key="none", timeout=60, max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match=said):
            client.completions.create(model="steered", prompt=ROWS[0], max_tokens=2, extra_body={"vllm_xargs": xargs})
        answer = client.completions.create(model="steered", prompt=ROWS[0], max_tokens=2)
        chat = client.chat.completions.create(
            model="steered",
            messages=[{"role": "user", "content": "how many apples?"}],
            max_tokens=2,
            extra_body={"vllm_xargs": {"alpha.e": 0.5}},
        )
    assert answer.usage.completion_tokens == 2
    assert chat.usage.completion_tokens == 2, "the base's chat template came with the recipe"


def test_clients_that_leave_in_mid_stream_change_nothing_for_others(server):
    async def leave(client, row):
        chunks = await client.completions.create(
            model="steered", prompt=row, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        async for _ in chunks:
            await chunks.close()
            return

    async def together():
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", timeout=120) as client:
            stayed = asyncio.gather(*[stream(client, row, 1.5) for row in ROWS])
            await asyncio.gather(*[leave(client, row) for row in ROWS * 2])
            return await stayed

    tokens = asyncio.run(together())
    assert_all_same(tokens, server.reference.greedy(ROWS, N_NEW, alpha=[[1.5]] * len(ROWS)))
    assert server.process.poll() is None
