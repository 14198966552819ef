"""One run: a model is trained as its arm says, measured, and its numbers are written to a file."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from scripts.studies.demo.student import Models, load, measure
from scripts.studies.often_wrong.arms import BATCH, SETTINGS, Run
from scripts.studies.often_wrong.formula import promised
from scripts.studies.often_wrong.rewards import REWARDS, no_number
from scripts.studies.often_wrong.teachers import facts, load_teacher
from scripts.studies.tasks.additions import MAX_COMPLETION_LENGTH, problems
from scripts.studies.tasks.seeds import GLANCE_AT, HELD_OUT, TRAIN
from scripts.studies.tasks.table import SHIPPED
from trl_distill import OPDConfig, OPDTrainer


class Curve(TrainerCallback):
    """
    Notes the accuracy on other problems now and then.

    Args:
        models ([`Models`]): its student is trained.
        seed (`int`): of the run.
        every (`int`): steps between two measurements.
    """

    def __init__(self, models: Models, seed: int, every: int):
        self.models, self.seed, self.every = models, seed, every
        self.rows = problems(250, seed=GLANCE_AT + seed)
        self.points: list[tuple[int, float]] = []

    def _look(self, step: int) -> None:
        found = measure(self.models, self.models.student, self.rows, self.seed)
        self.points.append((step, round(found.accuracy, 4)))

    def on_train_begin(self, args, state, control, **_):
        self._look(0)

    def on_step_end(self, args, state, control, **_):
        if state.global_step % self.every == 0:
            self._look(state.global_step)


def train(plan: Run, models: Models, teachers: dict[str, Any], seed: int) -> Curve:
    """
    Train `models.student` in place.

    Args:
        plan ([`Run`]): what to do.
        models ([`Models`]): student, teacher, tokenizer.
        teachers (`dict[str, Any]`): what scores the answers, by name.
        seed (`int`): of problems and sampling.
    """
    arm = plan.arm
    curve = Curve(models, seed, every=max(1, arm.steps // 6))
    with tempfile.TemporaryDirectory() as scratch:
        given = {
            **SETTINGS,
            "output_dir": scratch,
            "max_steps": arm.steps,
            "per_device_train_batch_size": BATCH,
            "learning_rate": arm.rate,
            "max_completion_length": MAX_COMPLETION_LENGTH,
            "seed": seed,
            **({"reward_baseline": "batch"} if arm.reward else {}),
            **arm.changes,
        }
        args = OPDConfig(**given)
        weighed: Any = teachers if len(teachers) > 1 else teachers["teacher"]
        rows = problems(arm.problems or BATCH * arm.steps, seed=TRAIN + seed)
        trainer = OPDTrainer(
            model=models.student,
            teacher_model=weighed if args.beta > 0 else None,
            reward_funcs=[REWARDS[arm.reward]] if arm.reward else None,
            args=args,
            train_dataset=rows,
            processing_class=models.tokenizer,
            callbacks=[curve],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return curve


def run(name: str, plan: Run, folder: Path, path: Path, size: int = 1000) -> None:
    """
    Make one run, and write its numbers.

    Args:
        name (`str`): of the run.
        plan ([`Run`]): what to do.
        folder (`Path`): of the teachers.
        path (`Path`): of the file, which is either whole or not there.
        size (`int`): held-out problems.
    """
    torch.set_num_threads(1)
    begun = time.perf_counter()
    arm, shipped = plan.arm, load(SHIPPED)
    lenient = arm.reward == "lenient"
    teacher = load_teacher(folder, plan.level)
    student = shipped.student if arm.start == "student" else load_teacher(folder, plan.level)
    models = Models(student, teacher, shipped.tokenizer)
    teachers = {"teacher": teacher}
    if arm.reference is not None:
        own = arm.reference == "student"
        teachers["ref"] = load(SHIPPED).student if own else load_teacher(folder, int(arm.reference))
    curve = train(plan, models, teachers, plan.seed)
    rows = problems(size, seed=HELD_OUT + plan.seed)
    found = measure(models, student, rows, plan.seed)
    known = facts(folder, plan.level)
    record = {
        "run": name,
        "arm": arm.label,
        "teacher": plan.level,
        "seed": plan.seed,
        "steps": arm.steps,
        "answers_per_step": BATCH,
        "learning_rate": arm.rate,
        "settings": arm.changes,
        "reward": arm.reward,
        "p": known["p"],
        "beta": arm.beta,
        "promised": None if arm.beta is None or lenient else promised(known["p"], arm.beta),
        "accuracy": found.accuracy,
        "kl_per_token": found.reverse_kl,
        "kl_per_answer": found.reverse_kl * found.length,
        "tokens_per_answer": found.length,
        "without_number": measure(models, student, rows, plan.seed, verifier=no_number).accuracy if lenient else None,
        "curve": curve.points,
        "seconds": round(time.perf_counter() - begun),
        "machine": machine(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record) + "\n")
    part.replace(path)


def machine() -> dict[str, str]:
    """Where a run was made."""
    versions = {name: version(name) for name in ("torch", "transformers", "trl")}
    return {"cores": str(os.cpu_count()), "Python": platform.python_version(), **versions}
