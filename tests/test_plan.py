"""``proxytune plan``: hand-worked numbers, shapes against loaded models, the probe, and how it fails."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig

from proxytune import ProxyTuneConfig, ProxyTunedForCausalLM, load_recipe
from proxytune.decoding.cost import Cost, Costs
from proxytune.recipe.check import count_recipe
from proxytune.speed import bench
from proxytune.speed import plan as planning
from proxytune.speed.options import ARMS, MemberOptions, PlanOptions
from proxytune.speed.plan import RecipeCosts, cost_of_forwards, plan_recipe, predict
from support import tiny
from support.commands import fails, run

pytestmark = pytest.mark.usefixtures("no_progress")


@pytest.fixture(scope="module")
def lora_recipe(shelf):
    values = {"experts": [{"expert": {"model": "../anti", "adapter": "../adapter"}, "anti_expert": "../anti"}]}
    return tiny.write_recipe(shelf / "plan_recipe", values)


def trio(base: float, small: float) -> RecipeCosts:
    """M of ``base`` bytes, M+ and M- of ``small`` each, nothing shared, rows for nothing."""
    return RecipeCosts(base, base + 2 * small, Costs(Cost(base), Cost(small), 1, [(Cost(small), 1)]))


# -- the arithmetic -------------------------------------------------------------------------------------------
def test_a_large_base_gains():
    """70B and 7B at an acceptance of 0.8. If the drafting lane read every last draft, a cycle of 6 drafts would cost
    70 + 7 + 7 * 7 = 126 for (1 - 0.8^7) / 0.2 = 3.95 tokens: 2.2 times the plain 70B and 2.6 times the naive loop. It
    reads the last one only where all were accepted, which is a little better still.
    """
    (one,) = predict({1: trio(70, 7)}, [0.8], timed=False)
    assert one.naive == one.shared == pytest.approx(84 / 70)
    tokens = (1 - 0.8**7) / 0.2
    assert 70 * tokens / 126 == pytest.approx(2.2, abs=0.01)
    assert 84 * tokens / 126 == pytest.approx(2.63, abs=0.01)
    assert one.n_drafts == 6
    assert one.ratio_to_base == pytest.approx(70 * tokens / (126 - 7 * (1 - 0.8**6)))
    assert one.ratio_to_naive == pytest.approx(84 * tokens / (126 - 7 * (1 - 0.8**6)))


def test_a_base_of_twice_the_size_cannot_win():
    (one,) = predict({1: trio(13, 7)}, [0.8], timed=False)
    assert one.ratio_to_base < 1 < one.ratio_to_naive
    (hopeless,) = predict({1: trio(13, 7)}, [0.0], timed=False)
    assert hopeless.n_drafts == 0
    assert hopeless.speculative == hopeless.shared == pytest.approx(27 / 13)


def test_what_a_cycle_adds_counts_against_drafting():
    free = trio(70, 7)
    dear = RecipeCosts(free.base_alone, free.naive, free.steered, cycle_overhead=400.0)
    assert dear.speculative(0.8, 1) == (84.0, 0)
    assert free.speculative(0.8, 1)[0] < 84


# -- from shapes ----------------------------------------------------------------------------------------------
def test_what_is_read_is_what_the_loaded_lanes_read(lora_recipe):
    plan = plan_recipe(load_recipe(lora_recipe), PlanOptions(device="cpu"))
    model = ProxyTunedForCausalLM.from_pretrained(lora_recipe)
    assert [lane.members for lane in plan.lanes] == [("base",), ("expert.expert", "expert.anti_expert")]
    assert [lane.n_seats for lane in plan.lanes] == [len(lane.seats) for lane in model.lanes]
    assert [lane.read_bytes for lane in plan.lanes] == [lane.read_bytes for lane in model.lanes]
    assert plan.weight_bytes["shared"] == sum(p.nbytes for p in model.parameters())
    apart = ProxyTunedForCausalLM.from_pretrained(lora_recipe, share=False)
    assert plan.weight_bytes["naive"] == sum(p.nbytes for p in apart.parameters())
    assert plan.weight_bytes["base"] == sum(p.nbytes for p in model.base.parameters())


def test_packing_is_counted(lora_recipe):
    """A copy of a tied head, and the quick head of the lane that drafts."""
    plan = plan_recipe(load_recipe(lora_recipe), PlanOptions(members=MemberOptions(pack=True), device="cpu"))
    model = ProxyTunedForCausalLM.from_pretrained(lora_recipe, pack=True)
    drafting = model.lanes[model.drafting.lane]
    quick = sum(tensor.nbytes for tensor in drafting.quick_head.buffers())
    n_vocab, width = drafting.quick_head.out_features, drafting.quick_head.in_features
    assert plan.lanes[model.drafting.lane].quick_head_bytes == n_vocab * width
    assert n_vocab * width < quick <= (n_vocab + 31) * (width + 31) + 2 * (n_vocab + 31), "with scales and padding"
    packed = bench.tensor_bytes(module for lane in model.lanes for module in lane.model.modules())
    assert plan.weight_bytes["shared"] - n_vocab * width == pytest.approx(packed, rel=0.02)
    assert model.costs.draft.fixed < ProxyTunedForCausalLM.from_pretrained(lora_recipe).costs.draft.fixed
    assert len(model.costs.others) == 1, "its own head reads the drafts once a cycle"


def test_tied_embeddings_are_read_and_others_are_not(tmp_path):
    sizes = {}
    for tied in (True, False):
        place = tiny.write_model(tmp_path / str(tied), "llama", "base", 1, tie_word_embeddings=tied)
        config = ProxyTuneConfig(base=str(place), experts=[{"expert": str(place)}])
        member = count_recipe(config)[0][0]
        sizes[tied] = (member.weight_bytes, member.read_bytes)
    embedding = tiny.VOCAB * 32 * 4
    assert sizes[True][0] == sizes[True][1] == sizes[False][1]
    assert sizes[False][0] - sizes[False][1] == embedding


def test_configs_alone_are_enough(tmp_path):
    for name, layers in (("big", 20), ("little", 2)):
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100}
        LlamaConfig(**shape, num_hidden_layers=layers, dtype="bfloat16").save_pretrained(tmp_path / name)
    little = str(tmp_path / "little")
    config = ProxyTuneConfig(base=str(tmp_path / "big"), experts=[{"expert": little, "anti_expert": little}])
    plan = plan_recipe(config, PlanOptions((0.5, 0.8), (1, 4)))
    assert [(one.batch, one.acceptance) for one in plan.predictions] == [(1, 0.5), (1, 0.8), (4, 0.5), (4, 0.8)]
    per_layer = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert plan.lanes[0].read_bytes == 2 * (20 * per_layer + 64 + 64 * 100)
    assert plan.lanes[0].dtype == "bfloat16"
    assert all(one.base_seconds is None for one in plan.predictions)


def test_the_command_prints_tables_and_writes_json(lora_recipe, tmp_path):
    made = run(
        "plan",
        lora_recipe,
        "--acceptance",
        "0.5,0.9",
        "--batch-size",
        "1,2",
        "--device",
        "cpu",
        "--output",
        tmp_path / "x",
    )
    assert "expert.expert, expert.anti_expert" in made.stdout
    assert made.stderr == ""
    found = json.loads((tmp_path / "x").read_text("utf-8"))
    assert len(found["predictions"]) == 4
    assert found["compared"] == []
    assert all(one["shared"] <= one["naive"] for one in found["predictions"])


# -- from a probe ---------------------------------------------------------------------------------------------
def test_a_line_goes_through_the_forwards():
    cost = cost_of_forwards({1: 0.11} | {rows: 0.3 + 0.01 * rows for rows in (2, 4, 8)})
    assert cost.per_row == pytest.approx(0.01)
    assert cost.fixed == pytest.approx(0.10)
    assert [cost.of(rows) for rows in (1, 2, 16)] == pytest.approx([0.11, 0.32, 0.46])
    falling = cost_of_forwards({rows: 0.3 - 0.001 * rows for rows in (4, 8, 16)})
    assert falling.per_row == 0.0, "noise does not make rows a gain"
    assert 0.28 < falling.fixed < 0.3


@pytest.mark.slow
def test_a_probe_is_compared_with_a_bench(lora_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "PROBE_SECONDS", 0.0)
    measured = tmp_path / "bench.json"
    run("bench", lora_recipe, "--batch-size", "1", "--lengths", "6/40,6/5", "--repeats", "1", "--output", measured)
    made = run(
        "plan", lora_recipe, "--probe", "--batch-size", "1", "--against", measured, "--output", tmp_path / "plan.json"
    )
    assert "beside the bench" in made.stdout
    found = json.loads((tmp_path / "plan.json").read_text("utf-8"))
    arms = {one["arm"] for one in found["compared"]}
    assert {"base", "plain_loop", "composite", "shared"} <= arms <= set(ARMS)
    assert {one["output"] for one in found["compared"]} == {40}
    for one in found["compared"]:
        assert one["predicted"] > 0
        assert one["error"] == pytest.approx(one["predicted"] / one["measured"] - 1)
    assert all(one["base_seconds"] > 0 for one in found["predictions"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--acceptance", "1.2"], "an acceptance lies between 0 and 1"),
        (["--acceptance", "x"], "--acceptance is numbers"),
        (["--batch-size", "0"], "at least 1"),
        (["--device", "tpu"], "--device is cpu or cuda"),
        (["--device", "cpu", "--probe"], "--device is for a prediction without --probe"),
        (["--against", "x.json"], "need --probe"),
        (["--options", "int3"], "no member option is called"),
        (["--options", "auto+compile"], "a plan knows nothing of compiled members"),
        (["--probe", "--against", "nowhere.json"], "nowhere.json: No such file"),
    ],
)
def test_bad_input_is_one_sentence(shelf, options, said):
    assert said in fails("plan", shelf / "recipe", *options)


def test_a_file_that_bench_did_not_write_is_refused(shelf, tmp_path):
    (tmp_path / "x.json").write_text("[]", "utf-8")
    assert "was not written by" in fails("plan", shelf / "recipe", "--probe", "--against", tmp_path / "x.json")
