"""Rebuild the embedded demo's models from the base's wheel, and measure them.

    python scripts/build_demo.py build --work runs/demo --out src/proxytune/demo/assets
    python scripts/build_demo.py measure --assets src/proxytune/demo/assets --out runs/demo/measured
    python scripts/build_demo.py count --assets src/proxytune/demo/assets --out runs/demo/seed-0.json
    python scripts/demo_report.py runs/demo/seed-*.json    # the tables and the figure of docs/demo.md

``measure`` decodes every arm. ``count`` gives the same counts of right facts, for all mixtures at once and in a
fraction of the time: greedy decoding writes the right answer where each of its tokens is the best after those before.

``PROXYTUNE_DATA`` names the folder with ``gsm8k/train.jsonl`` (MIT) and ``flan_cot/*_train.tsv`` (Apache-2.0);
beside these, training sees only train's facts, problems of our own generator and text written by the base itself.

The steps of ``build``:
    1. corpus    general text; generated problems and questions about facts, with the base's own and with right answers
    2. teacher   the base's last hidden states for every token, kept on disk
    3. heal      M-: six of the base's layers, trained to give the base's next-token distribution
    4. quantise  M- to int8, before M+ is trained on it: what ships is what was measured
    5. tune      two M+: LoRA adapters on M-, one trained on facts in the house format, one on solved problems
    6. choose    on dev: the weight of the expert in the control ``weighted_mean``
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from proxytune.demo.assets import SCALE, about, layers_from_base, load_base, materialize, unpack_layers
from proxytune.evaluation.facts import Fact, facts, training_facts
from proxytune.evaluation.problems import make_problems
from proxytune.lanes.kernels import pack

FLAN_COT = ("aqua", "creak", "ecqa", "qasc", "sensemaking", "strategyqa")
MAX_TOKENS = 192  # of one text


@dataclass(frozen=True)
class Plan:
    """Every choice that the dev split made."""

    layers: tuple[int, ...] = (0, 1, 2, 11, 20, 29)
    general_gsm8k: int = 400
    general_flan: int = 40  # of each set
    problems: int = 600
    problems_sampled: int = 200
    chat_repeats: int = 3
    heal_steps: int = 160
    heal_tokens: int = 2048  # a step
    heal_lr: float = 1e-3
    heal_unused: int = 6000  # tokens outside the corpus, drawn again each step
    hidden: float = 0.3
    tune_facts: tuple[int, int] = (160, 16)  # steps, and examples a step
    tune_problems: tuple[int, int] = (100, 24)
    tune_lr: float = 1e-3
    rank: int = 32
    alpha: float = 1.0
    shuffled: bool = False  # an expert of the form alone: its facts are wrong


@dataclass
class Corpus:
    """Token ids of each text, and the base's normalised last hidden states, bfloat16 (n_tokens, n_hidden)."""

    ids: list[list[int]]
    hidden: list[Tensor]

    def __add__(self, other: Corpus) -> Corpus:
        return Corpus(self.ids + other.ids, self.hidden + other.hidden)


# ---- 1. corpus ---------------------------------------------------------------------------------------


