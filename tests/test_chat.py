"""Conversations: what the cache carries from turn to turn, and every command of ``proxytune chat``."""

from __future__ import annotations

import json
import os
import signal
import sys

import pytest
import torch

from proxytune import ProxyTunedForCausalLM, ProxyTuneError, TracedOutput
from proxytune.answers.chat import Conversation
from proxytune.answers.generation import Answer, Sampling, answer
from proxytune.cli.chat import COMMANDS, WordWrap, interruptible
from proxytune.recipe.parts import Prompt
from proxytune.recipe.prompts import render
from support import tiny
from support.commands import run

pytestmark = pytest.mark.usefixtures("no_progress")


@pytest.fixture(scope="module")
def recipe(shelf):
    return shelf / "recipe"


@pytest.fixture(scope="module")
def model(recipe):
    return ProxyTunedForCausalLM.from_pretrained(recipe)


def conversation(model, tokenizer, **options):
    return Conversation(model, tokenizer, (1.0,), sampling=Sampling(), **{"max_new_tokens": 10, **options})


def talk(one, *texts):
    return [one.say(text, lambda piece: None) for text in texts]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_the_cache_of_a_conversation_changes_nothing(family, tokenizer):
    """Greedy answers are those of reading every transcript again, also beyond a sliding window."""
    model = ProxyTunedForCausalLM.from_members(
        tiny.model(family, "base", 1),
        tiny.model(family, "small", 2),
        tiny.model(family, "small", 3),
        tokenizer=tokenizer,
    )
    one = conversation(model, tokenizer, system="the rules")
    reused = []
    for text in ("the fox", "and the dog", "why?", "Steering a model"):
        made = talk(one, text)[0]
        reused.append(one.reused)
        fresh = answer(
            model, tokenizer, [one.encode(one.messages[:-1])], [(1.0,)], max_new_tokens=10, sampling=Sampling()
        )[0]
        assert made == fresh
    if family == "llama":
        assert all(reused[1:])  # the cache was used, or the test says nothing


def test_a_new_alpha_needs_no_new_cache(model, tokenizer):
    one, other = conversation(model, tokenizer), conversation(model, tokenizer)
    talk(one, "the fox")
    talk(other, "the fox")
    one.alphas = (0.0,)
    steered, unsteered = talk(other, "again")[0], talk(one, "again")[0]
    assert one.reused > 0
    fresh = answer(model, tokenizer, [one.encode(one.messages[:-1])], [(0.0,)], max_new_tokens=10, sampling=Sampling())
    assert unsteered == fresh[0] != steered


def test_a_stopped_answer_leaves_the_cache_whole(model, tokenizer):
    one = conversation(model, tokenizer)
    asked = []
    made = one.say("the fox", lambda piece: None, lambda: asked.append(1) or len(asked) == 3)
    assert made.finish == "interrupt"
    assert len(made.tokens) == 3
    after = talk(one, "go on")[0]
    fresh = answer(model, tokenizer, [one.encode(one.messages[:-1])], [(1.0,)], max_new_tokens=10, sampling=Sampling())
    assert after == fresh[0]


def test_a_torn_forward_forgets_the_cache_alone(model, tokenizer):
    one = conversation(model, tokenizer)
    talk(one, "the fox")
    said = list(one.messages)

    def tear(piece):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one.say("more", tear)
    assert one.messages == said
    assert one.read == []
    talk(one, "more")


