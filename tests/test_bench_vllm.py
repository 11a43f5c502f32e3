"""scripts/bench_vllm.py where it needs no vLLM: what it reads in logs, what it counts, and how it ends."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

import bench_vllm

CPU_ONLY = SimpleNamespace(is_available=lambda: False)
LOG = """\
(Worker pid=7) ERROR 11-24 12:00:00 [multiproc_executor.py:900] Traceback (most recent call last):
(Worker pid=7) ERROR 11-24 12:00:00 [multiproc_executor.py:900]   File "cpu_worker.py", line 83, in __init__
(Worker pid=7) ERROR 11-24 12:00:00 [multiproc_executor.py:900] ValueError: Available memory is less than desired.
(EngineCore pid=6) Exception: WorkerProc initialization failed. See stack trace for root cause.
(APIServer pid=5) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (LOG, "ValueError: Available memory is less than desired."),
        ("INFO 11-24 12:00:00 [a.py:1] starting\nproxytune.errors.MemberError: no such model\n", "no such model"),
        (LOG.splitlines()[-1], "RuntimeError: Engine core initialization failed."),
        ("Killed\n\n", "Killed"),
    ],
    ids=["of a child", "plain", "nothing but the last", "no exception"],
)
def test_the_cause_is_found_in_a_log(log, cause):
    assert cause in bench_vllm.cause_of(log)


def test_an_empty_log_has_no_cause():
    assert bench_vllm.cause_of("\n") is None


def server(words, memory=0.0):
    return bench_vllm.Server("base", [sys.executable, "-c", words], memory)


def test_a_server_that_fails_is_reported_by_its_log_and_one_without_memory_is_not_started(monkeypatch):
    monkeypatch.setattr(bench_vllm.torch, "cuda", CPU_ONLY)
    monkeypatch.setattr(bench_vllm, "available_memory", lambda: 2 * 2**30)
    failing = server("raise ValueError('no room')")
    told = r"while it started; its log, .*\.log, says: ValueError: no room$"
    with pytest.raises(bench_vllm.ProxyTuneError, match=told), failing:
        pass
    assert failing.process.poll() is not None
    assert not failing.log.exists()
    failing.log.with_suffix(".kept.log").unlink()
    with pytest.raises(bench_vllm.ProxyTuneError, match=r"it needs 3.0 GiB of memory, and 2.0 are free"):
        server("", 3 * 2**30).__enter__()


def test_times_of_requests():
    result = {"ttfts": [0.1, 0.2], "latencies": [0.4, 0.2], "output_lens": [4, 1], "input_lens": [10, 20]}
    found = bench_vllm.per_request(result)
    assert found == {"ttft_ms": [100, 200], "tpot_ms": [100, 0], "e2el_ms": [400, 200], "prompt_tokens": 15}


def test_the_ideal_is_of_bytes():
    models = {"base": (100.0, 1.0), "e.expert": (50.0, 1.0), "e.anti_expert": (50.0, 0.0)}
    assert bench_vllm.ideal_speed(models, 0, 0) == 0.5
    assert bench_vllm.ideal_speed(models, 10, 10) == pytest.approx(200 / 400)
    assert bench_vllm.ideal_speed(models, 10, 30) == pytest.approx(400 / 800)


def measured(arm, load, speed, each, **more):
    times = {"ttft_ms": [20.0, 40.0], "tpot_ms": [each, each], "e2el_ms": [1000.0, 1000.0], "prompt_tokens": 18}
    return {"arm": arm, "load": load, "output_throughput": speed, "request_throughput": 2.0, **times, **more}


