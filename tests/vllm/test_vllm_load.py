"""Two hundred clients at once, some of whom leave in mid-answer: every other one gets the answer that it gets alone."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter

import openai
import psutil

from proxytune.vllm.command import server_of
from support import tiny
from support.served import running

N_CLIENTS, SECONDS, N_NEW = 200, 180, 8
CACHE = 400 * 2**20  # bytes
NEAR = 0.01  # nats between two tokens that rounding may swap: a batch adds numbers in another order
NEGATIVE = ["I do not know.", "The answer is 7.", "Question: what is the capital of France?\nAnswer:"]


def of_demo(shelf):
    """The demo's word problems with guidance beside its expert: two experts, and three prompts of which one is a
    request's own."""
    from proxytune.demo import word_problems_recipe
    from proxytune.recipe.members import Loading, adapter_source, load_recipe_tokenizer, member_source
    from proxytune.recipe.store import load_recipe

    config = load_recipe(str(word_problems_recipe()))
    paths = {}
    for name, member in config.members():
        adapter = adapter_source(config, member)
        paths[name] = {"model": member_source(config, name, member)[0].path}
        paths[name] |= {} if adapter is None else {"adapter": adapter.path}
    math = {"name": "math", "expert": paths["math.expert"], "anti_expert": paths["math.anti_expert"], "alpha": 1.0}
    negative = {**paths["base"], "prompt": {"kind": "negative"}}
    guidance = {"name": "guidance", "expert": paths["base"], "anti_expert": negative, "alpha": 0.5}
    values = {"base": paths["base"], "experts": [math, guidance]}
    tokenizer = load_recipe_tokenizer(config, Loading())
    return tiny.write_recipe_alone(shelf.root / "load", values, tokenizer_=tokenizer)


def asked_of():
    """What clients ask: questions at other alphas, with other negative prompts, and without."""
    from proxytune.evaluation.problems import make_problems

    asked = []
    for at, problem in enumerate(make_problems("test", 24, seed=11)):
        xargs = {"alpha.math": [1.0, 0.0, 0.5, 1.5][at % 4], "alpha.guidance": [0.5, 1.0][at % 2]}
        if at % 3:
            xargs["negative_prompt"] = NEGATIVE[at % 3]
        asked.append((problem.prompt, xargs))
    return asked


async def answer(client, prompt, xargs, leave_after=None):
    """The tokens of an answer with the two best log-probabilities of each; None of one that was left."""
    chunks = await client.completions.create(
        model="steered",
        prompt=prompt,
        max_tokens=N_NEW,
        temperature=0,
        stream=True,
        logprobs=2,
        extra_body={"vllm_xargs": xargs, "ignore_eos": True, "return_token_ids": True},
    )
    tokens, best = [], []
    async for chunk in chunks:
        for choice in chunk.choices:
            tokens += choice.token_ids or []
            best += [] if choice.logprobs is None else choice.logprobs.top_logprobs
        if leave_after is not None and len(tokens) >= leave_after:
            await chunks.close()
            return None
    return tokens, best


def differs(ours, alone):
    """Whether an answer is another one than the one given alone, but for near ties."""
    (tokens, _), (wanted, best) = ours, alone
    at = next((at for at, pair in enumerate(zip(tokens, wanted)) if pair[0] != pair[1]), None)
    if at is None:
        return len(tokens) != len(wanted)
    first, second = sorted(best[at].values(), reverse=True)[:2]
    return first - second > NEAR


def memory(process):
    """Bytes that are held: by the server with the engine's core, and by its worker, which has weights and cache."""
    held = {False: 0, True: 0}
    for each in [process, *process.children(recursive=True)]:
        held["Worker" in " ".join(each.cmdline())] += each.memory_full_info().uss
    return held[False], held[True]


def test_two_hundred_clients_for_three_minutes(shelf, tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)  # vLLM would take it before the option
    words = [*server_of(str(of_demo(shelf))), "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "64"]
    words += ["--served-model-name", "steered", "--max-model-len", "512", "--kv-cache-memory-bytes", str(CACHE)]
    asked, seen = asked_of(), Counter()
    wrong: list[str] = []

    async def together(url, server):
        async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=300, max_retries=0) as client:
            alone = [await answer(client, *one) for one in asked]
            ends, marks = time.monotonic() + SECONDS, []

            async def one_client(number):
                rng = random.Random(number)
                while time.monotonic() < ends:
                    at = rng.randrange(len(asked))
                    leave = rng.randrange(1, N_NEW) if rng.random() < 0.3 else None
                    got = await answer(client, *asked[at], leave)
                    seen["left" if got is None else "answered"] += 1
                    if got is not None and differs(got, alone[at]):
                        wrong.append(f"{asked[at]}: {got[0]} is not {alone[at][0]}")

            async def watch():
                while time.monotonic() < ends:
                    await asyncio.sleep(SECONDS / 6)
                    marks.append(memory(server))

            await asyncio.gather(watch(), *[one_client(number) for number in range(N_CLIENTS)])
            assert [differs(await answer(client, *one), of) for one, of in zip(asked, alone)] == [False] * len(asked)
            return marks

    with running(words, tmp_path / "server.log", VLLM_ENABLE_V1_MULTIPROCESSING="1") as url:
        server = next(
            process for process in psutil.Process(os.getpid()).children() if "vllm" in " ".join(process.cmdline())
        )
        marks = asyncio.run(together(url, server))
        assert server.is_running()
    print(f"{dict(seen)}; MiB: {[tuple(round(part / 2**20) for part in mark) for mark in marks]}")
    assert not wrong, f"{len(wrong)} of {seen['answered']} answers differ, the first: {wrong[0]}"
    assert seen["answered"] > 2 * N_CLIENTS, "hardly anything was answered"
    assert seen["left"] > N_CLIENTS / 2
    (server_before, worker_before), (server_after, worker_after) = marks[1], marks[-1]
    assert server_after < 1.02 * server_before, f"memory grows: {marks}"
    # A worker holds a page of its cache from the first time that it writes there, so it grows up to the cache's size.
    assert worker_after < worker_before + CACHE, f"memory grows: {marks}"
