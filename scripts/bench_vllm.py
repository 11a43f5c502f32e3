"""What steering costs in vLLM: the base alone and the recipe, each served, under the client of `vllm bench serve`.

    python scripts/bench_vllm.py demo --json bench-vllm.json

Arms: ``base`` (the base alone), ``steered`` (the recipe), the recipe with drafts: ``ngram`` (copied from the text) and
``draft`` (by the model that --draft-model names; of the demo, its expert merged), and ``prompts``: the recipe, in which
experts and anti-experts read a line before the prompt that the base does not read. Loads: N requests at a time, and
Poisson arrivals at --rate. All arms' servers are up together, and are measured by turns, so that what else the machine
does meets all of them. An arm that does not start, or breaks, is reported and left out; the others continue. What is
measured is added to FILE at once, so that a run can be made in pieces; the tables are of all that FILE has.

Requests are answered to the full --new-tokens, also past the end of an answer. What a model writes there often repeats
itself, which is easier to draft than answers are. The ideal speed to base is that of the bytes a decoding step moves:
the weights of all models in vLLM, and the KV cache of the requests at half of their new tokens. Options after ``--``
are vLLM's, for every arm.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from proxytune.errors import ProxyTuneError, first_line
from proxytune.evaluation.problems import make_problems
from proxytune.recipe.check import count_recipe
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.members import Loading, member_source
from proxytune.recipe.parts import Prompt
from proxytune.recipe.place import named_recipe
from proxytune.recipe.store import load_recipe, write_recipe
from proxytune.speed.bench import describe_machine
from proxytune.vllm import installed_version
from proxytune.vllm.command import serve_command, server_of
from proxytune.vllm.plan import parts_of

ARMS = ("base", "steered", "ngram", "draft", "prompts")
OWN = "Solve the following problem, step by step.\n{prompt}"  # what the members but for the base read in "prompts"
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 2}
DTYPE = "bfloat16"  # vLLM's own choice, whatever the checkpoints' is; said, so that bytes can be counted
STARTED = 900  # seconds until a server must answer: the first start compiles every member
SETTLED = 1.5  # seconds between two measures: for one second a worker of vLLM that has nothing to do still spins
PREFIX = re.compile(r"^(\([^)]*pid=\d+\)\s*)?([A-Z]+ [\d-]+ [\d:.]+ \[[^]]*\]\s*)?")  # of a line of vLLM's log
PROCESSES = 3 * 2**30  # bytes of a server beside weights and cache (its processes are three), with some room
KEPT = ("duration", "output_throughput", "request_throughput", "spec_decode_acceptance_rate",
        "spec_decode_acceptance_length")  # fmt: skip


def main() -> int:
    """Measure what was asked for, and print the tables; 1 if an arm was left out, 2 if nothing could be done."""
    asked = options()
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that servers are ended then too
        signal.signal(number, lambda *_: sys.exit(143))
    try:
        return run(asked, load_recipe(asked.recipe))
    except ProxyTuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(asked: argparse.Namespace, config: ProxyTuneConfig) -> int:
    """Start all servers, then measure: within a load the arms follow one another, each in its turn the first."""
    found = read(asked)
    commands = {arm: command(arm, config, asked) for arm in asked.arms}
    tokenizer = AutoTokenizer.from_pretrained(str(config.name_or_path))
    tell(plan(asked, config))
    loads = [*map(str, asked.batch), *(["poisson"] if asked.rate else [])]
    up: dict[str, Server] = {}
    with contextlib.ExitStack() as servers:

        def lose(arm: str, why: Exception) -> None:
            tell(f"{arm} is left out: {why}")
            if arm in up:
                up.pop(arm).end()

        for arm in asked.arms:
            try:
                up[arm] = servers.enter_context(Server(arm, commands[arm], needs(arm, config, asked)))
                tell(f"{arm}: started in {up[arm].seconds:.0f} s")
            except ProxyTuneError as error:
                lose(arm, error)
        for at, load in ((at, load) for at in range(asked.rounds) for load in loads):
            turn = at % len(asked.arms)
            for arm in [one for one in asked.arms[turn:] + asked.arms[:turn] if one in up]:
                time.sleep(SETTLED)
                try:
                    values = asyncio.run(measure(up[arm].address, arm, load, tokenizer, asked))
                except Exception as error:  # whatever vLLM's client raises where a server is gone
                    lose(arm, up[arm].trouble(error))
                    continue
                found["measures"].append({"arm": arm, "load": load, **values})
                if asked.json:
                    write(asked.json, found)
                tell(f"round {at + 1} of {asked.rounds}, {load}, {arm}: {values['output_throughput']:.1f} tokens/s")
        lost = len(asked.arms) - len(up)
    if not found["measures"]:
        raise ProxyTuneError("no arm could be measured")
    print(tables(found, config))
    return 1 if lost else 0


def tell(text: str) -> None:
    """Say how it goes."""
    print(text, file=sys.stderr, flush=True)


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--arms", default=",".join(ARMS), type=lambda text: text.split(","))
    parser.add_argument("--batch", default="1,8,32", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--rate", default=1.0, type=float, help="requests a second of the Poisson load; 0 is none")
    parser.add_argument("--new-tokens", default=64, type=int)
    parser.add_argument("--requests", default=2, type=int, help="for each place in a batch; no load has less than 4")
    parser.add_argument("--poisson-requests", default=16, type=int)
    parser.add_argument("--rounds", default=2, type=int)
    parser.add_argument("--cache", default=1.0, type=float, metavar="GIB", help="KV cache of each server")
    parser.add_argument("--draft-model", help="directory or hub id; of an embedded recipe, its expert")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--json", metavar="FILE", type=Path)
    words = list(sys.argv[1:] if words is None else words)
    end = words.index("--") if "--" in words else len(words)
    asked = parser.parse_args(words[:end], argparse.Namespace(vllm=words[end + 1 :]))
    if unknown := [arm for arm in asked.arms if arm not in ARMS]:
        parser.error(f"--arms {unknown[0]} is not one of {', '.join(ARMS)}")
    if asked.draft_model and "draft" not in asked.arms:
        parser.error("--draft-model is for the arm draft, which --arms leaves out")
    if asked.json and not asked.json.parent.is_dir():
        parser.error(f"--json {asked.json}: there is no directory {asked.json.parent}")
    return asked


def plan(asked: argparse.Namespace, config: ProxyTuneConfig) -> str:
    """What will be done, said before it is."""
    loads = [f"{n_requests(asked, load)} requests, {load} at a time" for load in asked.batch]
    if asked.rate:
        loads.append(f"{asked.poisson_requests} requests as Poisson arrivals, {asked.rate:g} a second")
    memory = sum(needs(arm, config, asked) for arm in asked.arms)
    rounds = "1 round" if asked.rounds == 1 else f"{asked.rounds} rounds"
    return (
        f"Starts {len(asked.arms)} servers one after another ({', '.join(asked.arms)}), together at most "
        f"{memory / 2**30:.0f} GiB, {asked.cache:g} GiB of it each one's KV cache. Then {rounds} of "
        f"{'; '.join(loads)}; each with every server in turn, {asked.new_tokens} new tokens a request."
    )


def n_requests(asked: argparse.Namespace, load: int | str) -> int:
    """How many requests a load has."""
    return asked.poisson_requests if load == "poisson" else max(4, asked.requests * int(load))


def read(asked: argparse.Namespace) -> dict[str, Any]:
    """What the file has, or a new start of it."""
    said = describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    machine = {name: said[name] for name in ("cpu", "cores", "gpu", "torch")} | {"vllm": installed_version()}
    names = ("recipe", "rate", "new_tokens", "requests", "poisson_requests", "cache", "draft_model", "seed", "vllm")
    settings = {name: getattr(asked, name) for name in names}
    if asked.json and asked.json.exists():
        found: dict[str, Any] = json.loads(asked.json.read_text("utf-8"))
        if (found["settings"], found["machine"]) != (settings, machine):
            raise ProxyTuneError(f"{asked.json} was measured with other settings or on another machine; name another")
        return found
    return {"machine": machine, "settings": settings, "measures": []}


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Replace the file as a whole: one that is killed meanwhile leaves what was there."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    new.replace(path)


# -- servers --------------------------------------------------------------------------------------------------
def command(arm: str, config: ProxyTuneConfig, asked: argparse.Namespace) -> list[str]:
    """The words that start an arm's server. No prompt is read from a cache, in no arm."""
    # By itself each server would take nearly all memory for its cache, and refuse to start where others hold some.
    common = ["--dtype", DTYPE, "--no-enable-prefix-caching", "--max-num-seqs", str(max(asked.batch))]
    common += ["--kv-cache-memory-bytes", str(int(asked.cache * 2**30)), *asked.vllm]
    if arm == "base":
        source, _ = member_source(config, "base", config.base_member)
        return [*server_of(source.path), *(["--revision", source.revision] if source.revision else []), *common]
    if arm == "ngram":
        common += ["--speculative-config", json.dumps(NGRAM)]
    if arm == "draft":
        drafts = {"method": "draft_model", "model": draft_model(config, asked), "num_speculative_tokens": 3}
        common += ["--speculative-config", json.dumps(drafts)]
    return serve_command(with_prompts(config) if arm == "prompts" else config, common)


