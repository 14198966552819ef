"""Who runs in the benchmark: our trainer in its variants and three of TRL's, set up alike and fed the same rollouts.

Each is driven through its own `train()`: only the student's `generate` is replaced, by one that returns the cell's
rollouts, so that padding, shuffling, ordering and splitting are the trainer's own. The learning rate is 0, which costs
an optimizer what any other does and leaves every step with the same loss. Tables are in `report.py`.
"""

from __future__ import annotations

import contextlib
import operator
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from scripts.studies.benchmark.cells import Cell, Rollouts, make_model, make_rollouts, make_tokenizer
from scripts.studies.benchmark.clocks import PARTS, Shares, now, peak_memory, synchronize
from trl_distill import OPDConfig, OPDTrainer


BETA = 0.1  # weight of the teacher beside a reward


ROOM = 0.5  # share of a GPU's memory that must be free for a step; contenders wait in CPU memory where it is not


@dataclass(frozen=True)
class StepTime:
    """One optimizer step; seconds."""

    update: float
    generation: float
    loss: float


@dataclass(frozen=True)
class PeakMemory:
    """Peak of a step above models and optimizer, MiB, and the step's loss."""

    mib: float
    loss: float


@dataclass
class TrainerParts:
    """What a trainer is made of; each contender gets models of its own, since trainers change them in place."""

    cell: Cell
    rollouts: Rollouts
    folder: Path
    device: torch.device

    def student(self) -> Any:
        return make_model(self.cell.student, self.cell, 1, self.device)

    def teacher(self) -> Any:
        return make_model(self.cell.teacher, self.cell, 2, self.device)

    def teachers(self) -> dict[str, Any]:
        """Our arguments: one teacher, or several that are alike, so that the loss is the same."""
        count = self.cell.teachers
        return {"teacher_model": {f"t{i}": self.teacher() for i in range(count)} if count > 1 else self.teacher()}

    def settings(self) -> dict[str, Any]:
        """What all configurations share."""
        return {
            "output_dir": str(self.folder / "out"),
            "per_device_train_batch_size": self.cell.micro_batch,
            "gradient_accumulation_steps": self.cell.rows // self.cell.micro_batch,
            "max_steps": 1,
            "learning_rate": 0.0,
            "max_grad_norm": 1.0,
            "gradient_checkpointing": False,
            "bf16": self.cell.dtype == "bfloat16",
            "use_cpu": self.device.type == "cpu",
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }

    def online(self) -> dict[str, Any]:
        """What the trainers that generate share."""
        return self.settings() | {"max_completion_length": max(map(len, self.rollouts.completions))}

    def given(self) -> dict[str, Any]:
        """Arguments that all trainers take."""
        lora = None
        if self.cell.lora:
            from peft import LoraConfig

            lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        return {"processing_class": make_tokenizer(self.cell.vocab), "peft_config": lora}

    def prompts(self) -> Dataset:
        """The prompts as text, each once."""
        texts = [" ".join(f"w{i}" for i in ids) for ids in self.rollouts.prompts[:: self.cell.group]]
        return Dataset.from_dict({"prompt": texts})


