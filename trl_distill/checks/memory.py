"""How much memory a run takes at its peak, by a formula that docs/benchmarks.md holds against measured peaks.

A step has phases, and only the largest counts: the student writes, a teacher judges, the student is updated. All phases
have the weights and the optimizer's state in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..heads.tiles import sizes_for
from ..models.properties import unwrap_adapter
from ..models.shared_prompts import LEAST_SAVED
from ..teachers.base import is_sharded
from .findings import Finding
from .prompts import Prompts


STATES = {
    "adamw": 2,
    "lamb": 2,
    "lion": 1,
    "rmsprop": 1,
    "sgd": 0,
    "adagrad": 1,
}  # values per parameter, by a beginning


@dataclass(frozen=True)
class RunSizes:
    """
    What the formula needs to know about a run on one process.

    Attributes:
        rows (`int`): rows of a micro-batch.
        generated (`int`): rows of a generation batch; 0 if another program writes them.
        prompt, teacher_prompt (`int`): tokens of the longest prompt of student and teachers.
        completion (`int`): tokens of the longest completion.
        accumulates (`bool`): whether gradients are kept while a further micro-batch is computed.
        checkpointing (`bool`): whether layers are computed again in the backward pass (`gradient_checkpointing`).
        optimizer (`str`): name of the optimizer, as in `optim`.
        computed_in (`torch.dtype`): dtype of activations.
        teacher_rows (`int`): rows that a teacher reads at a time.
        ahead (`bool`): whether signals of a whole generation batch are kept.
        offloaded (`bool`): whether teachers are in other memory than the student's but while they judge.
    """

    rows: int
    generated: int
    prompt: int
    teacher_prompt: int
    completion: int
    accumulates: bool = False
    checkpointing: bool = False
    optimizer: str = "adamw"
    computed_in: torch.dtype = torch.float32
    teacher_rows: int = 1
    ahead: bool = False
    offloaded: bool = False


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder: layers, width, queries, keys, MLP and vocabulary; and whether queries and keys are normed."""

    layers: int
    hidden: int
    queries: int
    keys: int
    inner: int
    vocabulary: int
    normed: bool

    @classmethod
    def of(cls, model: nn.Module) -> Shape:
        """Of a loaded model. Raises `AttributeError` where its configuration does not say."""
        base: Any = unwrap_adapter(model)
        config = base.config.get_text_config()
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            heads * width,
            (getattr(config, "num_key_value_heads", None) or heads) * width,
            config.intermediate_size,
            config.vocab_size,
            any(name.endswith("q_norm") for name, _ in base.named_modules()),
        )

    def kept(self, width: int) -> int:
        """Bytes that one layer keeps for the backward pass, for each token; `width` is the bytes of an activation."""
        attention = 4 * self.queries + (2 * self.queries + 2 * self.keys if self.normed else 0)
        return 4 * 4 * self.hidden + width * (2 * self.hidden + attention + 4 * self.inner)  # norms are in fp32

    def passing(self, width: int) -> int:
        """Bytes that one layer needs while it is computed without gradient, for each token."""
        return width * (3 * self.hidden + max(3 * self.inner, 4 * self.queries))

    def cached(self, width: int) -> int:
        """Bytes of keys and values of all layers, for each token."""
        return width * 2 * self.keys * self.layers


@dataclass(frozen=True)
class Memory:
    """
    Bytes at the peak of each phase.

    Attributes:
        common (`dict[str, int]`): what all phases have in common, by name.
        phases (`dict[str, dict[str, int]]`): what each phase adds, by name.
    """

    common: dict[str, int]
    phases: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def largest(self) -> str:
        """Name of the phase with the peak."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        return sum(self.common.values()) + sum(self.phases[self.largest].values())


def bytes_of(module: nn.Module, trained: bool = False) -> int:
    """Bytes of a model's parameters and buffers, or of those parameters that are trained."""
    if trained:
        return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def states_of(optimizer: str) -> float:
    """The optimizer's values for each value of a trained parameter; 8-bit states are a quarter of fp32 ones."""
    known = [count for name, count in STATES.items() if optimizer.removeprefix("paged_").startswith(name)]
    return (known[0] if known else 2) * (0.25 if "8bit" in optimizer else 1.0)


