"""A trainer that stops rather than train on nonsense, and leaves a checkpoint or evidence where it does.

What is complete is in `checkpoints.py`, what runs away in `guards.py`; what is minimised is left to `trainer.py`.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import TrainOutput

from ..errors import (
    CheckpointError,
    NonFiniteLossError,
    RunawayError,
    StoppedBySignal,
    TeacherAnswerError,
    TeacherUnavailable,
)
from ..reporting.metrics import means
from .checkpoints import MARKER, last_complete, what_is_missing
from .grpo_hooks import GRPOHooks
from .runaway import Guard, repetition, written


logger = logging.getLogger(__name__)


class _FinishedError(Exception):
    """A run was resumed that had come to its end."""


class Safeguards(GRPOHooks):
    """
    `GRPOTrainer` that resumes from complete checkpoints, checks each loss, and watches completions.

    Attributes:
        terms (`Mapping[str, torch.Tensor]`): the parts of the last loss, for the evidence; set by a subclass.
    """

    terms: Mapping[str, torch.Tensor] = {}

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As [`~transformers.Trainer.train`].

        Raises:
            TeacherUnavailable: a teacher stayed away.
            TeacherAnswerError: a server's answer cannot be used.
            RunawayError: a guard has stopped the run. In these cases what was trained so far is in a checkpoint, which
                the message names.
            NonFiniteLossError: the loss is no number; the message says where what it was computed from is.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no complete checkpoint in {self.args.output_dir} to resume from.")
        checkpoint = str(resume_from_checkpoint) if resume_from_checkpoint else None
        if checkpoint and os.path.isfile(os.path.join(checkpoint, MARKER)) and (missing := what_is_missing(checkpoint)):
            raise ValueError(
                f"The checkpoint {checkpoint} is not complete: {missing}. Name another one, or let "
                "`resume_from_checkpoint=True` find it."
            )
        self._agree_on(checkpoint)
        self.on_run_start(checkpoint)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except _FinishedError:
            logger.warning(f"The run was finished already, after step {self.state.global_step}: nothing is trained.")
            return TrainOutput(self.state.global_step, 0.0, {})
        except Exception as error:
            if self.state.global_step == 0 or not self.raised_everywhere(error):
                if not isinstance(error, CheckpointError | NonFiniteLossError):  # those say it themselves
                    error.add_note(f"After step {self.state.global_step}. {self._where_to_go_on()}")
                raise  # nothing to save, or not all processes would take part in saving it
            change = "" if isinstance(error, StoppedBySignal) else " when this is mended"
            advice = (
                f"Training stopped after step {self.state.global_step}. Everything so far is in {self.save_now()}: "
                f"start again with `resume_from_checkpoint=True` (`auto` on the command line){change}."
            )
            kinds = (TeacherUnavailable, TeacherAnswerError, RunawayError, StoppedBySignal)
            kind = next((kind for kind in kinds if isinstance(error, kind)), None)
            if kind is None:  # of a teacher of the user's own
                error.add_note(advice)
                raise
            raise kind(f"{error} {advice}") from error
        finally:
            self.on_run_end()

    def _agree_on(self, checkpoint: str | None) -> None:
        """See that all processes go on from the same step: nodes that share no folder find different checkpoints."""
        found = re.search(r"(\d+)\D*$", checkpoint) if checkpoint else None
        step = torch.tensor([int(found[1]) if found else -1], device=self.accelerator.device)
        steps = self.accelerator.gather(step).tolist()
        if len(set(steps)) > 1:
            raise ValueError(
                f"The processes would go on from different checkpoints (steps {steps}, -1 for none). Let `output_dir` "
                "be a folder that all nodes share, or copy the checkpoint to each."
            )

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step >= self.state.max_steps:  # transformers makes one step more
            raise _FinishedError
        return super().training_step(*args, **kwargs)

    def on_run_start(self, checkpoint: str | None) -> None:
        """Called before training begins, or goes on from `checkpoint`."""

    def on_run_end(self) -> None:
        """Called when training has ended, for whatever reason."""

    def raised_everywhere(self, error: Exception) -> bool:
        """Whether all processes have met this error at the same place, so that all can write a checkpoint."""
        return isinstance(error, RunawayError | StoppedBySignal)

    def loss_computed(self, loss: torch.Tensor, inputs: dict[str, Any]) -> None:
        """Stop on all processes where the loss of one is no number, with what it was computed from."""
        if self.mode == "eval":
            return
        wrong = self.accelerator.reduce((~loss.detach().isfinite()).float(), reduction="sum")
        if wrong.item() == 0:
            return
        texts = [
            {"prompt": self.tokenizer.decode(p[p_mask.bool()]), "completion": self.tokenizer.decode(c[c_mask.bool()])}
            for p, p_mask, c, c_mask in zip(
                *(inputs[f"{part}_{what}"] for part in ("prompt", "completion") for what in ("ids", "mask")),
                strict=True,
            )
        ]
        terms = {name: term.item() for name, term in {"loss": loss, **self.terms}.items()}
        step, process = self.state.global_step, self.accelerator.process_index
        folder = save_evidence(Path(self.args.output_dir), process, step, terms, texts)
        raise NonFiniteLossError(
            f"The loss after step {step} is no number on {int(wrong.item())} of {self.accelerator.num_processes} "
            f"processes (on this one it is {loss.item()}), and nothing was trained on it. "
            f"Prompts, completions and both terms are in {folder}. {self._where_to_go_on()} Look for a learning rate "
            "that is too high, fp16, or a reward that is no number."
        )

    def _where_to_go_on(self) -> str:
        last = last_complete(self.args.output_dir)
        return f"The last complete checkpoint is {last}." if last else "There is no checkpoint yet."

    def watch(self, batch: dict[str, Any]) -> None:
        """Let the guards see a generation batch that the student has written."""
        shares = repetition(batch["completion_ids"], written(batch, self.tokenizer.pad_token_id))
        found = means(self.accelerator, {"distill/repetition": (shares, torch.ones_like(shares))})
        self.record("distill/repetition", found["distill/repetition"])
        for name, guard in self._guards.items():
            guard.check(self.last_recorded(name))

    @functools.cached_property
    def _guards(self) -> dict[str, Guard]:
        """By the metric that each looks at."""
        args = self.args
        return {
            "completions/clipped_ratio": Guard(
                "the completions are cut",
                args.stop_above_truncation,
                "Raise `max_completion_length`, or lower the learning rate.",
            ),
            "distill/repetition": Guard(
                "the completions' 4-grams repeat earlier ones",
                args.stop_above_repetition,
                "Look at the completions, and lower the learning rate.",
            ),
        }


def save_evidence(folder: Path, process: int, step: int, terms: dict[str, float], rows: list[dict[str, Any]]) -> Path:
    """
    Write what a loss that is no number was computed from.

    Args:
        folder (`Path`): of the run; gets a folder for this step.
        process (`int`): which one writes.
        step (`int`): optimizer steps that were made.
        terms (`dict`): the loss and its parts, of this process.
        rows (`list` of `dict`): "prompt" and "completion" of its micro-batch, as text.

    Returns:
        `Path`: the folder that all processes write to.
    """
    place = folder / f"nonfinite-after-step-{step}"
    place.mkdir(parents=True, exist_ok=True)
    found = {name: value if math.isfinite(value) else str(value) for name, value in terms.items()}
    content = {"step": step, "process": process, "terms": found, "rows": rows}
    (place / f"process-{process}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return place