def reward(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """Some reward that differs between completions: whether the first token is odd."""
    return [float(ids[0] % 2) for ids in completion_ids]


def ours(parts: TrainerParts, **changes: Any) -> Any:
    if parts.cell.teachers > 1:
        changes["teacher_weights"] = {f"t{i}": 1 / parts.cell.teachers for i in range(parts.cell.teachers)}
    args = OPDConfig(**parts.online(), **changes)
    return OPDTrainer(
        model=parts.student(),
        **parts.teachers(),
        args=args,
        train_dataset=parts.prompts(),
        **parts.given(),
    )


def ours_unprofiled(parts: TrainerParts) -> Any:
    """Without the metrics that are there for the log alone; the divergence itself is still logged."""
    trainer = ours(parts)
    trainer.estimator.profiles = False
    return trainer


def ours_combined(parts: TrainerParts) -> Any:
    args = OPDConfig(**parts.online(), beta=BETA, num_generations=parts.cell.group)
    return OPDTrainer(
        model=parts.student(),
        teacher_model=parts.teacher(),
        reward_funcs=reward,
        args=args,
        train_dataset=parts.prompts(),
        **parts.given(),
    )


def distillation(parts: TrainerParts) -> Any:
    args = DistillationConfig(**parts.online())
    return DistillationTrainer(
        model=parts.student(),
        teacher_model=parts.teacher(),
        args=args,
        train_dataset=parts.prompts(),
        **parts.given(),
    )


def grpo(parts: TrainerParts) -> Any:
    """GRPO loads its reference model by the name in the student's configuration: the teacher's folder, here."""
    folder = parts.folder / "reference"
    parts.teacher().save_pretrained(folder)
    student = parts.student()
    student.config._name_or_path = str(folder)
    args = GRPOConfig(**parts.online(), beta=BETA, scale_rewards="none", num_generations=parts.cell.group)
    return GRPOTrainer(model=student, reward_funcs=reward, args=args, train_dataset=parts.prompts(), **parts.given())


def gkd(parts: TrainerParts) -> Any:
    """GKD counts the tokens of a step before it generates, so its dataset holds the completions that it will write."""
    both = list(zip(parts.rollouts.prompts, parts.rollouts.completions, strict=True))
    rows = {
        "prompt": [" ".join(f"w{i}" for i in prompt) for prompt, _ in both],
        "input_ids": [prompt + completion for prompt, completion in both],
        "completion_mask": [[0] * len(prompt) + [1] * len(completion) for prompt, completion in both],
    }
    args = GKDConfig(**parts.settings(), lmbda=1.0, beta=1.0, temperature=1.0)
    return GKDTrainer(
        model=parts.student(),
        teacher_model=parts.teacher(),
        args=args,
        train_dataset=Dataset.from_dict(rows),
        **parts.given(),
    )


@dataclass(frozen=True)
class Kind:
    """A contender by what it minimises: contenders of one objective must have one loss."""

    label: str
    objective: str
    build: Callable[[TrainerParts], Any]
    teacher_of: Callable[[Any], Any]
    is_ours: bool = False


def our_teacher(trainer: Any) -> Any:
    (teacher, _), *_ = trainer.pool.members
    return teacher.model


def _ours(label: str, objective: str, build: Callable[[TrainerParts], Any]) -> Kind:
    return Kind(label, objective, build, our_teacher, is_ours=True)


def _trls(label: str, objective: str, build: Callable[[TrainerParts], Any], teacher: str = "teacher_model") -> Kind:
    return Kind(label, objective, build, operator.attrgetter(teacher))


CONTENDERS = {
    "ours": _ours("`OPDTrainer`", "reverse KL", ours),
    "distillation": _trls("`DistillationTrainer`", "reverse KL", distillation),
    "gkd": _trls("`GKDTrainer`", "reverse KL", gkd),
    "ours, own head": _ours(
        "`OPDTrainer`, own head", "reverse KL", lambda parts: ours(parts, divergence_kernel="fused")
    ),
    "ours, without metrics": _ours("`OPDTrainer`, without metrics", "reverse KL", ours_unprofiled),
    "ours, top-k": _ours("`OPDTrainer`, top-k", "top-k KL", lambda parts: ours(parts, kl_estimator="topk")),
    "ours, sampled": _ours("`OPDTrainer`, sampled", "sampled KL", lambda parts: ours(parts, kl_estimator="sampled")),
    "ours, combined": _ours("`OPDTrainer`, reward and exact KL", "reward and exact KL", ours_combined),
    "grpo": _trls("`GRPOTrainer`, reward and sampled KL", "reward and sampled KL", grpo, "ref_model"),
}


class StepClock(TrainerCallback):
    """Times the step as the trainer sees it: rollouts, losses, gradients, optimizer; not the loading of prompts."""

    def __init__(self, device: torch.device):
        self.device, self.begun, self.seconds = device, 0.0, 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        synchronize(self.device)
        self.begun = now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        synchronize(self.device)
        self.seconds = now() - self.begun


class Contender:
    """
    A trainer ready to take turns.

    Args:
        name (`str`): a key of [`CONTENDERS`].
        parts ([`TrainerParts`]): what it is made of.
    """

    def __init__(self, name: str, parts: TrainerParts):
        self.kind, self.parts = CONTENDERS[name], parts
        self.trainer = self.kind.build(parts)
        model = self.trainer.model
        self.student = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.teacher = self.kind.teacher_of(self.trainer)
        self.clock = StepClock(parts.device)
        self.trainer.add_callback(self.clock)
        self.trainer.remove_callback(PrinterCallback)
        self.generated, self._really, self._parked = 0.0, False, False
        self._replace_generate()
        self.park()

    def _replace_generate(self) -> None:
        """Let the student write the cell's rollouts, with or without the time that writing them takes."""
        original, by_prompt = self.student.generate, defaultdict(list)
        for prompt, completion in zip(self.parts.rollouts.prompts, self.parts.rollouts.completions, strict=True):
            by_prompt[tuple(prompt)].append(completion)

        def generate(_: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> Any:
            rows = [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)]
            seen: dict[tuple, int] = defaultdict(int)
            written = []
            for row in rows:
                written.append(torch.tensor(by_prompt[row][seen[row]], device=input_ids.device))
                seen[row] += 1
            longest = max(map(len, written))
            synchronize(self.parts.device)
            begun = now()
            if self._really:  # until the longest is written, as a batch is
                original(input_ids=input_ids, attention_mask=attention_mask, min_new_tokens=longest, **options)
                synchronize(self.parts.device)
            self.generated += now() - begun
            padded = torch.nn.utils.rnn.pad_sequence(written, batch_first=True, padding_value=0)
            ids = torch.cat([input_ids, padded], dim=1)
            return types.SimpleNamespace(sequences=ids) if options.get("return_dict_in_generate") else ids

        self.student.generate = types.MethodType(generate, self.student)

    def park(self) -> None:
        """Make room on a GPU for the next, unless there is enough; on a CPU there is nothing to do."""
        if self.parts.device.type != "cpu":
            torch.cuda.empty_cache()
            free, whole = torch.cuda.mem_get_info(self.parts.device)
            if free < ROOM * whole:
                self._move(torch.device("cpu"))
                self._parked = True

    def _move(self, device: torch.device) -> None:
        if self.parts.device.type == "cpu":
            return
        self.trainer.model.to(device)
        self.teacher.to(device)
        if device.type == "cpu":
            self.forget_optimizer()
        torch.cuda.empty_cache()

    def forget_optimizer(self) -> None:
        """Free the optimizer's state, which is larger than the student; the next step makes it anew."""
        trainer = self.trainer
        for holder in (trainer, trainer.callback_handler):
            holder.optimizer = holder.lr_scheduler = None
        trainer.accelerator.free_memory()

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        if self._parked:
            self._move(self.parts.device)
        try:
            yield
        finally:
            self.park()

    def step(self, seed: int, generating: bool = False) -> StepTime:
        """One optimizer step; rows are shuffled by the seed."""
        self.generated, self._really = 0.0, generating
        set_seed(seed)
        loss = self.trainer.train().training_loss
        return StepTime(self.clock.seconds - self.generated, self.generated, loss)

    def turn(self, seed: int, generating: bool = False) -> StepTime:
        """A measured step. After parking, the optimizer's state is made in a step before it, which is not measured."""
        with self.on_device():
            if self._parked:
                self.step(seed)
            return self.step(seed, generating)

    def peak(self, seed: int) -> float:
        """MiB at the peak of one more step on a GPU, above models and optimizer."""
        with self.on_device():
            if self._parked:
                self.step(seed)
            return peak_memory(self.parts.device, lambda: self.step(seed))

    def shares(self, seed: int) -> dict[str, float]:
        """Seconds of one more step, by what they are spent on."""
        shares = Shares(self.trainer, self.student, self.teacher, self.parts.device)
        with self.on_device(), shares.measuring():
            self.step(seed)
        return {part: shares.seconds[part] for part in PARTS}

    def whole(self, seed: int) -> dict[str, float]:
        """Seconds of a whole step by part: loading, generation, scoring, update and log. For ours alone."""
        shares = Shares(self.trainer, self.student, self.teacher, self.parts.device)
        with self.on_device(), shares.measuring(run=True), shares.around():
            self.step(seed, generating=True)
        return shares.seconds

    def close(self) -> None:
        """Let go of models and data, whatever hooks still hold this object."""
        self.trainer.accelerator.free_memory()
        self.__dict__.clear()


def memory_of(name: str, cell: Cell, folder: str, device: str, threads: int) -> PeakMemory | None:
    """Peak memory of a step, in a process of its own; `None` where memory did not suffice."""
    torch.set_num_threads(threads)
    parts = TrainerParts(cell, make_rollouts(cell), Path(folder), torch.device(device))
    losses = []
    try:
        contender = Contender(name, parts)
        with contender.on_device():
            contender.step(0)  # leaves the optimizer's state behind
            peak = peak_memory(parts.device, lambda: losses.append(contender.step(1).loss))
    except (torch.OutOfMemoryError, MemoryError):
        return None
    return PeakMemory(peak, losses[0])
