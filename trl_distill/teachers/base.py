"""What a teacher is: one class with defaults, and an adapter for objects that only have `score`."""

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
    Judges rollouts. A teacher of your own overrides [`~Teacher.score`]; whatever else is here has a working default.

    An object that is no subclass, but has a `score` method, is a teacher too: of the class attributes below it may have
    those in which it differs from the default.

    Attributes:
        gives (`type`): the signal that `score` returns, [`HiddenStates`] or [`TokenLogProbs`].
        per_generation (`bool`): whether it judges whole generation batches at once instead of each micro-batch.
        temperature (`float`, *optional*): the only softmax temperature at which it can judge; `None` for any.
        top_k (`int`, *optional*): how many of its likeliest ids it gives, where it gives log-probabilities.
        follows_student (`bool`): whether it is the student itself, without its adapter or averaged.
        starts_equal (`bool`): whether it gives the student's own probabilities before the first step, on purpose.
        module (`torch.nn.Module`, *optional*): the model of its own in this process.
    """

    gives: type = HiddenStates
    per_generation: bool = False
    temperature: float | None = None
    top_k: int | None = None
    follows_student: bool = False
    starts_equal: bool = False
    module: Any = None

    @property
    def kind(self) -> str:
        """What to call it in a message."""
        return type(self).__name__

    def score(self, rollouts: Rollouts) -> Signal:
        """Judge the tokens that `rollouts.mask` marks. Called on every process."""
        raise NotImplementedError(f"{type(self).__name__} has no `score(rollouts)`.")

    def bind(self, student: nn.Module, accelerator: Accelerator, batch_size: int | None = None) -> None:
        """Take the student that is trained; called by the trainer before anything is judged."""

    def check(self) -> None:
        """See whether it can be asked, before training."""

    @contextmanager
    def on_device(self) -> Iterator[nn.Module | None]:
        """Its model, where it can be called; `None` where it has none in this process."""
        yield self.module

    def call_it(self, name: str) -> None:
        """Called where there are several teachers, with its name: what it writes beside a checkpoint carries it."""

    def callbacks(self) -> list[TrainerCallback]:
        """Callbacks that the trainer shall have for it."""
        return []

    def save(self, folder: str) -> None:
        """Write what belongs to a checkpoint; called on the main process."""

    def load(self, folder: str) -> None:
        """Read what [`~Teacher.save`] has written."""


class TeacherAdapter(Teacher):
    """
    An object with `score` as a [`Teacher`]: what it does not say has the default.

    Attributes:
        original (`Any`): the object.
    """

    def __init__(self, original: Any):
        self.original = original
        for name in ("gives", "per_generation", "temperature", "top_k", "bind", "check", "save", "load"):
            if hasattr(original, name):
                setattr(self, name, getattr(original, name))

    @property
    def kind(self) -> str:
        return type(self.original).__name__

    def score(self, rollouts: Rollouts) -> Signal:
        return self.original.score(rollouts)


def as_teacher(given: Any) -> Teacher:
    """A teacher as it is, or an adapter around an object with `score`."""
    return given if isinstance(given, Teacher) else TeacherAdapter(given)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether parameters are cut up among processes, so that every forward takes all of them: ZeRO-3 and FSDP."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP
