"""What the claims of `reproduce.py` are tried with: models, teacher samples, SFT, on-policy training, measurements.

Every function is told its seed. Costs are counted in completion tokens: those that a model generated, and those that
the student was trained on. What is true of all runs, and differs between small models and large ones, is a `Preset`.
Which runs belong to a claim is left to `reproduce_claims.py`.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar as disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from scripts.studies.tasks.make_models import make_model
from scripts.studies.tasks.seeds import GLANCE_AT, HELD_OUT, HUMAN, TRAIN
from scripts.studies.tasks.table import SHIPPED, TASKS, Task
from trl_distill import OPDConfig, OPDTrainer
from trl_distill.data.sampling import Sampling, prompt_ids, sample_completions
from trl_distill.models.hidden_states import add_teacher_forward
from trl_distill.reporting.evaluation import Answer, answer_all, summarise


BATCH = 64  # answers per optimizer step


GLANCES = 6  # looks at the accuracy during a run


SIZES = {"teacher": (64, 2, 4), "student": (48, 2, 4), "small": (24, 2, 4), "tiny": (16, 1, 4)}  # hidden, layers, heads


@dataclass(frozen=True)
class Preset:
    """
    What all runs share.

    Attributes:
        tasks (`dict[str, str]`): which of `TASKS` has "one" right answer to a problem, and which has "many".
        rates (`dict[str, float]`): learning rate of each kind of training.
        training (`dict`): settings of every trainer, beside those of `settings`.
        device (`str`): where models measure and write.
        claims (`tuple[str, ...]`): that can be tried; all where it is empty.
    """

    tasks: dict[str, str]
    rates: dict[str, float]
    training: dict[str, Any]
    device: str = "cpu"
    claims: tuple[str, ...] = ()


PRESETS = {
    "cpu": Preset(
        {"one": "additions", "many": "orders"},
        {"SFT": 1e-3, "on-policy": 1.5e-3, "after SFT": 5e-4, "reward": 5e-5, "estimates": 3e-4, "many": 4e-3},
        {"bf16": False, "gradient_checkpointing": False, "per_device_train_batch_size": BATCH},
    ),
    "gpu": Preset(
        {"one": "gsm8k", "many": "gsm8k"},
        {"SFT": 1e-5, "on-policy": 1e-5, "after SFT": 5e-6, "reward": 1e-6, "estimates": 2e-6, "many": 1e-5},
        {"bf16": True, "per_device_train_batch_size": 8, "gradient_accumulation_steps": BATCH // 8},
        device="cuda",
        claims=("gap", "diversity", "rewards", "estimators", "controls"),
    ),
}


@dataclass(frozen=True)
class RunContext:
    """Where runs keep what they make, and with what they are made."""

    folder: Path
    preset: Preset


@dataclass
class Cost:
    """Completion tokens so far, and the accuracy that they bought: `(generated, trained, accuracy)`."""

    generated: int = 0
    trained: int = 0
    curve: list[tuple[int, int, float]] = field(default_factory=list)


class TaskModels:
    """
    A task with its models.

    Args:
        kind (`str`): how many right answers a problem has: "one" or "many".
        place ([`Place`]): where models and samples are kept, and the preset.
        student (`str`): which one: "student", or one of `SIZES` where students are made.
    """

    def __init__(self, kind: str, place: RunContext, student: str = "student"):
        self.task: Task = TASKS[place.preset.tasks[kind]]
        self.folder, self.preset = place.folder, place.preset
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
        """One that tells its hidden states, as measurements need it."""
        model = self.load(self.teacher_path).eval()
        add_teacher_forward(model)
        return model

    def sampling(self, generations: int, seed: int) -> Sampling:
        return Sampling(self.task.limit, (self.tokenizer.eos_token_id,), generations=generations, seed=seed)


def be_quiet() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(1)  # one run per core
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()  # of datasets
    logging.getLogger("trl_distill").setLevel(logging.ERROR)


def make_order_models(place: RunContext, steps: int = 800) -> None:
    """
    The teacher of the orders learns from right answers, students of several sizes a little from the teacher's.

    Made once; what is there is kept.
    """
    bench = TaskModels("many", place)
    if bench.task.teacher is not None:
        return
    if not Path(bench.teacher_path, "config.json").exists():
        set_seed(0)
        teacher = small_model(bench, "teacher")
        rows = bench.task.problems(BATCH * steps, HUMAN)
        fine_tune(bench, teacher, rows, list(rows["solution"]), steps, 0, Cost(), rate="many")
        save_whole(teacher, Path(bench.teacher_path), bench.tokenizer)
    for name in ("student", "small", "tiny"):
        path = TaskModels("many", place, name).student_path
        if not Path(path, "config.json").exists():
            set_seed(1)
            student = small_model(bench, name)
            rows, texts, _ = teacher_samples(bench, 2000, 1)
            fine_tune(bench, student, rows, texts, 300, 1, Cost(), rate="many")
            save_whole(student, Path(path))


def save_whole(model: Any, folder: Path, tokenizer: Any = None) -> None:
    """A folder that is there is whole, whenever the process was killed."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    if tokenizer is not None:
        tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)


