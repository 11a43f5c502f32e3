"""`transformers serve` as a base behind an API: it ignores `logprobs`, and is refused."""

from __future__ import annotations

import sys

import pytest

from proxytune import MemberError, ProxyTunedForCausalLM
from support import tiny
from support.served import running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The URL of the server, and the model that it serves."""
    root = tmp_path_factory.mktemp("served")
    model = tiny.write_model(root / "base", "llama", "base", 1)
    tiny.tokenizer().save_pretrained(model)
    program = "from transformers.cli.transformers import main; main()"
    with running([sys.executable, "-c", program, "serve", str(model)], root / "log") as url:
        yield url, model


def test_it_is_refused_in_one_sentence(served):
    url, model = served
    base = {"api": url, "model": str(model), "tokenizer": str(model)}
    with pytest.raises(MemberError, match=r"gives no log-probabilities; steering needs them$"):
        ProxyTunedForCausalLM.from_members(base, tiny.llama("mini", 3))
