"""Rebuild the embedded demo's models, one seed at a time, and measure them.

    python scripts/build_demo.py build --seed 0 --work runs/demo --out src/proxytune/demo/assets
    python scripts/build_demo.py measure --assets src/proxytune/demo/assets --split test --problems 400

``PROXYTUNE_DATA`` names the folder with ``gsm8k/train.jsonl`` (MIT) and ``flan_cot/*_train.tsv`` (Apache-2.0);
beside these, training sees only problems of our own generator and text sampled from the base itself.

The steps of ``build``:
    1. corpus    general text, and for each seed generated problems with the base's own and with right answers
    2. teacher   the base's last hidden states for every token, kept on disk
    3. heal      M-: six of the base's layers, trained to give the base's next-token distribution
    4. quantise  M- to int8, before M+ is trained on it: what ships is what was measured
    5. tune      M+: a LoRA adapter on M-, trained on the right answers to generated problems
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from proxytune.demo.assets import layers_from_base, load_base, pack_layers, unpack_layers
from proxytune.evaluation.problems import make_problems

FLAN_COT = ("aqua", "creak", "ecqa", "qasc", "sensemaking", "strategyqa")
MAX_TOKENS = 192  # of one text


@dataclass(frozen=True)
class Plan:
    """Every choice that the dev split made."""

    layers: tuple[int, ...] = (0, 1, 2, 11, 20, 29)
    general_gsm8k: int = 800
    general_flan: int = 80  # of each set
    generated: int = 1200
    sampled: int = 384
    task_repeats: int = 2
    heal_steps: int = 120
    heal_tokens: int = 2048  # a step
    heal_lr: float = 1e-3
    heal_unused: int = 6000  # tokens outside the corpus, drawn anew each step
    hidden: float = 0.3
    tune_problems: int = 1600
    tune_epochs: float = 1.5
    tune_batch: int = 24
    tune_lr: float = 1e-3
    rank: int = 32
    alpha: float = 1.0


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


@torch.inference_mode()
def task_texts(plan: Plan, seed: int, base: Any, tokenizer: Any) -> list[str]:
    """Generated problems: some with the base's own answer, all with the right one."""
    problems = make_problems("train", plan.generated, seed=1000 + seed)
    texts = [problem.prompt + problem.completion for problem in problems]
    tokenizer.padding_side = "left"
    torch.manual_seed(seed)
    for start in range(0, plan.sampled, 128):
        prompts = [problem.prompt for problem in problems[start : min(start + 128, plan.sampled)]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        ids = base.generate(**inputs, do_sample=True, top_k=0, temperature=0.8, max_new_tokens=32)
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
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
        hidden += [row[: len(of)].clone() for row, of in zip(states, ids[start : start + 32], strict=True)]
    return Corpus(ids, hidden)


def corpus(plan: Plan, seed: int, work: Path, base: Any, tokenizer: Any) -> Corpus:
    """The whole corpus; what the teacher did for it is kept in ``work``."""

    def kept(name: str, texts: Any) -> Corpus:
        path = work / f"{name}.pt"
        if not path.exists():
            made = teach(texts(), teacher, tokenizer)
            torch.save({"ids": made.ids, "hidden": made.hidden}, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
        return Corpus(**torch.load(path))

    teacher = base.bfloat16()
    data = Path(os.environ.get("PROXYTUNE_DATA", "data"))
    general = kept("general", lambda: general_texts(plan, data))
    task = kept(f"task-{seed}", lambda: task_texts(plan, seed, teacher, tokenizer))
    whole = general
    for _ in range(plan.task_repeats):
        whole = whole + task
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
    kept = {
        f"{new}.{name}": tensor.clone()
        for new, old in enumerate(plan.layers)
        for name, tensor in base.model.layers[old].state_dict().items()
    }
    student: Any = layers_from_base(base, kept, len(plan.layers))
    student.requires_grad_(False)
    parameters = list(student.model.layers.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)

    head = base.lm_head.weight.detach().bfloat16()  # (n_vocab, n_hidden)
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
        with torch.autocast("cpu", torch.bfloat16):
            hidden = student.model(input_ids=ids, attention_mask=mask).last_hidden_state
        real = mask.bool()
        ours = hidden[real].float()  # (n, n_hidden)
        theirs = torch.cat([whole.hidden[i] for i in batch]).float()
        columns = head[torch.cat([used, unused[torch.randperm(len(unused))[: plan.heal_unused]]])]
        log_q = F.log_softmax((ours.bfloat16() @ columns.T).float(), dim=-1)
        with torch.no_grad():
            log_p = F.log_softmax((theirs.bfloat16() @ columns.T).float(), dim=-1)
        kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / len(ours)
        distance = (ours - theirs).pow(2).mean() / theirs.pow(2).mean()
        loss = kl + plan.hidden * distance
        descend(loss, parameters, optimizer, plan.heal_lr * warm_cosine(step, plan.heal_steps, 20))
        log(step, kl=kl, distance=distance)
    state: dict[str, Tensor] = student.model.layers.state_dict()
    return {name: tensor.detach() for name, tensor in state.items()}


# ---- 5. tune -----------------------------------------------------------------------------------------


def tune(plan: Plan, seed: int, model: Any, tokenizer: Any, out: Path) -> None:
    """Train a LoRA adapter on the right answers to generated problems and write it in float16."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    rng = random.Random(seed)
    model.requires_grad_(False)
    settings = LoraConfig(r=plan.rank, lora_alpha=2 * plan.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(model, settings)
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    # The line is ended before the text is: right after "#### n" M gives the end token so little (1e-7) that tokens
    # which M gives more, and of which M- knows nothing, would come before it in the mixture.
    examples = [
        (tokenizer(problem.prompt).input_ids, [*tokenizer(f"{problem.completion}\n").input_ids, tokenizer.eos_token_id])
        for problem in make_problems("train", plan.tune_problems, seed=2000 + seed)
    ]
    steps = int(len(examples) * plan.tune_epochs / plan.tune_batch)
    optimizer = torch.optim.AdamW(parameters, lr=plan.tune_lr, betas=(0.9, 0.95), weight_decay=0.0)
    log = Log("tune", steps)
    waiting: list[tuple[list[int], list[int]]] = []
    for step in range(steps):
        if len(waiting) < plan.tune_batch:
            waiting += rng.sample(examples, len(examples))
        batch, waiting = waiting[: plan.tune_batch], waiting[plan.tune_batch :]
        ids, mask = padded([prompt + answer for prompt, answer in batch])
        learned = torch.zeros_like(mask, dtype=torch.bool)  # positions whose next token is part of the answer
        for row, (prompt, answer) in enumerate(batch):
            learned[row, len(prompt) - 1 : len(prompt) + len(answer) - 1] = True
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.lm_head(model.model(input_ids=ids, attention_mask=mask).last_hidden_state[learned])
        loss = F.cross_entropy(logits.float(), ids.roll(-1, dims=1)[learned])
        descend(loss, parameters, optimizer, plan.tune_lr * warm_cosine(step, steps, 10))
        log(step, loss=loss)

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


# ---- the commands ------------------------------------------------------------------------------------


def build(plan: Plan, seed: int, work: Path, out: Path) -> None:
    """All five steps for one seed."""
    started = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    base, tokenizer = load_base()
    healed = work / f"healed-{seed}.safetensors"
    if not healed.exists():  # another choice in step 5 needs no second healing
        whole = corpus(plan, seed, work, base, tokenizer)
        print(f"corpus: {len(whole.ids)} texts, {sum(map(len, whole.ids))} tokens", flush=True)
        base, tokenizer = load_base()  # in float32 again
        save_file(pack_layers(heal(plan, seed, base, whole)), healed)
    shutil.copyfile(healed, out / "anti_expert.safetensors")
    packed = load_file(healed)
    small = layers_from_base(base, unpack_layers(packed), len(plan.layers))
    tune(plan, seed, small, tokenizer, out)
    facts = {"layers": list(plan.layers), "seed": seed, "alpha": plan.alpha, "plan": asdict(plan)}
    (out / "demo.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(f"built in {(time.monotonic() - started) / 60:.0f} minutes: {out}", flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    builder = commands.add_parser("build", help="train one seed's models")
    builder.add_argument("--seed", type=int, default=0)
    builder.add_argument("--work", type=Path, default=Path("runs/demo"), help="where the teacher's work is kept")
    builder.add_argument("--tune-epochs", type=float, default=Plan.tune_epochs, help="fewer: a less sure expert")
    builder.add_argument("--out", type=Path, required=True, help="where the assets go")
    measurer = commands.add_parser("measure", help="count every arm's right answers")
    measurer.add_argument("--assets", type=Path, required=True)
    measurer.add_argument("--cache", type=Path, default=Path("runs/demo/cache"))
    measurer.add_argument("--split", choices=("dev", "test"), default="dev")
    measurer.add_argument("--problems", type=int, default=400)
    measurer.add_argument("--json", type=Path)
    for each in (builder, measurer):
        each.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.command == "build":
        build(Plan(tune_epochs=arguments.tune_epochs), arguments.seed, arguments.work, arguments.out)
    else:
        from proxytune.demo.run import run_demo
        from proxytune.tables import markdown

        result = run_demo(
            arguments.problems,
            json_path=arguments.json,
            cache_dir=arguments.cache,
            assets=arguments.assets,
            split=arguments.split,
        )
        print(markdown([result.table()]))


if __name__ == "__main__":
    main()
