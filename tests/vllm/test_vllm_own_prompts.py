"""Members that each read their own prompt, in the real engine: its greedy tokens are the transformers engine's."""

from __future__ import annotations

import pytest
import torch
from vllm.exceptions import VLLMValidationError

from proxytune.errors import ProxyTuneError
from support import tiny
from support.served import (
    N_NEW,
    NGRAM,
    STRENGTHS,
    TEXTS,
    Reference,
    assert_all_same,
    counted,
    engine,
    expected,
    expert,
    guided,
    of_prompts,
    submit,
    tokens_of,
    wide,
)

NEGATIVE = [None, "the lazy dog sleeps", "no", None, "Steering a large model with two small ones", "the {prompt} dog"]
CHAT = {"kind": "chat", "system": "the rules", "user_prefix": "Question: ", "response_prefix": "the answer"}
LONG = {
    "kind": "template",
    "template": "the quick brown fox jumps over the lazy dog, and the dog sleeps. " * 6 + "{prompt}",
}
SHORT = {"kind": "negative", "template": "no"}


@pytest.fixture(scope="module")
def mixed(shelf):
    """A chat expert, an anti-expert with a long prompt, and a raw base."""
    return of_prompts(shelf, "mixed-prompts", expert=CHAT, anti_expert=LONG)


@pytest.fixture(scope="module")
def wanted(mixed):
    return expected(Reference(mixed), TEXTS, STRENGTHS)


@pytest.mark.parametrize("chunk", [512, 16])
def test_ragged_batches_in_chunks(mixed, wanted, chunk):
    with engine(mixed, block_size=32, max_num_batched_tokens=chunk, max_model_len=256) as llm:
        outputs = submit(llm, TEXTS, STRENGTHS)
        assert_all_same(tokens_of(outputs), wanted)
        alone = [tokens_of(submit(llm, [text], [extra]))[0] for text, extra in zip(TEXTS, STRENGTHS)]
        tokenizer = llm.get_tokenizer()
    assert_all_same(alone, wanted)
    assert [output.prompt_token_ids for output in outputs] == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("base", ["gemma3", "mistral", "gpt2", "qwen2"])
def test_families(shelf, base):
    """Also layers that slide, absolute positions, and the base with a prompt of its own."""
    families = list(tiny.FAMILIES)
    other = families[(families.index(base) + 1) % len(families)]
    recipe = of_prompts(shelf, f"prompts-{base}", base, other, base_prompt=CHAT, expert=SHORT, anti_expert=LONG)
    with engine(recipe, block_size=32, max_num_batched_tokens=16, max_model_len=256) as llm:
        outputs = submit(llm, TEXTS, STRENGTHS)
        runner = llm.llm_engine.model_executor.driver_worker.model_runner
        layers = runner.compilation_config.static_forward_context
        for group in runner.attn_groups[0]:
            windows = {layers[name].sliding_window for name in group.layer_names}
            assert len(windows) == 1, "FlashInfer plans one window per builder"
    reference = Reference(recipe)
    assert_all_same(tokens_of(outputs), expected(reference, TEXTS, STRENGTHS))
    prompter = reference.model.prompter
    shown = [prompter.from_prompt(text, prompter.tokenizer(text)["input_ids"])["base"] for text in TEXTS]
    assert [output.prompt_token_ids for output in outputs] == shown, "what the base reads is counted"


def test_windows_of_two_widths(shelf):
    for window in (12, 20):
        if not (shelf.root / f"mistral-{window}").exists():
            wide(shelf.root / f"mistral-{window}", "mistral", "small", window, sliding_window=window)
    one = expert("e", "mistral-12", "mistral-20")
    one["expert"]["prompt"], one["anti_expert"]["prompt"] = CHAT, SHORT
    recipe = shelf.recipe("two-windows", "llama", experts=[one])
    with engine(recipe, block_size=32, max_num_batched_tokens=16, max_model_len=256) as llm:
        tokens = tokens_of(submit(llm, TEXTS, STRENGTHS))
    assert_all_same(tokens, expected(Reference(recipe), TEXTS, STRENGTHS))


