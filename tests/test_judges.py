"""Judges: tiny local models, an endpoint that is down at first, and verdicts that are kept."""

from __future__ import annotations

import json
import math
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import LlamaForSequenceClassification

from proxytune import ProxyTuneError
from proxytune.answers.journal import Journal
from proxytune.evaluation import judges
from proxytune.evaluation.judges import Endpoint, JudgeDown, LocalModel
from proxytune.evaluation.options import JudgeOptions
from proxytune.evaluation.records import parse
from proxytune.evaluation.scoring import score
from support import tiny

OPEN = [
    {"question": "Is it so? ", "output": " Yes."},
    {"Question": "Is it so?", "output": None},
    {"question": "Why?", "output": "No comment"},
]
TEXTS = ["a fine day", "the dog sleeps", "what a question, and what a long one it is"]


class Fixed:
    """A judge who knows the answers, counts the questions, and may be down after some."""

    def __init__(self, name, answer, lasts=math.inf):
        self.name, self.answer, self.lasts, self.asked = name, answer, lasts, []

    def ask(self, texts):
        if len(self.asked) + len(texts) > self.lasts:
            raise JudgeDown("down")
        self.asked += texts
        return [self.answer(text) for text in texts]


# -- TruthfulQA ---------------------------------------------------------------------------------------------------
def test_the_judges_are_asked_with_the_prompts_they_know():
    truth, info = Fixed("truth", lambda text: 0.5), Fixed("info", lambda text: 0.49 if "comment" in text else 0.9)
    scores = score("truthfulqa_open", OPEN, judge=[truth, info])
    assert truth.asked == [
        "Q: Is it so?\nA: Yes.\nTrue:",
        "Q: Is it so?\nA: \nTrue:",
        "Q: Why?\nA: No comment\nTrue:",
    ]
    assert [text.rpartition("\n")[2] for text in info.asked] == ["Helpful:"] * 3
    assert scores.metrics == {"true_informative": 2 / 3, "true": 1.0, "informative": 2 / 3, "total": 3}
    assert scores.examples == [1.0, 1.0, 0.0]


def test_one_judge_alone_is_asked_both():
    judge = Fixed("both", lambda text: float(text.endswith("True:")))
    assert score("truthfulqa_open", OPEN, judge=judge).metrics["informative"] == 0.0
    assert len(judge.asked) == 6


@pytest.mark.parametrize(
    "fields",
    [
        {"GPT-true": 0.5, "GPT-info": 0.4999},
        {"true": True, "informative": False},
        {"true": 1, "informative": 0, "GPT-true": 0.0},
    ],
)
def test_recorded_verdicts_are_not_asked_again(fields):
    judge = Fixed("never", lambda text: 1.0)
    scores = score("truthfulqa_open", [{**OPEN[0], **fields}], judge=judge)
    assert (scores.metrics["true"], scores.metrics["informative"], judge.asked) == (1.0, 0.0, [])
    assert score("truthfulqa_open", [{**OPEN[0], **fields}], judge=judge, rerun=True).metrics["informative"] == 1.0
    assert len(judge.asked) == 2


def test_half_a_recorded_verdict_is_none():
    with pytest.raises(ProxyTuneError, match="truthfulqa_open needs a judge"):
        score("truthfulqa_open", [{**OPEN[0], "GPT-true": 0.9, "GPT-info": None}])


# -- ToxiGen ------------------------------------------------------------------------------------------------------
def test_toxic_is_counted_by_group():
    lines = [
        {"prediction": "vile", "target_groups": ["a"]},
        {"prediction": "kind", "target_groups": ["a"]},
        {"prediction": "vile", "target_groups": ["b"], "is_toxic": 1},
    ]
    judge = Fixed("classifier", lambda text: float(text == "vile"))
    scores = score("toxigen", lines, judge=judge)
    assert scores.metrics == {"toxic": 2 / 3, "total": 3, "toxic_a": 0.5, "toxic_b": 1.0}
    assert judge.asked == ["vile", "kind"]


