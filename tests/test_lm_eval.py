"""lm_eval takes a recipe, and its log-likelihoods are the plain loop's."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

import tiny
from oracle import Oracle
from proxytune import ProxyTunedForCausalLM

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'proxytune[eval]'")

REQUESTS = [
    ("Question: how many apples are there? Answer:", " there are seven apples."),
    ("The quick brown fox", " jumps"),
    ("the dog", " sleeps, and the lazy fox"),
]


@pytest.fixture(scope="module")
def oracle(shelf):
    base, expert, anti = (AutoModelForCausalLM.from_pretrained(shelf / name) for name in ("base", "expert", "anti"))
    return Oracle(base, [("expert", expert, anti, 0.5)])


def harness(kind, shelf, tokenizer, **kwargs):
    from lm_eval.models.huggingface import HFLM

    settings = {"device": "cpu", "batch_size": 2, "dtype": "float32", "max_length": tiny.CONTEXT, "add_bos_token": True}
    if kind == "path":
        return HFLM(pretrained=str(shelf / "recipe"), alpha=0.5, **settings, **kwargs)
    model = ProxyTunedForCausalLM.from_pretrained(shelf / "recipe", alpha=0.5)
    return HFLM(pretrained=model, tokenizer=tokenizer, **settings, **kwargs)


@pytest.mark.parametrize("kind", ["path", "instance"])
def test_loglikelihoods_are_the_plain_loops(kind, shelf, tokenizer, oracle):
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(REQUESTS)]
    found = harness(kind, shelf, tokenizer).loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (score, is_greedy) in zip(REQUESTS, found, strict=True):
        prompt = tokenizer(context)["input_ids"]
        tokens = tokenizer(context + continuation)["input_ids"][len(prompt) :]
        log_p = oracle.logits(prompt, tokens)[:-1].log_softmax(dim=-1)
        assert score == pytest.approx(sum(float(row[token]) for row, token in zip(log_p, tokens)), abs=1e-3)
        assert is_greedy == (log_p.argmax(dim=-1).tolist() == tokens)


def test_generation_is_the_plain_loops(shelf, tokenizer, oracle):
    from lm_eval.api.instance import Instance

    contexts = [context for context, _ in REQUESTS]
    options = {"until": ["never said"], "max_gen_toks": 6, "do_sample": False}
    requests = [Instance("generate_until", {}, (context, options), index) for index, context in enumerate(contexts)]
    found = harness("instance", shelf, tokenizer).generate_until(requests, disable_tqdm=True)
    for context, text in zip(contexts, found, strict=True):
        tokens, _ = oracle.greedy(tokenizer(context)["input_ids"], 6, eos=tiny.EOS)
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)
