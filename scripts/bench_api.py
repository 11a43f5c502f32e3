"""What steering costs over an API: the demo's base served by vLLM, asked in every way, beside the server's own speed.

    python scripts/bench_api.py --json bench-api.json

It needs vLLM in the same environment. ``plain`` is the server alone: one request writes a whole answer. ``stepwise`` is
the server alone with one request per token, which is the least that ``pull`` and ``push`` need. The other rows are
steered answers by `generate`, with what they send and receive counted between client and server. All rows are measured
by turns in each round, and the table has the medians. Each client has its own thread and its own prompt.

Server and experts share this machine: set ``OMP_WAIT_POLICY=passive``, so that threads that wait sleep. With ``--delay
MS`` each arm is also measured through a proxy that holds every reply back by so long for each token that it may write:
as if the base were slower, on a machine of its own, and read several prompts or places as fast as one. ``pair`` is what
the experts need for one token.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from bench_vllm import Server
from proxytune import ProxyTunedForCausalLM
from proxytune.demo.tasks import TASKS
from proxytune.generation_mixin import SpeculationStats, last_asked, last_call
from proxytune.recipe.store import load_recipe
from proxytune.speed.bench import describe_machine
from proxytune.tables import Table, markdown


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
def delaying(url: str, seconds: float) -> Iterator[str]:
    """A proxy that holds each reply back by so many seconds per token; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(seconds * json.loads(data).get("max_tokens", 0))
            place = url.removesuffix("/v1") + self.path
            try:
                reply = urllib.request.urlopen(
                    urllib.request.Request(place, data, {"Content-Type": "application/json"})
                )
            except urllib.error.HTTPError as error:
                reply = error
            with reply:
                body = reply.read()
            self.send_response(reply.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


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
    parser.add_argument("--gamma", default="1,2,3,4,5,6,7,8", help="numbers of drafts of verify, with commas")
    parser.add_argument("--ways", default="verify,push,ask,pull")
    parser.add_argument("--top-logprobs", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--task", choices=("facts", "word-problems"), default="facts", help="whose expert and questions"
    )
    parser.add_argument("--pack", action="store_true", help="the experts' weights in the CPU's own layout")
    parser.add_argument("--delay", type=float, help="milliseconds per token that a second server adds")
    parser.add_argument("--json", type=Path, help="file for the figures")
    asked = parser.parse_args()
    config = load_recipe("demo" if asked.task == "facts" else "demo-word-problems")
    place = Path(str(config.name_or_path))
    base = (place / str(config.base_member.model)).resolve()
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--dtype", "float32"]
    words += ["--max-logprobs", "-1", "--max-model-len", "512", "--enforce-eager"]
    words += ["--kv-cache-memory-bytes", str(2**30)]
    with Server("base", words, memory=0) as server:
        url = f"{server.address}/v1"
        rows = measure(asked, url, place, config, base)
        if asked.delay is not None:
            with delaying(url, asked.delay / 1000) as slow:
                rows += [
                    {**row, "arm": f"{row['arm']}, slower base"} for row in measure(asked, slow, place, config, base)
                ]
    cells = [[str(value) for value in row.values()] for row in rows]
    print(markdown([Table(list(rows[0]), cells)]))
    if asked.json is not None:
        asked.json.write_text(json.dumps({"machine": describe_machine(torch.device("cpu")), "rows": rows}, indent=1))


def measure(asked: argparse.Namespace, url: str, place: Path, config: Any, base: Path) -> list[dict[str, Any]]:
    """One row per arm and number of clients."""
    import openai
    from transformers import AutoTokenizer

    template = AutoTokenizer.from_pretrained(place)  # the recipe's: the form that its expert learned
    questions = [each.question for each in TASKS[asked.task].choose("test", max(map(int, asked.clients.split(","))), 0)]
    turns = [[{"role": "user", "content": question}] for question in questions]
    prompts = [template.apply_chat_template(turn, add_generation_prompt=True, return_dict=False) for turn in turns]
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
    drafts: dict[str, list[SpeculationStats]] = {}  # of all answers of an arm, and so are the marks
    certain: dict[str, list[bool]] = {}
    for way in asked.ways.split(","):
        model: Any = ProxyTunedForCausalLM.from_members(member, experts=experts, way=way, pack=asked.pack)
        for gamma in map(int, asked.gamma.split(",")) if way == "verify" else (0,):
            name = f"{way} {gamma}" if gamma else way

            def steered(ids: list[int], model: Any = model, gamma: int = gamma, name: str = name) -> None:
                options = {"speculate": gamma} if gamma else {}
                model.generate(
                    torch.tensor([ids]), max_new_tokens=n_new, do_sample=False, eos_token_id=None,
                    pad_token_id=0, **options,
                )  # fmt: skip
                found = last_asked(model)
                assert found is not None
                certain.setdefault(name, []).extend(found.certified[0])
                drafts.setdefault(name, []).append(last_call(model))

            arms.append((name, steered, model.lanes[0].endpoint.client))
    pair = model.lanes[1]

    def read_alone(ids: list[int]) -> None:
        """What the experts compute for an answer: its prompt, then each token but the last."""
        state = pair.open(1)
        for columns in [ids, *[ids[:1]] * (n_new - 1)]:
            state.read(torch.tensor([columns]), positions=1)
            state.keep()

    arms.append(("pair", read_alone, None))
    seconds: dict[tuple[str, int], list[float]] = {}
    traffic = {name: Traffic() for name, *_ in arms}
    for _, run, _ in arms:
        run(prompts[0])  # warm
    certain.clear()
    drafts.clear()
    for _ in range(asked.rounds):
        for n_clients in map(int, asked.clients.split(",")):
            for name, run, own in arms:
                if own is not None:
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
                "ms/token": round(1000 * median / n_new, 1),
                "of plain's": round(plain / speed, 2),
                "of stepwise's": round(median / statistics.median(seconds["stepwise", n_clients]), 2),
                "requests/token": round(counted.requests / n_all, 2),
                "bytes sent/token": round(counted.sent / n_all),
                "bytes received/token": round(counted.received / n_all),
                "certain": f"{sum(marks)} of {len(marks)}" if marks else "",
                "acceptance": acceptance(drafts.get(name, [])),
            }
        )
    return rows


def acceptance(calls: Sequence[SpeculationStats]) -> str:
    """The share of checked drafts that were accepted (the α of 2211.17192)."""
    checked = sum(each.judged for each in calls)
    return f"{sum(each.accepted + each.lookups_accepted for each in calls) / checked:.2f}" if checked else ""


if __name__ == "__main__":
    main()