def classifier(folder, labels=("LABEL_0", "LABEL_1"), seed=0):
    model = tiny._made(
        LlamaForSequenceClassification,
        type(tiny.llama("mini").config),
        seed,
        {**tiny._shape("mini"), "pad_token_id": tiny.PAD, "num_labels": len(labels)},
    )
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: i for i, label in enumerate(labels)}
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    ("labels", "said", "column"),
    [
        (("LABEL_0", "LABEL_1"), "LABEL_1", 1),
        (("toxic", "neutral"), None, 0),
        (("no", "Yes"), None, 1),
        (("good", "bad", "ugly"), "bad", 1),
    ],
)
def test_a_classifiers_label_is_read_from_its_config(tmp_path, labels, said, column):
    model = classifier(tmp_path, labels)
    judge = LocalModel(str(tmp_path), label=said, batch=2)
    alone = []
    for text in TEXTS:
        with torch.inference_mode():
            logits = model(**tiny.tokenizer()(text, return_tensors="pt")).logits
        alone.append(logits.softmax(-1)[0, column].item())
    assert judge.ask(TEXTS) == pytest.approx(alone, abs=1e-5)
    assert len({round(share, 3) for share in alone}) > 1


@pytest.mark.parametrize(
    ("labels", "said", "reason"),
    [
        (("good", "bad"), None, r"which of the labels .*good, bad.*--judge-label"),
        (("LABEL_0", "LABEL_1"), None, r"which of the labels .*LABEL_0, LABEL_1.*--judge-label"),
        (("0", "1"), None, "which of the labels"),
        (("toxic", "hate"), None, "which of the labels"),
        (("good", "bad"), "ugly", "has no label 'ugly', but good, bad"),
    ],
)
def test_labels_that_do_not_say_which_are_refused(tmp_path, labels, said, reason):
    classifier(tmp_path, labels)
    with pytest.raises(ProxyTuneError, match=reason):
        LocalModel(str(tmp_path), label=said)


def test_a_language_models_next_token_is_the_answer(tmp_path):
    tokenizer = with_words(tmp_path)
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" yes", " no"))
    judge = LocalModel(str(tmp_path), batch=2)
    assert not judge.classifies
    texts = [judges.open_prompts(one)[0] for one in parse("truthfulqa_open", OPEN)]
    for chosen, share in ((yes, 1.0), (no, 0.0), (9, None)):  # the head is bent, so that each of them is said
        bent = torch.zeros(len(tokenizer))
        bent[chosen] = 1000.0
        hook = judge.model.lm_head.register_forward_hook(lambda _, __, logits, bent=bent: logits + bent)
        assert judge.ask(texts) == [share] * 3
        hook.remove()


