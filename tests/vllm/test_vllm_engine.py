"""One engine in this process: its greedy tokens are the transformers engine's, whatever vLLM does with the batch."""

from __future__ import annotations

import pytest
import torch

from proxytune.recipe.rules import RULES
from support import tiny
from support.served import (
    N_NEW,
    NGRAM,
    ROWS,
    Reference,
    assert_all_same,
    counted,
    engine,
    expert,
    generate,
    quantized,
    wide,
)

# -- families -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", tiny.FAMILIES)
def test_families_ragged_mixed_alpha(shelf, base):
    """A base of each family, steered by an expert of another; four strengths in one ragged batch."""
    families = list(tiny.FAMILIES)
    other = families[(families.index(base) + 1) % len(families)]
    recipe = shelf.recipe(f"of-{base}", base, experts=[expert("e", f"{other}-small", f"{other}-anti", 0.8)])
    with engine(recipe) as llm:
        tokens = generate(llm, ROWS, alphas=[{}, {"alpha": 0.0}, {"alpha": [-0.5]}, {"alpha.e": 2}])
    expected = Reference(recipe).greedy(ROWS, alpha=[[0.8], [0.0], [-0.5], [2.0]])
    assert_all_same(tokens, expected)
    unsteered = Reference(recipe).greedy(ROWS, alpha=[[0.0]] * 4)
    assert all(a[0] != b[0] for a, b in zip(expected[2:], unsteered[2:])), "steering shows, or nothing was tested"


OWN = {"mean": {"gate": {"warmup": 6}}, "dynamic": {}, "sum": {"gate": {"between": ["", "e"]}}}


@pytest.mark.parametrize("own", OWN)
def test_every_rule_in_one_batch(shelf, own):
    """Requests with each rule, with gates, and one that asks for nothing, in one ragged batch."""
    experts = [expert("e", "llama-small", "llama-anti", 0.6), expert("f", "qwen2-small", "qwen2-anti", 0.4)]
    recipe = shelf.recipe(f"of-{own}", "llama", experts=experts, combine=own, **OWN[own])
    asked = [*({"combine": rule} for rule in RULES), {}, {"gate": "unsure=0.5"}, {"gate": "kl=0.1", "combine": "sum"}]
    asked += [{"gate": said, "combine": "sum"} for said in ("decay=5", "cycle=2", "bet=0.05", "none")]
    rows = [ROWS[at % len(ROWS)] for at in range(len(asked))]
    reference = Reference(recipe)
    for alpha, gate in ((None, "between=...{}"), (0.0, "between={}...")):  # a text that a model writes in its answer
        ids, _ = reference.greedy(ROWS[:1], gate="none", alpha=alpha and [[alpha, alpha]])[0]
        written = [reference.model.tokenizer.decode([token]) for token in ids[2:]]
        asked.append({"gate": gate.format(next(text for text in written if text.strip()))})
        rows.append(ROWS[0])
    with engine(recipe) as llm:
        tokens = generate(llm, rows, alphas=asked)
    for row, extra, ours in zip(rows, asked, tokens):
        assert_all_same([ours], reference.greedy([row], **extra))


def prompt_logprobs(llm, row, extra=None):
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, extra_args=extra)
    (output,) = llm.generate([{"prompt_token_ids": row}], params, use_tqdm=False)
    return torch.tensor([entry[token].logprob for token, entry in zip(row[1:], output.prompt_logprobs[1:])])


