"""What ends a run early: a signal, a loss that is no number, completions that run away. Each leaves something to go on
from, or to look at.

When they are asked is left to the trainer.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback


EXIT_STOPPED = 75  # of scripts that SIGTERM ended after a checkpoint: EX_TEMPFAIL, "try again later"
PATIENCE = 3  # generation batches in a row before a guard stops the run
GRAM = 4  # tokens


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite. Nothing was trained on it."""

    on_all_processes = True


class RunawayError(RuntimeError):
    """Completions are cut, or repeat themselves, far beyond what was allowed."""

    on_all_processes = True


class StoppedBySignal(RuntimeError):
    """SIGTERM has ended the run after a step; what was trained is in a checkpoint, which the message names."""

    on_all_processes = True


class StopOnSigterm(TrainerCallback):
    """
    SIGTERM ends training after the current step, with a checkpoint, by [`StoppedBySignal`]; on demand Ctrl-C does, too.

    All processes stop together as soon as one of them has been told. To be added to a trainer's `callbacks`;
    `scripts/opd.py` does.
    """

    def __init__(self) -> None:
        self._told = self._agreed = False

    @contextmanager
    def listening(self, interrupt: bool = False) -> Iterator[None]:
        """
        SIGTERM is caught in here. Has no effect outside of the main thread, where Python takes no signals.

        Args:
            interrupt (`bool`): catch the first Ctrl-C, too; a second one does what it did before.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # whoever started this wants it to be
        caught = [signal.SIGTERM, *([signal.SIGINT] if interrupt and not ignored else [])]
        before = {number: signal.getsignal(number) for number in caught}

        def told(number: int, _frame: Any) -> None:
            self._told = True
            if number == signal.SIGINT:
                signal.signal(number, before[signal.SIGINT])
                os.write(2, b"\nStopping after this step, with a checkpoint. Ctrl-C again stops at once.\n")

        for number in caught:
            signal.signal(number, told)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        told = reduce(torch.tensor(float(self._told), device=args.device), reduction="sum")
        self._agreed = told.item() > 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._agreed:  # here, when all that follows a step has been done
            raise StoppedBySignal("It was told to stop.")


class Guard:
    """
    Counts generation batches in a row whose value is above a limit.

    Args:
        what (`str`): what the value is the share of, for the message.
        limit (`float`, *optional*): `None` never stops.
        advice (`str`): what to change.
    """

    def __init__(self, what: str, limit: float | None, advice: str):
        self.what, self.limit, self.advice = what, limit, advice
        self._above = 0

    def check(self, value: float) -> None:
        """Raise [`RunawayError`] where `value` is the last of too many."""
        self._above = self._above + 1 if self.limit is not None and value > self.limit else 0
        if self._above >= PATIENCE:
            raise RunawayError(
                f"{value:.0%} of {self.what}, more than {self.limit:.0%} in {PATIENCE} generation batches in a row. "
                f"{self.advice}"
            )


def repetition(ids: torch.Tensor, mask: torch.Tensor, gram: int = GRAM) -> torch.Tensor:
    """
    Share of each completion's n-grams that stood in it before.

    Args:
        ids (`torch.Tensor` of shape `(B, C)`): right-padded completions.
        mask (`torch.Tensor` of shape `(B, C)`): 1 on their tokens.
        gram (`int`): n.

    Returns:
        `torch.Tensor` of shape `(B,)`: 0 where a completion is shorter than n.
    """
    if ids.shape[1] < gram:
        return torch.zeros(len(ids), device=ids.device)
    windows = ids.unfold(1, gram, 1)  # (B, C - n + 1, n)
    whole = mask.bool().unfold(1, gram, 1).all(-1)
    shares = []
    for row, valid in zip(windows, whole, strict=True):
        known = row[valid]
        shares.append(1 - len(known.unique(dim=0)) / len(known) if len(known) else 0.0)
    return torch.tensor(shares, device=ids.device)


def written(batch: dict[str, Any], pad: int) -> torch.Tensor:
    """
    Which tokens of a generation batch its completions hold: `(B, C)`, bool; what tools said is left out.

    `mask_truncated_completions` empties the mask of a completion that was cut, and those are the ones to look at: of
    them it is all that is no padding.

    Args:
        batch (`dict`): with "completion_ids" and "completion_mask" of shape `(B, C)`, perhaps "tool_mask".
        pad (`int`): id of padding.
    """
    ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
    found = torch.where(mask.any(1, keepdim=True), mask, ids != pad)
    return found & batch["tool_mask"].bool() if "tool_mask" in batch else found


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
