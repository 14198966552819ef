"""On-policy distillation in miniature: a student that imitates its teacher's answers learns to reach them.

    make demo        # or: python scripts/demo.py

The task is four-digit addition with written-out steps. The teacher (0.6 M parameters) solves it; the student (0.34 M)
was made by SFT on 200 of the teacher's answers, and mostly derails. Here it writes answers of its own, and the teacher
judges every token. A table, `summary.json` and `training.png` say how far that brings it.

With `--rewards` it compares the teacher alone with a reward alone and with both (`demo_rewards.py`). Left out on
purpose: a search for good settings, and anything that needs a network or a GPU. How the two models were made:
`scripts/make_demo_models.py`.
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

from scripts.studies.demo.student import MODELS, Watch, console, load, measure, train
from scripts.studies.tasks.additions import problems


STEPS = 250  # unless `--steps` says else


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
        ylabel="accuracy on 250 problems", ylim=(0, 1.05), title="The student writes, the teacher judges every token"
    )
    bottom.plot(*zip(*watch.kl, strict=True), color=orange, linewidth=1.6)
    bottom.set(xlabel="optimizer step (64 answers each)", ylabel="KL(student ‖ teacher)\nnats per token", yscale="log")
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"))
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--steps", type=int, help="optimizer steps: 250, with --rewards 500 for each run")
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--held_out", type=int, default=1000, help="problems for the table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rewards", action="store_true", help="compare reward, teacher and both: see demo_rewards.py")
    options = parser.parse_args()
    logging.getLogger("trl_distill").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()  # of loading; ours follows
    if options.rewards:
        from scripts.studies.demo.rewards import compare

        return compare(options)
    options.steps = options.steps or STEPS
    start = time.perf_counter()
    student, teacher, tokenizer = load(options.models)
    held_out, glance = problems(options.held_out, seed=10_000 + options.seed), problems(250, seed=20_000 + options.seed)

    def measured(model: Any, rows: Dataset) -> dict[str, float]:
        return measure(model, teacher, tokenizer, rows, options.seed)

    console.print(f"Measuring teacher and student on {options.held_out} held-out problems ...")
    of_teacher, before = measured(teacher, held_out), measured(student, held_out)
    trainer, watch = train(options, "distilling", student, lambda: measured(student, glance))
    trainer.save_model(str(options.output_dir / "student"))
    after = measured(student, held_out)

    summary = {
        "teacher_accuracy": of_teacher["accuracy"],
        "student_accuracy_before": before["accuracy"],
        "student_accuracy_after": after["accuracy"],
        "reverse_kl_before": before["reverse_kl"],
        "reverse_kl_after": after["reverse_kl"],
        "seconds": round(time.perf_counter() - start, 1),
    }
    (options.output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw(watch, of_teacher["accuracy"], options.output_dir / "training.png")

    table = Table(title=f"{options.held_out} held-out problems, one sampled answer each")
    for column in ("", "accuracy", "KL to the teacher, nats per token"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("teacher", f"{of_teacher['accuracy']:.1%}", "0")
    table.add_row("student before", f"{before['accuracy']:.1%}", f"{before['reverse_kl']:.3f}")
    table.add_row("student after", f"{after['accuracy']:.1%}", f"{after['reverse_kl']:.3f}")
    console.print(table)
    gap = of_teacher["accuracy"] - before["accuracy"]
    recovered = (after["accuracy"] - before["accuracy"]) / gap if gap else float("nan")
    console.print(f"{recovered:.0%} of the gap to the teacher recovered in {summary['seconds']:.0f} seconds.")
    console.print(f"Results are in {options.output_dir}: summary.json, training.png, and the model in student/")
