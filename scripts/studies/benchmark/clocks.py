"""Clocks and memory for the benchmark: where the seconds of a step go, and its peak memory.

Hooks on modules and on gradients only: nothing here knows how a trainer computes its loss. What a loss does between
the backbones counts as LM heads.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import IntervalStrategy, TrainerCallback


PARTS = ("student forward", "backward", "teacher", "LM heads", "rest")


AROUND = ("generation", "scoring", "optimizer", "logging", "data")  # parts of a whole step beside those of an update


STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


_clock: list[Callable[[], float]] = [time.perf_counter]


def count_processor_time() -> None:
    """From now on, seconds are those that the processor spent on this process: for one thread beside other programs."""
    _clock[0] = time.process_time


def now() -> float:
    """Seconds, from some beginning."""
    return _clock[0]()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Shares:
    """
    Seconds of a step by part; the parts add up to the whole.

    Args:
        trainer: any of transformers' trainers.
        student, teacher: its models, without wrappers.
        device (`torch.device`): synchronised at every change of part.

    Attributes:
        seconds (`dict[str, float]`): by the names in `PARTS`, and for a whole step in `AROUND`.
    """

    def __init__(self, trainer: Any, student: Any, teacher: Any, device: torch.device):
        self.trainer, self.student, self.teacher, self.device = trainer, student, teacher, device
        self.seconds = dict.fromkeys((*PARTS, *AROUND), 0.0)
        self._stack: list[str] = []
        self._since = 0.0

    def _spend(self) -> None:
        synchronize(self.device)
        at = now()
        if self._stack:
            self.seconds[self._stack[-1]] += at - self._since
        self._since = at

    def _push(self, part: str) -> None:
        self._spend()
        self._stack.append("generation" if "generation" in self._stack else part)

    def _pop(self) -> None:
        self._spend()
        self._stack.pop()

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._push(part)
            try:
                return call(*args, **kwargs)
            finally:
                self._pop()

        return timed

    def _reached_backbone(self, gradient: torch.Tensor) -> None:
        """The gradient of the last hidden state is complete: heads are done, the backbone begins."""
        if self._stack[-1] == "LM heads":
            self._spend()
            self._stack[-1] = "backward"

    def _watch(self, module: torch.nn.Module, part: str) -> Iterator[Any]:
        yield module.register_forward_pre_hook(lambda *_: self._push(part))
        yield module.register_forward_hook(lambda *_: self._pop())

    def _after_student(self, _module: Any, _args: Any, output: Any) -> None:
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.register_hook(self._reached_backbone)

    @contextlib.contextmanager
    def measuring(self, run: bool = False) -> Iterator[None]:
        """Within this context steps are taken apart, or with `run` whole runs."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        hooks = [
            *self._watch(self.student.base_model, "student forward"),
            *self._watch(self.teacher, "LM heads"),  # what a teacher's forward does beside its backbone
            *self._watch(self.teacher.base_model, "teacher"),
            self.student.base_model.register_forward_hook(self._after_student),
        ]
        clock = _Bounds(self, run)
        trainer.add_callback(clock)
        trainer.compute_loss = self._timed("LM heads", trainer.compute_loss)
        accelerator.backward = self._timed("LM heads", accelerator.backward)
        try:
            yield
        finally:
            del trainer.compute_loss, accelerator.backward
            trainer.remove_callback(clock)
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Within this context the parts in `AROUND` are told apart, too, from the first batch's loading to the log."""
        trainer, clock = self.trainer, _Optimizer(self)
        timed = [
            (trainer, "get_batch_samples", "data"),
            (trainer, "_generate_and_score_completions", "scoring"),
            (trainer, "_clip_grad_norm", "optimizer"),
            (trainer, "_log_step", "logging"),
            (trainer, "_maybe_log_save_evaluate", "logging"),
            (self.student, "generate", "generation"),
        ]
        before = [vars(owner).get(name) for owner, name, _ in timed]
        for owner, name, part in timed:
            setattr(owner, name, self._timed(part, getattr(owner, name)))
        strategy, trainer.args.logging_strategy = trainer.args.logging_strategy, IntervalStrategy.STEPS
        steps, trainer.args.logging_steps = trainer.args.logging_steps, 1
        trainer.add_callback(clock)
        try:
            yield
        finally:
            trainer.remove_callback(clock)
            trainer.args.logging_strategy, trainer.args.logging_steps = strategy, steps
            for (owner, name, _), own in zip(timed, before, strict=True):
                delattr(owner, name)
                if own is not None:
                    setattr(owner, name, own)


class _Bounds(TrainerCallback):
    """
    Begins and ends what is measured: time in between that belongs to no other part is "rest".

    Args:
        shares ([`Shares`]): that is told.
        run (`bool`): measure from the beginning of the run to its end, with loading and logging, instead of a step.
    """

    def __init__(self, shares: Shares, run: bool = False):
        self.shares, self.run = shares, run

    def _begin(self, run: bool) -> None:
        if run == self.run:
            self.shares._push("rest")

    def _end(self, run: bool) -> None:
        if run == self.run:
            self.shares._pop()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._begin(run=True)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._end(run=True)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begin(run=False)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._end(run=False)


class _Optimizer(TrainerCallback):
    """Time between its two events is the optimizer's."""

    def __init__(self, shares: Shares):
        self.shares = shares

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.shares._push("optimizer")

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.shares._pop()


def peak_memory(device: torch.device, call: Callable[[], Any]) -> float:
    """MiB at the peak of `call` above what was held before it: of the GPU's allocator, or of the whole process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if not CLEAR.exists():
        raise RuntimeError(
            "Peak memory on a CPU is read from /proc/self, which only Linux has. Run with `--no_memory`."
        )
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")  # the peak so far is forgotten
    before = _kib("VmRSS")
    call()
    return (_kib("VmHWM") - before) / 2**10


def _kib(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])
