"""scripts/bench_gpu.py on a tiny pair on the CPU: the code that runs on a GPU, but for the device."""

from __future__ import annotations

import json

import pytest
import torch

import bench_gpu

TINY = ("--device", "cpu", "--pair", "tiny", "--dtype", "float32", "--lengths", "6/40", "--repeats", "1")


@pytest.mark.slow
def test_a_pair_is_measured_with_drafts_that_a_coin_accepts(tmp_path, capsys):
    status = bench_gpu.main([*TINY, "--batch", "1,2", "--acceptance", "0.3,0.9", "--json", str(tmp_path / "x.json")])
    assert status == 0
    found = json.loads((tmp_path / "x.json").read_text("utf-8"))
    assert [(one["rows"][0]["batch"], one["coin"]) for one in found] == [(1, 0.3), (1, 0.9), (2, 0.3), (2, 0.9)]
    said = capsys.readouterr().out
    for one in found:
        arms = [row["arm"] for row in one["rows"]]
        assert arms == [*bench_gpu.ARMS][: 4 if one["drafts"] else 3]
        assert one["outputs"]["compared"] == 0
        assert f"accepted with probability {one['coin']}" in said
        if one["drafts"]:
            stats = one["rows"][-1]["speculation"]
            assert stats["looked_up"] == 0 < stats["drafted"]


@pytest.mark.slow
def test_a_number_of_drafts_is_kept_and_the_coin_decides(tmp_path):
    asked = ("--batch", "2", "--acceptance", "0.2,0.9", "--drafts", "3", "--json", str(tmp_path / "x.json"))
    assert bench_gpu.main([*TINY, *asked]) == 0
    found = json.loads((tmp_path / "x.json").read_text("utf-8"))
    assert [one["drafts"] for one in found] == [3, 3]
    few, many = (one["rows"][-1]["acceptance"] for one in found)
    assert few < many


def test_the_coin_accepts_each_draft_with_its_probability():
    torch.manual_seed(0)
    drafts, scores = torch.zeros(20000, 3, dtype=torch.long), torch.eye(5)[[1, 2, 3]].expand(20000, 3, 5)
    n_accepted, tokens = bench_gpu.coin(0.7)(drafts, scores)
    shares = torch.bincount(n_accepted, minlength=4) / 20000
    torch.testing.assert_close(shares, torch.tensor([0.3, 0.21, 0.147, 0.343]), atol=0.01, rtol=0)
    assert (tokens[n_accepted == 1] == 2).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--pair", "1B/1B"], "no pair is called '1B/1B'; known are"),
        ([*TINY, "--lengths", "6"], "lengths are PROMPT/OUTPUT"),
        ([*TINY, "--batch", "none"], "invalid literal"),
        ([], "torch sees no CUDA device here"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(options, said, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu.main(options) == 2
    out = capsys.readouterr()
    assert said in out.err
    assert out.err.count("\n") == 1
    assert out.out == ""