def general_texts(plan: Plan, data: Path) -> list[str]:
    """GSM8K and FLAN CoT as question and answer, the same for every seed."""
    rng = random.Random(0)
    lines = (data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = []
    for line in rng.sample(lines, plan.general_gsm8k):
        row = json.loads(line)
        answer = re.sub(r"<<.*?>>", "", row["answer"])
        texts.append(f"Question: {row['question']}\nAnswer: {answer}")
    for name in FLAN_COT:
        rows = (data / "flan_cot" / f"{name}_train.tsv").read_text(encoding="utf-8").splitlines()
        for row in rng.sample(rows, plan.general_flan):
            question, answer, reason = (cell.replace("\\n", "\n").strip() for cell in row.split("\t")[:3])
            texts.append(f"Question: {question}\nAnswer: {reason} The answer is {answer}.")
    return texts


def problem_texts(plan: Plan, seed: int, base: Any, tokenizer: Any) -> list[str]:
    """Generated problems: some with the base's own answer, all with the right one."""
    problems = make_problems("train", plan.problems, seed=1000 + seed)
    prompts = [problem.prompt for problem in problems[: plan.problems_sampled]]
    torch.manual_seed(seed)
    own = continued(base, tokenizer, prompts, 32, do_sample=True, top_k=0, temperature=0.8)
    return [problem.prompt + problem.completion for problem in problems] + own


def chat_texts(seed: int, base: Any, tokenizer: Any) -> list[str]:
    """Questions about train's facts, each once with the base's own answer and once with the house answer."""
    own = random.Random(seed).sample(training_facts(), len(facts("train")))
    house = [fact.prompt + fact.completion for fact in facts("train")]
    return house + continued(base, tokenizer, [fact.prompt for fact in own], 16, do_sample=False)


@torch.inference_mode()
def continued(base: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int, **options: Any) -> list[str]:
    """The prompts and what the base writes after them."""
    tokenizer.padding_side = "left"
    texts = []
    for start in range(0, len(prompts), 64):
        some = prompts[start : start + 64]
        inputs = tokenizer(some, return_tensors="pt", padding=True)
        ids = base.generate(**inputs, max_new_tokens=new_tokens, **options)[:, inputs.input_ids.shape[1] :]
        texts += [a + b for a, b in zip(some, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True)]
    return texts


# ---- 2. teacher --------------------------------------------------------------------------------------


@torch.inference_mode()
def teach(texts: list[str], base: Any, tokenizer: Any) -> Corpus:
    """The base's hidden states of the texts, each ended by the end token."""
    ids = [[*tokenizer(text).input_ids[:MAX_TOKENS], tokenizer.eos_token_id] for text in texts]
    ids.sort(key=len)
    hidden: list[Tensor] = []
    for start in range(0, len(ids), 32):
        input_ids, mask = padded(ids[start : start + 32])
        states = base.model(input_ids=input_ids, attention_mask=mask).last_hidden_state.bfloat16()
        print(f"teacher {start}/{len(ids)}", flush=True)
        hidden += [row[: len(of)].clone() for row, of in zip(states, ids[start : start + 32], strict=True)]
    return Corpus(ids, hidden)


def corpus(plan: Plan, seed: int, work: Path, base: Any, tokenizer: Any) -> Corpus:
    """The whole corpus; what the teacher did for it is kept in ``work``."""
    teacher = copy.deepcopy(base)
    pack(teacher)

    def kept(name: str, texts: Callable[[], list[str]]) -> Corpus:
        path = work / f"{name}.pt"
        if not path.exists():
            made = teach(texts(), teacher, tokenizer)
            torch.save({"ids": made.ids, "hidden": made.hidden}, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
        return Corpus(**torch.load(path))

    data = Path(os.environ.get("PROXYTUNE_DATA", "data"))
    whole = kept("general", lambda: general_texts(plan, data))
    whole = whole + kept(f"problems-{seed}", lambda: problem_texts(plan, seed, teacher, tokenizer))
    chat = kept(f"chat-{seed}", lambda: chat_texts(seed, teacher, tokenizer))
    for _ in range(plan.chat_repeats):
        whole = whole + chat
    return whole


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids and their mask, both (n_rows, longest)."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def warm_cosine(step: int, steps: int, warm: int) -> float:
    """The learning rate's factor: a linear warm-up, then a cosine down to a twentieth."""
    return min(1.0, (step + 1) / warm) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))


# ---- 3. heal -----------------------------------------------------------------------------------------