def with_prompts(config: ProxyTuneConfig) -> ProxyTuneConfig:
    """The recipe, whose members but for the base have a prompt of their own."""

    def change(name: str, member: Any) -> Any:
        return member if name == "base" else replace(member, prompt=Prompt.parse(OWN))

    tokenizer = AutoTokenizer.from_pretrained(str(config.name_or_path))
    return load_recipe(write_recipe(config.with_members(change), "runs/bench-vllm-prompts", tokenizer=tokenizer))


def draft_model(config: ProxyTuneConfig, asked: argparse.Namespace) -> str:
    """The model that drafts: the one that is named, or an embedded recipe's expert, merged."""
    if asked.draft_model:
        return str(asked.draft_model)
    if named_recipe(asked.recipe) is None:
        raise ProxyTuneError("the arm draft needs --draft-model; or leave it out of --arms")
    (expert,) = (each.expert for each in config.expert_list)
    assert expert is not None  # the embedded recipes' are adapters
    assert expert.model is not None
    assert expert.adapter is not None
    from peft import PeftModel

    place, merged = Path(str(config.name_or_path)), Path("runs/bench-vllm-draft")
    model: Any = AutoModelForCausalLM.from_pretrained(place / expert.model)
    PeftModel.from_pretrained(model, place / expert.adapter).merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(place).save_pretrained(merged)
    return str(merged)