@pytest.fixture
def rig(monkeypatch, tmp_path):
    """The run without models and servers: those of ``broken`` fail, at start or when they are measured."""
    broken = {}

    class Fake:
        def __init__(self, arm, words, memory):
            self.arm, self.address, self.seconds = arm, arm, 1.0

        def __enter__(self):
            if broken.get(self.arm) == "start":
                raise bench_vllm.ProxyTuneError("no room")
            return self

        def __exit__(self, *_):
            self.end()

        def end(self):
            ended.append(self.arm)

        def trouble(self, error):
            return error

    async def measure(url, arm, load, tokenizer, asked):
        if broken.get(arm) == load:
            raise OSError("the server is gone")
        drafted = {"spec_decode_acceptance_rate": 40.0, "spec_decode_acceptance_length": 2.2}
        speeds = {"base": (50.0, 20.0, {}), "steered": (40.0, 25.0, {}), "ngram": (60.0, 12.5, drafted)}
        speeds["prompts"] = (30.0, 35.0, {})
        speed, each, more = speeds.get(arm, (20.0, 50.0, drafted))
        return {key: value for key, value in measured(arm, load, speed, each, **more).items() if key != "arm"}

    ended = []
    monkeypatch.setattr(bench_vllm, "Server", Fake)
    monkeypatch.setattr(bench_vllm, "measure", measure)
    monkeypatch.setattr(bench_vllm, "SETTLED", 0)
    monkeypatch.setattr(bench_vllm, "command", lambda arm, config, asked: [])
    monkeypatch.setattr(bench_vllm.AutoTokenizer, "from_pretrained", lambda path: None)
    models = {"base": (100.0, 0.0), "e.expert": (50.0, 0.0), "e.anti_expert": (50.0, 0.0)}
    monkeypatch.setattr(bench_vllm, "weights_and_cache", lambda config: models)

    def run(*words):
        asked = bench_vllm.options(["demo", "--batch", "1,8", "--json", str(tmp_path / "x.json"), *words])
        return bench_vllm.run(asked, SimpleNamespace(name_or_path="demo"))

    return SimpleNamespace(run=run, broken=broken, ended=ended, json=tmp_path / "x.json")


def test_all_arms_are_measured_by_turns(rig, capsys):
    assert rig.run() == 0
    found = json.loads(rig.json.read_text("utf-8"))["measures"]
    assert [one["arm"] for one in found[:5]] == [*bench_vllm.ARMS]
    second = ["steered", "ngram", "draft", "prompts", "base"]
    assert [one["arm"] for one in found[15:20]] == second, "the second round"
    said = capsys.readouterr()
    assert said.err.startswith("Starts 5 servers one after another (base, steered, ngram, draft, prompts), together ")
    assert "16 requests as Poisson arrivals, 1 a second" in said.err
    assert "| 8 | 2 | 50.0 | 40.0 | 0.80 | 0.80 | 0.50 |" in said.out
    assert "| poisson | 2 | 50.0 | 40.0 |  | 0.80 | 0.50 |" in said.out
    assert "| 1 | base | 4 | 30.0 | 40.0 | 20.0 | 20.0 |" in said.out
    assert "| 8 | ngram | 60.0 | 1.50 | 2.00 | 40 % | 2.20 |" in said.out
    assert "| 8 | prompts | 30.0 | 0.75 | 0.71 |  |  |" in said.out


@pytest.mark.parametrize("when", ["start", "8"])
def test_an_arm_that_fails_loses_nothing_of_the_others(rig, capsys, when):
    rig.broken["ngram"] = when
    assert rig.run("--rounds", "1") == 1
    said = capsys.readouterr()
    assert said.err.count("ngram is left out: ") == 1
    assert "| 8 | draft | 20.0 | 0.50 | 0.50 | 40 % | 2.20 |" in said.out
    assert "| 8 | ngram |" not in said.out
    assert ("| 1 | ngram |" in said.out) == (when == "8"), "what was measured of it is kept"
    assert {"base", "steered", "draft"} <= set(rig.ended)


def test_a_run_is_made_in_pieces(rig, capsys):
    assert rig.run("--arms", "steered", "--rounds", "1") == 0
    assert "| 8 | 1 |  | 40.0 |  |  | 0.50 |" in capsys.readouterr().out, "no ratio without the base"
    assert rig.run("--arms", "base", "--rounds", "1") == 0
    assert "| 8 | 1 | 50.0 | 40.0 | 0.80 | 0.80 | 0.50 |" in capsys.readouterr().out
    with pytest.raises(bench_vllm.ProxyTuneError, match="was measured with other settings"):
        rig.run("--new-tokens", "8")


def test_nothing_measured_is_an_error(rig):
    rig.broken["base"] = "start"
    with pytest.raises(bench_vllm.ProxyTuneError, match="no arm could be measured"):
        rig.run("--arms", "base")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--arms", "base,fast"], "--arms fast is not one of base, steered, ngram, draft"),
        (["--arms", "base", "--draft-model", "x"], "--draft-model is for the arm draft"),
        (["--json", "nowhere/x.json"], "there is no directory nowhere"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(words, said, capsys):
    with pytest.raises(SystemExit):
        bench_vllm.options(["demo", *words])
    assert said in capsys.readouterr().err