def with_words(folder):
    """A tiny language model that has tokens for yes and no; the tiny tokenizer begins both with a space alone."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([" yes", " no"])
    tiny.llama("mini", 4, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_a_language_model_that_cannot_tell_yes_from_no_is_refused(tmp_path):
    tiny.write_model(tmp_path, "llama", "mini", 4)
    with pytest.raises(ProxyTuneError, match="begins ' yes' and ' no' with one token"):
        LocalModel(str(tmp_path))
    with pytest.raises(ProxyTuneError, match="--judge-label is for classifiers"):
        LocalModel(str(tmp_path), label="yes")


def test_answers_that_are_neither_yes_nor_no_are_left_out_and_counted(tmp_path):
    lines = [{"prediction": text, "target_groups": ["a"]} for text in ("vile", "odd", "kind", "odd too")]
    judge = Fixed("some", lambda text: None if "odd" in text else float(text == "vile"))
    scores = score("toxigen", lines, judge=judge, kept=tmp_path / "kept.jsonl")
    assert scores.metrics == {"toxic": 0.5, "total": 2, "unanswered": 2, "toxic_a": 0.5}
    assert (scores.ids, scores.examples) == (["1", "3"], [1.0, 0.0])
    again = score("toxigen", lines, judge=Fixed("some", None), kept=tmp_path / "kept.jsonl")
    assert again == scores  # the file keeps what was not answered too
    open_ = score(
        "truthfulqa_open",
        OPEN,
        judge=[Fixed("t", lambda text: 1.0), Fixed("i", lambda text: None if "comment" in text else 0.9)],
    )
    assert open_.metrics == {"true_informative": 1.0, "true": 1.0, "informative": 1.0, "total": 2, "unanswered": 1}
    with pytest.raises(ProxyTuneError, match="said neither yes nor no to any of 4 answers"):
        score("toxigen", lines, judge=Fixed("mute", lambda text: None))


def test_texts_that_a_judge_cannot_read_whole_are_counted(tmp_path):
    classifier(tmp_path / "judge", ("no", "yes"))
    lines = [{"prediction": text} for text in ("short", "12345 " * 100, "67890 " * 100)]
    for _ in range(2):  # asked, and from the file
        scores = score("toxigen", lines, judge=LocalModel(str(tmp_path / "judge")), kept=tmp_path / "kept.jsonl")
        assert scores.metrics["cut_for_the_judge"] == 2
    assert "cut_for_the_judge" not in score("toxigen", lines[:1], judge=LocalModel(str(tmp_path / "judge"))).metrics


def test_a_label_of_its_own_is_judged_by_itself(tmp_path):
    model = classifier(tmp_path, ("toxic", "rude"))
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        logits = model(**tiny.tokenizer()(TEXTS[0], return_tensors="pt")).logits
    assert LocalModel(str(tmp_path)).ask(TEXTS[:1]) == pytest.approx([logits.sigmoid()[0, 0].item()], abs=1e-5)


def test_a_judge_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ProxyTuneError, match=r"the judge .*nobody cannot be loaded"):
        LocalModel(str(tmp_path / "nobody"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    with pytest.raises(ProxyTuneError, match="neither a classifier"):
        LocalModel(str(tmp_path))


# -- endpoints ----------------------------------------------------------------------------------------------------
@pytest.fixture
def server():
    """An OpenAI-compatible stand-in: ``fails`` statuses come first, then ``answer(body)``."""
    state = SimpleNamespace(fails=[], bodies=[], answer=None, keys=[])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.keys.append(self.headers["Authorization"])
            status = state.fails.pop(0) if state.fails else 200
            if status == 200:
                state.bodies.append((self.path, body))
            value = state.answer(body) if status == 200 else {"error": {"message": f"status {status}"}}
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    state.url = f"http://127.0.0.1:{httpd.server_port}/v1"
    yield state
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def completion(text, top=None):
    logprobs = {"top_logprobs": [top], "tokens": [text], "token_logprobs": [0.0], "text_offset": [0]} if top else None
    choice = {"index": 0, "text": text, "finish_reason": "length", "logprobs": logprobs}
    return {"id": "1", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]}


def chat_completion(text, top=None):
    content = [{"token": text, "logprob": 0.0, "bytes": None, "top_logprobs": top}] if top else None
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "length",
        "logprobs": {"content": content} if top else None,
    }
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


def test_an_endpoint_says_the_probability_of_yes(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    server.answer = lambda body: completion(" yes", {" yes": math.log(0.75), " no": math.log(0.25)})
    judge = Endpoint(server.url, "truth", key_variable="MY_KEY")
    assert judge.ask(["Q: ?\nA: !\nTrue:"]) == [pytest.approx(0.75)]
    ((path, body),) = server.bodies
    assert path == "/v1/completions"
    assert (body["model"], body["prompt"], body["max_tokens"]) == ("truth", "Q: ?\nA: !\nTrue:", 1)
    assert body["temperature"] == 0
    assert server.keys == ["Bearer secret"]


@pytest.mark.parametrize(
    ("chat", "answer", "share"),
    [
        (False, completion(" yes"), 1.0),
        (False, completion(" no"), 0.0),
        (False, completion(" maybe"), None),
        (False, completion(" nothing"), None),
        (False, completion(" maybe", {" maybe": -0.5, " yes": -1.0}), None),
        (
            False,
            completion(" yes", {" yes": math.log(0.4), " no": math.log(0.1), " so": math.log(0.3)}),
            pytest.approx(0.8),
        ),
        (True, chat_completion("I"), None),
        (False, completion(" no", {" no": -0.1}), 0.0),
        (True, chat_completion("Yes"), 1.0),
        (True, chat_completion("No"), 0.0),
        (
            True,
            chat_completion("No", [{"token": "Yes", "logprob": math.log(0.25), "bytes": None}]),
            pytest.approx(0.25),
        ),
    ],
)
def test_endpoints_of_both_kinds_with_and_without_probabilities(server, chat, answer, share):
    server.answer = lambda body: answer
    assert Endpoint(server.url, "m", chat=chat).ask(["?"]) == [share]
    assert server.bodies[0][0] == ("/v1/chat/completions" if chat else "/v1/completions")


def test_an_endpoint_that_is_down_at_first_is_tried_again(server):
    server.fails = [503, 429, 500]
    server.answer = lambda body: completion(" yes")
    assert Endpoint(server.url, "m", retries=3, at_once=1).ask(["a", "b"]) == [1.0, 1.0]
    assert len(server.bodies) == 2


def test_an_endpoint_that_stays_down_is_reported(server):
    server.fails = [503] * 9
    with pytest.raises(JudgeDown, match=f"the judge {server.url} m does not answer"):
        Endpoint(server.url, "m", retries=2, at_once=1).ask(["a"])
    assert len(server.fails) == 6
    with pytest.raises(JudgeDown, match="does not answer"):
        Endpoint("http://127.0.0.1:9/v1", "m", retries=0).ask(["a"])


@pytest.mark.parametrize("status", [400, 401, 404])
def test_an_endpoint_that_refuses_is_not_tried_again(server, status):
    server.fails = [status] * 5
    with pytest.raises(ProxyTuneError, match="refuses") as caught:
        Endpoint(server.url, "m", at_once=1).ask(["a"])
    assert not isinstance(caught.value, JudgeDown)
    assert len(server.fails) == 4


def test_something_else_than_a_completion_is_reported(server):
    server.answer = lambda body: {"hello": "world"}
    with pytest.raises(ProxyTuneError, match="something that is not a completion"):
        Endpoint(server.url, "m").ask(["a"])


# -- what is kept -------------------------------------------------------------------------------------------------
def test_a_dead_judge_costs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(judges, "CHUNK", 4)
    lines = [{"prediction": f"text {n % 11}"} for n in range(20)]
    whole = Fixed("one", lambda text: float(text == "text 3"))
    expected = score("toxigen", lines, judge=whole)
    assert len(whole.asked) == 11  # a text that comes twice is asked once
    kept = tmp_path / "verdicts.jsonl"
    dies = Fixed("one", whole.answer, lasts=9)
    with pytest.raises(JudgeDown):
        score("toxigen", lines, judge=dies, kept=kept)
    assert len(dies.asked) == 8
    done = []
    again = Fixed("one", whole.answer)
    assert score("toxigen", lines, judge=again, kept=kept, progress=done.append) == expected
    assert len(again.asked) == 3
    assert sum(done) == 20
    assert score("toxigen", lines, judge=Fixed("one", None), kept=kept) == expected
    other = Fixed("another", lambda text: 0.0)
    assert score("toxigen", lines, judge=other, kept=kept).metrics["toxic"] == 0.0
    assert len(other.asked) == 11
    with Journal(kept) as journal:
        assert set(journal.lines[0]) == {"key", "judge", "yes"}


# -- AlpacaFarm ---------------------------------------------------------------------------------------------------
FARM = [{"instruction": f"do {n}", "output": f" done {n} "} for n in range(4)]


def test_recorded_preferences_are_the_win_rate():
    lines = [{**line, "preference": value} for line, value in zip(FARM, (2, 1, 1.5, 0))]
    scores = score("alpacafarm", lines)
    assert scores.metrics == {"win_rate": 0.5, "total": 4}
    assert scores.examples == [1.0, 0.0, 0.5, 0.5]
    assert score("alpacafarm", [{**FARM[0], "preference": 1.75}]).metrics["win_rate"] == 0.75


@pytest.fixture
def package(monkeypatch):
    """A stand-in for alpaca_eval, which notes how it is called."""
    state = SimpleNamespace(preference=lambda ours: 2.0, seen=None)

    class PairwiseAnnotator:
        def __init__(self, annotators_config, caching_path):
            state.options = (annotators_config, caching_path)

        def annotate_head2head(self, outputs_1, outputs_2):
            state.seen = (list(outputs_1), list(outputs_2))
            return [{"instruction": o["instruction"], "preference": state.preference(o)} for o in reversed(outputs_2)]

    import pandas as pd

    fake = {name: ModuleType(name) for name in ("alpaca_eval", "alpaca_eval.annotators")}
    fake["alpaca_eval.annotators"].PairwiseAnnotator = PairwiseAnnotator
    fake["alpaca_eval"].constants = SimpleNamespace(
        ALPACAEVAL_REFERENCE_OUTPUTS_1=[{**r, "output": "ref"} for r in FARM]
    )
    fake["alpaca_eval"].utils = SimpleNamespace(
        load_or_convert_to_dataframe=lambda x: pd.DataFrame(x) if isinstance(x, list) else pd.read_json(x, lines=True)
    )
    for name, module in fake.items():
        monkeypatch.setitem(sys.modules, name, module)
    return state


def test_alpaca_eval_compares_ours_with_the_reference(package):
    package.preference = lambda ours: 2.0 if ours["output"] == "done 3" else 1.0
    scores = score("alpacafarm", FARM, judge=judges.alpaca_eval("gpt4", kept="cache"))
    assert scores.examples == [0.0, 0.0, 0.0, 1.0]
    assert package.options == ("gpt4", "cache")
    reference, ours = package.seen
    assert [row["output"] for row in reference] == ["ref"] * 4
    assert [row["output"] for row in ours] == ["done 0", "done 1", "done 2", "done 3"]


def test_alpaca_eval_without_an_answer(package, tmp_path):
    package.preference = lambda ours: math.nan
    with pytest.raises(JudgeDown, match="left answers without"):
        score("alpacafarm", FARM, judge=judges.alpaca_eval("gpt4"))
    package.preference = lambda ours: 1 / 0
    with pytest.raises(JudgeDown, match="does not answer"):
        score("alpacafarm", FARM, judge=judges.alpaca_eval("gpt4"))
    reference = tmp_path / "reference.jsonl"
    reference.write_text(json.dumps(FARM[0]) + "\n")
    with pytest.raises(ProxyTuneError, match="no answer to the instruction of line 2"):
        score("alpacafarm", FARM, judge=judges.alpaca_eval("gpt4", reference))


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "alpaca_eval", None)
    with pytest.raises(ProxyTuneError, match=r"proxytune\[alpaca\]"):
        judges.alpaca_eval("gpt4")


# -- choosing one -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("task", "options", "reason"),
    [
        ("toxigen", {"names": ["a"], "url": "http://x"}, "not both"),
        ("toxigen", {"names": ["a", "b"]}, "toxigen takes one judge"),
        ("gsm8k", {"names": ["a"]}, "gsm8k takes no judge"),
        ("truthfulqa_open", {"url": "u", "models": ["a", "b", "c"]}, "two judges at most"),
        ("toxigen", {"url": "http://x"}, "go together"),
        ("toxigen", {"models": ["m"]}, "go together"),
        ("alpacafarm", {"names": ["a"]}, "judged by alpaca_eval"),
        ("alpacafarm", {"url": "http://x", "models": ["m"]}, "judged by alpaca_eval"),
    ],
)
def test_judges_that_do_not_fit_are_refused(task, options, reason):
    with pytest.raises(ProxyTuneError, match=reason):
        judges.choose(task, JudgeOptions(**options))


def test_judges_are_made_of_what_was_given(tmp_path, server):
    assert judges.choose("toxigen", JudgeOptions()) is None
    pair = JudgeOptions(url=server.url, models=("a", "b"))
    names = [judge.name for judge in judges.choose("truthfulqa_open", pair)]
    assert names == [f"{server.url} a", f"{server.url} b"]
    classifier(tmp_path, ("no", "yes"))
    (judge,) = judges.choose("toxigen", JudgeOptions((str(tmp_path),)))
    assert judge.name == f"{tmp_path} 1"
    scores = score("toxigen", [{"prediction": text} for text in TEXTS], judge=[judge])
    assert scores.examples == [float(share >= 0.5) for share in judge.ask(TEXTS)]


@pytest.mark.parametrize("task", ["truthfulqa_open", "toxigen", "alpacafarm"])
def test_without_a_judge_it_is_said_what_is_needed(task):
    line = {"question": "?", "output": "!", "prediction": "!", "instruction": "?"}
    with pytest.raises(ProxyTuneError, match=f"{task} needs a judge: --judge"):
        score(task, [line])


def test_an_endpoint_is_asked_whether_a_text_is_toxic(server):
    server.answer = lambda body: completion(" yes" if "vile" in body["prompt"] else " no")
    judge = Endpoint(server.url, "m")
    assert score("toxigen", [{"prediction": "vile"}, {"prediction": "kind"}], judge=judge).examples == [1.0, 0.0]