def needs(arm: str, config: ProxyTuneConfig, asked: argparse.Namespace) -> float:
    """About how many bytes of memory a server takes; a draft model is taken to be as large as the largest steerer."""
    read = weights_and_cache(config)
    total = read["base"][0] if arm == "base" else sum(weights for weights, _ in read.values())
    if arm == "draft":
        total += max(weights for name, (weights, _) in read.items() if name != "base")
    return total + asked.cache * 2**30 + PROCESSES


class Server:
    """A server that answers, and is gone at the end.

    Args:
        arm: what it is called by its clients.
        words: that start it.
        memory: bytes that must be free, where it runs on the CPU. Without the check the kernel would end some process,
            this or another, when there is no more.
    """

    def __init__(self, arm: str, words: Sequence[str], memory: float) -> None:
        self.arm, self.words, self.memory = arm, words, memory

    def __enter__(self) -> Server:
        free = available_memory()
        if free < self.memory and not torch.cuda.is_available():
            raise ProxyTuneError(f"it needs {self.memory / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} are free")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        words = [*self.words, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", self.arm]
        environment = {**os.environ, "VLLM_LOGGING_LEVEL": "WARNING"}
        environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # vLLM would take it before --kv-cache-memory-bytes
        started = time.monotonic()
        with tempfile.NamedTemporaryFile("w", prefix=f"bench-vllm-{self.arm}-", suffix=".log", delete=False) as log:
            self.log = Path(log.name)
            self.process = subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            while not answers(f"{self.address}/health"):
                if self.process.poll() is not None:
                    raise self.trouble(ProxyTuneError("it ended while it started"))
                if time.monotonic() - started > STARTED:
                    raise self.trouble(ProxyTuneError(f"it did not answer within {STARTED} s"))
                time.sleep(0.5)
        except BaseException:
            self.__exit__()
            raise
        self.seconds = time.monotonic() - started
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self.log.unlink(missing_ok=True)

    def end(self) -> None:
        """End it, with all of its processes: what is left of one would keep memory from those after it."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def trouble(self, error: Exception) -> ProxyTuneError:
        """What went wrong, with what the server's own log says of it; the log is kept."""
        kept = self.log.with_suffix(".kept.log")
        with contextlib.suppress(FileNotFoundError):
            self.log.rename(kept)
        cause = cause_of(kept.read_text("utf-8", errors="replace")) or "nothing"
        return ProxyTuneError(f"{first_line(error)}; its log, {kept}, says: {cause}")


def cause_of(log: str) -> str | None:
    """The line of a vLLM log that says why: the last exception that does not merely point at another one.

    Each process of a server ends with a traceback of its own; those of outer ones only say that an inner one failed.
    """
    lines = [PREFIX.sub("", line).strip() for line in log.splitlines()]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Refused|Interrupt)\b\s*:", line)]
    causes = [line for line in raised if "root cause" not in line]
    return next(reversed(causes or raised or [line for line in lines if line]), None)


