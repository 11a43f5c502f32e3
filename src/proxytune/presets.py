"""Trios that are known to work: the paper's (2401.08565, section 3 to 5) and two of today's."""

from __future__ import annotations

from proxytune.config import Expert, Member, Prompt, ProxyTuneConfig

__all__ = ["PRESETS"]


def _llama2(size: str, name: str, expert: Member) -> ProxyTuneConfig:
    anti_expert = Member("meta-llama/Llama-2-7b-hf")
    return ProxyTuneConfig(base=Member(f"meta-llama/Llama-2-{size}-hf"), experts=[Expert(name, expert, anti_expert)])


def _chat(size: str) -> ProxyTuneConfig:
    # The paper's chat expert reads [INST] ... [/INST]; base and anti-expert read the raw prompt.
    return _llama2(size, "chat", Member("meta-llama/Llama-2-7b-chat-hf", prompt=Prompt("chat")))


def _code(size: str) -> ProxyTuneConfig:
    return _llama2(size, "code", Member("codellama/CodeLlama-7b-Python-hf"))


def _qwen() -> ProxyTuneConfig:
    # One chat template for all three, so all of them read the same tokens.
    return ProxyTuneConfig(
        base=Member("Qwen/Qwen2.5-32B"),
        experts=[Expert("chat", Member("Qwen/Qwen2.5-1.5B-Instruct"), Member("Qwen/Qwen2.5-1.5B"))],
    )


def _llama3() -> ProxyTuneConfig:
    return ProxyTuneConfig(
        base=Member("meta-llama/Llama-3.1-70B"),
        experts=[
            Expert(
                "chat",
                Member("meta-llama/Llama-3.1-8B-Instruct", prompt=Prompt("chat")),
                Member("meta-llama/Llama-3.1-8B"),
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