@pytest.mark.parametrize("side", ["base", "expert"])
def test_a_member_is_quantized_as_its_checkpoint_says(shelf, side):
    """Only that one: the others' weights are read as they are, whoever's config comes first."""
    names = {"base": "qwen2", "expert": "llama-small"}
    if not (shelf.root / f"{names[side]}-w8a8").exists():
        quantized(shelf.root / f"{names[side]}-w8a8", shelf.root / names[side])
    plain = shelf.recipe(f"plain-{side}", names["base"], experts=[expert("e", names["expert"], "llama-anti")])
    names[side] += "-w8a8"
    recipe = shelf.recipe(f"w8a8-{side}", names["base"], experts=[expert("e", names["expert"], "llama-anti")])
    row = ROWS[3]
    with engine(recipe) as llm:
        seen = prompt_logprobs(llm, row)
        kinds = {name: type(one.quant_method).__name__ for name, one in linears(llm)}
    with torch.no_grad():
        reference = Reference(plain).model
        at = (range(len(row) - 1), row[1:])
        exact, unsteered = (reference(torch.tensor([row]), alpha=a).logits[0].log_softmax(-1)[at] for a in (1.0, 0.0))
    error, effect = (seen - exact).abs().mean(), (unsteered - exact).abs().mean()
    assert 1e-4 < error < 0.4 * effect, "rounded to 8 bits, and otherwise the same"
    assert kinds == {
        name: "CompressedTensorsLinearMethod" if name == side else "UnquantizedLinearMethod"
        for name in ("base", "expert", "anti_expert")
    }


def linears(llm):
    """One linear layer of each part."""
    model = llm.llm_engine.model_executor.driver_worker.model_runner.model
    return [(part, model.part(part).model.layers[0].mlp.down_proj) for part in model.parts]


# -- one recipe with everything -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rich(shelf):
    """Two experts and a contrast: LoRA, a shared anti-expert, a sliding base, other widths, a plausibility mask."""
    root = shelf.root
    wide(root / "roomy", "mistral", "base", 40, vocab_size=tiny.VOCAB + 9, tokenizer_=None)
    wide(root / "short", "qwen2", "small", 41, max_position_embeddings=96)
    tiny.write_adapter(root / "lora", root / "qwen2-anti", 5, use_rslora=True, rank_pattern={"q_proj": 2})
    more = tiny.tokenizer()
    more.add_tokens(["<more>"])  # an id that the experts lack
    return shelf.recipe(
        "rich",
        "roomy",
        tokenizer_=more,
        experts=[
            expert("tuned", "qwen2-anti", "qwen2-anti", 0.7, adapter="../lora"),
            expert("second", "short", "qwen2-anti", 0.4),
            expert("contrast", None, "gpt2-small", 0.3),
        ],
        plausibility=0.01,
    )


@pytest.fixture(scope="module")
def rich_engine(rich):
    with engine(rich, disable_log_stats=False) as llm:
        yield llm


@pytest.fixture(scope="module")
def rich_reference(rich):
    return Reference(rich)


def test_several_experts_lora_widths_and_a_mask(rich_engine, rich_reference):
    alphas = [[0.7, 0.4, 0.3], [1.5, 0.4, 0.0], [1.0, -1.0, 0.2], [0.0, 0.0, 0.0]]
    extra = [None, {"alpha.tuned": 1.5, "alpha.contrast": 0}, {"alpha": [1.0, -1, 0.2]}, {"alpha": 0}]
    assert_all_same(generate(rich_engine, ROWS, alphas=extra), rich_reference.greedy(ROWS, alpha=alphas))


def test_weights_of_members(rich_engine, rich_reference):
    """Arms of an evaluation from one engine: the base, an expert alone, their mean, in one batch with a mixture."""
    asked = [{"weight.base": 1}, {"weight.tuned.expert": 2.0}, {"weight.base": 0.5, "weight.second.expert": 0.5}, {}]
    tokens = generate(rich_engine, ROWS, alphas=asked)
    model = rich_reference.model
    for row, weights, ours in zip(ROWS, asked[:3], tokens):
        ids = torch.tensor([[*row, *ours]])
        with torch.no_grad():
            logits = model(ids, output_member_logits=True).member_logits
        shared = min(each.shape[-1] for each in logits.values())
        mixed = sum(w * logits[name.removeprefix("weight.")][0, ..., :shared] for name, w in weights.items())
        seen = mixed[len(row) - 1 : -1]
        assert_all_same([ours], [(seen.argmax(dim=-1).tolist(), list(seen))])
    assert_all_same(tokens[3:], rich_reference.greedy(ROWS[3:]))
    seen = prompt_logprobs(rich_engine, ROWS[3], {"weight.base": 1})
    with torch.no_grad():
        logits = model(torch.tensor([ROWS[3]]), output_member_logits=True).member_logits["base"]
    base = logits[0, :, : tiny.VOCAB].log_softmax(dim=-1)
    assert seen.tolist() == pytest.approx([float(base[at, token]) for at, token in enumerate(ROWS[3][1:])], abs=2e-3)


