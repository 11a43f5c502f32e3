"""The reference implementation's loop: three models, three forwards per token, nothing shared (2401.08565, section 3).

It shows what proxy-tuning costs without this package; ``proxytune bench`` compares with it. It does the same as the
authors' loop (github.com/alisawuffles/proxy-tuning): every model prepares its inputs and keeps a cache of its own at
every step, the logits are mixed, and each new token is concatenated to the whole prefix. Improvements that ``generate``
has made since then are included: only the last position's logits are computed, and they are mixed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from proxytune.decoding.mixing import mix
from proxytune.recipe.gates import Gate
from proxytune.recipe.rules import Rule

__all__ = ["plain_loop"]

Side = Any  # a transformers model, or None if the recipe has no such side


@torch.no_grad()
def plain_loop(
    base: Any,
    experts: Sequence[tuple[Side, Side, float]],
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    rule: Rule = "sum",
    gate: Gate | None = None,
    plausibility: float | None = None,
    logits_processor: LogitsProcessorList | None = None,
    temperature: float | None = None,
) -> tuple[Tensor, list[Any]]:
    """Proxy-tuning of a batch with rows of equal length. Only ``max_new_tokens`` ends it.

    Args:
        base: the model that is steered.
        experts: (expert or None, anti-expert or None, alpha) each. LoRA experts must be merged before.
        input_ids: shape = (n_batch, n_prompt), read by every model.
        rule, gate, plausibility: see :func:`proxytune.decoding.mixing.mix`.
        logits_processor: applied to the mixed logits, shape = (n_batch, n_vocab).
        temperature: for sampling; None is greedy.

    Returns:
        The prompt and the new tokens, shape = (n_batch, n_prompt + max_new_tokens), and each model's cache.
    """
    models = [base] + [side for *pair, _ in experts for side in pair if side is not None]
    alpha = torch.tensor([[alpha for *_, alpha in experts]], device=input_ids.device)
    kwargs: list[dict[str, Any]] = [
        {"attention_mask": torch.ones_like(input_ids), "past_key_values": None, "use_cache": True} for _ in models
    ]
    for step in range(max_new_tokens):
        outputs = []
        for model, own in zip(models, kwargs):
            inputs = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=None if step == 0 else 1, is_first_iteration=step == 0, **own
            )
            if model._supports_logits_to_keep():
                inputs["logits_to_keep"] = 1
            outputs.append(model(**inputs, return_dict=True))

        logits = iter([output.logits[:, -1:] for output in outputs])
        base_logits = next(logits)
        pairs = [tuple(None if side is None else next(logits) for side in pair) for *pair, _ in experts]
        mixed = mix(base_logits, pairs, alpha, rule=rule, gate=gate, plausibility=plausibility)[:, -1]  # type: ignore[arg-type]
        if logits_processor is not None:
            mixed = logits_processor(input_ids, mixed)  # type: ignore[arg-type]
        if temperature is None:
            next_tokens = mixed.argmax(dim=-1)
        else:
            next_tokens = torch.multinomial((mixed / temperature).softmax(dim=-1), num_samples=1).squeeze(1)

        input_ids = torch.cat([input_ids, next_tokens[:, None]], dim=-1)
        for output, own in zip(outputs, kwargs):
            own["past_key_values"] = output.past_key_values
            mask = own["attention_mask"]
            own["attention_mask"] = torch.cat([mask, mask.new_ones((mask.shape[0], 1))], dim=-1)
    return input_ids, [own["past_key_values"] for own in kwargs]
