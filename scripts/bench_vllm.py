"""What steering costs in vLLM: the base alone and the recipe, each served, under the client of `vllm bench serve`.

    python scripts/bench_vllm.py demo --json bench-vllm.json

Arms: ``base`` (the base alone), ``steered`` (the recipe), and the recipe with drafts: ``ngram`` (copied from the text)
and ``draft`` (by the model that --draft-model names; of the demo, its expert merged). Loads: N requests at a time, and
Poisson arrivals at --rate. All arms' servers are up together, and are measured by turns, so that what else the machine
does meets all of them. What is measured is added to FILE, so that a run can be made in pieces; the table is of all that
FILE has, medians of rounds.

The ideal speed to base is that of the bytes a decoding step moves: the weights of all models in vLLM, and the KV cache
of the requests at half of their new tokens. Options after ``--`` are vLLM's, for every arm.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer
from vllm.benchmarks.datasets import SampleRequest
from vllm.benchmarks.serve import TaskType, benchmark

import vllm
from proxytune.bench import describe_machine
from proxytune.check import count_recipe
from proxytune.config import ProxyTuneConfig
from proxytune.demo.problems import make_problems
from proxytune.errors import ProxyTuneError
from proxytune.members import Loading, member_source
from proxytune.recipe import load_recipe
from proxytune.vllm.command import serve_command, server_of
from proxytune.vllm.plan import parts_of

ARMS = ("base", "steered", "ngram", "draft")
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 2}
DTYPE = "bfloat16"  # vLLM's own choice, whatever the checkpoints' is; said, so that bytes can be counted
POISSON_REQUESTS = 32
STARTED = 900  # seconds until a server must answer: the first start compiles every member
KEPT = ("duration", "completed", "failed", "request_throughput", "output_throughput", "spec_decode_acceptance_rate",
        "spec_decode_acceptance_length", *(f"{kind}_{name}_ms" for name in ("ttft", "tpot", "e2el")
                                           for kind in ("mean", "median", "p90")))  # fmt: skip


def main() -> None:
    """Measure what was asked for, and print the table."""
    asked = options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are ended then too
    try:
        run(asked, load_recipe(asked.recipe))
    except ProxyTuneError as error:
        sys.exit(f"error: {error}")


def run(asked: argparse.Namespace, config: ProxyTuneConfig) -> None:
    """Start all servers, then measure: within a load the arms follow one another, each in its turn the first."""
    found = read(asked)
    tokenizer = AutoTokenizer.from_pretrained(str(config.name_or_path))
    with contextlib.ExitStack() as servers:
        urls = {arm: servers.enter_context(server(command(arm, config, asked), arm)) for arm in asked.arms}
        for at in range(asked.rounds):
            for load in [*asked.batch, *(["poisson"] if asked.rate else [])]:
                for arm in asked.arms[at % len(asked.arms) :] + asked.arms[: at % len(asked.arms)]:
                    values = asyncio.run(measure(urls[arm], arm, load, tokenizer, asked))
                    found["measures"].append({"arm": arm, "load": str(load), **values})
                    speed = f"{values['output_throughput']:.1f} tokens/s"
                    print(f"round {at + 1} of {asked.rounds}, {load}, {arm}: {speed}", file=sys.stderr)
                    if asked.json:
                        asked.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(table(found, config))


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--arms", default=",".join(ARMS), type=lambda text: text.split(","))
    parser.add_argument("--batch", default="1,8,32", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--rate", default=1.0, type=float, help="requests a second of the Poisson load; 0 is none")
    parser.add_argument("--new-tokens", default=64, type=int)
    parser.add_argument("--requests", default=4, type=int, help="of a load, in batches; Poisson has 32 requests")
    parser.add_argument("--rounds", default=2, type=int)
    parser.add_argument("--draft-model", help="directory or hub id; of the demo, its expert")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--json", metavar="FILE", type=Path)
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    asked = parser.parse_args(words[:end], argparse.Namespace(vllm=words[end + 1 :]))
    if unknown := [arm for arm in asked.arms if arm not in ARMS]:
        parser.error(f"--arms {unknown[0]} is not one of {', '.join(ARMS)}")
    return asked


def read(asked: argparse.Namespace) -> dict[str, Any]:
    """What the file has, or a new start of it."""
    said = describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    machine = {name: said[name] for name in ("cpu", "cores", "gpu", "torch")} | {"vllm": vllm.__version__}
    settings = {name: getattr(asked, name) for name in ("recipe", "rate", "new_tokens", "requests", "seed", "vllm")}
    if asked.json and asked.json.exists():
        found: dict[str, Any] = json.loads(asked.json.read_text("utf-8"))
        if (found["settings"], found["machine"]) != (settings, machine):
            raise ProxyTuneError(f"{asked.json} was measured with other settings or on another machine; name another")
        return found
    return {"machine": machine, "settings": settings, "measures": []}


# -- servers --------------------------------------------------------------------------------------------------
def command(arm: str, config: ProxyTuneConfig, asked: argparse.Namespace) -> list[str]:
    """The words that start an arm's server. No prompt is read from a cache, in no arm."""
    common = ["--dtype", DTYPE, "--no-enable-prefix-caching", "--max-num-seqs", str(max(asked.batch)), *asked.vllm]
    if arm == "base":
        source, _ = member_source(config, "base", config.base_member)
        return [*server_of(source.path), *(["--revision", source.revision] if source.revision else []), *common]
    if arm == "ngram":
        common += ["--speculative-config", json.dumps(NGRAM)]
    if arm == "draft":
        model = asked.draft_model
        if model is None and asked.recipe == "demo":
            model = str(Path(str(config.name_or_path)).parent / "expert")
        if model is None:
            raise ProxyTuneError("the arm draft needs --draft-model; or leave it out of --arms")
        drafts = {"method": "draft_model", "model": model, "num_speculative_tokens": 3}
        common += ["--speculative-config", json.dumps(drafts)]
    return serve_command(config, common)


