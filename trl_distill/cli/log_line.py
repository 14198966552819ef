"""Training on a terminal: one line for each log, and a line that moves on with every step.

It stands in the place of transformers' progress bar and of its dictionary of all numbers; those are in
`trainer_state.json`, and shown with `--log_format full`.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TextIO

from transformers import PrinterCallback, ProgressCallback, TrainerCallback


COLUMNS = {  # what stands before a number, and how it is written, by the log's key
    "distill/reverse_kl": "KL {:.3g}",
    "distill/top1_agreement": "agreement {:.0%}",
    "reward": "reward {:.3g}",
    "completions/mean_length": "length {:.0f}",
    "learning_rate": "lr {:.2g}",
}


ERASE = "\x1b[2K"  # the terminal's line, wherever the cursor is in it


class LogLine(TrainerCallback):
    """
    Prints, for each log: step, KL to the teacher (nats per token), share of tokens that both find likeliest, reward,
    completion length (tokens), learning rate, seconds per step since the last log, and the time left at the run's mean
    pace. What is not in a log is left out.

    Args:
        out (`TextIO`, *optional*): a terminal.
        clock (`Callable`, *optional*): gives seconds.
    """

    def __init__(self, out: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self.out, self.clock = out or sys.stdout, clock
        self.first = self.last = (0, 0.0)  # step and time at the begin of training, and of the last log

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.first = self.last = (state.global_step, self.clock())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero and not args.disable_tqdm:
            width = shutil.get_terminal_size().columns
            text = "  ".join([f"step {state.global_step}/{state.max_steps}", *self._pace(state, self.first)])
            self._write(f"{ERASE}{text[: width - 1]}\r")  # whatever is printed next takes its place

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "train_runtime" in logs:
            seconds = int(logs["train_runtime"])
            self._write(f"{ERASE}Trained to step {state.global_step} in {timedelta(seconds=seconds)}\n")
            return
        prefix = "eval_" if any(key.startswith("eval_") for key in logs) else ""
        parts = [text.format(logs[f"{prefix}{key}"]) for key, text in COLUMNS.items() if f"{prefix}{key}" in logs]
        step = f"step {state.global_step}/{state.max_steps}"
        if prefix:
            self._write(f"{ERASE}{'  '.join([step, 'evaluation', *parts])}\n")
            return
        self._write(f"{ERASE}{'  '.join([step, *parts, *self._pace(state, self.last)])}\n")
        self.last = (state.global_step, self.clock())

    def _pace(self, state: Any, since: tuple[int, float]) -> list[str]:
        """Seconds per step since then, and the time left."""
        now, step = self.clock(), state.global_step
        if step <= since[0]:
            return []
        left = (state.max_steps - step) * (now - self.first[1]) / (step - self.first[0])
        return [f"{(now - since[1]) / (step - since[0]):.3g} s/step", f"{timedelta(seconds=round(left))} left"]

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def show_lines(trainer: Any) -> None:
    """Let a trainer print lines in the place of transformers' bar and dictionaries."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(LogLine())
