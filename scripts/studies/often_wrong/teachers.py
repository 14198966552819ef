"""Teachers that are often wrong: models of the demo's teacher's size, trained in the ordinary way and stopped early.

One training on right solutions makes all three: a copy is kept when the model first reaches each level. Weights are
kept in 16 bits, which makes the files small, and loaded in 32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed

from scripts.studies.demo.student import Models, load, measure
from scripts.studies.often_wrong.arms import SEEDS
from scripts.studies.often_wrong.rewards import no_number
from scripts.studies.tasks.additions import problems
from scripts.studies.tasks.make_models import as_conversation, make_model, sft
from scripts.studies.tasks.seeds import HELD_OUT
from scripts.studies.tasks.table import SHIPPED


LEVELS = (50, 70, 85)  # right answers of 100


class KeepLevels(TrainerCallback):
    """
    Keeps a copy of the model when it first reaches each level, and ends the training with the last.

    Args:
        folder (`Path`): gets a folder for each level.
        models ([`Models`]): for the tokenizer.
    """

    def __init__(self, folder: Path, models: Models):
        self.folder, self.models, self.missing = folder, models, list(LEVELS)
        self.rows = problems(500, seed=3_000_000)

    def _right(self, model: Any, size: int) -> float:
        models = Models(model, model, self.models.tokenizer)
        return measure(models, model, self.rows.select(range(size)), 0).accuracy

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step % 4 or self._right(model, 40) < 0.25:
            return
        right = self._right(model, 500)
        while self.missing and right >= self.missing[0] / 100:
            folder = self.folder / str(self.missing.pop(0))
            keep(model, folder, {"steps": state.global_step})
            self.models.tokenizer.save_pretrained(folder)
        control.should_training_stop = not self.missing


def keep(model: Any, folder: Path, facts: dict[str, Any]) -> None:
    """Save weights in 16 bits, and what is known of them."""
    half = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=half)
    (folder / "teacher.json").write_text(json.dumps(facts, indent=1) + "\n")


def load_teacher(folder: Path, level: int) -> Any:
    """A teacher in 32 bits."""
    model = AutoModelForCausalLM.from_pretrained(folder / str(level), dtype=torch.float32)
    model.generation_config.pad_token_id = model.config.pad_token_id
    return model


def facts(folder: Path, level: int) -> dict[str, Any]:
    """
    What is known of a teacher; empty where there is none.

    "steps" it was trained for; "accuracy" is the share of right answers, sampled at temperature 1, by seed; "p" their
    mean; "greedy" the same as "p" with the most likely token everywhere.
    """
    path = folder / str(level) / "teacher.json"
    return json.loads(path.read_text()) if path.exists() else {}


def make_teachers(folder: Path) -> None:
    """
    Make and measure the teachers that are not there yet.

    Args:
        folder (`Path`): of the teachers.
    """
    if not all(facts(folder, level) for level in LEVELS):
        _train(folder)
    for level in LEVELS:
        known = facts(folder, level)
        if "greedy" not in known:
            keep(load_teacher(folder, level), folder / str(level), {**known, **measured(folder, level)})


def _train(folder: Path, steps: int = 2000) -> None:
    """One training, of which a copy is kept at each level; `steps` are those of the whole, which sets the rate."""
    models = load(SHIPPED)
    set_seed(0)
    teacher = make_model(models.tokenizer, hidden_size=128, layers=4, heads=4)
    teacher.config.initializer_range = teacher.config.hidden_size**-0.5  # with Qwen's own it takes long to begin
    teacher = type(teacher)(teacher.config)
    teacher.generation_config.pad_token_id = models.tokenizer.pad_token_id
    rows = problems(30_000, seed=1)
    samples = as_conversation(rows, list(rows["solution"]))
    sft(teacher, models.tokenizer, samples, steps, 128, 2e-3, 0, callbacks=[KeepLevels(folder, models)])


def measured(folder: Path, level: int) -> dict[str, Any]:
    """What [`facts`] says of a teacher's answers."""
    model = load_teacher(folder, level)
    models = Models(model, model, load(SHIPPED).tokenizer)
    rows = {seed: problems(1000, seed=HELD_OUT + seed) for seed in SEEDS}
    found = [measure(models, model, rows[seed], seed).accuracy for seed in SEEDS]
    greedy = [measure(models, model, rows[seed], seed, greedy=True).accuracy for seed in SEEDS]
    return {"accuracy": found, "p": sum(found) / len(found), "greedy": sum(greedy) / len(greedy)}


def before(folder: Path, level: int) -> dict[str, float]:
    """The share of answers without a number that a teacher and the untrained student write, on 500 problems."""
    shipped, teacher = load(SHIPPED), load_teacher(folder, level)
    models, rows = Models(shipped.student, teacher, shipped.tokenizer), problems(500, seed=HELD_OUT)
    written = {"teacher": teacher, "student": shipped.student}
    return {name: measure(models, one, rows, 0, verifier=no_number).accuracy for name, one in written.items()}


def write_facts(folder: Path, results: Path) -> None:
    """What is known of the teachers and of the student before, for the page: `teachers.json`, `before.json`."""
    results.mkdir(parents=True, exist_ok=True)
    known = {level: facts(folder, level) for level in LEVELS}
    (results / "teachers.json").write_text(json.dumps(known, indent=1) + "\n")
    path = results / "before.json"
    if not path.exists():
        path.write_text(json.dumps(before(folder, 70), indent=1) + "\n")