def test_equal_members_are_held_once(rich_engine):
    model = rich_engine.llm_engine.model_executor.driver_worker.model_runner.model
    assert model.parts == ["base", "expert", "anti_expert", "expert2", "anti_expert3"]
    assert model.owner["second.anti_expert"] == "anti_expert"


def test_context_and_vocabulary_are_what_all_members_have(rich_engine):
    config = rich_engine.llm_engine.vllm_config.model_config
    assert config.max_model_len == 96
    assert config.get_vocab_size() == tiny.VOCAB


def test_prompt_logprobs_are_the_mixtures(rich_engine, rich_reference):
    from vllm import SamplingParams

    alpha = {"alpha": [1.0, -0.5, 0.2]}
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, extra_args=alpha)
    (output,) = rich_engine.generate([{"prompt_token_ids": ROWS[3]}], params, use_tqdm=False)
    with torch.no_grad():
        logits = rich_reference.model(torch.tensor([ROWS[3]]), alpha=torch.tensor([alpha["alpha"]])).logits[0]
    log_p = logits.log_softmax(dim=-1)
    seen = [entry[token].logprob for token, entry in zip(ROWS[3][1:], output.prompt_logprobs[1:])]
    expected = [float(log_p[at, token]) for at, token in enumerate(ROWS[3][1:])]
    assert seen == pytest.approx(expected, abs=2e-3)


def test_sampled_tokens_are_distributed_as_the_mixture(rich_engine, rich_reference):
    """Total variation against the exact distribution, under the bound that holds with 1 - 1e-6 for this many draws."""
    from vllm import SamplingParams

    n = 4000
    alpha = {"alpha": [0.5, 0.2, 0.1]}
    params = SamplingParams(n=n, max_tokens=1, temperature=1.3, seed=5, extra_args=alpha, ignore_eos=True)
    (output,) = rich_engine.generate([{"prompt_token_ids": ROWS[0]}], params, use_tqdm=False)
    with torch.no_grad():
        logits = rich_reference.model(torch.tensor([ROWS[0]]), alpha=torch.tensor([alpha["alpha"]])).logits[0, -1]
    p = (logits / 1.3).softmax(dim=-1)
    counts = torch.bincount(torch.tensor([one.token_ids[0] for one in output.outputs]), minlength=len(p))[: len(p)]
    assert not counts[p == 0].any(), "what the mask forbids was never drawn"
    distance = 0.5 * float((counts / n - p).abs().sum())
    # E[TV] <= sum sqrt(p (1 - p) / n) / 2, and one draw moves it by 1 / n at most (McDiarmid).
    bound = 0.5 * float((p * (1 - p) / n).sqrt().sum()) + (6 * 2.303 / (2 * n)) ** 0.5
    assert 0 < distance < bound
    base = (rich_reference.model(torch.tensor([ROWS[0]]), alpha=0.0).logits[0, -1] / 1.3).softmax(dim=-1)
    assert 0.5 * float((counts / n - base).abs().sum()) > bound, "the base's distribution is another"


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"alpha": [1.0, 2.0]}, "2 alphas for 3 experts"),
        ({"alpha": "0.5"}, "finite number"),
        ({"alpha": float("nan")}, "finite number"),
        ({"alpha.tuned": [1.0]}, "finite number"),
        ({"alpha.none": 1.0}, "no expert is called 'none'"),
        ({"weight.tuned": 1.0}, "there is no member 'tuned' to give a weight"),
        ({"weight.base": -1.0}, "weights of members are 0 or more"),
        ({"weight.base": 0}, "weights of members are 0 or more"),
        ({"weight.base": "1"}, "the weight of base must be"),
        ({"weight.base": 1.0, "alpha": 1.0}, "weights of members or alpha, not both"),
        ({"member_input_ids.base": [5]}, "members of this recipe read one prompt"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_bad_alpha_is_refused_and_the_engine_lives_on(rich_engine, rich_reference, extra, said):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=said):
        generate(rich_engine, ROWS[:1], 2, alphas=[extra])
    assert_all_same(generate(rich_engine, ROWS[:1], 4), rich_reference.greedy(ROWS[:1], 4))