def available_memory() -> int:
    """Bytes that a new process could have."""
    import psutil  # type: ignore[import-untyped]  # comes with vLLM

    return int(psutil.virtual_memory().available)


def answers(url: str) -> bool:
    """Whether something is there."""
    with contextlib.suppress(OSError):
        urllib.request.urlopen(url, timeout=5).close()
        return True
    return False


# -- measuring ------------------------------------------------------------------------------------------------
async def measure(url: str, name: str, load: str, tokenizer: Any, asked: argparse.Namespace) -> dict[str, Any]:
    """What vLLM's client says of one load, in short, and the times of each request."""
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType, benchmark

    count = n_requests(asked, load)
    requests = [
        SampleRequest(problem.prompt, len(tokenizer.encode(problem.prompt)), asked.new_tokens)
        for problem in make_problems("test", count, asked.seed)
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
            selected_percentile_metrics=[],
            selected_percentiles=[95.0],
            ignore_eos=True,
            goodput_config_dict={},
            max_concurrency=None if load == "poisson" else int(load),
            lora_modules=None,
            extra_headers=None,
            extra_body={"temperature": 0.0},
        )
    if result["completed"] < count:
        why = next(filter(None, result["errors"]), "no reason was given").strip().splitlines()[-1]
        raise ProxyTuneError(f"{count - result['completed']} of {count} requests failed: {why}")
    return {key: result[key] for key in KEPT if key in result} | per_request(result)


def per_request(result: Mapping[str, Any]) -> dict[str, Any]:
    """Times of the requests in milliseconds: to the first token, of each after it, of all; and the prompts' length."""
    first, whole, n_tokens = result["ttfts"], result["latencies"], result["output_lens"]
    each = [(all_ - ttft) / max(n - 1, 1) for ttft, all_, n in zip(first, whole, n_tokens)]
    times = {"ttft_ms": first, "tpot_ms": each, "e2el_ms": whole}
    found: dict[str, Any] = {name: [round(1000 * value, 2) for value in values] for name, values in times.items()}
    return found | {"prompt_tokens": statistics.mean(result["input_lens"])}


# -- the tables -----------------------------------------------------------------------------------------------
def weights_and_cache(config: ProxyTuneConfig) -> dict[str, tuple[float, float]]:
    """Each model that vLLM holds: bytes of weights that a step reads, and of the cache of one token."""
    owners = {part.owner for part in parts_of(config)}
    members, _ = count_recipe(config, Loading(dtype=DTYPE, share=False))
    return {one.name: (one.read_bytes, one.kv_bytes_per_token or 0) for one in members if one.name in owners}


def ideal_speed(models: Mapping[str, tuple[float, float]], batch: float, length: float) -> float:
    """Of the recipe, to the base alone, if time were bytes: a step of ``batch`` requests of ``length`` tokens."""
    moved = {name: weights + batch * length * cache for name, (weights, cache) in models.items()}
    return moved["base"] / sum(moved.values())


