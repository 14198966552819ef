"""SFT and on-policy training of the runs of `scripts/reproduce.py`, with their costs in completion tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from scripts.studies.reproduce.models import Samples, TaskModels, answers, save_whole, small_model, teacher_samples
from scripts.studies.reproduce.presets import BATCH, RunContext
from scripts.studies.reproduce.records import Cost
from scripts.studies.tasks.seeds import GLANCE_AT, HUMAN, TRAIN
from trl_distill import OPDConfig, OPDTrainer


GLANCES = 6  # looks at the accuracy during a run


@dataclass(frozen=True)
class Schedule:
    """
    How a model is trained.

    Attributes:
        steps (`int`): optimizer steps, of `BATCH` answers each.
        seed (`int`): of the training.
        rate (`str`): a key of the preset's learning rates.
    """

    steps: int
    seed: int
    rate: str


class AccuracyProbe(TrainerCallback):
    """
    Notes the accuracy on a few problems, and the cost so far, at the start and several times on the way.

    Args:
        models ([`TaskModels`]): the task.
        schedule ([`Schedule`]): of this training.
        cost ([`Cost`]): is counted up.
        samples ([`Samples`], *optional*): that the student is trained on; `None` where it writes its own answers.
        per_step (`int`): tokens of these that a step trains on.
    """

    def __init__(
        self, models: TaskModels, schedule: Schedule, cost: Cost, samples: Samples | None = None, per_step: int = 0
    ):
        self.models, self.seed, self.cost = models, schedule.seed, cost
        self.every, self.writes_its_own, self.per_step = max(1, schedule.steps // GLANCES), samples is None, per_step
        self.cost.generated += 0 if samples is None else samples.tokens
        self.rows = models.task.problems(200, GLANCE_AT + schedule.seed)

    def _look(self, model: Any) -> None:
        found = answers(self.models, model, self.rows, 1, self.seed)
        right = sum(one.score or 0.0 for one in found) / len(found)
        self.cost.curve.append((self.cost.generated, self.cost.trained, right))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not self.cost.curve:
            self._look(model)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **_: Any) -> None:
        if "loss" not in (logs or {}):
            return  # the last line, of the whole run
        if self.writes_its_own:
            tokens = round(logs["completions/mean_length"] * BATCH)
            self.cost.generated += tokens
            self.cost.trained += tokens
        else:
            self.cost.trained += self.per_step
        if state.global_step % self.every == 0 or state.global_step == args.max_steps:
            self._look(model)


class FixedAdvantage(OPDTrainer):
    """
    A trainer in which every token of every completion has the advantage −1, whatever rewards say.

    The control of arXiv 2608.31046. Its expected gradient is 0, E[∇ log q] = 0; what it does, noise, clipping and the
    optimizer do.
    """

    def on_rollouts(self, rows: list[dict[str, Any]], batch: dict[str, Any]) -> None:
        super().on_rollouts(rows, batch)
        batch["advantages"] = -torch.ones_like(batch["advantages"])


def settings(models: TaskModels, schedule: Schedule) -> dict[str, Any]:
    """What both trainers are given."""
    return {
        **models.preset.training,
        "output_dir": str(models.folder / "scratch"),
        "max_steps": schedule.steps,
        "learning_rate": models.preset.rates[schedule.rate],
        "use_cpu": models.preset.device == "cpu",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": schedule.seed,
        "report_to": "none",
        "disable_tqdm": True,
    }


def fine_tune(models: TaskModels, student: Any, samples: Samples, schedule: Schedule, cost: Cost) -> None:
    """SFT on finished answers with TRL's `SFTTrainer`."""
    tokens = sum(len(ids) + 1 for ids in models.tokenizer(samples.texts)["input_ids"])  # and the stop token
    per_step = BATCH * tokens // len(samples.texts)
    trainer = SFTTrainer(
        model=student,
        args=SFTConfig(**settings(models, schedule)),
        train_dataset=Dataset.from_dict({"prompt": samples.rows["prompt"], "completion": samples.completions()}),
        processing_class=models.tokenizer,
        callbacks=[AccuracyProbe(models, schedule, cost, samples, per_step)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def distil(
    models: TaskModels,
    student: Any,
    schedule: Schedule,
    cost: Cost,
    *,
    teacher: Any = None,
    rows: Dataset | None = None,
    samples: Samples | None = None,
    reward: Any = None,
    kind: type[OPDTrainer] = OPDTrainer,
    **changes: Any,
) -> None:
    """
    `OPDTrainer`, on fresh problems unless told otherwise.

    Args:
        models ([`TaskModels`]): the task.
        student: is trained in place.
        schedule ([`Schedule`]): how long.
        cost ([`Cost`]): is counted up.
        teacher (*optional*): model or name; the task's unless given.
        rows (`Dataset`, *optional*): the problems.
        samples ([`Samples`], *optional*): problems with answers to train on in place of the student's own.
        reward (*optional*): reward function.
        kind (`type`): the trainer, or a subclass.
        changes: fields of `OPDConfig`.
    """
    if samples is not None:
        rows, changes = samples.rows.add_column("completion", samples.completions()), {**changes, "lmbda": 0.0}
    elif rows is None:
        rows = models.task.problems(BATCH * schedule.steps, TRAIN + schedule.seed)
    per_step = 0 if samples is None else samples.tokens // schedule.steps
    base = {**settings(models, schedule), "max_completion_length": models.task.limit}
    args = OPDConfig(**{**base, **changes})
    trainer = kind(
        model=student,
        teacher_model=(models.teacher_path if teacher is None else teacher) if args.beta > 0 else None,
        reward_funcs=reward,
        args=args,
        train_dataset=rows,
        processing_class=models.tokenizer,
        callbacks=[AccuracyProbe(models, schedule, cost, samples, per_step)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def make_order_models(context: RunContext, steps: int = 800) -> None:
    """
    Make the models of the orders: the teacher learns from right answers, each student a little from the teacher's.

    Models that are there are kept.
    """
    models = TaskModels("many", context)
    if models.task.teacher is not None:
        return
    if not Path(models.teacher_path, "config.json").exists():
        set_seed(0)
        teacher = small_model(models, "teacher")
        rows = models.task.problems(BATCH * steps, HUMAN)
        fine_tune(models, teacher, Samples(rows, list(rows["solution"])), Schedule(steps, 0, "many"), Cost())
        save_whole(teacher, Path(models.teacher_path), models.tokenizer)
    for name in ("student", "small", "tiny"):
        path = TaskModels("many", context, name).student_path
        if not Path(path, "config.json").exists():
            set_seed(1)
            student = small_model(models, name)
            fine_tune(models, student, teacher_samples(models, 2000, 1), Schedule(300, 1, "many"), Cost())
            save_whole(student, Path(path))
