"""`transformers serve` as a base behind an API: it ignores `logprobs`, and is refused."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from proxytune import MemberError, ProxyTunedForCausalLM
from support import tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The URL of the server, and the model that it serves."""
    root = tmp_path_factory.mktemp("served")
    model = tiny.write_model(root / "base", "llama", "base", 1)
    tiny.tokenizer().save_pretrained(model)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = "from transformers.cli.transformers import main; main()"
    words = [sys.executable, "-c", program, "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    with open(root / "log", "w") as log:
        server = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, (root / "log").read_text()[-2000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", model
    finally:
        server.terminate()
        server.wait()


def test_it_is_refused_in_one_sentence(served):
    url, model = served
    base = {"api": url, "model": str(model), "tokenizer": str(model)}
    with pytest.raises(MemberError, match=r"gives no log-probabilities; steering needs them$"):
        ProxyTunedForCausalLM.from_members(base, tiny.llama("mini", 3))