def small_model(bench: TaskModels, name: str) -> Any:
    """Weights of variance 1 / width: from Qwen's initialisation models this narrow take thousands of steps to begin."""
    model = make_model(bench.tokenizer, *SIZES[name])
    model.config.initializer_range = model.config.hidden_size**-0.5
    return type(model)(model.config)


def teacher_samples(bench: TaskModels, size: int, seed: int) -> tuple[Dataset, list[str], int]:
    """Problems, the teacher's answers, and how many tokens these have; kept on disk for the other runs of the seed."""
    path = bench.folder / "samples" / f"{bench.task.name}-{size}-{seed}.json"
    rows = bench.task.problems(size, TRAIN + seed)
    if not path.exists():
        texts, tokens = write(bench, bench.load(bench.teacher_path), rows, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({"texts": texts, "tokens": tokens}))
        part.replace(path)
    found = json.loads(path.read_text())
    return rows, found["texts"], found["tokens"]


def write(bench: TaskModels, model: Any, rows: Dataset, seed: int, batch: int = 250) -> tuple[list[str], int]:
    """One answer to each problem at temperature 1, as text, and the tokens of all."""
    texts: list[str] = []
    tokens = 0
    for start in range(0, len(rows), batch):
        part = [rows[i] for i in range(start, min(start + batch, len(rows)))]
        prompts = [prompt_ids(bench.tokenizer, row["prompt"]) for row in part]
        written = sample_completions(
            model, part, prompts, bench.tokenizer.pad_token_id, bench.sampling(1, seed + start)
        )
        texts += [bench.tokenizer.decode(one.completion, skip_special_tokens=True) for one in written]
        tokens += sum(len(one.completion) for one in written)
    return texts, tokens


def answers(
    bench: TaskModels, model: Any, rows: Dataset, generations: int, seed: int, teacher: Any = None
) -> list[Answer]:
    """All answers to some problems, in the form that `summarise` takes."""
    how = bench.sampling(generations, seed)
    found = answer_all(model, list(rows), bench.tokenizer, how, [bench.task.verifier], teacher, batch_size=250)
    return list(itertools.chain.from_iterable(found))


def measured(bench: TaskModels, model: Any, seed: int, prompts: int = 250, generations: int = 4) -> dict[str, float]:
    """
    The estimates of a model on new problems, without their intervals: those are told by the seeds.

    With them "different right", how many different right answers a problem got, and "different of right", their share
    among the right ones: n-grams would count every mistake as diversity.
    """
    add_teacher_forward(model)
    rows = bench.task.problems(prompts, HELD_OUT + seed)
    found = answers(bench, model, rows, generations, seed, bench.teacher())
    right = [(one.prompt, one.ids) for one in found if one.score]
    return {
        **{name: one.value for name, one in summarise(found).items()},
        "different right": len(set(right)) / prompts,
        "different of right": len(set(right)) / len(right) if right else math.nan,
    }


