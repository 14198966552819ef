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
import os
import time
import warnings
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # where DeepSpeed is installed, it would look for one and warn
warnings.filterwarnings("ignore", category=FutureWarning)

import torch
from datasets import Dataset
from demo_task import MAX_COMPLETION_LENGTH, correct, problems
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from trl_distill import OPDConfig, OPDTrainer
from trl_distill.objective import reverse_kl


STEPS = 250  # unless `--steps` says else
MODELS = Path(__file__).parent / "demo_models"
console = Console()


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompts: list[Any]) -> tuple[torch.Tensor, ...]:
    """One answer per prompt at temperature 1: ids and attention mask `(B, P + C)`, completions and mask `(B, C)`."""
    inputs = tokenizer.apply_chat_template(
        prompts,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    ids = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=MAX_COMPLETION_LENGTH)
    completions = ids[:, inputs["input_ids"].shape[1] :]
    ended = (completions == tokenizer.eos_token_id).cumsum(-1)
    mask = (ended == 0) | ((ended == 1) & (completions == tokenizer.eos_token_id))  # up to the first stop token
    return ids, torch.cat([inputs["attention_mask"], mask.long()], dim=1), completions, mask


@torch.no_grad()
def measure(
    model: Any, teacher: Any, tokenizer: Any, rows: Dataset, seed: int, batch_size: int = 250
) -> dict[str, float]:
    """Sample one answer per problem at temperature 1: accuracy, and KL(model ‖ teacher) in nats per token."""
    was_training = model.training
    model.eval()
    state = torch.random.get_rng_state()
    set_seed(seed)
    right, kl, tokens = 0.0, 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        ids, attention_mask, completions, mask = sample(model, tokenizer, batch["prompt"])
        logits = [m(input_ids=ids, attention_mask=attention_mask).logits for m in (model, teacher)]
        per_token = reverse_kl(*logits)[:, -completions.shape[1] - 1 : -1]  # small vocabulary: full logits are fine
        kl += (per_token * mask).sum().item()
        tokens += int(mask.sum())
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        right += sum(correct(texts, batch["answer"]))
    torch.random.set_rng_state(state)
    model.train(was_training)
    return {"accuracy": right / len(rows), "reverse_kl": kl / tokens}


class Watch(TrainerCallback):
    """Moves the progress bar, and measures accuracy now and then on problems that are not used for the final table."""

    def __init__(self, progress: Progress, label: str, total: int, every: int, measure_now: Any):
        self.progress, self.every, self.measure_now = progress, every, measure_now
        self.task = progress.add_task(label, total=total, kl=float("nan"), accuracy=float("nan"))
        self.kl: list[tuple[int, float]] = []
        self.accuracy: list[tuple[int, float]] = []

    def on_train_begin(self, args, state, control, **_):
        self._look(0)

    def on_log(self, args, state, control, logs=None, **_):
        if logs and "distill/reverse_kl" in logs:
            self.kl.append((state.global_step, logs["distill/reverse_kl"]))
            self.progress.update(self.task, kl=logs["distill/reverse_kl"])

    def on_step_end(self, args, state, control, **_):
        self.progress.update(self.task, completed=state.global_step)
        if state.global_step % self.every == 0:
            self._look(state.global_step)

    def _look(self, step: int) -> None:
        self.accuracy.append((step, self.measure_now()["accuracy"]))
        self.progress.update(self.task, accuracy=self.accuracy[-1][1])


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


def load(models: Path) -> tuple[Any, Any, Any]:
    """Student, teacher and their tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(models / "student")
    student, teacher = (AutoModelForCausalLM.from_pretrained(models / name) for name in ("student", "teacher"))
    for model in (student, teacher):  # `measure` calls these directly; without it generation would read defaults
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return student, teacher, tokenizer


def train(options: argparse.Namespace, label: str, student: Any, watch_with: Any, **changes: Any) -> tuple[Any, Watch]:
    """Train the student with a progress bar: the demo's settings, with `changes`, `reward_funcs` among them."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("KL {task.fields[kl]:.3f}  accuracy {task.fields[accuracy]:.0%}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    reward_funcs = changes.pop("reward_funcs", None)
    settings = {
        "output_dir": str(options.output_dir / "checkpoints"),
        "max_steps": options.steps,
        "per_device_train_batch_size": 64,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,  # at this rate the student first gets worse; gentler starts end lower in the same time
        "max_completion_length": MAX_COMPLETION_LENGTH,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": options.seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    args = OPDConfig(**{**settings, **changes})
    with Progress(*columns, console=console) as progress:
        watch = Watch(progress, label, args.max_steps, every=25, measure_now=watch_with)
        trainer = OPDTrainer(
            model=student,
            teacher_model=str(options.models / "teacher") if args.beta > 0 else None,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=problems(64 * args.max_steps, seed=30_000 + args.seed),
            processing_class=AutoTokenizer.from_pretrained(options.models / "student"),
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer, watch


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
        from demo_rewards import compare

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


if __name__ == "__main__":
    main()
