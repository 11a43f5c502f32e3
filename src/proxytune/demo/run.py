"""The demo: the same held-out problems for every arm, side by side and counted.

Six arms, all decoded greedily by ``generate``:

    base            M, as it is
    anti_expert     M-, the small model
    expert          M+, the small model that knows the format
    proxy_tuned     M + alpha * (M+ - M-), the recipe
    base_few_shot   control: M after four solved problems
    mean_logits     control: M and M+ averaged, no anti-expert
"""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging as transformers_logging

from proxytune.demo.assets import materialize
from proxytune.errors import ProxyTuneError
from proxytune.evaluation.problems import FEW_SHOT, Problem, Split, is_correct, is_exact, make_problems
from proxytune.evaluation.statistics import mcnemar, wilson
from proxytune.lanes.kernels import pack
from proxytune.model import ProxyTunedForCausalLM

__all__ = ["ARMS", "Arms", "DemoResult", "run_demo"]

ARMS: Mapping[str, str] = {
    "base": "base (SmolLM2-135M-Instruct)",
    "anti_expert": "anti-expert",
    "expert": "expert alone",
    "proxy_tuned": "proxy-tuned base",
    "base_few_shot": "control: base, 4 examples shown",
    "mean_logits": "control: mean of base and expert",
}
SECONDS = 60.0
MAX_NEW_TOKENS = 28


@dataclass
class DemoResult:
    """Every arm's answer to every problem, in the order of the problems.

    ``verdicts`` are those of :func:`is_correct`, ``exact`` those of :func:`is_exact`: the right answer and
    nothing else. The first is the demo's measure.
    """

    seed: int
    verdicts: dict[str, list[bool]] = field(default_factory=lambda: {arm: [] for arm in ARMS})
    exact: dict[str, list[bool]] = field(default_factory=lambda: {arm: [] for arm in ARMS})
    texts: dict[str, list[str]] = field(default_factory=lambda: {arm: [] for arm in ARMS})
    seconds: float = 0.0

    @property
    def total(self) -> int:
        """The number of problems that every arm has answered."""
        return min(len(verdicts) for verdicts in self.verdicts.values())

    def to_json(self) -> dict[str, Any]:
        arms = {arm: {"correct": sum(done), "total": len(done)} for arm, done in self.verdicts.items()}
        exact = {arm: sum(done) for arm, done in self.exact.items()}
        return {
            "arms": arms,
            "seconds": round(self.seconds, 1),
            "seed": self.seed,
            "nothing_else": exact,
            "proxy_tuned_against": [
                {"arm": name, "only_proxy_tuned": won, "only_other": lost, "p": p}
                for name, won, lost, p in self.comparisons()
            ],
        }

    def comparisons(self) -> list[tuple[str, int, int, float]]:
        """Against each arm: problems that only the proxy-tuned base solved, that only the other did, and p."""
        rows = [(arm, self.verdicts, arm) for arm in ("base", "expert", "base_few_shot", "mean_logits")]
        rows.append(("mean_logits, nothing else", self.exact, "mean_logits"))
        return [
            (name, *mcnemar(verdicts["proxy_tuned"][: self.total], verdicts[arm][: self.total]))
            for name, verdicts, arm in rows
        ]