def test_a_bad_alpha_in_the_worker_is_no_end(rich_engine, rich_reference, monkeypatch):
    """The frontend lets none through; if one came, the worker must not fall over it."""
    from proxytune.vllm import frontend

    monkeypatch.setattr(frontend, "_served", {})
    assert_all_same(generate(rich_engine, ROWS[:1], 4, alphas=[{"alpha": "x"}]), rich_reference.greedy(ROWS[:1], 4))


def test_an_id_that_a_member_lacks_is_refused_and_the_engine_lives_on(rich_engine, rich_reference, monkeypatch):
    """The recipe's tokenizer knows one id that only the base has, and the transformers engine refuses it too."""
    from vllm.exceptions import VLLMValidationError

    from proxytune.errors import PromptError
    from proxytune.vllm import frontend

    said = f"has token id {tiny.VOCAB}, but member '[a-z.]*' has only {tiny.VOCAB} tokens"
    with pytest.raises(VLLMValidationError, match=said):
        generate(rich_engine, [[1, tiny.VOCAB, 7]], 4)
    with pytest.raises(PromptError, match=said):
        rich_reference.greedy([[1, tiny.VOCAB, 7]], 4)
    monkeypatch.setattr(frontend, "_served", {})
    assert len(generate(rich_engine, [[1, tiny.VOCAB, 7]], 4)[0]) == 4, "in the worker it would be no end either"
    assert_all_same(generate(rich_engine, ROWS[:1], 4), rich_reference.greedy(ROWS[:1], 4))


# -- a batch under pressure -----------------------------------------------------------------------------------

SHARED = [1, *range(40, 103)]  # two blocks that many prompts begin with
LONG = [[*SHARED, *tail] for tail in ([5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15], [16, 17, 18], [19])]
STRONG = [{"alpha": value} for value in (1.0, 0.5, 0.0, -0.5, 2.0, 0.25)]


@pytest.fixture(scope="module")
def pressed(shelf):
    """An engine with a KV cache too small for its batch, which reads prompts in chunks of 32 tokens."""
    recipe = shelf.recipe("pressed", "gemma3", experts=[expert("e", "qwen2-small", "qwen2-anti")])
    options = {"block_size": 32, "max_num_batched_tokens": 32, "num_gpu_blocks_override": 34, "max_model_len": 160}
    with engine(recipe, **options, disable_log_stats=False, enable_prefix_caching=True) as llm:
        yield llm, Reference(recipe)


def test_chunked_prefill_preemption_and_mixed_alpha(pressed):
    llm, reference = pressed
    preempted = counted(llm, "vllm:num_preemptions")
    tokens = generate(llm, LONG, 60, alphas=STRONG)
    assert counted(llm, "vllm:num_preemptions") > preempted, "nothing was preempted, so nothing was tested"
    assert_all_same(tokens, reference.greedy(LONG, 60, alpha=[[one["alpha"]] for one in STRONG]))


def test_prefix_cache_hits_serve_every_alpha(pressed):
    """The members' KV does not depend on alpha, so a prefix read at one strength serves another."""
    from vllm import SamplingParams

    llm, reference = pressed
    llm.reset_prefix_cache()
    generate(llm, LONG[:1], 1, alphas=[{"alpha": 1.0}])
    for row, extra in zip(LONG[1:4], STRONG[1:4]):
        params = SamplingParams(temperature=0, max_tokens=N_NEW, ignore_eos=True, extra_args=extra)
        (output,) = llm.generate([{"prompt_token_ids": row}], params, use_tqdm=False)
        assert output.num_cached_tokens >= 32
        assert_all_same([list(output.outputs[0].token_ids)], reference.greedy([row], N_NEW, alpha=[[extra["alpha"]]]))