def estimate(student: nn.Module, teachers: Sequence[nn.Module], run: RunSizes, averaged: bool = False) -> Memory:
    """
    The memory of a run on one process with whole weights.

    Args:
        student (`torch.nn.Module`): with its adapter.
        teachers (`Sequence[torch.nn.Module]`): those that are models of their own in this process.
        run ([`RunSizes`]): sizes.
        averaged (`bool`): whether a teacher is the student's moving average, in fp32.
    """
    shape, width = Shape.of(student), run.computed_in.itemsize
    shapes = [Shape.of(teacher) for teacher in teachers]
    trained = bytes_of(student, trained=True)
    values = sum(p.numel() for p in student.parameters() if p.requires_grad)
    head: Any = unwrap_adapter(student).get_output_embeddings().weight
    weights = [bytes_of(teacher) for teacher in teachers]
    common = {
        "student": bytes_of(student) + (width * values if width < head.element_size() else 0),  # autocast's copies
        "optimizer": int(states_of(run.optimizer) * trained),
        "teachers": (0 if run.offloaded else sum(weights)) + 4 * values * averaged,
    }
    judged, width_of_states = run.rows * run.completion, max((one.hidden for one in shapes), default=shape.hidden)
    signals = (run.generated * run.completion if run.ahead else judged) * width_of_states * width
    kept = shape.layers * shape.kept(width)
    if run.checkpointing:
        kept = shape.layers * shape.hidden * width + shape.kept(width)
    sizes, logits = sizes_for(head.device), judged * shape.vocabulary
    earlier = trained if run.accumulates else 0
    update = {
        "activations": run.rows * (run.prompt + run.completion) * kept,
        "tiles of logits": 4 * 2 * (min(sizes.tile, logits) + min(sizes.part, logits)),
        "gradients": 4 * head.numel() * head.requires_grad + 4 * judged * shape.hidden + earlier,
        "signals": signals,
    }
    writing = {
        "keys and values": run.generated * (run.prompt + run.completion) * shape.cached(width),
        "logits of a step": 3 * 4 * run.generated * shape.vocabulary,
        "activations": run.generated * run.prompt * shape.passing(width),
    }
    phases = {"update": update, "end of the update": {"gradients": trained, "signals": signals}}
    if run.generated:
        phases["generation"] = writing
    if shapes:
        largest = max(shapes, key=lambda one: one.passing(width))
        reading = run.teacher_rows * (run.teacher_prompt + run.completion)
        phases["teacher"] = {
            "activations": reading * largest.passing(width),
            "signals": signals,
            "gradients": 0 if run.ahead else earlier,
            "weights": max(weights) if run.offloaded else 0,
        }
    return Memory(common, phases)


def of_run(trainer: Any, prompts: Sequence[Prompts]) -> Finding:
    """
    The estimate for a run that is set up, as a line of the preflight.

    Args:
        trainer ([`~trl_distill.OPDTrainer`]): ready to train.
        prompts (`Sequence[Prompts]`): the prompts that could be counted.
    """
    if trainer.pool is None:
        return finding(None, "there is no teacher")
    if is_sharded(trainer.accelerator):
        return finding(None, "the engine shards weights and decides what it gathers")
    if not prompts:
        return finding(None, "prompts are not known before training")
    modules = [teacher.module for teacher, _ in trainer.pool.members if isinstance(teacher.module, nn.Module)]
    try:
        memory = estimate(trainer.model, modules, sizes_of(trainer, prompts), bool(trainer.args.teacher_ema))
    except AttributeError as error:
        return finding(None, f"the configuration of a model does not say enough ({error})")
    return finding(memory)


def sizes_of(trainer: Any, prompts: Sequence[Prompts]) -> RunSizes:
    """What the formula needs to know, from a trainer and its counted prompts."""
    args, pool = trainer.args, trainer.pool
    own = max((one.longest for one in prompts if one.column == "prompt"), default=1)
    theirs = max((one.longest for one in prompts), default=1)
    completion, rows = args.max_completion_length or 1, args.per_device_train_batch_size
    repeated = theirs * (1 - 1 / (args.num_generations or 1)) >= LEAST_SAVED * (theirs + completion)
    at_once = any(teacher.per_generation or (repeated and teacher.prompts_once) for teacher, _ in pool.members)
    reduced = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    return RunSizes(
        rows=rows,
        generated=0 if trainer.use_vllm else rows * (args.steps_per_generation or 1),
        prompt=own,
        teacher_prompt=theirs,
        completion=completion,
        accumulates=args.gradient_accumulation_steps > 1,
        checkpointing=args.gradient_checkpointing,
        optimizer=str(getattr(args.optim, "value", args.optim)),
        computed_in=reduced or next(trainer.model.parameters()).dtype,
        teacher_rows=args.teacher_batch_size or rows,
        ahead=at_once or args.num_iterations > 1,
        offloaded=args.teacher_offload and trainer.accelerator.device.type != "cpu",
    )


def finding(memory: Memory | None, reason: str = "") -> Finding:
    """The estimate as a line of the preflight; without one, `reason` says why."""
    if memory is None:
        return Finding("memory", "skipped", f"Not estimated: {reason}.")
    parts = {**memory.common, **memory.phases[memory.largest]}
    listed = ", ".join(f"{name} {shown(size)}" for name, size in parts.items() if size)
    others = ", ".join(
        f"{name} {shown(sum(memory.common.values()) + sum(added.values()))}"
        for name, added in memory.phases.items()
        if name != memory.largest
    )
    found = f"About {shown(memory.peak)} at the peak, in the {memory.largest} phase: {listed}."
    return Finding("memory", "ok", f"{found} Other phases: {others}. For each process, beside the libraries.")


def shown(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
