"""Members with prompts of their own, rendered by hand."""

from __future__ import annotations

from proxytune import Prompt, ProxyTunedForCausalLM

TEXTS = ["Question: how many apples are there?\nAnswer:", "the dog", "Steering a large model, how?"]
SYSTEM = "the rules"
CHAT = Prompt("chat", system=SYSTEM, response_prefix="Answer:")
TEMPLATE = Prompt("template", template="Tell me: {prompt}\nReply:")


def chat_ids(text, tokenizer, system=SYSTEM, prefix="Answer:"):
    """By hand: the chat around the text, without the words that are put where the answer begins."""
    body = text[: -len(prefix)].rstrip() if prefix and text.endswith(prefix) else text
    filled = f"<s>[system] {system}\n" if system else "<s>"
    filled += f"[user] {body}\n[assistant]{prefix}"
    return tokenizer(filled, add_special_tokens=False)["input_ids"]


def template_ids(text, tokenizer):
    return tokenizer(f"Tell me: {text}\nReply:")["input_ids"]


def compose(oracle, tokenizer, expert=CHAT, anti_expert=TEMPLATE, **kwargs):
    """The trio, its expert and anti-expert each under a prompt of its own."""
    name, e, a, alpha = oracle.experts[0]
    one = {
        "name": name, "expert": e, "anti_expert": a, "alpha": alpha, "expert_prompt": expert,
        "anti_expert_prompt": anti_expert,
    }  # fmt: skip
    return ProxyTunedForCausalLM.from_members(oracle.base, experts=[one], tokenizer=tokenizer, **kwargs)


def prompts_of(text, tokenizer):
    return {
        "base": tokenizer(text)["input_ids"],
        "e.expert": chat_ids(text, tokenizer),
        "e.anti_expert": template_ids(text, tokenizer),
    }


def batch_of(tokenizer, texts=TEXTS):
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    return {key: batch[key] for key in ("input_ids", "attention_mask")}