class Arms:
    """The six arms, made of the four models of a materialised demo."""

    def __init__(self, place: Path) -> None:
        self.steered = ProxyTunedForCausalLM.from_pretrained(place / "recipe", pack=True)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(place / "recipe", padding_side="left")
        anti_expert: Any = AutoModelForCausalLM.from_pretrained(place / "anti_expert", dtype=torch.float32)
        expert: Any = AutoModelForCausalLM.from_pretrained(place / "expert", dtype=torch.float32)
        for model in (anti_expert, expert):
            pack(model)
        # Greedy choices do not feel a scale, so base + expert chooses what their mean would.
        mean = ProxyTunedForCausalLM.from_members(self.steered.base, expert, tokenizer=self.tokenizer)
        self.few_shot: tuple[torch.Tensor, DynamicCache] | None = None
        self.models: dict[str, Any] = {
            "base": self.steered.base,
            "anti_expert": anti_expert.eval(),
            "expert": expert.eval(),
            "proxy_tuned": self.steered,
            "base_few_shot": self.steered.base,
            "mean_logits": mean,
        }

    def answer(self, arm: str, problems: Sequence[Problem]) -> list[str]:
        """The arm's greedy answers."""
        inputs = self.tokenizer([problem.prompt for problem in problems], return_tensors="pt", padding=True)
        ids, mask, cache = inputs.input_ids, inputs.attention_mask, {}
        if arm == "base_few_shot":
            shown, past = self._shown()
            ids = torch.cat([shown.expand(len(ids), -1), ids], dim=1)
            mask = torch.cat([torch.ones_like(shown).expand(len(ids), -1), mask], dim=1)
            past.batch_repeat_interleave(len(ids))
            cache = {"past_key_values": past}
        n_prompt = ids.shape[1]
        generated = self.models[arm].generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            stopping_criteria=StoppingCriteriaList([_Answered(self.tokenizer, n_prompt)]),
            **cache,
        )
        texts: list[str] = self.tokenizer.batch_decode(generated[:, n_prompt:], skip_special_tokens=True)
        return texts

    @torch.inference_mode()
    def _shown(self) -> tuple[torch.Tensor, DynamicCache]:
        """The few-shot examples' ids, (1, n_shown), and a fresh cache that has read them; read only once."""
        if self.few_shot is None:
            shown = "".join(f"{problem.prompt}{problem.completion}\n\n" for problem in FEW_SHOT)
            ids = self.tokenizer(shown, return_tensors="pt").input_ids
            output = self.models["base_few_shot"](input_ids=ids, use_cache=True, logits_to_keep=1)
            self.few_shot = ids, output.past_key_values
        ids, past = self.few_shot
        return ids, copy.deepcopy(past)

    @torch.inference_mode()
    def steered_tokens(self, problem: Problem, text: str) -> list[tuple[str, bool]]:
        """The tokens of the proxy-tuned answer, each with whether the base alone would have chosen another."""
        prompt = self.tokenizer(problem.prompt).input_ids
        answer = self.tokenizer(text).input_ids
        output = self.steered(input_ids=torch.tensor([prompt + answer]), output_member_logits=True, use_cache=False)
        choices = output.member_logits["base"][0, len(prompt) - 1 : -1].argmax(dim=-1).tolist()
        return [(self.tokenizer.decode([t]), t != choice) for t, choice in zip(answer, choices, strict=True)]


class _Answered(StoppingCriteria):
    """A row is done once it has written something behind the line of its ``####``: nothing later changes a verdict."""

    def __init__(self, tokenizer: Any, n_prompt: int) -> None:
        self.tokenizer = tokenizer
        self.n_prompt = n_prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        texts = self.tokenizer.batch_decode(input_ids[:, self.n_prompt :])
        return torch.tensor(
            [re.search(r"^####.*\n+.", text, re.MULTILINE) is not None for text in texts], device=input_ids.device
        )


def measure(
    arms: Arms,
    problems: Sequence[Problem],
    result: DemoResult,
    *,
    batch_size: int = 8,
    go_on: Callable[[], bool] = lambda: True,
    report: Callable[[], None] = lambda: None,
) -> DemoResult:
    """Let every arm answer the problems, batch by batch, into ``result``; ``go_on`` is asked before each batch."""
    for start in range(0, len(problems), batch_size):
        if not go_on():
            break
        batch = problems[start : start + batch_size]
        for arm in ARMS:
            texts = arms.answer(arm, batch)
            result.texts[arm] += texts
            result.verdicts[arm] += [is_correct(text, problem) for text, problem in zip(texts, batch, strict=True)]
            result.exact[arm] += [is_exact(text, problem) for text, problem in zip(texts, batch, strict=True)]
            report()
    return result