@contextlib.contextmanager
def server(words: list[str], name: str) -> Iterator[str]:
    """A server that answers, and is gone at the end: its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    words = [*words, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", name]
    with TemporaryFile("w+") as log:
        environment = {**os.environ, "VLLM_LOGGING_LEVEL": "WARNING"}
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            deadline = time.monotonic() + STARTED
            while not answers(f"{address}/health"):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise ProxyTuneError(f"the server of {name} did not start: {log.read()[-2000:]}")
                time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with contextlib.suppress(ProcessLookupError):  # what is left of it: a server that starts does not listen
                os.killpg(process.pid, signal.SIGKILL)


def answers(url: str) -> bool:
    """Whether something is there."""
    with contextlib.suppress(OSError):
        urllib.request.urlopen(url, timeout=5).close()
        return True
    return False


# -- measuring ------------------------------------------------------------------------------------------------
async def measure(url: str, name: str, load: int | str, tokenizer: Any, asked: argparse.Namespace) -> dict[str, Any]:
    """What vLLM's client says of one load, in short."""
    n_requests = POISSON_REQUESTS if load == "poisson" else asked.requests * int(load)
    requests = [
        SampleRequest(problem.prompt, len(tokenizer.encode(problem.prompt)), asked.new_tokens)
        for problem in make_problems("test", n_requests, asked.seed)
    ]
    np.random.seed(asked.seed)  # vLLM draws arrivals from it: the same for every arm
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        result = await benchmark(
            task_type=TaskType.GENERATION,
            endpoint_type="openai",
            api_url=f"{url}/v1/completions",
            base_url=url,
            model_id=name,
            model_name=name,
            tokenizer=tokenizer,
            input_requests=requests,
            logprobs=None,
            request_rate=asked.rate if load == "poisson" else float("inf"),
            burstiness=1.0,
            disable_tqdm=True,
            num_warmups=1,
            ready_check_timeout_sec=0,
            profile=False,
            selected_percentile_metrics=["ttft", "tpot", "e2el"],
            selected_percentiles=[90.0],
            ignore_eos=True,
            goodput_config_dict={},
            max_concurrency=None if load == "poisson" else int(load),
            lora_modules=None,
            extra_headers=None,
            extra_body={"temperature": 0.0},
        )
    if result["completed"] < n_requests:
        raise ProxyTuneError(
            f"{n_requests - result['completed']} requests failed: {next(filter(None, result['errors']))}"
        )
    return {key: result[key] for key in KEPT if key in result} | {
        "prompt_tokens": result["total_input_tokens"] / n_requests
    }


def bytes_of_a_step(config: ProxyTuneConfig, arm: str, batch: float, length: float) -> float:
    """What one decoding step must read: weights, and the cache of ``batch`` requests of ``length`` tokens."""
    parts = parts_of(config)
    read = {part.owner for part in (parts[:1] if arm == "base" else parts)}
    members, _ = count_recipe(config, Loading(dtype=DTYPE, share=False))
    return sum(one.read_bytes + batch * length * (one.kv_bytes_per_token or 0) for one in members if one.name in read)


def table(found: Mapping[str, Any], config: ProxyTuneConfig) -> str:
    """All measures as Markdown, medians of rounds."""

    def median(arm: str, load: str, key: str) -> float | None:
        values = [one[key] for one in found["measures"] if (one["arm"], one["load"]) == (arm, load) and key in one]
        return statistics.median(values) if values else None

    machine, settings = found["machine"], found["settings"]
    rows = [
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, vLLM {machine['vllm']}, {DTYPE}; recipe "
        f"`{settings['recipe']}`, {settings['new_tokens']} new tokens a request, greedy; Poisson: {settings['rate']} "
        f"requests a second; options of vLLM: {' '.join(settings['vllm']) or 'none'}.",
        "",
        "| load | arm | rounds | tokens/s | first, ms | then each, ms | speed to base | ideal | of ideal | accepted |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for load, arm in dict.fromkeys((one["load"], one["arm"]) for one in sorted(found["measures"], key=_order)):
        each, base = median(arm, load, "median_tpot_ms"), median("base", load, "median_tpot_ms")
        speed = base / each if base and each else None
        ideal = None
        if arm == "steered" and base:
            # Under Poisson arrivals the batch is as large as the base's server let it become (Little's law).
            in_flight = median("base", load, "request_throughput") * median("base", load, "mean_e2el_ms") / 1000  # type: ignore[operator]
            batch = in_flight if load == "poisson" else float(load)
            length = median(arm, load, "prompt_tokens") + settings["new_tokens"] / 2  # type: ignore[operator]
            ideal = bytes_of_a_step(config, "base", batch, length) / bytes_of_a_step(config, arm, batch, length)
        taken = median(arm, load, "spec_decode_acceptance_rate")
        cells = [
            load,
            arm,
            str(sum((one["arm"], one["load"]) == (arm, load) for one in found["measures"])),
            f"{median(arm, load, 'output_throughput'):.1f}",
            f"{median(arm, load, 'median_ttft_ms'):.0f}",
            f"{each:.1f}",
            _said(speed),
            _said(ideal),
            _said(speed / ideal if speed and ideal else None),
            "" if taken is None else f"{taken:.0f} %",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _order(one: Mapping[str, Any]) -> tuple[int, int]:
    return (10**6 if one["load"] == "poisson" else int(one["load"]), ARMS.index(one["arm"]))


def _said(number: float | None) -> str:
    return "" if number is None else f"{number:.2f}"


if __name__ == "__main__":
    main()