@pytest.mark.parametrize("blocks", [None, 14])
def test_preemption(mixed, wanted, blocks):
    """With a cache that is too small for the batch, requests are thrown out and read again."""
    options = {"block_size": 32, "max_num_batched_tokens": 24, "num_gpu_blocks_override": blocks, "max_model_len": 256}
    with engine(mixed, **options, disable_log_stats=False, enable_prefix_caching=True) as llm:
        tokens = tokens_of(submit(llm, TEXTS, STRENGTHS, 60))
        assert (counted(llm, "vllm:num_preemptions") > 0) == (blocks is not None)
    assert_all_same([each[:N_NEW] for each in tokens], wanted)
    assert_all_same(tokens[:2], expected(Reference(mixed), TEXTS[:2], STRENGTHS[:2], 60))


def test_shared_blocks_hold_what_their_readers_expect(shelf):
    """Requests that begin while others run: the same prompts at other alphas, and the same base prompt beside other
    negative prompts. What a shorter member writes during an answer must not stand in a block that another reads, and
    what a short prompt leaves out must not be missed by one that reads it."""
    recipe = guided(shelf, "guided-shared")
    text = "the quick brown fox jumps over the lazy dog, and the dog sleeps over the fox. " * 7
    most = text[: 2 * len(text) // 3]
    extra = [{"negative_prompt": most, "alpha": alpha} for alpha in (3.0, -2.0, 0.5)]
    extra += [{"negative_prompt": said} for said in ("no", "the lazy dog", text + " again and again")]
    extra += [{"alpha": alpha} for alpha in (1.0, 2.0)]
    extra += [{"negative_prompt": "no", "alpha": alpha} for alpha in (0.3, 3.0)]
    with engine(recipe, block_size=32, enable_prefix_caching=True, disable_log_stats=False) as llm:
        tokens = staggered(llm, [text] * len(extra), extra)
        hits = counted(llm, "vllm:prefix_cache_hits")
        (output,) = submit(llm, ["dog"], [{"negative_prompt": "a dog " * 20}])
        (again,) = submit(llm, ["dog"], [{"negative_prompt": "a dog " * 20}])
    assert again.num_cached_tokens == len(again.prompt_token_ids) > output.num_cached_tokens, "of the base's prompt"
    assert hits >= 32 * 12, "next to nothing was shared, so nothing was tested"
    assert_all_same(tokens, expected(Reference(recipe), [text] * len(extra), extra))


def test_a_request_with_the_id_of_an_earlier_one(shelf, monkeypatch):
    monkeypatch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1")
    recipe = guided(shelf, "guided-twice")
    text = "the quick brown fox jumps over the lazy dog, and the dog sleeps over the fox. " * 7
    extra = [{"negative_prompt": said, "alpha": 2.0} for said in ("dog", "fox")]
    with engine(recipe, block_size=32, enable_prefix_caching=True, disable_log_stats=False) as llm:
        tokens = [staggered(llm, [text], [one])[0] for one in extra]
        assert counted(llm, "vllm:prefix_cache_hits") > 0
    assert_all_same(tokens, expected(Reference(recipe), [text] * 2, extra))


def staggered(llm, texts, extra, n_new=N_NEW, every=3):
    """One more request after every few steps of the engine."""
    from vllm import SamplingParams

    waiting, found, steps = list(enumerate(zip(texts, extra))), {}, 0
    while waiting or llm.llm_engine.has_unfinished_requests():
        if waiting and steps % every == 0:
            at, (text, one) = waiting.pop(0)
            params = SamplingParams(temperature=0.0, max_tokens=n_new, ignore_eos=True, extra_args=one)
            (prompt,) = llm.llm_engine.renderer.render_cmpl([{"prompt": text}])
            llm.llm_engine.add_request(str(at), prompt, params)
        for output in llm.llm_engine.step():
            if output.finished:
                found[int(output.request_id)] = list(output.outputs[0].token_ids)
        steps += 1
    return [found[at] for at in range(len(texts))]


@pytest.mark.parametrize("base", ["llama", "gemma3"])
def test_guidance_by_negative_prompts_of_requests(shelf, base):
    """One batch with other negative prompts, and with none; one set of weights."""
    recipe = guided(shelf, f"guided-{base}", base)
    extra = [
        {**({} if said is None else {"negative_prompt": said}), **alpha} for said, alpha in zip(NEGATIVE, STRENGTHS)
    ]
    with engine(recipe, block_size=32, max_num_batched_tokens=24, max_model_len=256) as llm:
        model = llm.llm_engine.model_executor.driver_worker.model_runner.model
        assert model.parts == ["base", "anti_expert"]
        names = {id(parameter) for parameter in model.part("base").parameters()}
        assert names == {id(parameter) for parameter in model.part("anti_expert").parameters()}
        assert not any(parameter.is_meta for parameter in model.parameters())
        tokens = tokens_of(submit(llm, TEXTS, extra))
        refused(llm, {"negative_prompt": 3}, "must be a text or its ids")
        refused(llm, {"negative_prompt": ""}, "the negative prompt is empty")
        refused(llm, {"negative_prompt": "\ud800"}, "half of a surrogate pair")
        refused(llm, {"member_input_ids.base": [5]}, "are one model here; give member_input_ids.base and")
        other = {"member_input_ids.base": [5], "member_input_ids.guidance.expert": 7}
        refused(llm, other, "are one model here; give member_input_ids.base and")
        refused(llm, {"negative_prompt": [5, 9999]}, "token id 9999")
        refused(llm, {"negative_prompt": "a " * 300}, "tokens for member 'guidance.anti_expert', which reads 256")
        refused(llm, {"proxytune.ids.base": [5]}, "cannot be set by a request")
        refused(llm, {}, "log-probabilities of the prompt cannot be had", prompt_logprobs=1, negative="no")
        ids = tokens_of(submit(llm, TEXTS[:1], [{"negative_prompt": llm.get_tokenizer().encode("the lazy dog")}]))
        assert len(tokens_of(submit(llm, TEXTS[:1], [{}], prompt_logprobs=1))[0]) == N_NEW, "with one prompt for all"
    reference = Reference(recipe)
    assert_all_same(tokens, expected(reference, TEXTS, extra))
    assert_all_same(ids, expected(reference, TEXTS[:1], [{"negative_prompt": "the lazy dog"}]))
    assert tokens[1] != expected(reference, TEXTS[1:2], [{"alpha": 0.5}])[0][0], "the negative prompt shows"


def refused(llm, extra, said, negative=None, **params):
    with pytest.raises(VLLMValidationError, match=said):
        submit(llm, TEXTS[:1], [extra | ({} if negative is None else {"negative_prompt": negative})], **params)


def test_compiled_members_on_one_set_of_weights(shelf, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    recipe = guided(shelf, "guided-compiled", template="the lazy {prompt}")
    with engine(recipe, block_size=32, enforce_eager=False, max_model_len=256) as llm:
        tokens = tokens_of(submit(llm, TEXTS, STRENGTHS))
    assert_all_same(tokens, expected(Reference(recipe), TEXTS, STRENGTHS))


@pytest.mark.parametrize("base_prompt", [None, CHAT], ids=["raw", "chat"])
def test_n_gram_drafts_see_what_the_base_reads_and_no_more(shelf, base_prompt):
    recipe = of_prompts(shelf, f"drafted-{base_prompt is None}", base_prompt=base_prompt, anti_expert=LONG)
    few = [5, 6, 7]  # where few ids may be chosen, n-grams come again
    options = {"block_size": 32, "max_model_len": 256, "disable_log_stats": False}
    seen = []
    with engine(recipe, **options, speculative_config=NGRAM) as llm:
        drafter = llm.llm_engine.model_executor.driver_worker.model_runner.drafter
        plain = drafter.batch_propose

        def watched(n, valid, n_tokens, tokens, k):
            seen.extend(tokens[at, : n_tokens[at]].tolist() for at in valid)
            return plain(n, valid, n_tokens, tokens, k)

        drafter.batch_propose = watched
        outputs = submit(llm, TEXTS, STRENGTHS, 40, allowed_token_ids=few)
        assert counted(llm, "vllm:spec_decode_num_accepted_tokens") > 0
    reference = Reference(recipe)
    prompter = reference.model.prompter
    rows = [prompter.tokenizer(text)["input_ids"] for text in TEXTS]
    alphas = [[one.get("alpha", 1.0)] for one in STRENGTHS]
    wanted = [reference.greedy([row], 40, [alpha], few)[0] for row, alpha in zip(rows, alphas)]
    assert_all_same(tokens_of(outputs), wanted)
    shown = [prompter.from_prompt(text, row).get("base", row) for text, row in zip(TEXTS, rows)]
    texts = [list(row) + tokens for row, (tokens, _) in zip(shown, wanted)]
    assert seen
    # Drafts may go beyond the end of an answer.
    same = (any(text[: len(told)] == told[: len(text)] for text in texts) for told in seen)
    assert all(same), "the base's text, and nothing else"


def test_several_answers_of_one_prompt(mixed):
    """Sampled answers are the same whether blocks are shared or not, and each is its own."""
    found = {}
    for caching in (False, True):
        with engine(mixed, block_size=32, max_model_len=256, enable_prefix_caching=caching) as llm:
            outputs = submit(llm, TEXTS[:2] * 2, STRENGTHS[:2] * 2, temperature=1.0, n=4, seed=3)
            found[caching] = [[list(one.token_ids) for one in output.outputs] for output in outputs]
    assert found[False] == found[True]
    assert all(len(set(map(tuple, answers))) == 4 for answers in found[True])


def test_contexts_are_each_members_own(shelf):
    """A member with a short context limits its own prompt, and not the base's."""
    if not (shelf.root / "brief-96").exists():
        wide(shelf.root / "brief-96", "qwen2", "small", 41, max_position_embeddings=96)
    one = {
        "name": "e",
        "expert": {"model": "../brief-96", "prompt": {"kind": "negative", "template": "dog"}},
        "alpha": 1.0,
    }
    recipe = shelf.recipe("brief-expert", "llama", experts=[one])
    long = "the quick brown fox jumps over the lazy dog. " * 12
    with engine(recipe, block_size=32) as llm:
        assert llm.llm_engine.vllm_config.model_config.max_model_len == tiny.CONTEXT
        (output,) = submit(llm, [long], [{}], None)
        assert len(output.prompt_token_ids) > 96
        (expected_,) = expected(Reference(recipe), [long], [{}], len(output.outputs[0].token_ids))
        assert_all_same(tokens_of([output]), [expected_])
        n_dog = len(llm.get_tokenizer().encode("dog"))
        assert len(output.outputs[0].token_ids) == min(96 - n_dog, tiny.CONTEXT - len(output.prompt_token_ids))
        with pytest.raises(VLLMValidationError, match=r"for member 'e\.expert', which reads 96 with the answer"):
            submit(llm, ["dog"], [{"negative_prompt": long}])
        with pytest.raises(VLLMValidationError, match="min_tokens is 100, but member"):
            submit(llm, ["dog"], [{}], 200, min_tokens=100)


@pytest.mark.parametrize("template", ["the lazy dog", "the lazy {prompt}", None])
def test_a_chat_with_the_recipes_own_negative_prompt(shelf, template):
    from vllm import SamplingParams

    recipe = guided(shelf, f"guided-chat-{len(template or '')}", template=template)
    tokenizer, reference = tiny.tokenizer(), Reference(recipe)

    def ids_of(text):
        turns = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)

    ids = ids_of("fox")
    shown = ids if template is None else ids_of(template.replace("{prompt}", "fox"))
    wanted = reference.greedy([ids], N_NEW, member_input_ids={"guidance.anti_expert": [shown]})
    with engine(recipe, block_size=32, max_model_len=256) as llm:
        params = SamplingParams(temperature=0, max_tokens=N_NEW, ignore_eos=True)
        outputs = llm.chat([{"role": "user", "content": "fox"}], params, use_tqdm=False)
    assert_all_same(tokens_of(outputs), wanted)


# -- one engine -----------------------------------------------------------------------------------------------
# These tests stand together: an engine does not survive the start of another one in its process.


@pytest.fixture(scope="module")
def mixed_engine(mixed):
    with engine(mixed, block_size=32, max_model_len=256) as llm:
        yield llm


def test_prompts_that_a_request_gives(mixed, mixed_engine):
    """Of any member, in place of the one that would be made for it; with weights, a member alone on any prompt."""
    reference, row = Reference(mixed), [1, 70, 71, 116, 104, 101]  # these are not a text's ids
    own = {"e.expert": [1, 88, 15], "e.anti_expert": [1, 5, 5, 9, 200, 17, 18, 19]}
    given = {f"member_input_ids.{name}": ids for name, ids in own.items()}
    extra = [given, given | {"weight.e.expert": 1.0}, given | {"weight.base": 1.0}]
    tokens = tokens_of(submit(mixed_engine, [{"prompt_token_ids": row}] * 3, extra))
    refused(mixed_engine, {"member_input_ids.e": [5]}, "there is no member 'e' to give a prompt")
    refused(mixed_engine, {"member_input_ids.e.expert": "dog"}, "must be ids")
    refused(mixed_engine, {"member_input_ids.e.expert": []}, "must be ids")
    refused(mixed_engine, {"negative_prompt": "dog"}, "no member that reads a negative prompt")
    shown = {name: [ids] for name, ids in own.items()}
    assert_all_same(tokens[:1], reference.greedy([row], member_input_ids=shown))
    assert_all_same(tokens[2:], reference.greedy([row], alpha=[[0.0]], member_input_ids=shown))
    from transformers import AutoModelForCausalLM

    expert_ = AutoModelForCausalLM.from_pretrained(mixed.parent / "qwen2-small").eval()
    with torch.no_grad():
        seen = expert_(torch.tensor([own["e.expert"] + tokens[1]])).logits[0, 2:-1]
    assert_all_same(tokens[1:2], [(seen.argmax(dim=-1).tolist(), list(seen))])


def test_penalties_see_the_bases_prompt(mixed, mixed_engine):
    """What fills a prompt changes no penalty: the set of ids in it is the base's."""
    from vllm import SamplingParams

    tokenizer = tiny.tokenizer()
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, repetition_penalty=1.7)
    outputs = mixed_engine.generate(TEXTS, params, use_tqdm=False)
    reference = Reference(mixed)
    for text, output in zip(TEXTS, outputs):
        out = reference.model.generate(
            torch.tensor([tokenizer(text)["input_ids"]]),
            do_sample=False,
            max_new_tokens=8,
            eos_token_id=None,
            pad_token_id=tiny.PAD,
            repetition_penalty=1.7,
            output_scores=True,
            return_dict_in_generate=True,
        )
        assert_all_same(
            [list(output.outputs[0].token_ids)], [(out.sequences[0, -8:].tolist(), [s[0] for s in out.scores])]
        )


