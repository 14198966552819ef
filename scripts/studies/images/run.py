"""Distillation with images in miniature: a student learns to read pictures from its teacher.

    python -m scripts.studies.images.run --output_dir images_output

The task is to read what is drawn: "3 red circles" (`drawings.py`). Teacher and student are small models of Idefics 3's
classes that `make_models.py` made. The student writes answers to new pictures, and the teacher, which sees the same
pictures, scores every token; nothing else says what is right. `summary.json` has accuracy and KL before and after, the
accuracy on 250 other pictures every 25 steps, and answers to some pictures, which `examples.png` shows. Left out: a
search for good settings, and anything that needs a network or a GPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

from scripts.studies.startup import ONE_THREAD, prepare_environment  # before the libraries


prepare_environment(HF_HUB_OFFLINE="1", OMP_NUM_THREADS=ONE_THREAD)

from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging

from scripts.studies.demo.run import draw as draw_curve
from scripts.studies.demo.run import table
from scripts.studies.demo.student import Watch, console, progress_bar
from scripts.studies.images.drawings import MAX_COMPLETION_LENGTH, problems
from scripts.studies.images.reader import MODELS, Models, answers, load, measure
from trl_distill import OPDConfig, OPDTrainer


BATCH = 64  # pictures in a step
EXAMPLES, SEED_OF_EXAMPLES = 12, 40_000


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=MODELS, help="folder with `student/` and `teacher/`")
    parser.add_argument("--output_dir", type=Path, default=Path("images_output"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="at its peak")
    parser.add_argument("--held_out", type=int, default=1000, help="pictures for the table")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(words)
    if missing := [name for name in ("student", "teacher") if not (options.models / name / "config.json").is_file()]:
        how = f"python -m scripts.studies.images.make_models --output_dir {options.models}"
        parser.error(f"{options.models} has no {' and no '.join(missing)}. Make the models: {how}")
    return options


def train(models: Models, options: argparse.Namespace) -> Watch:
    """Distil into `models.student`, with a progress bar."""
    glance = problems(250, seed=20_000 + options.seed)
    args = OPDConfig(
        output_dir=str(options.output_dir / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=BATCH,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        max_completion_length=MAX_COMPLETION_LENGTH,
        logging_steps=1,
        save_strategy="no",
        seed=options.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
    )
    with progress_bar() as progress:
        looks = 25 if options.steps >= 25 else options.steps
        watch = Watch(
            progress, "distilling", options.steps, looks, lambda: measure(models, models.student, glance, options.seed)
        )
        trainer = OPDTrainer(
            model=models.student,
            teacher_model=models.teacher,
            args=args,
            train_dataset=problems(BATCH * options.steps, seed=30_000 + options.seed),
            processing_class=models.processor,
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return watch


def examples_figure(examples: list[dict[str, str]]) -> Any:
    """The pictures of `examples`, drawn again from their seed, with answers before and after below them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pictures = problems(len(examples), seed=SEED_OF_EXAMPLES)["image"]
    figure, axes = plt.subplots(2, len(examples) // 2, figsize=(1.9 * (len(examples) // 2), 5.4), layout="constrained")
    for axis, picture, said in zip(axes.flat, pictures, examples, strict=True):
        axis.imshow(picture, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        for line, when in enumerate(("before", "after")):
            right = said[when] == said["answer"]
            text = f"{when}: {said[when]} {'✓' if right else '✗'}"
            colour = "#1a7a3c" if right else "#b03020"
            axis.annotate(
                text,
                (0.5, 0),
                (0, -10 - 13 * line),
                xycoords="axes fraction",
                textcoords="offset points",
                ha="center",
                va="top",
                color=colour,
                fontsize=8.5,
            )
    figure.suptitle("What the student says of pictures, before and after distillation", fontsize=12)
    return figure


def main(words: list[str] | None = None) -> None:
    options, start = parse(words), time.perf_counter()
    logging.getLogger("trl_distill").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()  # of loading; ours follows
    options.output_dir.mkdir(parents=True, exist_ok=True)
    models, held_out = load(options.models), problems(options.held_out, seed=10_000 + options.seed)
    shown = problems(EXAMPLES, seed=SEED_OF_EXAMPLES)

    console.print(f"Measuring teacher and student on {options.held_out} held-out pictures ...")
    teacher, before = (measure(models, model, held_out, options.seed) for model in (models.teacher, models.student))
    said_before = answers(models.student, models.processor, shown, options.seed)
    watch = train(models, options)
    after = measure(models, models.student, held_out, options.seed)
    said_after = answers(models.student, models.processor, shown, options.seed)
    models.student.save_pretrained(options.output_dir / "student")
    models.processor.save_pretrained(options.output_dir / "student")

    gap = teacher.accuracy - before.accuracy
    recovered = (after.accuracy - before.accuracy) / gap if gap else float("nan")
    said = zip(shown["answer"], said_before, said_after, strict=True)
    summary = {
        "teacher_accuracy": teacher.accuracy,
        "student_accuracy_before": before.accuracy,
        "student_accuracy_after": after.accuracy,
        "recovered": recovered,
        "reverse_kl_before": before.reverse_kl,
        "reverse_kl_after": after.reverse_kl,
        "parameters": {"teacher": models.teacher.num_parameters(), "student": models.student.num_parameters()},
        "settings": {name: getattr(options, name) for name in ("steps", "learning_rate", "held_out", "seed")},
        "curve": watch.accuracy,
        "examples": [dict(zip(("answer", "before", "after"), row, strict=True)) for row in said],
        "seconds": round(time.perf_counter() - start, 1),
    }
    (options.output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw_curve(watch, teacher.accuracy, options.output_dir / "training.png")
    examples_figure(summary["examples"]).savefig(options.output_dir / "examples.png", dpi=110)  # type: ignore[arg-type]
    console.print(table(options.held_out, teacher, before, after))
    console.print(f"{recovered:.0%} of the gap to the teacher recovered in {summary['seconds']:.0f} seconds.")
    console.print(f"Results are in {options.output_dir}: summary.json, training.png, examples.png, and student/")


if __name__ == "__main__":
    main()
