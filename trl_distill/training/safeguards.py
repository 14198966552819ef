"""Safeguards of a run: resume from complete checkpoints, stop on a bad loss or bad completions, save before leaving.

`checkpoints.py` decides which checkpoints are complete, `runaway.py` what counts as runaway completions.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
from collections.abc import Callable
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
from .checkpoints import MARKER, last_complete, what_is_broken, what_is_missing
from .runaway import Guard, repetition, written


logger = logging.getLogger(__name__)


class _FinishedError(Exception):
    """The run that was resumed had already finished."""


class Safeguards:
    """
    Resumes a trainer from complete checkpoints, checks each loss, and watches completions.

    Args:
        trainer ([`~trl_distill.OPDTrainer`]): the trainer that owns it.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def train(self, run: Callable[..., Any], resume: str | bool | None, *args: Any, **kwargs: Any) -> Any:
        """
        Call `run(checkpoint, ...)`, and save a checkpoint if it ends early.

        The message of the first four errors names the checkpoint that holds what was trained so far.

        Raises:
            TeacherUnavailable: a teacher did not answer.
            TeacherAnswerError: a server's answer cannot be used.
            RunawayError: completions were cut or repetitive for too long.
            StoppedBySignal: SIGTERM or Ctrl-C.
            NonFiniteLossError: the loss is NaN or infinite; the message names the folder with the inputs.
            CheckpointError: a checkpoint could not be written.
        """
        trainer = self.trainer
        checkpoint = self._checkpoint(resume)
        trainer.on_run_start(checkpoint)
        try:
            return run(checkpoint, *args, **kwargs)
        except _FinishedError:
            step = trainer.state.global_step
            logger.warning(f"The run was finished already, after step {step}: nothing is trained.")
            return TrainOutput(step, 0.0, {})
        except Exception as error:
            ended = self._after_saving(error)
            if ended is error:
                raise
            raise ended from error
        finally:
            trainer.on_run_end()

    def _checkpoint(self, resume: str | bool | None) -> str | None:
        """
        The checkpoint to resume from, the same step on all processes.

        Without a shared folder, nodes can find different checkpoints, or none; then all processes raise.
        """
        accelerator, checkpoint, failure = self.trainer.accelerator, None, None
        try:
            checkpoint = self._checkpoint_here(resume)
        except ValueError as error:
            failure = error
        found = re.search(r"(\d+)\D*$", checkpoint) if checkpoint else None
        step = -2 if failure else int(found[1]) if found else -1
        steps = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
        if failure is not None:
            raise failure
        if len(set(steps)) > 1:
            raise ValueError(
                f"The processes would resume from different checkpoints (steps {steps}; -1: none, -2: not usable). Let "
                "`output_dir` be a folder that all nodes share, or copy the checkpoint to each node."
            )
        return checkpoint

    def _checkpoint_here(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """The checkpoint to resume from. One that lists its files must be complete, and any must be readable."""
        if resume_from_checkpoint is True:
            output_dir = self.trainer.args.output_dir
            resume_from_checkpoint = last_complete(output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no complete checkpoint in {output_dir} to resume from.")
        checkpoint = str(resume_from_checkpoint) if resume_from_checkpoint else None
        if checkpoint and os.path.isdir(checkpoint):
            listed = os.path.isfile(os.path.join(checkpoint, MARKER))  # other programs write no list
            if missing := what_is_missing(checkpoint) if listed else what_is_broken(checkpoint):
                raise ValueError(
                    f"The checkpoint {checkpoint} is not complete: {missing}. Name another one, or let "
                    "`resume_from_checkpoint=True` find it."
                )
        return checkpoint

    def _after_saving(self, error: Exception) -> Exception:
        """The error to raise, with the path of a checkpoint, which is written now if all processes can take part."""
        trainer = self.trainer
        step = trainer.state.global_step
        if step == 0 or not trainer.raised_everywhere(error):
            if not isinstance(error, CheckpointError | NonFiniteLossError):  # those say it themselves
                error.add_note(f"After step {step}. {self._where_to_go_on()}")
            return error
        change = "" if isinstance(error, StoppedBySignal) else " once this is fixed"
        advice = (
            f"Training stopped after step {step}. Everything so far is in {self._save()}: "
            f"restart with `resume_from_checkpoint=True` (`auto` on the command line){change}."
        )
        kinds = (TeacherUnavailable, TeacherAnswerError, RunawayError, StoppedBySignal)
        kind = next((kind for kind in kinds if isinstance(error, kind)), None)
        if kind is not None:
            return kind(f"{error} {advice}")
        error.add_note(advice)  # an error of the user's own teacher keeps its type
        return error

    def _save(self) -> str:
        """Write a checkpoint. A failure to do so is one process's alone, whatever it is raised in the middle of."""
        try:
            return self.trainer.save_now()
        except Exception as error:
            vars(error)["on_all_processes"] = False
            raise

    def stop_when_finished(self) -> None:
        """Called before each training step, since transformers makes one more step when a finished run is resumed."""
        if self.trainer.state.global_step >= self.trainer.state.max_steps:
            raise _FinishedError

    def check_loss(self, loss: torch.Tensor, inputs: dict[str, Any], terms: dict[str, torch.Tensor]) -> None:
        """Stop all processes if the loss of any is NaN or infinite, and save what it was computed from."""
        trainer = self.trainer
        if trainer.mode == "eval":
            return
        wrong = trainer.accelerator.reduce((~loss.detach().isfinite()).float(), reduction="sum")
        if wrong.item() == 0:
            return
        decode = trainer.tokenizer.decode
        columns = (inputs[f"{part}_{what}"] for part in ("prompt", "completion") for what in ("ids", "mask"))
        texts = [
            {"prompt": decode(p[p_mask.bool()]), "completion": decode(c[c_mask.bool()])}
            for p, p_mask, c, c_mask in zip(*columns, strict=True)
        ]
        values = {name: term.item() for name, term in {"loss": loss, **terms}.items()}
        step, process = trainer.state.global_step, trainer.accelerator.process_index
        folder = save_evidence(Path(trainer.args.output_dir), process, step, values, texts)
        raise NonFiniteLossError(
            f"The loss after step {step} is NaN or infinite on {int(wrong.item())} of "
            f"{trainer.accelerator.num_processes} processes (on this one it is {loss.item()}), and nothing was trained "
            f"on it. Prompts, completions and both terms are in {folder}. {self._where_to_go_on()} Look for a learning "
            "rate that is too high, fp16, or a reward that is NaN."
        )

    def _where_to_go_on(self) -> str:
        last = last_complete(self.trainer.args.output_dir)
        return f"The last complete checkpoint is {last}." if last else "There is no checkpoint yet."

    def watch(self, batch: dict[str, Any]) -> None:
        """Check a generation batch that the student wrote for cut and repetitive completions."""
        trainer = self.trainer
        if trainer.args.logging_strategy != "no" or trainer.args.stop_above_repetition is not None:
            shares = repetition(batch["completion_ids"], written(batch, trainer.tokenizer.pad_token_id))
            found = means(trainer.accelerator, {"distill/repetition": (shares, torch.ones_like(shares))})
            trainer.record("distill/repetition", found["distill/repetition"])
        for name, guard in self._guards.items():
            if guard.limit is not None:
                guard.check(trainer.last_recorded(name))

    @functools.cached_property
    def _guards(self) -> dict[str, Guard]:
        """The guards, by the metric that each one watches."""
        args = self.trainer.args
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
    Write what a NaN or infinite loss was computed from.

    Args:
        folder (`Path`): output folder of the run; a subfolder for this step is made.
        process (`int`): index of this process.
        step (`int`): optimizer steps made so far.
        terms (`dict`): the loss and its parts on this process.
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
