"""The base class of teachers, and an adapter for other objects with a `score` method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainerCallback

from ..rollouts import Rollouts
from ..signals import HiddenStates, Signal


class Teacher:
    """
    Scores rollouts. A teacher of your own overrides [`~Teacher.score`]; everything else has a working default.

    An object of another class with a `score` method is a teacher too. It may have `gives`, `per_generation`,
    `temperature`, `top_k`, `follows_student`, `starts_equal` and `bind` where it differs from the defaults.

    Attributes:
        gives (`type`): the signal that `score` returns, [`HiddenStates`] or [`TokenLogProbs`].
        per_generation (`bool`): whether it scores whole generation batches at once instead of each micro-batch.
        temperature (`float`, *optional*): the only softmax temperature that it supports; `None` for any.
        top_k (`int`, *optional*): number of its most likely ids that it gives, if it gives log-probabilities.
        follows_student (`bool`): whether it is the student itself, without its adapter or as a moving average.
        moves (`bool`): whether it changes with every optimizer step.
        prompts_once (`bool`): whether it can read a prompt that several rows share once.
        bytes_per_token (`int`): size of what it gives for a token, if it can read prompts once.
        starts_equal (`bool`): whether, by design, it gives the student's probabilities before the first step.
        module (`torch.nn.Module`, *optional*): its own model in this process.
        prompts (`str`): the columns of a batch from which it reads prompts, if they are there.
        reads_text (`bool`): whether it has another tokenizer, and reads the student's completions as text.
    """

    gives: type = HiddenStates
    per_generation: bool = False
    temperature: float | None = None
    top_k: int | None = None
    follows_student: bool = False
    moves: bool = False
    prompts_once: bool = False
    bytes_per_token: int = 0
    starts_equal: bool = False
    module: Any = None
    prompts: str = "teacher_prompt"
    reads_text: bool = False

    def score(self, rollouts: Rollouts) -> Signal:
        """
        Score the tokens that `rollouts.mask` marks. Called on every process.

        Args:
            rollouts ([`~trl_distill.Rollouts`]): prompts and completions; N tokens are marked.

        Returns:
            [`HiddenStates`] or [`TokenLogProbs`], as `gives` says: for the N tokens, row by row.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `score(rollouts)`.")

    def bind(self, student: nn.Module, accelerator: Accelerator, batch_size: int | None = None) -> None:
        """Get the student that is trained, and the rows per forward pass; called before the first `score`."""

    def check(self) -> None:
        """Called once before training; raises if the teacher cannot be used."""

    @contextmanager
    def on_device(self) -> Iterator[nn.Module | None]:
        """Context in which its model is on the accelerator; `None` if it has no model in this process."""
        yield self.module

    def call_it(self, name: str) -> None:
        """Called with its name if there are several teachers, for the names of its files in checkpoints."""

    def callbacks(self) -> list[TrainerCallback]:
        """Callbacks that the trainer adds for it."""
        return []

    def save(self, folder: str) -> None:
        """Write its state into a checkpoint folder; called on the main process."""

    def load(self, folder: str) -> None:
        """Read from a checkpoint folder what [`~Teacher.save`] has written."""


class TeacherAdapter(Teacher):
    """
    Makes an object with `score` a [`Teacher`]; attributes that it lacks have the defaults. Of its methods only `score`
    and `bind` are called: `save`, `load` and `check` may mean something else to it. Subclass [`Teacher`] for those.

    Attributes:
        original (`Any`): the object.
    """

    def __init__(self, original: Any):
        self.original = original
        for name in ("gives", "per_generation", "temperature", "top_k", "follows_student", "starts_equal", "bind"):
            if hasattr(original, name):
                setattr(self, name, getattr(original, name))

    def score(self, rollouts: Rollouts) -> Signal:
        return self.original.score(rollouts)


def kind_of(teacher: Teacher) -> str:
    """A teacher's name in messages: its class, or that of the object in an adapter."""
    return type(getattr(teacher, "original", teacher)).__name__


def as_teacher(given: Any) -> Teacher:
    """A teacher unchanged, or another object with `score` in an adapter."""
    return given if isinstance(given, Teacher) else TeacherAdapter(given)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether parameters are sharded (ZeRO-3, FSDP), so that every forward pass takes all processes."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP
