"""Teachers that are the student itself: with its adapter off, or its moving average. No second set of weights.

They judge with the student's own forward, in eval mode. What they are good for is in docs/teachers.md.
"""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from ..heads.lm_head import FixedHead
from ..models.properties import has_relative_positions, unwrap_adapter
from ..rollouts import Rollouts
from ..signals import HiddenStates
from .base import Teacher, is_sharded
from .local import in_parts


ADAPTER_OFF = "adapter-off"  # what to write where a name is expected


class AdapterOff(Teacher):
    """
    The student without its adapter: the base model of a PEFT student judges, with no second set of weights.

    With prompts of its own (a `teacher_prompt` column) this is self-distillation. On the command line:
    `--teacher_model_name_or_path adapter-off`.
    """

    follows_student = True

    def __init__(self) -> None:
        self._student: Any = None

    def bind(self, student: nn.Module, accelerator: Accelerator, batch_size: int | None = None) -> None:
        """
        Take the student that is trained as the one to look at; called by the trainer.

        Raises:
            ValueError: the student has no adapter, or what lies under it is trained too.
        """
        if not is_peft_model(student):
            raise ValueError(
                "The teacher is the student with its adapter off, but the student has no adapter. Give a "
                "`peft_config`, or another teacher."
            )
        head = unwrap_adapter(student).get_output_embeddings()
        if any(parameter.requires_grad for parameter in head.parameters()):
            raise ValueError(
                "The teacher is the student with its adapter off, but the LM head is trained itself, so that there is "
                "no frozen one to judge with. Leave it out of `modules_to_save` and `target_modules`."
            )
        biases = {getattr(config, "bias", "none") for config in cast(Any, student).peft_config.values()}
        if biases - {"none"}:
            raise ValueError(
                "The teacher is the student with its adapter off, but the adapter trains biases of the base model too, "
                "so that this teacher would drift. Set `bias='none'` in the `peft_config`."
            )
        self._student, self._accelerator, self._batch_size = student, accelerator, batch_size

    @torch.no_grad()
    def score(self, rollouts: Rollouts) -> HiddenStates:
        """Forwards of the base model in eval mode."""
        trained = [(parameter, parameter.requires_grad) for parameter in self._student.parameters()]
        try:
            with self._student.disable_adapter():
                return _score_as_student(self._student, self._accelerator, rollouts, self._batch_size)
        finally:
            for parameter, requires_grad in trained:  # PEFT switches all of the adapter on again
                parameter.requires_grad_(requires_grad)


class MovingAverage(Teacher):
    """
    The student's exponential moving average, θ_T ← d · θ_T + (1 − d) · θ after every step, starting at the student.

    Only averages of trained parameters are held; they change places with the student's for as long as it judges. With
    prompts of its own (a `teacher_prompt` column) this is self-distillation, see `teacher_ema`.

    Args:
        decay (`float`): d in (0, 1).
    """

    follows_student = starts_equal = True
    file_name = "teacher_ema.safetensors"  # beside a checkpoint

    def __init__(self, decay: float):
        if not 0 < decay < 1:
            raise ValueError(f"`teacher_ema` is {decay}; it is the decay of a moving average, in (0, 1), e.g. 0.99.")
        self.decay = decay

    def bind(self, student: nn.Module, accelerator: Accelerator, batch_size: int | None = None) -> None:
        """Start at the student that is trained; called by the trainer. Raises `ValueError` where it is sharded."""
        if is_sharded(accelerator):
            raise ValueError(
                "`teacher_ema` averages whole parameters, which ZeRO-3 and FSDP cut up. Use plain data parallelism "
                "(`torchrun`), ZeRO-2, or a fixed teacher."
            )
        self._student, self._accelerator, self._batch_size = student, accelerator, batch_size
        trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self._parameters = trained
        self.averages = {name: p.detach().float().clone() for name, p in trained.items()}

    @torch.no_grad()
    def follow(self) -> None:
        """One step after the student. New tensors, since signals that are still in use hold the old ones."""
        for name, parameter in self._parameters.items():
            average = self.averages[name].to(parameter.device)  # an engine may have moved the student since
            self.averages[name] = torch.lerp(average, parameter.detach().float(), 1 - self.decay)

    def call_it(self, name: str) -> None:
        self.file_name = f"teacher_ema.{name}.safetensors"

    def callbacks(self) -> list[TrainerCallback]:
        return [FollowStudent(self)]

    def save(self, folder: str) -> None:
        """Write the averages beside a checkpoint."""
        save_file(self.averages, os.path.join(folder, self.file_name))

    def load(self, folder: str) -> None:
        """Go on from a checkpoint. Raises `ValueError` where it holds no averages, or others."""
        path = os.path.join(folder, self.file_name)
        if not os.path.isfile(path):
            raise ValueError(
                f"The checkpoint {folder} has no {self.file_name}: it is from a run without `teacher_ema`."
            )
        averages = load_file(path)
        if averages.keys() != self.averages.keys():
            raise ValueError(f"{path} holds the averages of other parameters than those that are trained now.")
        self.averages = {name: averages[name].to(old.device) for name, old in self.averages.items()}

    @torch.no_grad()
    def score(self, rollouts: Rollouts) -> HiddenStates:
        """Forwards of the student in eval mode with the averages in place of its parameters."""
        own = {name: parameter.data for name, parameter in self._parameters.items()}
        try:
            for name, parameter in self._parameters.items():
                parameter.data = self.averages[name].to(parameter)
            torch.clear_autocast_cache()  # casts of the student's weights
            signal = _score_as_student(self._student, self._accelerator, rollouts, self._batch_size)
            weight, bias = signal.head.parameters()
            # detached: the averages themselves, not the parameters that will hold the student's values again
            head = FixedHead(unwrap_adapter(self._student), weight.detach(), None if bias is None else bias.detach())
            return HiddenStates(signal.hidden, head)
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = own[name]


class FollowStudent(TrainerCallback):
    """Moves a [`MovingAverage`] after each optimizer step."""

    def __init__(self, teacher: MovingAverage):
        self.teacher = teacher

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.teacher.follow()


def _score_as_student(
    student: nn.Module, accelerator: Accelerator, rollouts: Rollouts, batch_size: int | None
) -> HiddenStates:
    """Judgement of the student as it stands, in eval mode and back."""
    training = student.training
    student.eval()
    try:
        with accelerator.autocast():
            return in_parts(
                lambda part: student(input_ids=part.input_ids, attention_mask=part.attention_mask, rollouts=part),
                rollouts,
                batch_size,
                has_relative_positions(unwrap_adapter(student).config),
            )
    finally:
        student.train(training)
        torch.clear_autocast_cache()  # casts made without a graph must not reach the student's own forward