def run_demo(
    problems: int | None = None,
    seed: int = 0,
    json_path: Path | None = None,
    *,
    console: Console | None = None,
    cache_dir: Path | None = None,
    assets: Path | None = None,
    split: Split = "test",
    examples: int = 3,
) -> DemoResult:
    """Show proxy-tuning at work on held-out problems, and count.

    Args:
        problems: how many; by default as many as fit about a minute, loading included.
        seed: of the problems.
        json_path: where the counts go, after every batch.
        cache_dir, assets: see :func:`proxytune.demo.materialize`; by default the shipped models.
        split: which templates the problems are made of.
        examples: how many problems are shown side by side.

    Raises:
        ProxyTuneError: if a file cannot be written, or the base model is not installed.
    """
    if problems is not None and problems < 1:
        raise ProxyTuneError(f"the demo needs at least one problem, not {problems}")
    started = time.monotonic()
    console = console or Console()
    result = DemoResult(seed)
    _save(result, json_path)  # an unwritable place is found before the work, not after it

    with _quiet_transformers():
        with console.status("Preparing the demo's models (only the first time takes long)"):
            place = materialize(cache_dir) if assets is None else materialize(cache_dir, assets)
        console.print(f"Models: {place}", style="dim", soft_wrap=True)
        with console.status("Loading"):
            arms = Arms(place)

        batch_size = 8 if problems is None else min(problems, 50)
        chosen = make_problems(split, problems or 400, seed)
        batch_seconds = [time.monotonic()]
        with console.status("Solving the first problems"):
            measure(arms, chosen[:batch_size], result, batch_size=batch_size)
        for problem, texts in zip(chosen[:examples], _rows(result), strict=False):
            console.print(_side_by_side(arms, problem, texts))

        def go_on() -> bool:
            """With no number given: only while another batch, as long as the longest so far, fits the minute."""
            batch_seconds.append(time.monotonic())
            longest = max(b - a for a, b in pairwise(batch_seconds))
            return problems is not None or batch_seconds[-1] - started + longest < SECONDS

        with Live(_table(result), console=console, refresh_per_second=4) as live:

            def report() -> None:
                result.seconds = time.monotonic() - started
                live.update(_table(result))
                _save(result, json_path)

            report()
            measure(arms, chosen[batch_size:], result, batch_size=batch_size, go_on=go_on, report=report)
    result.seconds = time.monotonic() - started
    _save(result, json_path)
    console.print()
    console.print(_comparisons(result))
    return result


# ---- what is shown -----------------------------------------------------------------------------------


def _rows(result: DemoResult) -> Iterator[dict[str, str]]:
    for index in range(result.total):
        yield {arm: texts[index] for arm, texts in result.texts.items()}


def _side_by_side(arms: Arms, problem: Problem, texts: Mapping[str, str]) -> Panel:
    table = Table(box=None, padding=(0, 2, 0, 0), expand=True)
    for heading in ("base", "expert alone", "proxy-tuned"):
        table.add_column(heading, ratio=1, overflow="fold")
    steered = Text()
    for token, changed in arms.steered_tokens(problem, texts["proxy_tuned"].rstrip()):
        steered.append(token, style="bold reverse" if changed else "")
    cells = []
    for arm in ("base", "expert", "proxy_tuned"):
        mark = Text("  right", "green") if is_correct(texts[arm], problem) else Text("  wrong", "red")
        text = steered if arm == "proxy_tuned" else Text(texts[arm])
        text.rstrip()
        while text.plain.startswith((" ", "\n")):
            text = text[1:]
        cells.append(Group(text, mark))
    table.add_row(*cells)
    note = Text("reversed: tokens that the base alone would not have chosen", style="dim")
    return Panel(Group(Text(problem.question, style="italic"), Text(), table, note), title="held-out problem")


def _table(result: DemoResult) -> Table:
    table = Table(title="Held-out problems, strict exact match", title_justify="left")
    table.add_column("arm")
    table.add_column("correct", justify="right")
    table.add_column("share", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("and nothing else", justify="right")
    for arm, name in ARMS.items():
        correct, total = sum(result.verdicts[arm]), len(result.verdicts[arm])
        low, high = wilson(correct, total)
        share = f"{100 * correct / total:.1f} %" if total else ""
        interval = f"{100 * low:.1f} – {100 * high:.1f}" if total else ""
        exact = f"{sum(result.exact[arm])}/{total}"
        table.add_row(name, f"{correct}/{total}", share, interval, exact, style="bold" if arm == "proxy_tuned" else "")
    table.caption = f"{result.seconds:.0f} s"
    return table


def _comparisons(result: DemoResult) -> Table:
    table = Table(title="Proxy-tuned against", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("", "only it right", "only the other right", "p (exact McNemar)"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, won, lost, p in result.comparisons():
        arm, _, rest = name.partition(",")
        table.add_row(ARMS[arm] + (f",{rest}" if rest else ""), str(won), str(lost), f"{p:.2g}")
    return table


# ---- surroundings ------------------------------------------------------------------------------------


def _save(result: DemoResult, path: Path | None) -> None:
    if path is None:
        return
    try:
        Path(path).write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ProxyTuneError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No loading bars and no warnings of transformers' own between the demo's lines."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
