"""The OpenAI server where members read prompts of their own answers as the transformers engine does."""

from __future__ import annotations

import json
from types import SimpleNamespace

import openai
import pytest

from proxytune.vllm.command import server_of
from support.served import N_NEW, TEXTS, Reference, assert_all_same, of_prompts, running

MESSAGES = [
    {"role": "system", "content": "the rules"},
    {"role": "user", "content": "how many apples are there?"},
    {"role": "assistant", "content": "there are seven apples."},
    {"role": "user", "content": "the quick brown fox"},
]
EXPERT = {"kind": "chat", "user_prefix": "Question: ", "response_prefix": "the answer"}


@pytest.fixture(scope="module")
def server(shelf, tmp_path_factory):
    recipe = of_prompts(shelf, "prompts-of-server", expert=EXPERT, anti_expert={"kind": "negative"})
    words = [*server_of(str(recipe)), "--dtype", "float32", "--enforce-eager", "--served-model-name", "steered"]
    words += ["--max-num-seqs", "16", "--max-model-len", "256"]
    log = tmp_path_factory.mktemp("log") / "server.log"
    with running(words, log, VLLM_ENABLE_V1_MULTIPROCESSING="1") as url:
        client = openai.OpenAI(base_url=url, api_key="none", timeout=120, max_retries=0)
        yield SimpleNamespace(client=client, reference=Reference(recipe))


def options(n_new=N_NEW, **xargs):
    body = {"ignore_eos": True, "return_token_ids": True, **({"vllm_xargs": xargs} if xargs else {})}
    return {"model": "steered", "max_tokens": n_new, "temperature": 0.0, "extra_body": body}


def of_text(reference, text, **asked):
    tokenizer = reference.model.tokenizer
    return reference.greedy([tokenizer(text)["input_ids"]], **asked)[0]


def of_chat(reference, messages, negative=None, **asked):
    """As `proxytune chat` shows it to each member."""
    tokenizer = reference.model.tokenizer

    def ids_of(turns):
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)

    def encode(text):
        system = [turn for turn in messages if turn["role"] == "system"]
        return ids_of([*system, {"role": "user", "content": text}])

    ids = ids_of(messages)
    own = reference.model.prompter.from_messages(messages, ids, encode, negative)
    return ids, reference.greedy([ids], member_input_ids={name: [each] for name, each in own.items()}, **asked)[0]


def streamed(chunks):
    return [token for chunk in chunks for token in getattr(chunk.choices[0], "token_ids", None) or []]


@pytest.mark.parametrize("asked", [{}, {"alpha": 0.5}, {"negative_prompt": "the lazy dog"}], ids=repr)
def test_chat(server, asked):
    ids, wanted = of_chat(server.reference, MESSAGES, asked.get("negative_prompt"), alpha=[[asked.get("alpha", 1.0)]])
    answer = server.client.chat.completions.create(messages=MESSAGES, **options(**asked))
    assert_all_same([answer.choices[0].token_ids], [wanted])
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == N_NEW
    chunks = server.client.chat.completions.create(messages=MESSAGES, stream=True, **options(**asked))
    assert_all_same([streamed(chunks)], [wanted])


def test_texts_in_parts_are_read_as_text(server):
    parts = [{"role": "user", "content": [{"type": "text", "text": "the quick brown fox"}]}]
    whole = [{"role": "user", "content": "the quick brown fox"}]
    answer = server.client.chat.completions.create(messages=parts, **options())
    assert_all_same([answer.choices[0].token_ids], [of_chat(server.reference, whole)[1]])


def test_a_developer_speaks_as_the_system(server):
    """For templates without that role, as vLLM has it for the base; also before a negative prompt."""
    messages = [{**MESSAGES[0], "role": "developer"}, *MESSAGES[1:]]
    for negative in (None, "the lazy dog"):
        said = {} if negative is None else {"negative_prompt": negative}
        answer = server.client.chat.completions.create(messages=messages, **options(**said))
        assert_all_same([answer.choices[0].token_ids], [of_chat(server.reference, MESSAGES, negative)[1]])


@pytest.mark.parametrize("asked", [{}, {"negative_prompt": "the lazy {prompt}", "alpha": 2.0}], ids=repr)
def test_completions_of_texts_and_of_ids(server, asked):
    tokenizer = server.reference.model.tokenizer
    said = {"negative_prompt": asked["negative_prompt"]} if "negative_prompt" in asked else {}
    wanted = [of_text(server.reference, text, alpha=[[asked.get("alpha", 1.0)]], **said) for text in TEXTS]
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    for prompts in (TEXTS, ids):
        answer = server.client.completions.create(prompt=prompts, **options(**asked))
        assert_all_same([choice.token_ids for choice in answer.choices], wanted)
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    chunks = server.client.completions.create(prompt=TEXTS[0], stream=True, **options(**asked))
    assert_all_same([streamed(chunks)], wanted[:1])


