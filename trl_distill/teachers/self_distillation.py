"""Teachers that are the student itself: with its adapter off, or its moving average. No second model is loaded.

They score with the student's own forward pass, in eval mode. docs/teachers.md says what they are good for.
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
from ..models.shared_prompts import can_share, obstacle
from ..rollouts import Rollouts
from ..signals import HiddenStates
from .base import Teacher, is_sharded
from .local import in_parts, state_bytes


ADAPTER_OFF = "adapter-off"  # the name of this teacher where a model's name is expected


class AdapterOff(Teacher):
    """
    The base model of a PEFT student, that is, the student with its adapter off. No second model is loaded.

    With its own prompts (a `teacher_prompt` column) this is self-distillation. On the command line:
    `--teacher_model_name_or_path adapter-off`.
    """

    follows_student = True

    def __init__(self) -> None:
        self._student: Any = None

    def bind(self, student: nn.Module, accelerator: Accelerator, batch_size: int | None = None) -> None:
        """
        Get the student; called by the trainer.

        Raises:
            ValueError: the student has no adapter, or parts of the base model are trained too.
        """
        if not is_peft_model(student):
            raise ValueError(
                "The teacher is the student with its adapter off, but the student has no adapter. Give a "
                "`peft_config`, or another teacher."
            )
        head = unwrap_adapter(student).get_output_embeddings()
        if any(parameter.requires_grad for parameter in head.parameters()):
            raise ValueError(
                "The teacher is the student with its adapter off, but the LM head is trained too, so there is no "
                "frozen head to score with. Leave it out of `modules_to_save` and `target_modules`."
            )
        biases = {getattr(config, "bias", "none") for config in cast(Any, student).peft_config.values()}
        if biases - {"none"}:
            raise ValueError(
                "The teacher is the student with its adapter off, but the adapter trains biases of the base model too, "
                "so this teacher would change during training. Set `bias='none'` in the `peft_config`."
            )
        self._student, self._accelerator, self._batch_size = student, accelerator, batch_size
        self.prompts_once = not obstacle(unwrap_adapter(student))
        self.bytes_per_token = state_bytes(unwrap_adapter(student))

    @torch.no_grad()
    def score(self, rollouts: Rollouts) -> HiddenStates:
        """Run the base model in eval mode."""
        trained = [(parameter, parameter.requires_grad) for parameter in self._student.parameters()]

        def restore() -> None:
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)

        try:
            with self._student.disable_adapter():  # sets `requires_grad` of the adapter, here and when it ends
                restore()  # FSDP2 looks at it in the first forward pass, for all those that follow
                return _score_as_student(self._student, self._accelerator, rollouts, self._batch_size)
        finally:
            restore()


class MovingAverage(Teacher):
    """
    The student's exponential moving average, θ_T ← d · θ_T + (1 − d) · θ after every step, starting equal to it.

    Only averages of trained parameters are kept; they replace the student's parameters while it scores. With its own
    prompts (a `teacher_prompt` column) this is self-distillation. The setting is `teacher_ema`.

    Args:
        decay (`float`): d in (0, 1).
    """

    follows_student = starts_equal = moves = True
    file_name = "teacher_ema.safetensors"  # in a checkpoint

    def __init__(self, decay: float):
        if not 0 < decay < 1:
            raise ValueError(
                f"`teacher_ema` is {decay}; it is the decay of a moving average and must be in (0, 1), such as 0.99."
            )
        self.decay = decay

    def bind(self, student: nn.Module, accelerator: Accelerator, batch_size: int | None = None) -> None:
        """Start equal to the student; called by the trainer. Raises `ValueError` if the student is sharded."""
        if is_sharded(accelerator):
            raise ValueError(
                "`teacher_ema` averages whole parameters, but ZeRO-3 and FSDP shard them. Use plain data parallelism "
                "(`torchrun`), ZeRO-2, or a fixed teacher."
            )
        self._student, self._accelerator, self._batch_size = student, accelerator, batch_size
        self.prompts_once = not obstacle(unwrap_adapter(student))
        self.bytes_per_token = state_bytes(unwrap_adapter(student))
        trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self._parameters = trained
        self.averages = {name: p.detach().float().clone() for name, p in trained.items()}

    @torch.no_grad()
    def follow(self) -> None:
        """Update the averages after a step. They become new tensors, since signals in use may refer to the old ones."""
        for name, parameter in self._parameters.items():
            average = self.averages[name].to(parameter.device)  # an engine may have moved the student
            self.averages[name] = torch.lerp(average, parameter.detach().float(), 1 - self.decay)

    def call_it(self, name: str) -> None:
        self.file_name = f"teacher_ema.{name}.safetensors"

    def callbacks(self) -> list[TrainerCallback]:
        return [FollowStudent(self)]

    def save(self, folder: str) -> None:
        """Write the averages into a checkpoint folder."""
        save_file(self.averages, os.path.join(folder, self.file_name))

    def load(self, folder: str) -> None:
        """Read the averages from a checkpoint. Raises `ValueError` if it has none, or those of other parameters."""
        path = os.path.join(folder, self.file_name)
        if not os.path.isfile(path):
            raise ValueError(
                f"The checkpoint {folder} has no {self.file_name}, so it is from a run without this `teacher_ema`. "
                "Resume with the settings of that run, or start a new run."
            )
        averages = load_file(path)
        if averages.keys() != self.averages.keys():
            raise ValueError(
                f"{path} holds averages of other parameters than those that are trained now. Resume with the model and "
                "adapter settings of that run."
            )
        self.averages = {name: averages[name].to(old.device) for name, old in self.averages.items()}

    @torch.no_grad()
    def score(self, rollouts: Rollouts) -> HiddenStates:
        """Run the student in eval mode with the averages in place of its parameters."""
        own = {name: parameter.data for name, parameter in self._parameters.items()}
        try:
            for name, parameter in self._parameters.items():
                parameter.data = self.averages[name].to(parameter)
            torch.clear_autocast_cache()  # it holds casts of the student's weights
            signal = _score_as_student(self._student, self._accelerator, rollouts, self._batch_size)
            weight, bias = signal.head.parameters()
            # detached: the averages, not the parameters, which get the student's values back
            head = FixedHead(unwrap_adapter(self._student), weight.detach(), None if bias is None else bias.detach())
            return HiddenStates(signal.hidden, head)
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = own[name]


class FollowStudent(TrainerCallback):
    """Updates a [`MovingAverage`] after each optimizer step."""

    def __init__(self, teacher: MovingAverage):
        self.teacher = teacher

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.teacher.follow()


def _score_as_student(
    student: nn.Module, accelerator: Accelerator, rollouts: Rollouts, batch_size: int | None
) -> HiddenStates:
    """Score with the student's current parameters in eval mode, then restore its mode."""
    training = student.training
    student.eval()
    try:
        with accelerator.autocast():
            return in_parts(
                student,
                rollouts,
                batch_size,
                has_relative_positions(unwrap_adapter(student).config),
                can_share(unwrap_adapter(student)),
            )
    finally:
        student.train(training)
        torch.clear_autocast_cache()  # casts made without a graph must not be used in training
