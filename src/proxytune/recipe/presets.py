"""Trios to start from: the paper's (2401.08565, section 3 to 5) and two of today's.

None of them has been loaded by us: the models are too large for where this was made. `proxytune check` says of a preset
what it says of any recipe.
"""

from __future__ import annotations

from typing import Any

__all__ = ["PRESETS"]


def _trio(name: str, base: str, expert: str, anti_expert: str, prompt: str = "raw") -> dict[str, Any]:
    """A recipe's fields; ``prompt`` is the expert's, base and anti-expert read the raw one."""
    sides = {"expert": {"model": expert, "prompt": prompt}, "anti_expert": anti_expert}
    return {"base": base, "experts": [{"name": name, **sides}]}


LLAMA2 = "meta-llama/Llama-2-{}-hf".format
# The paper's chat expert reads [INST] ... [/INST].
CHAT = {"expert": LLAMA2("7b-chat"), "anti_expert": LLAMA2("7b"), "prompt": "chat"}
CODE = {"expert": "codellama/CodeLlama-7b-Python-hf", "anti_expert": LLAMA2("7b")}
LLAMA3 = "meta-llama/Llama-3.1-"
QWEN = "Qwen/Qwen2.5-"  # its prompt is raw, so all three read the same tokens

PRESETS = {
    "llama2-13b-chat": _trio("chat", LLAMA2("13b"), **CHAT),
    "llama2-70b-chat": _trio("chat", LLAMA2("70b"), **CHAT),
    "llama2-13b-code": _trio("code", LLAMA2("13b"), **CODE),
    "llama2-70b-code": _trio("code", LLAMA2("70b"), **CODE),
    "qwen2.5-32b-chat": _trio("chat", f"{QWEN}32B", f"{QWEN}1.5B-Instruct", f"{QWEN}1.5B"),
    "llama3.1-70b-chat": _trio("chat", f"{LLAMA3}70B", f"{LLAMA3}8B-Instruct", f"{LLAMA3}8B", "chat"),
}