def test_a_cuda_graph_of_a_whole_step_is_refused(mixed_engine, monkeypatch):
    """vLLM captures at start, so that is where it would be seen. The mode does not tell: V2 captures whole steps
    in the mode NONE, and breakable graphs in the mode PIECEWISE."""
    runner = mixed_engine.llm_engine.model_executor.driver_worker.model_runner
    kinds = [group.get_metadata_builder() for groups in runner.attn_groups for group in groups]
    assert {type(kind).get_cudagraph_support(None, None).name for kind in kinds} == {"NEVER"}
    for name in ("is_available", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    with pytest.raises(ProxyTuneError, match="a CUDA graph cannot hold a whole step"):
        runner.model(torch.ones(4, dtype=torch.long), torch.arange(4))


def test_ids_that_are_not_their_text(mixed, mixed_engine):
    """A prompt of ids is shown to members as its text, if it is one."""
    reference = Reference(mixed)
    row = reference.model.tokenizer("the quick brown fox")["input_ids"]
    outputs = submit(mixed_engine, [{"prompt_token_ids": row}], [{}])
    with pytest.raises(VLLMValidationError, match="changes if it is decoded and encoded again"):
        submit(mixed_engine, [{"prompt_token_ids": [1, 70, 71, 116, 104, 101]}], [{}])
    assert_all_same(tokens_of(outputs), reference.greedy([row], N_NEW))


def test_offline_chat(mixed, mixed_engine):
    from vllm import SamplingParams

    tokenizer = tiny.tokenizer()
    messages = [{"role": "user", "content": "the quick brown fox"}]
    reference = Reference(mixed)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    own = reference.model.prompter.from_messages(messages, ids, tokenizer)
    wanted = reference.greedy([ids], N_NEW, member_input_ids={name: [each] for name, each in own.items()})
    params = SamplingParams(temperature=0, max_tokens=N_NEW, ignore_eos=True)
    outputs = mixed_engine.chat(messages, params, use_tqdm=False)
    with pytest.raises(VLLMValidationError, match="the last message must be the user's"):
        mixed_engine.chat([*messages, {"role": "assistant", "content": "dog"}], params, use_tqdm=False)
    with pytest.raises(VLLMValidationError, match="beam search cannot be had"):
        mixed_engine.beam_search([{"prompt": "dog"}], None)
    assert_all_same(tokens_of(outputs), wanted)