class AccuracyProbe(TrainerCallback):
    """Notes the accuracy on a few problems, and what it has cost so far, at the start and several times on the way."""

    def __init__(
        self, bench: TaskModels, seed: int, steps: int, cost: Cost, generated: int, per_step: int | None = None
    ):
        self.bench, self.seed, self.cost = bench, seed, cost
        self.every, self.per_step = max(1, steps // GLANCES), per_step
        self.cost.generated += generated
        self.rows = bench.task.problems(200, GLANCE_AT + seed)

    def _look(self, model: Any) -> None:
        found = answers(self.bench, model, self.rows, 1, self.seed)
        right = sum(one.score or 0.0 for one in found) / len(found)
        self.cost.curve.append((self.cost.generated, self.cost.trained, right))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not self.cost.curve:
            self._look(model)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **_: Any) -> None:
        if "loss" not in (logs or {}):
            return  # the last line, of the whole run
        if self.per_step is None:  # on-policy: what is written is trained on
            self.cost.generated += round(logs["completions/mean_length"] * BATCH)
            self.cost.trained += round(logs["completions/mean_length"] * BATCH)
        else:
            self.cost.trained += self.per_step
        if state.global_step % self.every == 0 or state.global_step == args.max_steps:
            self._look(model)


def settings(bench: TaskModels, steps: int, seed: int, rate: str) -> dict[str, Any]:
    """What both trainers are given; `rate` is a key of the preset's rates."""
    return {
        **bench.preset.training,
        "output_dir": str(bench.folder / "scratch"),
        "max_steps": steps,
        "learning_rate": bench.preset.rates[rate],
        "use_cpu": bench.preset.device == "cpu",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": seed,
        "report_to": "none",
        "disable_tqdm": True,
    }


def fine_tune(
    bench: TaskModels,
    student: Any,
    rows: Dataset,
    texts: list[str],
    steps: int,
    seed: int,
    cost: Cost,
    generated: int = 0,
    rate: str = "SFT",
) -> None:
    """SFT on finished answers with TRL's `SFTTrainer`."""
    both = {"prompt": rows["prompt"], "completion": [[{"role": "assistant", "content": text}] for text in texts]}
    tokens = sum(len(ids) + 1 for ids in bench.tokenizer(texts)["input_ids"])  # and the stop token
    trainer = SFTTrainer(
        model=student,
        args=SFTConfig(**settings(bench, steps, seed, rate)),
        train_dataset=Dataset.from_dict(both),
        processing_class=bench.tokenizer,
        callbacks=[AccuracyProbe(bench, seed, steps, cost, generated, per_step=BATCH * tokens // len(texts))],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def distil(bench: TaskModels, student: Any, steps: int, seed: int, cost: Cost, **changes: Any) -> Any:
    """`OPDTrainer` on fresh problems; `changes` are settings, or `teacher` (model or name), `rows`, `rate`."""
    teacher = changes.pop("teacher", bench.teacher_path)
    rows = changes.pop("rows", None)
    generated = changes.pop("generated", 0)
    per_step = changes.pop("per_step", None)
    rewards = changes.pop("reward_funcs", None)
    rate = changes.pop("rate", "on-policy")
    base = {**settings(bench, steps, seed, rate), "max_completion_length": bench.task.limit}
    args = OPDConfig(**{**base, **changes})
    trainer = OPDTrainer(
        model=student,
        teacher_model=teacher if args.beta > 0 else None,
        reward_funcs=rewards,
        args=args,
        train_dataset=rows if rows is not None else bench.task.problems(BATCH * steps, TRAIN + seed),
        processing_class=bench.tokenizer,
        callbacks=[AccuracyProbe(bench, seed, steps, cost, generated, per_step)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer
