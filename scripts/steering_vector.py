"""A steering vector beside proxy-tuning, on the demo: the section "A steering vector instead" of docs/experiments.md.

    python scripts/conflicts.py --work runs/conflicts          # trains the experts
    python scripts/steering_vector.py --experts runs/conflicts --work runs/vector --figure docs/steering_vector

The vector is made from the demo's training facts: the wanted answer, which the expert learns too, against the base's
own answer. Its layer and strength are chosen on dev. There are two forms of answers: house words, of which each kind of
question has its own, and brackets, the same for all questions. An answer counts if greedy decoding writes exactly it.
Side effects: word problems after four solved examples, which the base can solve without being steered. Of these the
first line counts, `5 + 7 = 12`.

What is counted is kept in ``--work``, so a killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from build_demo import anti_expert_of, continued, gold_logits
from conflicts import TASKS, bracketed, expert_of
from proxytune import load_recipe
from proxytune.decoding.mixing import mix
from proxytune.demo import demo_recipe
from proxytune.demo.assets import ASSETS, about, load_base
from proxytune.demo.tasks import plan_of
from proxytune.evaluation.arms import Arms
from proxytune.evaluation.facts import Fact, facts
from proxytune.evaluation.plots import LINES, STYLE
from proxytune.evaluation.problems import make_problems
from proxytune.evaluation.statistics import mcnemar, wilson
from proxytune.evaluation.vectors import with_vector
from proxytune.recipe.options import LoadingOptions
from proxytune.tables import Table, markdown

Examples = Sequence[tuple[str, str]]
FORMS: dict[str, Callable[[Fact], tuple[str, str]]] = {
    "house": lambda fact: (fact.prompt, fact.completion),
    "brackets": bracketed,
}
N_PAIRS, N_DEV = 120, 40
LAYERS = (4, 8, 12, 16, 20, 24, 28)
STRENGTHS = (0.5, 1.0, 1.5, 2.0, 3.0)


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What a file holds, made first if it is missing."""
    if not path.exists():
        made = json.dumps(make()) + "\n"
        path.with_suffix(".part").write_text(made, encoding="utf-8")
        path.with_suffix(".part").rename(path)
    return json.loads(path.read_text(encoding="utf-8"))


@torch.inference_mode()
def scored(model: Any, tokenizer: Any, rows: Examples) -> tuple[list[bool], float]:
    """Which right answers a model writes, and the mean log-probability of their tokens."""
    right, nats = [], []
    for (logits,), wanted, n_tokens in gold_logits([model], tokenizer, rows):
        hits, of_right = read(logits, wanted, n_tokens)
        right += hits
        nats += of_right
    return right, sum(nats) / len(nats)


def read(logits: Tensor, wanted: Tensor, n_tokens: list[int]) -> tuple[list[bool], list[float]]:
    """Whether each answer's tokens are the best, (n_answers,), and each token's log-probability."""
    log_p = logits.log_softmax(dim=-1)
    hits = [bool(hit.all()) for hit in (logits.argmax(dim=-1) == wanted).split(n_tokens)]
    return hits, log_p.gather(-1, wanted[:, None])[:, 0].tolist()


@torch.no_grad()
def mean_difference(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str, str]]) -> dict[int, Tensor]:
    """The vector of every layer but the last one, whose output the model gives only after its norm.

    As contrastive activation addition (2312.06681), with the mean over an answer's tokens instead of its one token:
    v_l = mean over pairs (mean of h_l over the wanted answer - mean of h_l over the other), h_l the hidden states
    after layer l.

    Args:
        pairs: a prompt, the wanted answer, and the other one. Prompt and answer are encoded apart.

    Returns:
        float32 (n_hidden,) by layer.
    """
    sums: Any = 0.0
    for prompt, *answers in pairs:
        begun = list(tokenizer(prompt)["input_ids"])
        for sign, answer in zip((1, -1), answers):
            ids = torch.tensor([begun + list(tokenizer(answer, add_special_tokens=False)["input_ids"])])
            # The first hidden states are the embeddings.
            layers = model(ids.to(model.device), output_hidden_states=True, use_cache=False).hidden_states[1:-1]
            sums = sums + sign * torch.stack([layer[0, len(begun) :].float().mean(dim=0).cpu() for layer in layers])
    return dict(enumerate(sums / len(pairs)))


