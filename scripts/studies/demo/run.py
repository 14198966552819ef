"""On-policy distillation in miniature: a student that imitates its teacher's answers learns to reach them.

    make demo        # or: python scripts/demo.py

The task is four-digit addition with written-out steps. The teacher (0.6 M parameters) solves it; the student (0.34 M)
was made by SFT on 200 of the teacher's answers, and mostly makes mistakes. Here it writes answers of its own, and the
teacher scores every token. A table, `summary.json` and `training.png` show how far that brings it; "curve" in
`summary.json` is the accuracy on 250 other problems every 25 steps.

`python scripts/demo.py --rewards` compares the teacher alone with a reward alone and with both (`rewards.py`). Left
out: a search for good settings, and anything that needs a network or a GPU.
`python -m scripts.studies.tasks.make_models` makes the two models again.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.table import Table
from transformers.utils import logging as transformers_logging

from scripts.studies.demo.student import MODELS, Measured, Setting, Watch, console, load, measure, train
from scripts.studies.tasks.additions import problems


STEPS, STEPS_WITH_REWARDS = 300, 500  # unless `--steps` is given
RATE, RATE_WITH_REWARDS = 6e-4, 1.5e-3  # unless `--learning_rate` is given

# A gentle start, so that the student does not fall before it learns. At first a few tokens carry most of the
# divergence, in states after a mistake: the cap bounds what one of them may pull. Adam's second moment forgets these
# first, large gradients within some 20 steps.
STEADY: dict[str, Any] = {
    "warmup_steps": 20,
    "adam_beta2": 0.95,
    "token_weighting": "cap",
    "token_weighting_kwargs": {"nats": 0.3},
}


def draw(watch: Watch, teacher_accuracy: float, path: Path) -> None:
    """Accuracy and KL over the steps, with the teacher's level."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    blue, grey, orange = "#1f5fa8", "#555555", "#c05a00"
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=[3, 2], layout="constrained")
    top.axhline(teacher_accuracy, color=grey, linestyle="--", linewidth=1.2)
    top.annotate(
        f"teacher {teacher_accuracy:.1%}",
        (0, teacher_accuracy),
        (0, -4),
        textcoords="offset points",
        color=grey,
        va="top",
    )
    steps, values = zip(*watch.accuracy, strict=True)
    top.plot(steps, values, color=blue, marker="o", linewidth=2)
    top.annotate(
        f"student {values[-1]:.1%}",
        (steps[-1], values[-1]),
        (0, -24),
        textcoords="offset points",
        color=blue,
        ha="right",
    )
    top.set(
        ylabel="accuracy on 250 problems", ylim=(0, 1.05), title="The student writes, the teacher scores every token"
    )
    bottom.plot(*zip(*watch.kl, strict=True), color=orange, linewidth=1.6)
    bottom.set(xlabel="optimizer step (64 answers each)", ylabel="KL(student ‖ teacher)\nnats per token", yscale="log")
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"))
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument(
        "--steps", type=int, help=f"optimizer steps: {STEPS}, with --rewards {STEPS_WITH_REWARDS} a run"
    )
    parser.add_argument(
        "--learning_rate", type=float, help=f"at its peak: {RATE:g}, with --rewards {RATE_WITH_REWARDS:g}"
    )
    parser.add_argument("--held_out", type=int, default=1000, help="problems for the table")
    parser.add_argument("--seed", type=int, default=0, help="with --rewards there are three seeds, whatever is given")
    parser.add_argument("--rewards", action="store_true", help="compare reward, teacher and both")
    return parser.parse_args(words)


def table(held_out: int, teacher: Measured, before: Measured, after: Measured) -> Table:
    made = Table(title=f"{held_out} held-out problems, one sampled answer each")
    for column in ("", "accuracy", "KL to the teacher, nats per token"):
        made.add_column(column, justify="left" if not column else "right")
    made.add_row("teacher", f"{teacher.accuracy:.1%}", "0")
    made.add_row("student before", f"{before.accuracy:.1%}", f"{before.reverse_kl:.3f}")
    made.add_row("student after", f"{after.accuracy:.1%}", f"{after.reverse_kl:.3f}")
    return made


def demonstrate(setting: Setting) -> None:
    """Measure, train, measure again; save and show what came out."""
    start = time.perf_counter()
    models = load(setting.models)
    held_out, glance = problems(setting.held_out, seed=10_000 + setting.seed), problems(250, seed=20_000 + setting.seed)

    def measured(model: Any, rows: Dataset) -> Measured:
        return measure(models, model, rows, setting.seed)

    console.print(f"Measuring teacher and student on {setting.held_out} held-out problems ...")
    teacher, before = measured(models.teacher, held_out), measured(models.student, held_out)
    trainer, watch = train(setting, models, "distilling", lambda: measured(models.student, glance), **STEADY)
    trainer.save_model(str(setting.output_dir / "student"))
    after = measured(models.student, held_out)

    summary = {
        "teacher_accuracy": teacher.accuracy,
        "student_accuracy_before": before.accuracy,
        "student_accuracy_after": after.accuracy,
        "reverse_kl_before": before.reverse_kl,
        "reverse_kl_after": after.reverse_kl,
        "curve": watch.accuracy,
        "seconds": round(time.perf_counter() - start, 1),
    }
    (setting.output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw(watch, teacher.accuracy, setting.output_dir / "training.png")
    console.print(table(setting.held_out, teacher, before, after))
    gap = teacher.accuracy - before.accuracy
    recovered = (after.accuracy - before.accuracy) / gap if gap else float("nan")
    console.print(f"{recovered:.0%} of the gap to the teacher recovered in {summary['seconds']:.0f} seconds.")
    console.print(f"Results are in {setting.output_dir}: summary.json, training.png, and the model in student/")


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    logging.getLogger("trl_distill").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()  # of loading; ours follows
    steps = options.steps or (STEPS_WITH_REWARDS if options.rewards else STEPS)
    rate = options.learning_rate or (RATE_WITH_REWARDS if options.rewards else RATE)
    setting = Setting(options.models, options.output_dir, steps, rate, options.held_out, options.seed)
    if options.rewards:
        from scripts.studies.demo.rewards import compare

        compare(setting)
    else:
        demonstrate(setting)