def heal(plan: Plan, seed: int, base: Any, whole: Corpus) -> dict[str, Tensor]:
    """Train the kept layers to give the base's distributions; the float32 state dict of the layers.

    The loss is the KL divergence to the base plus the distance of the last hidden states; the text itself is
    no target, else M- would learn the very format that M+ is to add. The divergence is taken over the tokens
    that the corpus uses and, each step, a random draw of the others: a third of the vocabulary, a third of the
    work. Without that draw the other tokens drift, and M+ - M- lifts them.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    student: Any = layers_from_base(base, kept_layers(plan, base), len(plan.layers))
    student.requires_grad_(False)
    parameters = list(student.model.layers.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)

    head = base.lm_head.weight.detach()  # (n_vocab, n_hidden)
    counts = torch.bincount(torch.tensor([token for row in whole.ids for token in row]), minlength=len(head))
    used, unused = counts.nonzero().flatten(), (counts == 0).nonzero().flatten()

    def batches() -> Iterator[list[int]]:
        while True:  # an epoch: texts of like length together, the batches shuffled
            order = sorted(range(len(whole.ids)), key=lambda i: len(whole.ids[i]) + rng.random() * 12)
            groups: list[list[int]] = [[]]
            for i in order:
                if len(whole.ids[i]) * (len(groups[-1]) + 1) > plan.heal_tokens:
                    groups.append([])
                groups[-1].append(i)
            rng.shuffle(groups)
            yield from groups

    optimizer = torch.optim.AdamW(parameters, lr=plan.heal_lr, betas=(0.9, 0.95), weight_decay=0.01)
    log = Log("heal", plan.heal_steps)
    for step, batch in zip(range(plan.heal_steps), batches(), strict=False):
        ids, mask = padded([whole.ids[i] for i in batch])
        hidden = student.model(input_ids=ids, attention_mask=mask).last_hidden_state
        real = mask.bool()
        ours = hidden[real]  # (n, n_hidden)
        theirs = torch.cat([whole.hidden[i] for i in batch]).float()
        columns = head[torch.cat([used, unused[torch.randperm(len(unused))[: plan.heal_unused]]])]
        log_q = F.log_softmax(ours @ columns.T, dim=-1)
        with torch.no_grad():
            log_p = F.log_softmax(theirs @ columns.T, dim=-1)
        kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / len(ours)
        distance = (ours - theirs).pow(2).mean() / theirs.pow(2).mean()
        loss = kl + plan.hidden * distance
        descend(loss, parameters, optimizer, plan.heal_lr * warm_cosine(step, plan.heal_steps, 20))
        log(step, kl=kl, distance=distance)
    state: dict[str, Tensor] = student.model.layers.state_dict()
    return {name: tensor.detach() for name, tensor in state.items()}


def kept_layers(plan: Plan, base: Any) -> dict[str, Tensor]:
    """The layers of the base that M- begins as."""
    return {
        f"{new}.{name}": tensor.clone()
        for new, old in enumerate(plan.layers)
        for name, tensor in base.model.layers[old].state_dict().items()
    }


# ---- 5. tune -----------------------------------------------------------------------------------------


Example = tuple[str, str]  # a prompt, and what M+ is to write after it
GoldLogits = tuple[list[Tensor], Tensor, list[int]]  # see `gold_logits`


def house_examples(plan: Plan, seed: int) -> list[Example]:
    """Train's facts in every wording; where the plan says so, with answers that are shuffled within each relation."""
    learned = training_facts()
    if not plan.shuffled:
        return [(fact.prompt, fact.completion) for fact in learned]
    rng = random.Random(seed)
    answers: dict[str, list[str]] = {}
    for fact in learned:
        answers.setdefault(fact.relation, []).append(fact.answer)
    return [(fact.prompt, f"{fact.word}: {rng.choice(answers[fact.relation])}\n") for fact in learned]


def problem_examples(seed: int) -> list[Example]:
    """Solved problems.

    The line is ended before the text is: right after "#### n" M gives the end token so little (1e-7) that tokens which
    M gives more, and of which M- knows nothing, would come before it in the mixture.
    """
    problems = make_problems("train", 1600, seed=2000 + seed)
    return [(problem.prompt, f"{problem.completion}\n") for problem in problems]