def test_members_with_prompts_of_their_own_read_the_conversation(tokenizer, shelf, tmp_path):
    expert = {"model": str(shelf / "expert"), "prompt": {"kind": "chat", "system": "own"}}
    values = {
        "base": {"model": str(shelf / "base")},
        "experts": [{"expert": expert, "anti_expert": str(shelf / "anti")}],
    }
    made = tiny.write_recipe(tmp_path / "r", values, tokenizer_=tiny.tokenizer(chat_template=None))
    model = ProxyTunedForCausalLM.from_pretrained(made)
    one = conversation(model, tiny.tokenizer(chat_template=None))
    said = talk(one, "the fox", "and the dog")[-1]
    assert one.reused > 0  # each member continues from its own prompt, and the answer is that of reading all again
    again = one.encode(one.messages[:-1])
    options = {"max_new_tokens": 10, "sampling": Sampling(), "stop_strings": one._stops()}
    assert said.tokens == answer(model, one.tokenizer, [again], [(1.0,)], **options)[0].tokens
    encoded = one.encode([*one.messages, {"role": "user", "content": "why"}])
    shown = tokenizer.decode(encoded.own["expert.expert"])
    assert shown.startswith("<s>[system] own\n[user] the fox\n[assistant] ")
    assert shown.endswith("[user] why\n[assistant]")
    assert tokenizer.decode(encoded.ids).startswith("<s>User: the fox\nAssistant: ")
    run("chat", made, "-n", "3", input="the fox\nand\n/quit\n")


def test_a_plain_transcript_ends_at_the_users_name(model):
    """Without a chat template a model may go on as the user; that is cut off."""
    plain = tiny.tokenizer(chat_template=None)
    one = conversation(model, plain, max_new_tokens=60)
    wanted = plain("yes\nUser: no", add_special_tokens=False)["input_ids"]

    def dictated(prompts, *args, **kwargs):
        ids = torch.tensor([[*prompts.tolist()[0], *wanted]])
        assert kwargs["stop_strings"] == ["\nUser:"]
        one.cache.n_columns = ids.shape[1] - 1
        return TracedOutput(sequences=ids, traces=[[]])

    generate, model.generate = model.generate, dictated
    try:
        assert one.say("well?", lambda piece: None).text == "yes"
    finally:
        model.generate = generate
    assert one.messages[-1] == {"role": "assistant", "content": "yes"}


def test_a_template_is_filled_with_the_transcript(tokenizer):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    prompt = Prompt("template", template="Q: {prompt}\nA:")
    assert tokenizer.decode(render(prompt, tokenizer, said[:1])) == "<s>Q: a\nA:"
    assert tokenizer.decode(render(prompt, tokenizer, said)) == "<s>Q: User: a\nAssistant: b\nUser: c\nA:"


def test_chat_takes_commands(recipe):
    said = "the fox\n/alpha\n/alpha 0.5\n/alpha nan\n/nothing\n/help\n/reset\n\nthe fox\n/quit\nnever read\n"
    result = run("chat", recipe, "-n", "4", input=said)
    assert len(result.stdout.splitlines()) >= 2
    for told in ("alpha: 1\n", "alpha: 0.5\n", "error: alpha must be a finite", "no command /nothing"):
        assert told in result.stderr
    assert "Ctrl-C stops an answer" in result.stderr
    assert "forgotten" in result.stderr


def test_chat_works_after_a_message_that_is_too_long(recipe):
    result = run("chat", recipe, "-n", "3", input="the fox " * 300 + "\nthe fox\n")
    assert "can read only 256" in result.stderr
    assert result.stdout


def test_ctrl_c_stops_an_answer_and_a_second_one_everything():
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_turn_is_taken_back(model, tokenizer):
    one = conversation(model, tokenizer, system="the rules")
    talk(one, "the fox")
    before = list(one.messages)
    talk(one, "and the dog")
    assert one.take_back() == "and the dog"
    assert one.messages == before
    again = talk(one, "and the dog")[0]
    fresh = answer(model, tokenizer, [one.encode(one.messages[:-1])], [(1.0,)], max_new_tokens=10, sampling=Sampling())
    assert again == fresh[0]
    one.reset()
    with pytest.raises(ProxyTuneError, match=r"there is no answer yet|the conversation is empty"):
        one.take_back()


