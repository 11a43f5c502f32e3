"""A server that speaks OpenAI's completions route over a tiny model, correct or faulty, and shares no code with us."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

KEY = "sk-very-secret"


class Served:
    """What a server does; a test sets what it wants to see.

    Attributes:
        texts: how it writes tokens: decoded, bytes (where they are no text), raw (the tokenizer's names) or ids.
        cap: log-probabilities that it gives at most. refuses: words in a request that it answers with 400.
        faults: from the number of a request (from 0) and its reply to what is sent: a reply, or (status, text).
        requests: the bodies of all requests.
        words: whether it knows vLLM's words: tokens written as ids, and the prompt's ids returned. scores: whether it
            knows ``echo``. tokenizes: whether it has the route /tokenize. raw: whether its log-probabilities are those
            before a bias. details: whether it says how many tokens of a prompt it had read before.
        penalty: how it holds earlier tokens back, unless a request says otherwise.
    """

    def __init__(self, model: Any, tokenizer: Any, **more: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.texts, self.cap, self.refuses, self.faults = "bytes", None, (), None
        self.ids, self.lists, self.hot, self.usage, self.key, self.offsets = True, True, False, True, None, True
        self.most_biases, self.whole_biases, self.words, self.scores = 10**6, False, False, False
        self.tokenizes, self.penalty, self.details, self.raw = False, 1.0, False, False
        self.requests: list[dict[str, Any]] = []
        self.name = "tiny"
        self.lock, self.turn = threading.Lock(), threading.Lock()
        self.spelled: dict[tuple[int, str], str] = {}  # a reply that scores a text spells each token many times
        for name, value in more.items():
            assert hasattr(self, name), name
            setattr(self, name, value)

    def spell(self, index: int, as_id: bool = False) -> str:
        if self.texts == "ids" or as_id:
            return f"token_id:{index}"
        if (index, self.texts) not in self.spelled:
            self.spelled[index, self.texts] = self._spelling(index)
        return self.spelled[index, self.texts]

    def _spelling(self, index: int) -> str:
        raw = self.tokenizer.convert_ids_to_tokens(index)
        if self.texts == "raw":
            return raw
        text = self.tokenizer.decode([index])
        if self.texts == "bytes" and "�" in text:
            from transformers.convert_slow_tokenizer import bytes_to_unicode

            table = {character: byte for byte, character in bytes_to_unicode().items()}
            return "bytes:" + "".join(f"\\x{table[character]:02x}" for character in raw)
        return text

    @torch.no_grad()
    def choice(self, index: int, prompt: Any, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt)["input_ids"]
        logits = self.model(torch.tensor([ids])).logits[0].double()
        every, own = logits.log_softmax(dim=-1), logits[-1].clone()
        if body.get("repetition_penalty") is None:
            said = torch.tensor(sorted(set(ids)))
            own[said] = torch.where(own[said] > 0, own[said] / self.penalty, own[said] * self.penalty)
        logprobs = own.log_softmax(dim=-1)
        for token, bias in (body.get("logit_bias") or {}).items():
            logprobs[int(token)] += max(-100.0, min(100.0, int(bias) if self.whole_biases else bias))
        temperature = body.get("temperature", 1.0)
        logprobs = logprobs.log_softmax(dim=-1)
        if temperature == 0:
            drawn = int(logprobs.argmax())
            shown = torch.full_like(logprobs, -9999.0).index_fill(0, torch.tensor(drawn), 0.0) if self.hot else logprobs
        else:
            drawn = int(torch.multinomial((logprobs / temperature).softmax(dim=-1), 1))
            shown = logprobs
        shown = every[-1] if self.raw else shown
        n = min(body["logprobs"], self.cap or body["logprobs"], len(shown))
        best = shown.topk(n)
        entries = dict(zip(best.indices.tolist(), best.values.tolist()))
        entries.setdefault(drawn, float(shown[drawn]))
        as_id = self.words and body.get("return_tokens_as_token_ids", False)
        top = {self.spell(token, as_id): value for token, value in entries.items()}
        made = {
            "index": index,
            "text": self.tokenizer.decode([drawn]),
            "finish_reason": "stop" if drawn == self.tokenizer.eos_token_id else "length",
            "logprobs": {
                "tokens": [self.spell(drawn, as_id)],
                "token_logprobs": [float(shown[drawn])],
                "top_logprobs": [top],
                "text_offset": [len(self.tokenizer.decode(ids)) if self.offsets else 0],
            },
        }
        if body.get("echo"):
            made["text"] = self.tokenizer.decode(ids) + made["text"]
            listed = made["logprobs"]
            listed["text_offset"] = [len(self.tokenizer.decode(ids[:at])) for at in range(len(ids) + 1)]
            listed["tokens"] = [self.spell(token, as_id) for token in ids] + listed["tokens"]
            given = [None, *(float(row[token]) for row, token in zip(every, ids[1:]))]
            listed["token_logprobs"] = given + listed["token_logprobs"]
            tops: list[Any] = [None]
            for row, token in zip(every, ids[1:]):
                best = row.topk(n)
                entries = dict(zip(best.indices.tolist(), best.values.tolist()))
                entries.setdefault(token, float(row[token]))
                tops.append({self.spell(index, as_id): value for index, value in entries.items()})
            listed["top_logprobs"] = tops + listed["top_logprobs"]
        if self.words and body.get("return_token_ids"):
            made["prompt_token_ids"] = ids
        return made, len(ids)

    def tokenize(self, body: dict[str, Any]) -> Any:
        return {"tokens": self.tokenizer(body["prompt"])["input_ids"]}

    def reply(self, body: dict[str, Any]) -> Any:
        prompt = body["prompt"]
        several = isinstance(prompt, list) and not isinstance(prompt[0], int)
        prompts = prompt if several else [prompt]
        if word := next((word for word in self.refuses if word in body), None):
            return 400, f"unknown field {word}"
        if body.get("echo") and not self.scores:
            return 400, "echo is not supported"
        if not self.ids and not isinstance(prompts[0], str):
            return 400, "prompt must be a text"
        if several and not self.lists:
            return 400, "prompt must not be a list"
        if len(body.get("logit_bias") or {}) > self.most_biases:
            return 400, f"logit_bias has more than {self.most_biases} entries"
        choices, lengths = zip(*(self.choice(at, one, body) for at, one in enumerate(prompts)))
        made = {"id": "1", "object": "text_completion", "model": self.name, "choices": list(choices)}
        if self.usage:
            made["usage"] = {"prompt_tokens": sum(lengths), "completion_tokens": len(choices)}
            if self.details:
                seen = any(one["prompt"] == prompt for one in self.requests[:-1] if "prompt" in one)
                made["usage"]["prompt_tokens_details"] = {"cached_tokens": lengths[0] - 1 if seen else 0}
        return made


class Proxy(Served):
    """Passes requests on to another server, several at once.

    Attributes:
        target: that server's URL, or a :class:`Served` in its place. altered: from a request's number and body to the
            body that is passed on.
    """

    def __init__(self, target: Any) -> None:
        super().__init__(None, None)
        self.target, self.altered, self.turn = target, None, nullcontext()

    def reply(self, body: dict[str, Any]) -> Any:
        if self.altered is not None:
            number = next(at for at, one in enumerate(self.requests) if one is body)
            body = self.altered(number, body)
        if isinstance(self.target, Served):
            return self.target.reply(body)
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{self.target}/completions", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["error"]["message"]


@contextmanager
def serving(served: Served):
    """Serve; yields the URL, which is then also ``served.url``."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # headers and body are two packets, and the second one would wait for 40 ms

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with served.lock:
                number = len(served.requests)
                served.requests.append(body)
            with served.turn:
                made: Any
                if served.key is not None and self.headers["Authorization"] != f"Bearer {served.key}":
                    made = 401, f"Incorrect API key provided: {self.headers['Authorization']}"
                elif self.path == "/tokenize" and served.tokenizes:
                    made = served.tokenize(body)
                elif self.path != "/v1/completions":
                    made = 404, "no such route"
                else:
                    made = served.reply(body)
                if served.faults is not None:
                    made = served.faults(number, made)
            if made == "drop":
                self.close_connection = True
                return
            if isinstance(made, tuple) and made[0] == "slow":
                time.sleep(made[1])
                made = made[2]
            status, headers = 200, {}
            if isinstance(made, tuple):
                status, text, *rest = made
                headers = rest[0] if rest else {}
                made = {"error": {"message": text}} if status != 200 else text
            data = made.encode() if isinstance(made, str) else json.dumps(made).encode()
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(data)),
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        served.url = f"http://127.0.0.1:{server.server_port}/v1"
        yield served.url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
