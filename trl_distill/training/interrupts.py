"""SIGTERM and Ctrl-C end a run after the current step, with a checkpoint."""

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


EXIT_STOPPED = 75  # exit status after SIGTERM and a checkpoint: EX_TEMPFAIL, "try again later"


class StopOnSigterm(TrainerCallback):
    """
    On SIGTERM, and optionally Ctrl-C, ends training after the current step with a checkpoint and [`StoppedBySignal`].

    All processes stop together as soon as one of them gets the signal. Add it to a trainer's `callbacks`, as
    `trl-distill train` does, and train inside of `listening()`.
    """

    def __init__(self) -> None:
        self._signalled = self._agreed = False

    @contextmanager
    def listening(self, interrupt: bool = False) -> Iterator[None]:
        """
        Catch SIGTERM in this context. Outside of the main thread, where Python receives no signals, it does nothing.

        Args:
            interrupt (`bool`): catch the first Ctrl-C too; a second one interrupts at once.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # by the parent process, on purpose
        caught = [signal.SIGTERM, *([signal.SIGINT] if interrupt and not ignored else [])]
        before = {number: signal.getsignal(number) for number in caught}

        def on_signal(number: int, _frame: Any) -> None:
            self._signalled = True
            if number == signal.SIGINT:
                signal.signal(number, before[signal.SIGINT])
                os.write(2, b"\nStopping after this step, with a checkpoint. Ctrl-C again stops at once.\n")

        for number in caught:
            signal.signal(number, on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        signalled = reduce(torch.tensor(float(self._signalled), device=args.device), reduction="sum")
        self._agreed = signalled.item() > 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._agreed:  # here, since the last step's saving and logging are done by now
            raise StoppedBySignal("The run received a signal to stop.")