def write_vector(path: Path, vector: Mapping[int, Tensor], model_type: str) -> None:
    """Write a vector as GGUF, as repeng does; ``model_type`` is that of the model's config."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", model_type)
    writer.add_uint32("controlvector.layer_count", len(vector))
    for layer, direction in vector.items():
        writer.add_tensor(f"direction.{layer}", direction.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def vector_of(form: str, base: Any, tokenizer: Any, work: Path) -> dict[int, Tensor]:
    """The vector of every layer for a form of answers."""
    place = work / f"{form}.pt"
    if not place.exists():
        rows = [FORMS[form](fact) for fact in facts("train")[:N_PAIRS]]
        prompts = [prompt for prompt, _ in rows]
        own = continued(base, tokenizer, prompts, 16, do_sample=False)
        pairs = [(prompt, wanted, text.removeprefix(prompt)) for (prompt, wanted), text in zip(rows, own)]
        torch.save(mean_difference(base, tokenizer, [pair for pair in pairs if pair[2].strip()]), place)
    found: dict[int, Tensor] = torch.load(place)
    return found


def choose(form: str, base: Any, tokenizer: Any, vector: dict[int, Tensor]) -> list[dict[str, Any]]:
    """Each layer and strength on dev."""
    rows = [FORMS[form](fact) for fact in facts("dev")[:N_DEV]]
    found = []
    for layer in LAYERS:
        for strength in STRENGTHS:
            right, nats = scored(with_vector(base, {layer: vector[layer]}, strength), tokenizer, rows)
            found.append({"layer": layer, "strength": strength, "right": sum(right), "nats": nats})
            print(form, found[-1], flush=True)
    return found


@torch.inference_mode()
def compared(models: Sequence[Any], tokenizer: Any, rows: Examples) -> dict[str, Any]:
    """The arms on a task: which answers are right, the mean log-probability of a token, and KL(base || arm).

    Args:
        models: the base, the base with the vector, the expert, and the anti-expert.
    """
    found: dict[str, Any] = {}
    for (base, changed, expert, anti_expert), wanted, n_tokens in gold_logits(models, tokenizer, rows):
        p = base.log_softmax(dim=-1)
        one = torch.ones(1, 1)
        arms = {
            "base": base,
            "steering vector": changed,
            "expert alone": expert,
            "mean of base and expert": mix(base[None], [(expert[None], base[None])], one / 2)[0],
            "proxy-tuned": mix(base[None], [(expert[None], anti_expert[None])], one)[0],
        }
        for arm, logits in arms.items():
            line = found.setdefault(arm, {"right": [], "nats": [], "moved": []})
            hits, nats = read(logits, wanted, n_tokens)
            line["right"] += hits
            line["nats"] += nats
            line["moved"] += (p.exp() * (p - logits.log_softmax(dim=-1))).sum(dim=-1).tolist()
    return found


def shown_problems(count: int) -> Examples:
    """Word problems after four solved examples, and the first line of the worked solution."""
    problems = make_problems("test", count, seed=0)
    jobs = plan_of(problems).jobs["few_shot"]
    return [(job.context, f" {problem.equation} = {problem.answer}") for job, problem in zip(jobs, problems)]


def timed(file: Path, strength: float, rounds: int) -> dict[str, float]:
    """Seconds per token of one row, the median of interleaved rounds."""
    arms = Arms(load_recipe(demo_recipe()), ["proxy_tuned"], LoadingOptions(pack=True), vector=(str(file), strength))
    made = {name: arms.make(name) for name in ("proxy_tuned", "base", "steering_vector")}
    ids = torch.tensor([made["base"].tokenizer(facts("test")[0].prompt).input_ids])
    seconds: dict[str, list[float]] = {}

    def rows() -> Iterator[tuple[str, Any, dict[str, Any]]]:
        for name, arm in made.items():
            yield name, arm, {"speculate": False} if name == "proxy_tuned" else {}
        yield "proxy_tuned, drafting", made["proxy_tuned"], {}

    for at in range(rounds + 1):
        for name, arm, options in rows():
            began = time.perf_counter()
            arm.model.generate(ids, max_new_tokens=48, min_new_tokens=48, **options)
            if at:  # the first round warms up
                seconds.setdefault(name, []).append((time.perf_counter() - began) / 48)
    return {name: statistics.median(of) for name, of in seconds.items()}


def tables(found: dict[str, Any]) -> list[Table]:
    """The arms of each form on its task and on the other task."""
    made = []
    for form, of in found.items():
        rows = []
        for arm, line in of["task"].items():
            n = len(line["right"])
            low, high = (100 * bound for bound in wilson(sum(line["right"]), n))
            won, lost, p = mcnemar(of["task"]["proxy-tuned"]["right"], line["right"])
            side = of["side"][arm]
            w, lo, p_side = mcnemar(side["right"], of["side"]["base"]["right"])
            rows.append(
                [
                    arm,
                    f"{sum(line['right'])}/{n} ({low:.0f} – {high:.0f})",
                    "" if arm == "proxy-tuned" else f"{won} : {lost}, {p:.1g}",
                    f"{statistics.fmean(line['nats']):.2f}",
                    f"{sum(side['right'])}/{len(side['right'])}",
                    "" if arm == "base" else f"{w} : {lo}, {p_side:.1g}",
                    f"{statistics.fmean(side['nats']):.2f}",
                    f"{statistics.fmean(side['moved']):.2f}",
                ]
            )
        heads = ["arm", "right (95 %)", "only steered : only this, p", "nats per token"]
        heads += ["word problems right", "only this : only base, p", "nats per token", "KL to the base"]
        chosen = of["chosen"]
        said = f", layer {chosen['layer']}, strength {chosen['strength']:g}"
        made.append(Table(heads, rows, TASKS[form].title, said))
    return made


def figure(found: dict[str, Any], dev: dict[str, Any], path: Path) -> None:
    """The log-probability of right answers on dev by layer and strength, with the arms of the test as lines."""
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(9.2, 3.6), layout="constrained")
        panels = drawn.subplots(1, len(found), sharey=True)
        for panel, (form, lines) in zip(panels, dev.items()):
            for color, strength in zip(LINES, STRENGTHS):
                points = [(line["layer"], line["nats"]) for line in lines if line["strength"] == strength]
                panel.plot(*zip(*points), marker="o", markersize=4, color=color, label=f"vector, strength {strength:g}")
            for arm, style in (("base", ":"), ("expert alone", "-."), ("proxy-tuned", "-")):
                value = statistics.fmean(found[form]["task"][arm]["nats"])
                panel.axhline(value, color="#222222", linewidth=1.2, linestyle=style, label=arm)
            panel.set_title(TASKS[form].title, loc="left", fontweight="bold", fontsize=10)
            panel.set_xlabel("layer of the base")
            panel.set_ylim(bottom=-10, top=0.3)
        panels[0].set_ylabel("log-probability per gold token, nats")
        drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        drawn.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/vector"))
    parser.add_argument("--experts", type=Path, default=Path("runs/conflicts"), help="scripts/conflicts.py's --work")
    parser.add_argument("--problems", type=int, default=100, help="of each task")
    parser.add_argument("--side-problems", type=int, default=50, help="of the word problems, whose prompts are long")
    parser.add_argument("--rounds", type=int, default=5, help="of the measured speed")
    parser.add_argument("--figure", type=Path, help=".svg is added")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    work = given.work
    work.mkdir(parents=True, exist_ok=True)
    base, tokenizer = load_base()
    small = anti_expert_of(base, ASSETS, about()["layers"])
    found: dict[str, Any] = {}
    dev: dict[str, Any] = {}
    for form, example in FORMS.items():
        vector = vector_of(form, base, tokenizer, work)
        dev[form] = kept(work / f"{form}-dev.json", partial(choose, form, base, tokenizer, vector))
        chosen = max(dev[form], key=lambda line: (line["right"], line["nats"]))
        best = {chosen["layer"]: vector[chosen["layer"]]}
        write_vector(work / f"{form}.gguf", best, base.config.model_type)
        models = [base, with_vector(base, best, chosen["strength"])]
        models += [expert_of(form, 0, given.experts, small, tokenizer), small]
        tasks: dict[str, Examples] = {"task": [example(fact) for fact in facts("test")[: given.problems]]}
        tasks["side"] = shown_problems(given.side_problems)
        found[form] = {"chosen": chosen}
        for name, rows in tasks.items():
            place = work / f"{form}-{name}-{len(rows)}.json"
            found[form][name] = kept(place, partial(compared, models, tokenizer, rows))
    print(markdown(tables(found)))
    chosen = found["house"]["chosen"]
    speed = kept(work / "speed.json", lambda: timed(work / "house.gguf", chosen["strength"], given.rounds))
    print({name: f"{1000 * value:.1f} ms per token" for name, value in speed.items()})
    if given.figure:
        figure(found, dev, given.figure)


if __name__ == "__main__":
    main()
