"""Models of a task, what they write, and what is measured of them. Every function is told its seed."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar as disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from scripts.studies.reproduce.presets import RunContext
from scripts.studies.tasks.make_models import make_model
from scripts.studies.tasks.seeds import HELD_OUT, TRAIN
from scripts.studies.tasks.table import SHIPPED, TASKS, Task
from trl_distill.data.sampling import Sampling, prompt_ids, sample_completions
from trl_distill.models.hidden_states import add_teacher_forward
from trl_distill.reporting.evaluation import Answer, answer_all, summarise


SIZES = {"teacher": (64, 2, 4), "student": (48, 2, 4), "small": (24, 2, 4), "tiny": (16, 1, 4)}  # hidden, layers, heads


def be_quiet() -> None:
    """In a run's own process: one thread, and nothing of the libraries on the screen."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(1)  # one run per core
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()  # of datasets
    logging.getLogger("trl_distill").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Samples:
    """
    Problems with an answer each.

    Attributes:
        rows (`Dataset`): the problems.
        texts (`list[str]`): the answers.
        tokens (`int`): that a model wrote for them; 0 where no model did.
    """

    rows: Dataset
    texts: list[str]
    tokens: int = 0

    def completions(self) -> list[list[dict[str, str]]]:
        """The answers as conversations, for a column "completion"."""
        return [[{"role": "assistant", "content": text}] for text in self.texts]


class TaskModels:
    """
    A task with its models.

    Args:
        kind (`str`): how many right answers a problem has: "one" or "many".
        context ([`RunContext`]): where models and samples are kept, and the preset.
        student (`str`): which one: "student", or one of `SIZES` where students are made.
    """

    def __init__(self, kind: str, context: RunContext, student: str = "student"):
        self.task: Task = TASKS[context.preset.tasks[kind]]
        self.folder, self.preset = context.folder, context.preset
        made = self.folder / "models"
        self.teacher_path = self.task.teacher or str(made / f"{self.task.name}-teacher")
        self.student_path = self.task.student or str(made / f"{self.task.name}-{student}")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.task.student or SHIPPED / "student")

    def load(self, path: Path | str) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        model.generation_config.pad_token_id = self.tokenizer.pad_token_id
        return model.to(self.preset.device)

    def student(self) -> Any:
        return self.load(self.student_path)

    def teacher(self) -> Any:
        """The teacher, with the forward that returns hidden states: measurements need it."""
        model = self.load(self.teacher_path).eval()
        add_teacher_forward(model)
        return model

    def sampling(self, generations: int, seed: int) -> Sampling:
        return Sampling(self.task.limit, (self.tokenizer.eos_token_id,), generations=generations, seed=seed)


def save_whole(model: Any, folder: Path, tokenizer: Any = None) -> None:
    """Save a model in a folder that is either whole or not there, even if the process is killed."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    if tokenizer is not None:
        tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)


def small_model(models: TaskModels, name: str) -> Any:
    """Weights of variance 1 / width: with Qwen's own, models this narrow need thousands of steps to begin."""
    model = make_model(models.tokenizer, *SIZES[name])
    model.config.initializer_range = model.config.hidden_size**-0.5
    return type(model)(model.config)


def teacher_samples(models: TaskModels, size: int, seed: int) -> Samples:
    """Problems with the teacher's answers, kept on disk for the other runs of the seed."""
    path = models.folder / "samples" / f"{models.task.name}-{size}-{seed}.json"
    rows = models.task.problems(size, TRAIN + seed)
    if not path.exists():
        written = write(models, models.load(models.teacher_path), rows, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({"texts": written.texts, "tokens": written.tokens}))
        part.replace(path)
    found = json.loads(path.read_text())
    return Samples(rows, found["texts"], found["tokens"])


def write(models: TaskModels, model: Any, rows: Dataset, seed: int, batch: int = 250) -> Samples:
    """One answer of the model to each problem, at temperature 1."""
    texts: list[str] = []
    tokens = 0
    for start in range(0, len(rows), batch):
        part = [rows[i] for i in range(start, min(start + batch, len(rows)))]
        prompts = [prompt_ids(models.tokenizer, row["prompt"]) for row in part]
        sampling = models.sampling(1, seed + start)
        written = sample_completions(model, part, prompts, models.tokenizer.pad_token_id, sampling)
        texts += [models.tokenizer.decode(one.completion, skip_special_tokens=True) for one in written]
        tokens += sum(len(one.completion) for one in written)
    return Samples(rows, texts, tokens)


def answers(
    models: TaskModels, model: Any, rows: Dataset, generations: int, seed: int, teacher: Any = None
) -> list[Answer]:
    """All answers to some problems, in the form that `summarise` takes."""
    sampling = models.sampling(generations, seed)
    found = answer_all(model, list(rows), models.tokenizer, sampling, [models.task.verifier], teacher, batch_size=250)
    return list(itertools.chain.from_iterable(found))


def measured(models: TaskModels, model: Any, seed: int, prompts: int = 250, generations: int = 4) -> dict[str, float]:
    """
    The estimates of a model on new problems, without their intervals: the seeds give those.

    Beside them "different right", how many different right answers a problem got, and "different of right", their share
    among the right ones: n-grams would count every mistake as diversity.
    """
    add_teacher_forward(model)
    rows = models.task.problems(prompts, HELD_OUT + seed)
    found = answers(models, model, rows, generations, seed, models.teacher())
    right = [(one.prompt, one.ids) for one in found if one.score]
    return {
        **{name: one.value for name, one in summarise(found).items()},
        "different right": len(set(right)) / prompts,
        "different of right": len(set(right)) / len(right) if right else math.nan,
    }
