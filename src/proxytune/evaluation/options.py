"""The options of evaluations: tasks and arms, running programs, and judges."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from proxytune.answers.options import ALPHA, COMBINE, GATE
from proxytune.errors import ProxyTuneError
from proxytune.evaluation import EVAL_TASKS, KINDS, check_tasks, data_place
from proxytune.options import Options, numbers, option, words
from proxytune.recipe.rules import Rule
from proxytune.recipe.source import resolve

__all__ = ["CodeOptions", "Engine", "EvaluationOptions", "JudgeOptions", "SweepOptions", "engine_options"]

# The headings of the options in the help.
_data, _speed, _traces, _code, _judges = (
    partial(option, panel=panel) for panel in ("Data", "Speed", "Traces", "Code", "Judges")
)

Engine = Literal["transformers", "vllm"]
# Options of vLLM that the command gives itself, or that do not fit a recipe -> what to do.
NOT_OPTIONS = {"model": "name the recipe", "dtype": "use --dtype", "tokenizer": "the recipe names it"} | dict.fromkeys(
    ("generation_config", "hf_overrides", "quantization", "runner", "skip_tokenizer_init", "trust_remote_code"),
    "leave it out",
)


def engine_options(texts: Sequence[str]) -> dict[str, Any]:
    """Read ``NAME=VALUE`` several times, where VALUE is JSON or else text.

    Raises:
        ProxyTuneError: for what has another form, and for an option that is not the user's to give.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ProxyTuneError(f"--engine-option is NAME=VALUE, such as tensor_parallel_size=4, not {text!r}")
        if name in NOT_OPTIONS:
            raise ProxyTuneError(f"--engine-option cannot give {name}; {NOT_OPTIONS[name]}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


@dataclass(frozen=True)
class EvaluationOptions(Options):
    """Options of an evaluation."""

    tasks: tuple[str, ...] = option(
        help="Tasks to evaluate; `proxytune tasks` lists them.", flag="--tasks -t", metavar="NAME,...", parse=words
    )
    arms: tuple[str, ...] | None = option(
        None,
        f"Who answers: {', '.join(KINDS)}; by default all that the recipe, the tasks and the options allow.",
        metavar="NAME,...",
        parse=words,
    )
    tuned: str | None = option(None, "A directly finetuned large model, to compute the gap closed.", metavar="MODEL")
    mean_weight: float | None = option(
        None, "Weight w of the expert in the arm weighted_mean, base + w * expert.", metavar="W", min=0
    )
    steering_vector: str | None = option(
        None,
        "A GGUF file with a vector for the arm steering_vector, which adds it to the base's hidden states.",
        metavar="FILE",
    )
    vector_strength: float | None = option(None, "Factor of the steering vector, 1 by default.", metavar="X")
    alpha: float | Mapping[str, float] | None = option(None, **ALPHA)
    combine: Rule | None = option(None, **COMBINE)
    gate: str | None = option(None, **GATE)
    data: str | None = _data(
        None, "A file or a folder with the data, instead of the hub.", metavar="PATH", envvar="PROXYTUNE_DATA"
    )
    limit: int | None = _data(
        None, "Number of examples per task, drawn with --seed; all by default.", metavar="N", min=1
    )
    samples: int | None = _data(
        None, "Samples per problem, in tasks that sample; 20 by default, as in the paper.", metavar="N", min=1
    )
    seed: int = _data(0, "Seed for drawing examples and for sampling.", metavar="N")
    batch_size: int | None = _speed(
        None, "Rows per batch; 8 by default, with vLLM 512.", flag="--batch-size -b", metavar="N", min=1
    )
    engine: Engine = _speed(
        "transformers",
        "What runs the members: transformers, or vLLM, which answers hundreds of prompts at a time.",
        metavar="transformers|vllm",
    )
    engine_options: Mapping[str, Any] = _speed(
        dict,
        "With --engine vllm: an option of vLLM, as vllm.LLM takes it, such as tensor_parallel_size=4. Repeatable.",
        flag="--engine-option",
        metavar="NAME=VALUE",
        many=True,
        parse=engine_options,
    )
    trace: bool = _traces(
        False,
        "Write a trace of each answer to DIR/TASK/ARM.trace.jsonl: why each token was chosen. Not for tasks that score "
        "given continuations.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "tasks", check_tasks(self.tasks, EVAL_TASKS))
        if self.engine == "transformers" and self.engine_options:
            raise ProxyTuneError("--engine-option is for vLLM; give --engine vllm too")
        length = self.engine_options.get("max_model_len")
        if length is not None and (type(length) is not int or length < 1):
            raise ProxyTuneError(f"--engine-option max_model_len must be a whole number of tokens, not {length!r}")
        place = data_place(self.data)
        if place is not None and place.is_file() and len(self.tasks) > 1:
            raise ProxyTuneError("--data is one file, but there are several tasks; give a folder")
        if self.tuned is not None:
            resolve(self.tuned, None)
        elif "tuned" in (self.arms or ()):
            raise ProxyTuneError("the arm tuned needs a model: --tuned MODEL")
        if self.mean_weight is None and "weighted_mean" in (self.arms or ()):
            raise ProxyTuneError("the arm weighted_mean needs the expert's weight: --mean-weight W")
        if self.steering_vector is None:
            if "steering_vector" in (self.arms or ()):
                raise ProxyTuneError("the arm steering_vector needs a vector: --steering-vector FILE")
            if self.vector_strength is not None:
                raise ProxyTuneError("--vector-strength is the factor of a steering vector: give --steering-vector too")
        elif not Path(self.steering_vector).is_file():
            raise ProxyTuneError(f"there is no file {self.steering_vector} (--steering-vector)")

    @property
    def rows_per_batch(self) -> int:
        """How many rows are answered at a time."""
        return self.batch_size or (512 if self.engine == "vllm" else 8)

    @property
    def vector(self) -> tuple[str, float] | None:
        """The file of the steering vector, and its strength."""
        if self.steering_vector is None:
            return None
        return self.steering_vector, 1.0 if self.vector_strength is None else self.vector_strength


@dataclass(frozen=True)
class SweepOptions:
    """The alphas of a sweep."""

    alpha: str = option(
        "0:2:0.25",
        "The alphas to try: a range or A,B,..., for one expert or for all.",
        flag="--alpha -a",
        metavar="[NAME=]START:STOP:STEP",
    )
    fit: bool = option(
        False,
        "Also find the alpha under which the gold answers are most probable, with an interval. It takes one pass over "
        "them; with several experts there is one alpha for all, and one for each.",
    )


@dataclass(frozen=True)
class CodeOptions(Options):
    """Options for running and counting generated programs."""

    ks: tuple[int, ...] = _code(
        (1, 10),
        "Report pass@k for each of these k that the samples allow.",
        flag="--k",
        metavar="K,...",
        parse=numbers("--k", "1,10"),
    )
    workers: int | None = _code(
        None, "Programs that run at the same time; by default one per core.", metavar="N", min=1
    )
    seconds: float | None = _code(
        None,
        "CPU seconds per program, 3 by default (ds1000: 60). The limit of wall time is 7 seconds more (ds1000: twice "
        "as much).",
        metavar="S",
        min=1,
    )
    unguarded: bool = _code(
        False, "Run generated code even if it cannot be sandboxed. It can then do whatever you can do."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.ks) < 1:
            raise ProxyTuneError(f"--k is numbers from 1 on, not {','.join(map(str, self.ks))!r}")


@dataclass(frozen=True)
class JudgeOptions:
    """Options for judges of answers: local models, or models behind an endpoint."""

    names: tuple[str, ...] = _judges(
        (),
        "A local classifier or language model. truthfulqa_open takes two: one for truth, one for information.",
        flag="--judge",
        metavar="DIR|ID",
        many=True,
        parse=tuple,
    )
    label: str | None = _judges(
        None,
        "The classifier's label that means yes (or toxic), if its config does not say.",
        flag="--judge-label",
        metavar="NAME",
    )
    url: str | None = _judges(
        None, "URL of an OpenAI-compatible endpoint, with its /v1.", flag="--judge-url", metavar="URL"
    )
    models: tuple[str, ...] = _judges(
        (),
        "Name of the model at that endpoint; truthfulqa_open takes two. For alpacafarm: an annotator of alpaca_eval.",
        flag="--judge-model",
        metavar="NAME",
        many=True,
        parse=tuple,
    )
    chat: bool = _judges(False, "The endpoint has only chat completions.", flag="--judge-chat")
    key: str = _judges(
        "OPENAI_API_KEY",
        "Environment variable that holds the key of the endpoint.",
        flag="--judge-key",
        metavar="VARIABLE",
    )
