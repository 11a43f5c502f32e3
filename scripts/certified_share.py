"""How many greedy tokens are certain if the base's server names its top n: the table and the plot of docs/api-base.md.

    python scripts/certified_share.py --prompts 16 --plot docs/pictures/certified.png

It needs no server: the demo answers held-out questions with all its models here, and the certificate is asked what it
would say of each token if only the base's top n were known. The lines below the table count the tokens that the way
``push`` decides by a request with some of the vocabulary's tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import proxytune
from proxytune.answers.generation import Sampling, answer, encode
from proxytune.answers.text import loaded
from proxytune.decoding.certificate import biases, bounded, judge, known_ids, most_probable
from proxytune.decoding.lane import Scores
from proxytune.demo.tasks import TASKS
from proxytune.lanes.completions import FEW_BIASES, MOST_BIAS, known_of
from proxytune.lanes.probing import BIASES
from proxytune.tables import Table, markdown

SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 49_152)
SHOWN = (1, 5, 20, 100, 1000, 10_000)  # in the table


@torch.no_grad()
def main() -> None:
    """Print the table, and write the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--task", choices=("facts", "word-problems"), default="facts", help="whose expert and questions"
    )
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--plot", type=Path, help="PNG file for the shares at more sizes than the table has")
    asked = parser.parse_args()
    model, tokenizer = loaded("demo" if asked.task == "facts" else "demo-word-problems")
    decided = dict.fromkeys((FEW_BIASES, *BIASES), 0)  # size of a push -> tokens
    counts = {n: [0, 0] for n in SIZES}  # certain; and the top n's own best token is the choice
    total = 0
    for problem in TASKS[asked.task].choose("test", asked.prompts, 0):
        prompt = encode(model, tokenizer, problem.question, chat=True)
        made = answer(model, tokenizer, [prompt], None, max_new_tokens=asked.max_new_tokens, sampling=Sampling())[0]
        ids = torch.tensor([prompt.ids + made.tokens[:-1]])
        output = model(ids, logits_to_keep=len(made.tokens), output_member_logits=True)
        base = output.member_logits["base"].float().log_softmax(dim=-1)
        delta = output.logits - output.member_logits["base"].float()
        total += len(made.tokens)
        members = [logits[0] for name, logits in output.member_logits.items() if name != "base"]
        likely = most_probable([torch.cat(members)], len(made.tokens), base.shape[-1])
        for at, token in enumerate(made.tokens):
            for n in decided:
                ids, added = biases(delta[0, at], likely[at], n, MOST_BIAS)
                pushed = base[0, at].index_add(0, ids, added.clamp(min=-MOST_BIAS))
                wins = bool((ids[added >= -MOST_BIAS] == pushed.argmax()).any())
                assert not wins or int(pushed.argmax()) == token
                decided[n] += wins
        for n in SIZES:
            top = base.topk(n)
            bounds = [known_of([((i,), x) for i, x in enumerate(row)], n).bound for row in top.values[0].tolist()]
            scores = Scores(top.values, top.indices, torch.tensor([bounds]))
            known, upper = known_ids(scores, base.shape[-1]), bounded(scores, base.shape[-1]) + delta
            certain, _ = judge(upper, known)
            chosen = upper.masked_fill(~known, -torch.inf).argmax(dim=-1)[0]
            counts[n][0] += int(certain.sum())
            counts[n][1] += int((chosen == torch.tensor(made.tokens)).sum())
    rows = [
        (f"{n:,}", f"{100 * sure / total:.1f} %", f"{100 * right / total:.1f} %")
        for n, (sure, right) in counts.items()
        if n in SHOWN
    ]
    print(markdown([Table(("n", "certain", "the mixture's choice"), rows)]))
    for n, sure in decided.items():
        print(f"a push of {n:,} tokens decides {sure} of {total}: {100 * sure / total:.1f} %")
    print(f"{total} tokens of {asked.prompts} answers, alpha {model.config.alphas}, proxytune {proxytune.__version__}")
    if asked.plot is not None:
        plot(counts, total, asked.plot)


def plot(counts: Mapping[int, Sequence[int]], total: int, path: Path) -> None:
    """The two shares over n, as PNG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from proxytune.evaluation.plots import LINES, STYLE

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        panel = figure.subplots()
        for at, (label, style) in enumerate(
            (("certain", "-"), ("the mixture's choice is the best of the top n", "--"))
        ):
            shares = [100 * both[at] / total for both in counts.values()]
            panel.plot(list(counts), shares, style, marker="o", markersize=4, color=LINES[at], label=label)
        panel.set_xscale("log")
        panel.set_xlabel("n, the tokens that the base's server names")
        panel.set_ylabel("share of greedy tokens, %")
        panel.set_ylim(0, 104)
        panel.grid(color="#e6e6e6")
        panel.set_axisbelow(True)
        panel.legend(frameon=False, loc="lower right")
        figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