class Measures:
    """All measures of one load and arm, taken together: rates are medians of rounds, times are of all requests."""

    def __init__(self, found: Mapping[str, Any], load: str, arm: str) -> None:
        self.rounds = [one for one in found["measures"] if (one["load"], one["arm"]) == (load, arm)]

    def rate(self, key: str) -> float | None:
        """The median of rounds."""
        values = [one[key] for one in self.rounds if key in one]
        return statistics.median(values) if values else None

    def times(self, key: str) -> list[float]:
        """Of every request."""
        return [value for one in self.rounds for value in one[key]]

    def median(self, key: str) -> float | None:
        """Of every request."""
        return statistics.median(self.times(key)) if self.rounds else None


def tables(found: Mapping[str, Any], config: ProxyTuneConfig) -> str:
    """All measures as Markdown: speed beside the base alone, latencies, and what drafts gain."""
    machine, settings = found["machine"], found["settings"]
    loads = sorted({one["load"] for one in found["measures"]}, key=lambda load: (load == "poisson", len(load), load))
    of = {(load, arm): Measures(found, load, arm) for load in loads for arm in ARMS}
    text = [
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, vLLM {machine['vllm']}, {DTYPE}; recipe "
        f"`{settings['recipe']}`, {settings['new_tokens']} new tokens a request, past the answer too, greedy; "
        f"Poisson: {settings['rate']:g} a second; options of vLLM: {' '.join(settings['vllm']) or 'none'}.",
        "",
        "| load | rounds | base, tokens/s | steered, tokens/s | speed to base | of a token after the first | ideal |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    models = weights_and_cache(config)
    for load in loads:
        base, steered = of[load, "base"], of[load, "steered"]
        if not steered.rounds:
            continue
        speed = _ratio(steered.rate("output_throughput"), base.rate("output_throughput"))
        each = _ratio(base.median("tpot_ms"), steered.median("tpot_ms"))
        batch = None if load == "poisson" else float(load)
        if batch is None and base.rounds:
            # As large as the base's server let it become (Little's law).
            batch = base.rate("request_throughput") * statistics.mean(base.times("e2el_ms")) / 1000  # type: ignore[operator]
        length = steered.rate("prompt_tokens") + settings["new_tokens"] / 2  # type: ignore[operator]
        cells = [load, str(len(steered.rounds))]
        cells += [_said(one.rate("output_throughput"), 1) for one in (base, steered)]
        # Under Poisson arrivals a server that keeps up has the tokens/s of the arrivals: no ratio of speeds.
        cells += [_said(None if load == "poisson" else speed), _said(each)]
        text.append(_row([*cells, _said(None if batch is None else ideal_speed(models, batch, length))]))

    text += [
        "",
        "| load | arm | requests | first token, ms | its 95 % | each after it, ms | its 95 % |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for (load, arm), one in of.items():
        if one.rounds:
            cells = [load, arm, str(len(one.times("ttft_ms")))]
            for key in ("ttft_ms", "tpot_ms"):
                cells += [_said(float(np.percentile(one.times(key), percent)), 1) for percent in (50, 95)]
            text.append(_row(cells))

    text += [
        "",
        "| load | arm | tokens/s | speed to steered | of a token after the first | accepted | tokens a step |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for (load, arm), one in of.items():
        if one.rounds and arm in ("ngram", "draft", "prompts"):
            plain = of[load, "steered"]
            speed = _ratio(one.rate("output_throughput"), plain.rate("output_throughput"))
            taken = one.rate("spec_decode_acceptance_rate")
            cells = [load, arm, _said(one.rate("output_throughput"), 1)]
            cells += [_said(None if load == "poisson" else speed)]
            cells += [_said(_ratio(plain.median("tpot_ms"), one.median("tpot_ms")))]
            cells += ["" if taken is None else f"{taken:.0f} %", _said(one.rate("spec_decode_acceptance_length"))]
            text.append(_row(cells))
    return "\n".join(text)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def _said(number: float | None, digits: int = 2) -> str:
    return "" if number is None else f"{number:.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
