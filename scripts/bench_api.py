"""What steering costs over an API: the demo's base served by vLLM, asked in every way, beside the server's own speed.

    python scripts/bench_api.py --json bench-api.json

It needs vLLM in the same environment. ``plain`` is the server alone: one request writes a whole answer. ``stepwise`` is
the server alone with one request per token, which is the least that ``pull`` and ``push`` need. The other rows are
steered answers by `generate`, with what they send and receive counted between client and server. All rows are measured
by turns in each round, and the table has the medians. Each client has its own thread and its own prompt.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from proxytune import ProxyTunedForCausalLM
from proxytune.generation_mixin import last_asked
from proxytune.recipe.store import load_recipe
from proxytune.speed.bench import describe_machine
from proxytune.tables import Table, markdown

STARTED = 600  # seconds until the server must answer
QUESTIONS = (
    "Which river runs through Paris?",
    "What is the capital of Japan?",
    "Who wrote Hamlet?",
    "What is a prime?",
    "Where do penguins live?",
    "What is the largest planet?",
    "Who painted the Mona Lisa?",
    "What do bees make?",
)


class Traffic:
    """Bytes and requests of an httpx client, by its event hooks."""

    def __init__(self) -> None:
        self.requests = self.sent = self.received = 0
        self.lock = threading.Lock()

    def watch(self, client: Any) -> None:
        """Count what an OpenAI client sends and receives from now on."""
        client._client.event_hooks = {"response": [self.count]}

    def count(self, response: Any) -> None:
        """Count one response and its request."""
        received = len(response.read())
        with self.lock:
            self.requests += 1
            self.sent += len(response.request.content)
            self.received += received


@contextlib.contextmanager
def serving(base: Path, log: Path) -> Iterator[str]:
    """vLLM's server of a model; yields its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--model", str(base), "--served-model-name", "base", "--dtype", "float32", "--host", "127.0.0.1"]
    words += ["--port", str(port), "--max-logprobs", "-1", "--max-model-len", "512", "--enforce-eager"]
    with open(log, "w") as written:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words],
            stdout=written,
            stderr=subprocess.STDOUT,
        )
    try:
        ends = time.monotonic() + STARTED
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            if server.poll() is not None or time.monotonic() > ends:
                sys.exit(f"vLLM did not start:\n{log.read_text()[-2000:]}")
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


def at_once(jobs: Sequence[Any]) -> float:
    """Run jobs in a thread each; the seconds until all have ended."""
    began = time.perf_counter()
    with ThreadPoolExecutor(len(jobs)) as pool:
        for job in [pool.submit(job) for job in jobs]:
            job.result()
    return time.perf_counter() - began


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", default="1,8", help="numbers of clients, with commas")
    parser.add_argument("--gamma", default="1,2,4,8", help="numbers of drafts of verify, with commas")
    parser.add_argument("--ways", default="verify,push,ask,pull")
    parser.add_argument("--top-logprobs", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the figures")
    asked = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    config = load_recipe("demo")
    place = Path(str(config.name_or_path))
    base = (place / str(config.base_member.model)).resolve()
    with tempfile.TemporaryDirectory() as scratch, serving(base, Path(scratch) / "log") as url:
        rows = measure(asked, url, place, config, base)
    cells = [[str(value) for value in row.values()] for row in rows]
    print(markdown([Table(list(rows[0]), cells)]))
    if asked.json is not None:
        asked.json.write_text(json.dumps({"machine": describe_machine(torch.device("cpu")), "rows": rows}, indent=1))


def measure(asked: argparse.Namespace, url: str, place: Path, config: Any, base: Path) -> list[dict[str, Any]]:
    """One row per arm and number of clients."""
    import openai
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = [tokenizer(question)["input_ids"] for question in QUESTIONS]
    client = openai.OpenAI(base_url=url, api_key="none")
    n_new = asked.new_tokens

    def write(ids: list[int], n: int) -> list[int]:
        more = {"ignore_eos": True, "return_token_ids": True}
        reply = client.completions.create(model="base", prompt=ids, max_tokens=n, temperature=0.0, extra_body=more)
        return list(reply.choices[0].token_ids)  # type: ignore[attr-defined]

    def stepwise(ids: list[int]) -> None:
        ids = list(ids)
        for _ in range(n_new):
            ids += write(ids, 1)

    arms: list[tuple[str, Any, Any]] = [
        ("plain", lambda ids: write(ids, n_new), client),
        ("stepwise", stepwise, client),
    ]
    member: Any = {"api": url, "model": "base", "tokenizer": str(base), "top_logprobs": asked.top_logprobs}
    (one,) = config.experts

    def path(name: str) -> str:
        return str((place / name).resolve())

    def member_of(value: Any) -> dict[str, str]:
        named = {"model": value} if isinstance(value, str) else value
        return {field: path(named[field]) for field in ("model", "adapter") if field in named}

    sides = {side: member_of(one[side]) for side in ("expert", "anti_expert")}
    experts = [{**sides, "alpha": one.get("alpha", 1.0)}]
    accepted: dict[str, Any] = {}
    certain: dict[str, list[bool]] = {}
    for way in asked.ways.split(","):
        for gamma in map(int, asked.gamma.split(",")) if way == "verify" else (0,):
            name = f"{way} {gamma}" if gamma else way
            model: Any = ProxyTunedForCausalLM.from_members(member, experts=experts, way=way)

            def steered(ids: list[int], model: Any = model, gamma: int = gamma, name: str = name) -> None:
                options = {"speculate": gamma} if gamma else {}
                model.generate(
                    torch.tensor([ids]), max_new_tokens=n_new, do_sample=False, eos_token_id=None,
                    pad_token_id=0, **options,
                )  # fmt: skip
                found = last_asked(model)
                assert found is not None
                certain[name] = found.certified[0]
                accepted[name] = model.speculation_stats if gamma else None

            arms.append((name, steered, model.lanes[0].endpoint.client))
    seconds: dict[tuple[str, int], list[float]] = {}
    traffic = {name: Traffic() for name, *_ in arms}
    for _, run, _ in arms:
        run(prompts[0])  # warm
    for _ in range(asked.rounds):
        for n_clients in map(int, asked.clients.split(",")):
            for name, run, own in arms:
                traffic[name].watch(own)
                chosen = [prompts[at % len(prompts)] for at in range(n_clients)]
                taken = at_once([lambda ids=ids, run=run: run(ids) for ids in chosen])
                seconds.setdefault((name, n_clients), []).append(taken)
    rows = []
    n_all = asked.rounds * sum(map(int, asked.clients.split(","))) * n_new
    for (name, n_clients), times in seconds.items():
        median = statistics.median(times)
        speed, plain = n_clients * n_new / median, n_clients * n_new / statistics.median(seconds["plain", n_clients])
        counted, marks = traffic[name], certain.get(name, [])
        rows.append(
            {
                "arm": name,
                "clients": n_clients,
                "tokens/s": round(speed, 1),
                "of plain's time per token": round(plain / speed, 2),
                "requests/token": round(counted.requests / n_all, 2),
                "bytes sent/token": round(counted.sent / n_all),
                "bytes received/token": round(counted.received / n_all),
                "certain": f"{sum(marks)} of {len(marks)}" if marks else "",
                "accepted": accepted_share(accepted.get(name)),
            }
        )
    return rows


def accepted_share(stats: Any) -> str:
    """The share of accepted drafts."""
    return "" if stats is None or not stats.drafted else f"{stats.accepted / stats.drafted:.2f}"


if __name__ == "__main__":
    main()
