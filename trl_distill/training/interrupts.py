"""SIGTERM and Ctrl-C end a run after the step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback

from ..errors import StoppedBySignal


EXIT_STOPPED = 75  # of scripts that SIGTERM ended after a checkpoint: EX_TEMPFAIL, "try again later"


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