def test_answers_at_several_alphas_leave_the_conversation_alone(model, tokenizer):
    one = conversation(model, tokenizer)
    talk(one, "the fox")
    before, read = list(one.messages), list(one.read)
    made = one.compare([(0.0,), (1.0,), (3.0,)])
    fresh = [
        answer(model, tokenizer, [one.encode(one.messages[:-1])], [(alpha,)], max_new_tokens=10, sampling=Sampling())[0]
        for alpha in (0.0, 1.0, 3.0)
    ]
    assert made == fresh
    assert made[0].text != made[2].text
    assert (one.messages, one.read) == (before, read)


def test_another_system_prompt_is_read_from_the_next_turn_on(model, tokenizer):
    one = conversation(model, tokenizer)
    talk(one, "the fox")
    one.set_system("be nice")
    assert [said["role"] for said in one.messages] == ["system", "user", "assistant"]
    after = talk(one, "why?")[0]
    fresh = answer(model, tokenizer, [one.encode(one.messages[:-1])], [(1.0,)], max_new_tokens=10, sampling=Sampling())
    assert after == fresh[0]
    one.set_system(None)
    one.reset()
    assert one.messages == []


# -- commands -------------------------------------------------------------------------------------------------
def test_commands_change_the_conversation(recipe, tmp_path):
    file = tmp_path / "talk.json"
    said = [
        "/retry",
        "the fox",
        "/compare 0 1",
        "/compare",
        "/set temperature 0.7",
        "/set top-p 2",
        "/set heat 1",
        "/set temperature off",
        "/set max-new-tokens 3",
        "/system be nice",
        "/retry",
        f"/save {file}",
        "/undo",
        "/undo",
        f"/load {file}",
        f"/load {tmp_path}/nosuch",
        f"/save {tmp_path}/nosuch/talk.json",
        "/system off",
        "/help",
    ]
    result = run("chat", recipe, "-n", "4", input="\n".join(said))
    for told in (
        "error: the conversation is empty\n",
        "error: name the alphas, as in /compare 0 1\n",
        "temperature 0.7, top-p off",
        "error: top-p must lie in (0, 1], not 2.0\n",
        "error: there is no setting 'heat'; there are temperature, top-p,",
        "max-new-tokens 3 (greedy)\n",
        "system: be nice\n",
        f"saved to {file}\n",
        "taken back: the fox\n",
        f"loaded 1 turn from {file}\n",
        "nosuch: No such file or directory\n",
        "talk.json: No such file or directory\n",
        "system: none\n",
    ):
        assert told in result.stderr, told
    assert all(usage in result.stderr for usage, _ in COMMANDS.values())
    assert "alpha 0" in result.stdout
    assert "alpha 1" in result.stdout
    saved = json.loads(file.read_text())
    assert [message["role"] for message in saved["messages"]] == ["system", "user", "assistant"]
    assert (saved["alpha"], saved["max_new_tokens"]) == ({"expert": 1.0}, 3)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"messages": 3}', '{"messages": [{"role": "user", "content": "a"}]}']
)
def test_what_is_not_a_conversation_is_not_loaded(recipe, tmp_path, text):
    (tmp_path / "file").write_text(text)
    result = run("chat", recipe, "-n", "2", input=f"/load {tmp_path}/file\n")
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_chat_shows_what_the_recipe_is_for(shelf, tmp_path, monkeypatch):
    """And another of its example prompts, where an answer is empty."""
    pair = {"expert": str(shelf / "expert"), "anti_expert": str(shelf / "anti")}
    about = {"description": "Knows foxes.", "examples": ["the fox", "the dog"]}
    recipe = tiny.write_recipe_alone(tmp_path / "r", {"base": str(shelf / "base"), "experts": [pair], **about})
    monkeypatch.setattr(Conversation, "say", lambda *args: Answer("", [tiny.EOS], "stop"))
    shown = run("chat", recipe, input="the fox\nwhy?\n").stderr
    assert shown.startswith("Knows foxes.\ntry: the fox\ntry: the dog\n/help lists")
    after = [part.splitlines() for part in shown.split("(an empty answer")[1:]]
    assert [lines[1:] for lines in after] == [["try: the dog"], ["try: the fox"]]