def test_a_negative_prompt_of_ids(server):
    ids = server.reference.model.tokenizer("the lazy dog")["input_ids"]
    answer = server.client.completions.create(prompt="dog", **options(negative_prompt=ids))
    assert_all_same([answer.choices[0].token_ids], [of_text(server.reference, "dog", negative_prompt="the lazy dog")])


def test_echo_is_the_bases_prompt(server):
    answer = server.client.completions.create(model="steered", prompt="the quick brown fox", echo=True, max_tokens=2)
    assert answer.choices[0].text.startswith("the quick brown fox")


ASSISTANT = [*MESSAGES, {"role": "assistant", "content": "dog"}]
CONTINUED = {"continue_final_message": True, "add_generation_prompt": False}
KWARGS = r"do not follow chat_template_kwargs\.enable_thinking; leave it out"
LONG = r"prompt has \d+ tokens for member 'e\.anti_expert', which reads 256 with the answer; shorten it"
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
CALLED = {"role": "assistant", "content": "a", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("kind", "asked", "said"),
    [
        ("completions", {"vllm_xargs": {"negative_prompt": 3}}, "must be a text or its ids"),
        ("completions", {"vllm_xargs": {"negative_prompt": " "}}, "the negative prompt is empty"),
        ("completions", {"vllm_xargs": {"negative_prompt": [7, 4000]}}, "the negative prompt has token id 4000"),
        ("completions", {"vllm_xargs": {"negative_prompt": "a dog " * 200}}, f"the negative {LONG}"),
        ("chat", {"vllm_xargs": {"negative_prompt": "a dog " * 2000}}, f"the negative {LONG}"),
        ("completions", {"vllm_xargs": {"member_input_ids.e.anti_expert": [7] * 256}}, f"the {LONG}"),
        ("completions", {"vllm_xargs": {"member_input_ids": [7]}}, r"write 'member_input_ids\.NAME'"),
        ("completions", {"vllm_xargs": {"weight": 1}}, r"write 'weight\.NAME'"),
        ("completions", {"vllm_xargs": {"negative_prompts": "dog"}}, "write 'negative_prompt'"),
        (
            "completions",
            {"vllm_xargs": {"member_input_ids.e.anti_expert": [7], "negative_prompt": "dog"}},
            r"'e\.anti_expert' by member_input_ids\.e\.anti_expert or by negative_prompt",
        ),
        ("completions", {"vllm_xargs": {"proxytune.ids.base": [7]}}, "cannot be set by a request"),
        ("completions", {"echo": True, "logprobs": 1}, "log-probabilities of the prompt cannot be had"),
        ("completions", {"prompt_logprobs": 1}, "log-probabilities of the prompt cannot be had"),
        ("completions", {"use_beam_search": True}, "beam search cannot be had"),
        (
            "completions",
            {"prompt": [1, 70, 71, 116, 104, 101]},
            r"the prompt changes if it is decoded.*by `member_input_ids\.NAME`",
        ),
        ("chat", {"echo": True}, "logprobs beside echo, and echo in a chat"),
        ("chat", {"messages": ASSISTANT}, "the last message must be the user's"),
        (
            "chat",
            {"messages": ASSISTANT, **CONTINUED},
            "do not follow add_generation_prompt, continue_final_message; leave them out",
        ),
        ("chat", {"messages": [{"role": "developer", "content": "a", "tools": [TOOL]}, *MESSAGES]}, "made from texts"),
        ("chat", {"messages": [{"role": "user", "content": "a", "name": "Ann"}]}, "made from texts"),
        ("chat", {"messages": [MESSAGES[0], CALLED, *MESSAGES]}, "made from texts"),
        ("chat", {"tools": [TOOL], "tool_choice": "none"}, "do not follow tools; leave it out"),
        ("chat", {"chat_template_kwargs": {"enable_thinking": True}}, KWARGS),
        ("chat", {"chat_template_kwargs": {"enable_thinking": False}}, KWARGS),
        ("chat", {"reasoning_effort": "low"}, "do not follow reasoning_effort; leave it out"),
        ("chat", {"truncate_prompt_tokens": 9}, "do not follow truncate_prompt_tokens; leave it out"),
        ("chat", {"add_generation_prompt": False}, "do not follow add_generation_prompt; leave it out"),
        ("chat", {"use_beam_search": True}, "beam search cannot be had"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_what_cannot_be_had_is_400_and_the_server_lives_on(server, kind, asked, said):
    prompt = {"prompt": "dog"} if kind == "completions" else {"messages": MESSAGES}
    body = {"model": "steered", "max_tokens": 2, **prompt, **asked}
    route = "/completions" if kind == "completions" else "/chat/completions"
    with pytest.raises(openai.BadRequestError, match=said):
        server.client.post(route, body=body, cast_to=object)
    answer = server.client.completions.create(prompt="dog", **options(4))
    assert_all_same([answer.choices[0].token_ids], [of_text(server.reference, "dog", n_new=4)])