# -- speculation ----------------------------------------------------------------------------------------------

DRAFTS = {
    "ngram": NGRAM,
    "draft": {"method": "draft_model", "num_speculative_tokens": 3},
}


@pytest.mark.parametrize("kind", DRAFTS)
def test_speculation_changes_no_token(shelf, kind):
    """Drafts are verified against the mixture, at each request's own alpha; bad alphas are still refused."""
    from vllm.exceptions import VLLMValidationError

    # Random models agree on nothing. Where few ids may be chosen, n-grams come again; and at a large alpha without an
    # anti-expert the mixture says what the expert says.
    few = [5, 6, 7] if kind == "ngram" else None
    term = expert("e", "llama-small", "llama-anti" if kind == "ngram" else None)
    recipe = shelf.recipe(f"drafted-{kind}", "llama", experts=[term])
    speculative = dict(DRAFTS[kind])
    if kind == "draft":
        speculative["model"] = str(shelf.root / "llama-small")
    extra = [{}, {"alpha": 0.0}, {"alpha": -0.5}, {"alpha": 8.0}]
    with engine(recipe, speculative_config=speculative, disable_log_stats=False) as llm:
        tokens = generate(llm, ROWS, 40, alphas=extra, allowed_token_ids=few)
        drafted = counted(llm, "vllm:spec_decode_num_draft_tokens")
        accepted = counted(llm, "vllm:spec_decode_num_accepted_tokens")
        with pytest.raises(VLLMValidationError, match="finite number"):
            generate(llm, ROWS[:1], 2, alphas=[{"alpha": "much"}])
    assert 0 < accepted < drafted, "some drafts were taken and some were not, or only half was tested"
    assert_all_same(tokens, Reference(recipe).greedy(ROWS, 40, [[1.0], [0.0], [-0.5], [8.0]], few))


def test_compiled_members_are_not_mixed_up(shelf, tmp_path, monkeypatch):
    """Expert and anti-expert have one shape: a compiled graph of one must not stand in for the other."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    recipe = shelf.recipe("compiled", "llama", experts=[expert("e", "qwen2-small", "qwen2-anti")])
    with engine(recipe, enforce_eager=False) as llm:
        tokens = generate(llm, ROWS, alphas=[None, None, {"alpha": 0.5}, {"alpha": 2.0}])
    assert_all_same(tokens, Reference(recipe).greedy(ROWS, alpha=[[1.0], [1.0], [0.5], [2.0]]))


# -- the embedded demo ----------------------------------------------------------------------------------------


def test_the_demo():
    """A real model: a base that came from a GGUF file, and a LoRA expert on the anti-expert's weights."""
    from proxytune.demo import word_problems_recipe
    from proxytune.evaluation.problems import make_problems

    recipe = word_problems_recipe()
    alphas = [1.0, 0.0, 0.5, -0.5, 1.5, 1.0]
    with engine(recipe) as llm:
        tokenizer = llm.get_tokenizer()
        rows = [tokenizer.encode(problem.prompt) for problem in make_problems("test", len(alphas), seed=7)]
        tokens = generate(llm, rows, alphas=[{"alpha.math": alpha} for alpha in alphas])
        parts = llm.llm_engine.model_executor.driver_worker.model_runner.model.parts
    assert parts == ["base", "expert", "anti_expert"], "merged, the expert is a model of its own"
    reference = Reference(recipe)
    assert_all_same(tokens, reference.greedy(rows, alpha=[[alpha] for alpha in alphas]))
    assert "####" in tokenizer.decode(tokens[0]), "steered, it answers in the experts' form"
    assert tokens[1] != tokens[0]
