"""The demo's student: sampling, measuring and training it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback, set_seed

from scripts.studies.tasks.additions import MAX_COMPLETION_LENGTH, correct, problems
from trl_distill import OPDConfig, OPDTrainer, foreign_text
from trl_distill.objective.divergences import reverse_kl


MODELS = Path(__file__).parents[1] / "tasks" / "models"


console = foreign_text.console()


@dataclass(frozen=True)
class Setting:
    """
    What a training of the demo is given.

    Attributes:
        models (`Path`): folder with `student/` and `teacher/`.
        output_dir (`Path`): for results.
        steps (`int`): optimizer steps.
        learning_rate (`float`): at its peak.
        held_out (`int`): problems for the table.
        seed (`int`): of everything.
    """

    models: Path
    output_dir: Path
    steps: int
    learning_rate: float
    held_out: int
    seed: int


@dataclass(frozen=True)
class Models:
    """Student, teacher and their tokenizer."""

    student: Any
    teacher: Any
    tokenizer: Any


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompts: list[Any], greedy: bool = False) -> tuple[torch.Tensor, ...]:
    """
    One answer per prompt, at temperature 1 or `greedy`: ids and attention mask `(B, P + C)`, completions and mask
    `(B, C)`.
    """
    inputs = tokenizer.apply_chat_template(
        prompts,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    ids = model.generate(
        **inputs, do_sample=not greedy, top_k=None if greedy else 0, max_new_tokens=MAX_COMPLETION_LENGTH
    )
    completions = ids[:, inputs["input_ids"].shape[1] :]
    ended = (completions == tokenizer.eos_token_id).cumsum(-1)
    mask = (ended == 0) | ((ended == 1) & (completions == tokenizer.eos_token_id))  # up to the first stop token
    return ids, torch.cat([inputs["attention_mask"], mask.long()], dim=1), completions, mask


@dataclass(frozen=True)
class Measured:
    """Of a model on some problems: share of right answers, KL to the teacher in nats per token, tokens per answer."""

    accuracy: float
    reverse_kl: float
    length: float


@torch.no_grad()
def measure(
    models: Models,
    model: Any,
    rows: Dataset,
    seed: int,
    batch_size: int = 250,
    verifier: Any = correct,
    greedy: bool = False,
) -> Measured:
    """
    Accuracy, by the verifier, and KL(model ‖ teacher), nats per token: one answer to each problem, sampled at
    temperature 1 or `greedy`.
    """
    was_training = model.training
    model.eval()
    state = torch.random.get_rng_state()
    set_seed(seed)
    right, kl, tokens = 0.0, 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        ids, attention_mask, completions, mask = sample(model, models.tokenizer, batch["prompt"], greedy)
        logits = [m(input_ids=ids, attention_mask=attention_mask).logits for m in (model, models.teacher)]
        per_token = reverse_kl(*logits)[:, -completions.shape[1] - 1 : -1]  # small vocabulary: full logits are fine
        kl += (per_token * mask).sum().item()
        tokens += int(mask.sum())
        texts = models.tokenizer.batch_decode(completions, skip_special_tokens=True)
        right += sum(verifier(texts, batch["answer"]))
    torch.random.set_rng_state(state)
    model.train(was_training)
    return Measured(right / len(rows), kl / tokens, tokens / len(rows))


def progress_bar() -> Progress:
    """A bar for [`Watch`], with KL and accuracy."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("KL {task.fields[kl]:.3f}  accuracy {task.fields[accuracy]:.0%}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


class Watch(TrainerCallback):
    """
    Moves the progress bar, and measures accuracy now and then.

    Args:
        progress (`Progress`): the bar's.
        label (`str`): of the bar.
        total (`int`): optimizer steps.
        every (`int`): steps between two measurements.
        measure_now (`Callable[[], Measured]`): measures the student.
    """

    def __init__(self, progress: Progress, label: str, total: int, every: int, measure_now: Callable[[], Measured]):
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
        self.accuracy.append((step, self.measure_now().accuracy))
        self.progress.update(self.task, accuracy=self.accuracy[-1][1])


def load(folder: Path) -> Models:
    """The models in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("student", "teacher"))
    for model in (student, teacher):  # `sample` calls `generate` without a padding token
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return Models(student, teacher, tokenizer)


def train(
    setting: Setting,
    models: Models,
    label: str,
    measure_now: Callable[[], Measured],
    reward: Any = None,
    **changes: Any,
) -> tuple[OPDTrainer, Watch]:
    """
    Train the student, with a progress bar.

    Args:
        setting ([`Setting`]): steps, learning rate, folders, seed.
        models ([`Models`]): whose student is trained, in place.
        label (`str`): of the progress bar.
        measure_now (`Callable[[], Measured]`): measures the student now and then.
        reward (*optional*): reward function.
        changes: fields of `OPDConfig` that differ from those below.
    """
    settings = {
        "output_dir": str(setting.output_dir / "checkpoints"),
        "max_steps": setting.steps,
        "per_device_train_batch_size": 64,
        "learning_rate": setting.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "max_completion_length": MAX_COMPLETION_LENGTH,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": setting.seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    args = OPDConfig(**{**settings, **changes})
    with progress_bar() as progress:
        watch = Watch(progress, label, args.max_steps, every=25, measure_now=measure_now)
        trainer = OPDTrainer(
            model=models.student,
            teacher_model=str(setting.models / "teacher") if args.beta > 0 else None,
            reward_funcs=reward,
            args=args,
            train_dataset=problems(64 * args.max_steps, seed=30_000 + args.seed),
            processing_class=AutoTokenizer.from_pretrained(setting.models / "student"),
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer, watch