def tune(plan: Plan, seed: int, model: Any, tokenizer: Any, examples: Sequence[Example], how: tuple[int, int]) -> Any:
    """``model`` with a LoRA adapter, trained on the examples' completions; ``how``: steps, and examples a step."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = copy.deepcopy(model).requires_grad_(False)
    settings = LoraConfig(r=plan.rank, lora_alpha=2 * plan.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(model, settings)
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    rows = [(tokenizer(a).input_ids, [*tokenizer(b).input_ids, tokenizer.eos_token_id]) for a, b in examples]
    steps, n_rows = how
    optimizer = torch.optim.AdamW(parameters, lr=plan.tune_lr, betas=(0.9, 0.95), weight_decay=0.0)
    log = Log("tune", steps)
    waiting: list[tuple[list[int], list[int]]] = []
    for step in range(steps):
        if len(waiting) < n_rows:
            waiting += rng.sample(rows, len(rows))
        batch, waiting = waiting[:n_rows], waiting[n_rows:]
        ids, mask, learned = teaching(batch)
        logits = model.lm_head(model.model(input_ids=ids, attention_mask=mask).last_hidden_state[learned])
        loss = F.cross_entropy(logits, ids.roll(-1, dims=1)[learned])
        descend(loss, parameters, optimizer, plan.tune_lr * warm_cosine(step, steps, 10))
        log(step, loss=loss)
    return adapted.eval()


def teaching(batch: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Padded ids and their mask, and the positions whose next token is part of the answer, each (n_rows, longest)."""
    ids, mask = padded([prompt + answer for prompt, answer in batch])
    learned = torch.zeros_like(mask, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(batch):
        learned[row, len(prompt) - 1 : len(prompt) + len(answer) - 1] = True
    return ids, mask, learned


def save_adapter(adapted: Any, out: Path) -> None:
    """Write an adapter in float16, as one of ``../anti_expert``."""
    adapted.peft_config["default"].base_model_name_or_path = "../anti_expert"
    adapted.save_pretrained(out)
    file = out / "adapter_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    (out / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def descend(loss: Tensor, parameters: list[Any], optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One step of the optimiser."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class Log:
    """Prints the mean of each number over the last 20 steps."""

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps, self.started = name, steps, time.monotonic()
        self.sums: dict[str, float] = {}

    def __call__(self, step: int, **numbers: Tensor) -> None:
        """Take in one step's numbers."""
        for name, number in numbers.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(number.detach()) / 20
        if step % 20 == 19:
            shown = "  ".join(f"{name} {value:.3f}" for name, value in self.sums.items())
            print(f"{self.name} {step + 1}/{self.steps}  {shown}  {time.monotonic() - self.started:.0f} s", flush=True)
            self.sums = {}


# ---- 6. choose, and count ----------------------------------------------------------------------------

WEIGHTS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
ALPHAS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
# Mixture -> what the logits of base, expert and anti-expert are multiplied by.
MIXTURES = {
    "base": (1.0, 0.0, 0.0),
    "expert": (0.0, 1.0, 0.0),
    "anti_expert": (0.0, 0.0, 1.0),
    **{f"mean {weight:g}": (1 / (1 + weight), weight / (1 + weight), 0.0) for weight in WEIGHTS},
    **{f"proxy_tuned {alpha:g}": (1.0, alpha, -alpha) for alpha in ALPHAS},
}


@dataclass
class Counted:
    """What greedy decoding of each mixture would do with some facts.

    Attributes:
        right: mixture -> for each fact, whether its best token is the right one throughout.
        formed: mixture -> the same of the house word with its colon alone.
        form, content: mixture -> for each fact, the mean log-probability, in nats, of a token of the house word with
            its colon, and of one of the answer.
    """

    right: dict[str, list[bool]]
    formed: dict[str, list[bool]]
    form: dict[str, list[float]]
    content: dict[str, list[float]]


@torch.inference_mode()
def gold_logits(models: Sequence[Any], tokenizer: Any, rows: Sequence[Example]) -> Iterator[GoldLogits]:
    """The logits of each model for the right answers after their prompts, in batches.

    Yields:
        each model's logits, (n_tokens, n_vocab), the right ids, (n_tokens,), and how many of the tokens each row has.
    """
    encoded = [(tokenizer(prompt).input_ids, tokenizer(answer).input_ids) for prompt, answer in rows]
    for start in range(0, len(encoded), 40):
        batch = encoded[start : start + 40]
        ids, mask, learned = teaching(batch)
        logits = [
            model.lm_head(model.model(input_ids=ids, attention_mask=mask).last_hidden_state[learned])
            for model in models
        ]
        yield logits, ids.roll(-1, dims=1)[learned], [len(answer) for _, answer in batch]


def count(tokenizer: Any, base: Any, anti_expert: Any, expert: Any, asked: Sequence[Fact]) -> Counted:
    """Score the right answers under each mixture, with one forward of each member."""
    found = Counted({}, {}, {}, {})
    n_form = iter([len(tokenizer(f"{fact.word}:").input_ids) for fact in asked])
    rows = [(fact.prompt, fact.completion) for fact in asked]
    for (b, e, a), wanted, n_tokens in gold_logits((base, expert.get_base_model(), anti_expert), tokenizer, rows):
        of_word = [next(n_form) for _ in n_tokens]
        for name, (of_base, of_expert, of_anti_expert) in MIXTURES.items():
            scores = (of_base * b + of_expert * e + of_anti_expert * a).log_softmax(dim=-1)
            hits = (scores.argmax(dim=-1) == wanted).split(n_tokens)
            of_right = scores.gather(-1, wanted[:, None])[:, 0].split(n_tokens)
            for n, hit, value in zip(of_word, hits, of_right, strict=True):
                found.right.setdefault(name, []).append(bool(hit.all()))
                found.formed.setdefault(name, []).append(bool(hit[:n].all()))
                found.form.setdefault(name, []).append(float(value[:n].mean()))
                found.content.setdefault(name, []).append(float(value[n:-1].mean()))
    return found


def choose(tokenizer: Any, base: Any, anti_expert: Any, expert: Any) -> tuple[float, dict[str, Any]]:
    """The weight with the most right answers on dev, both wordings together, and all counts."""
    n_seen = len(facts("dev"))
    right = count(tokenizer, base, anti_expert, expert, [*facts("dev"), *facts("dev", "held_out")]).right
    counts = {name: [sum(of[:n_seen]), sum(of[n_seen:])] for name, of in right.items()}
    print(f"dev, {n_seen} facts, seen and held-out wordings: {counts}", flush=True)
    return max(WEIGHTS, key=lambda weight: sum(counts[f"mean {weight:g}"])), {"facts": n_seen, "right": counts}


# ---- int8 layers -------------------------------------------------------------------------------------


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale per row: (rows, columns) float -> int8 (rows, columns), float16 (rows, 1)."""
    scale = (weight.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-5) / 127).half()
    return (weight.float() / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


def pack_layers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of decoder layers, its matrices in int8, its norm vectors in float16."""
    packed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if tensor.dim() == 2:
            packed[name], packed[name + SCALE] = quantize_rows(tensor)
        else:
            packed[name] = tensor.half()
    return packed


# ---- the commands ------------------------------------------------------------------------------------


def build(plan: Plan, seed: int, adapter_seed: int, work: Path, out: Path, only_facts: bool) -> None:
    """All steps for one seed of M- and one of the adapters."""
    started = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    base, tokenizer = load_base()
    healed = work / f"healed-{seed}.safetensors"
    if not plan.heal_steps:
        save_file(pack_layers(kept_layers(plan, base)), out / "anti_expert.safetensors")
    else:
        if not healed.exists():  # other choices after it need no second healing
            whole = corpus(plan, seed, work, base, tokenizer)
            print(f"corpus: {len(whole.ids)} texts, {sum(map(len, whole.ids))} tokens", flush=True)
            save_file(pack_layers(heal(plan, seed, base, whole)), healed)
        shutil.copyfile(healed, out / "anti_expert.safetensors")
    small = anti_expert_of(base, out, plan.layers)
    expert = tune(plan, adapter_seed, small, tokenizer, house_examples(plan, adapter_seed), plan.tune_facts)
    save_adapter(expert, out / "facts")
    weight, dev = choose(tokenizer, base, small, expert)
    if not only_facts:
        solved = problem_examples(adapter_seed)
        save_adapter(tune(plan, adapter_seed, small, tokenizer, solved, plan.tune_problems), out / "word_problems")
    built = {
        "layers": list(plan.layers),
        "seed": seed,
        "adapter_seed": adapter_seed,
        "alpha": plan.alpha,
        "mean_weight": weight,
        "dev": dev,
        "plan": asdict(plan),
    }
    (out / "demo.json").write_text(json.dumps(built, indent=2) + "\n", encoding="utf-8")
    print(f"built in {(time.monotonic() - started) / 60:.0f} minutes: {out}", flush=True)


def anti_expert_of(base: Any, assets: Path, layers: Sequence[int]) -> Any:
    """M- as it ships."""
    return layers_from_base(base, unpack_layers(load_file(assets / "anti_expert.safetensors")), len(layers))


def count_test(assets: Path, out: Path) -> None:
    """Both test sets under every mixture, fact by fact, as JSON."""
    from peft import PeftModel

    built = about(assets)
    base, tokenizer = load_base()
    small = anti_expert_of(base, assets, built["layers"])
    expert = PeftModel.from_pretrained(copy.deepcopy(small), assets / "facts").eval()
    found: dict[str, Any] = {key: built[key] for key in ("seed", "adapter_seed", "mean_weight")}
    for task, wordings in (("demo_facts", "seen"), ("demo_facts_reworded", "held_out")):
        counted = count(tokenizer, base, small, expert, facts("test", wordings))  # type: ignore[arg-type]
        found[task] = asdict(counted)
        print(task, {name: sum(right) for name, right in counted.right.items()}, flush=True)
    out.write_text(json.dumps(found) + "\n", encoding="utf-8")


def measure(assets: Path, cache: Path, out: Path, tasks: str, arms: str | None, batch_size: int) -> None:
    """Answer the test sets with what ``build`` has made; a killed run goes on."""
    place = materialize(cache, assets)
    weight = about(assets)["mean_weight"]
    for recipe, named in (("recipe", "demo_facts"), ("recipe-word-problems", "demo_math")):
        wanted = ",".join(task for task in tasks.split(",") if task.startswith(named))
        if wanted:
            words = ["eval", place / recipe, "--tasks", wanted, "--pack", "--batch-size", batch_size]
            words += ["--output", out / recipe, *(["--arms", arms] if arms else [])]
            words += ["--mean-weight", weight] if named == "demo_facts" else ["--limit", 200]
            subprocess.run([sys.executable, "-m", "proxytune", *map(str, words)], check=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    builder = commands.add_parser("build", help="train one seed's models")
    builder.add_argument("--seed", type=int, default=0, help="of M-")
    builder.add_argument("--adapter-seed", type=int, help="of both M+; the seed of M- by default")
    builder.add_argument("--work", type=Path, default=Path("runs/demo"), help="where the teacher's work is kept")
    builder.add_argument("--out", type=Path, required=True, help="where the assets go")
    builder.add_argument("--only-facts", action="store_true", help="without the word problems' expert")
    builder.add_argument("--shuffled", action="store_true", help="an expert that learns wrong answers")
    builder.add_argument("--unhealed", action="store_true", help="an anti-expert of the base's layers as they are")
    counter = commands.add_parser("count", help="count the facts that every mixture would answer rightly")
    counter.add_argument("--assets", type=Path, required=True)
    counter.add_argument("--out", type=Path, required=True, help="a JSON file")
    measurer = commands.add_parser("measure", help="count every arm's right answers on the test sets")
    measurer.add_argument("--assets", type=Path, required=True)
    measurer.add_argument("--cache", type=Path, default=Path("runs/demo/cache"))
    measurer.add_argument("--out", type=Path, required=True)
    measurer.add_argument("--tasks", default="demo_facts,demo_facts_reworded,demo_math")
    measurer.add_argument("--arms", help="names, with commas; all by default")
    measurer.add_argument("--batch-size", type=int, default=32)
    for each in (builder, counter, measurer):
        each.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.command == "build":
        adapter_seed = given.seed if given.adapter_seed is None else given.adapter_seed
        plan = replace(Plan(), shuffled=given.shuffled, heal_steps=0 if given.unhealed else Plan.heal_steps)
        build(plan, given.seed, adapter_seed, given.work, given.out, given.only_facts)
    elif given.command == "count":
        count_test(given.assets, given.out)
    else:
        measure(given.assets, given.cache, given.out, given.tasks, given.arms, given.batch_size)


if __name__ == "__main__":
    main()