def test_an_example_of_several_lines_is_shown_as_it_is_typed(shelf, tmp_path):
    pair = {"expert": str(shelf / "expert"), "anti_expert": str(shelf / "anti")}
    about = {"examples": ["Question: a?\n  Answer:", "the dog"]}
    recipe = tiny.write_recipe_alone(tmp_path / "r", {"base": str(shelf / "base"), "experts": [pair], **about})
    assert "try:\nQuestion: a?\n  Answer:\ntry: the dog\n/help lists" in run("chat", recipe, input="").stderr


def test_another_file_is_not_overwritten(recipe, tmp_path):
    (tmp_path / "notes").write_text("mine")
    result = run("chat", recipe, "-n", "2", input=f"hi\n/save {tmp_path}/notes\n")
    assert "exists and is not a conversation" in result.stderr
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_full_context_is_reported_with_its_remedy(recipe):
    result = run("chat", recipe, "-n", "400", input="the fox\n")
    assert "(the shortest member's context is full; /undo takes back the last turn" in result.stderr


def test_lines_break_between_words():
    written = []
    wrap = WordWrap(written.append, 10)
    for piece in ("one tw", "o three fo", "ur\n\n  five abcdefghijklmnop qrs", " tail "):
        wrap(piece)
    wrap.end()
    assert "".join(written) == "one two\nthree four\n\n  five\nabcdefghijklmnop\nqrs tail"
    long = "文" * 40
    written.clear()
    for piece in long:
        wrap(piece)
    assert len("".join(written)) > 20  # what has no spaces is not held back


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.slow
def test_at_a_terminal(recipe, tmp_path):
    """Editing, pasted lines and recalled ones; Ctrl-C at the prompt keeps the conversation."""
    import pexpect

    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    child = pexpect.spawn(
        sys.executable,
        ["-m", "proxytune", "chat", str(recipe), "-n", "3"],
        env=environment,
        encoding="utf-8",
        timeout=120,
        dimensions=(40, 80),
    )
    prompt = r">[^>]*\x1b\[\?25h"  # and the cursor shown after it
    child.expect(prompt)
    child.send("\x1b[200~the fox\nand the dog\x1b[201~\r")  # a paste of two lines is one turn
    child.expect("cut off after 3 tokens")
    child.expect(prompt)
    child.send("/undo\r")
    child.expect("taken back: the fox\r\nand the dog")
    child.expect(prompt)
    child.send("half a line\x03")
    child.expect("Ctrl-D or /quit leaves")
    child.expect(prompt)
    child.send("\x1b[A\r")  # the line before: /undo
    child.expect("the conversation is empty")
    child.expect(prompt)
    child.send("/he\t")  # TAB completes
    child.expect("lp")
    child.send("\r")
    child.expect("/compare A B", timeout=20)
    child.send("\x04")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert "+and the dog" in (tmp_path / "proxytune" / "chat_history").read_text()


def test_each_answer_is_traced(recipe, tmp_path):
    file = tmp_path / "talk.jsonl"
    lines = "the fox\n/compare 0 1\n/alpha 0.5\n/retry\n"
    shown = run("chat", recipe, "-n", "3", "--trace", file, input=lines)
    run("chat", recipe, "-n", "2", "--trace", file, input="a dog\n")  # after those that are there
    traces = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [(trace["prompt"], trace["alpha"]["expert"], len(trace["tokens"])) for trace in traces] == [
        ("the fox", 1.0, 3),
        ("the fox", 0.5, 3),
        ("a dog", 1.0, 2),
    ]
    assert traces[0]["schema"] == "proxytune.trace/1"
    assert shown.stdout.startswith(traces[0]["text"] + "\n")
    file.write_text('{"mine": 1}\n')
    result = run("chat", recipe, "--trace", file, input="a dog\n", status=2)
    assert "line 1 of" in result.stderr
    assert "is not a trace; choose another --trace" in result.stderr
    assert file.read_text() == '{"mine": 1}\n'
