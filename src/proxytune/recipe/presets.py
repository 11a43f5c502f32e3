"""Trios to start from: the paper's (2401.08565, section 3 to 5) and two of today's.

None of them has been loaded by us: the models are too large for where this was made. `proxytune check` says of a preset
what it says of any recipe.
"""

from __future__ import annotations

import proxytune as pt  # names that are imported when they are used: the command line shows the presets at once

__all__ = ["PRESETS"]


def _llama2(size: str, name: str, expert: pt.Member) -> pt.ProxyTuneConfig:
    anti_expert = pt.Member("meta-llama/Llama-2-7b-hf")
    return pt.ProxyTuneConfig(
        base=pt.Member(f"meta-llama/Llama-2-{size}-hf"), experts=[pt.Expert(name, expert, anti_expert)]
    )


def _chat(size: str) -> pt.ProxyTuneConfig:
    # The paper's chat expert reads [INST] ... [/INST]; base and anti-expert read the raw prompt.
    return _llama2(size, "chat", pt.Member("meta-llama/Llama-2-7b-chat-hf", prompt=pt.Prompt("chat")))


def _code(size: str) -> pt.ProxyTuneConfig:
    return _llama2(size, "code", pt.Member("codellama/CodeLlama-7b-Python-hf"))


def _qwen() -> pt.ProxyTuneConfig:
    # The prompt is raw, so all three read the same tokens.
    return pt.ProxyTuneConfig(
        base=pt.Member("Qwen/Qwen2.5-32B"),
        experts=[pt.Expert("chat", pt.Member("Qwen/Qwen2.5-1.5B-Instruct"), pt.Member("Qwen/Qwen2.5-1.5B"))],
    )


def _llama3() -> pt.ProxyTuneConfig:
    return pt.ProxyTuneConfig(
        base=pt.Member("meta-llama/Llama-3.1-70B"),
        experts=[
            pt.Expert(
                "chat",
                pt.Member("meta-llama/Llama-3.1-8B-Instruct", prompt=pt.Prompt("chat")),
                pt.Member("meta-llama/Llama-3.1-8B"),
            )
        ],
    )


#: name -> (what it is, a function that makes its config)
PRESETS = {
    "llama2-13b-chat": ("the paper's chat trio: Llama-2 13B steered by 7B-chat", lambda: _chat("13b")),
    "llama2-70b-chat": ("the same with the 70B as base", lambda: _chat("70b")),
    "llama2-13b-code": ("the paper's code trio: Llama-2 13B steered by CodeLlama-7B-Python", lambda: _code("13b")),
    "llama2-70b-code": ("the same with the 70B as base", lambda: _code("70b")),
    "qwen2.5-32b-chat": ("Qwen2.5 32B steered by 1.5B-Instruct", _qwen),
    "llama3.1-70b-chat": ("Llama-3.1 70B steered by 8B-Instruct", _llama3),
}
