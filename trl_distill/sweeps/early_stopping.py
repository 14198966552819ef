"""Ending poor runs early: wandb's `early_terminate: {type: hyperband}`, decided from the values in a run's log.

At certain numbers of logged values, its bands, a run is held against all earlier runs (Hyperband,
https://arxiv.org/abs/1603.06560, as wandb's server does it): it goes on if its best value so far is among the best
1/eta there. The decision depends on the logged values alone, never on when somebody looked.
"""

from __future__ import annotations

import ast
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


BEGINS = "==> "  # the line with which a run begins or goes on in its log


ENTRY = re.compile(r"\{'[^{}]*\}")  # what the trainer prints of a logging step


Entry = dict[str, float]


@dataclass(frozen=True)
class EarlyStop:
    """
    A run that was ended early.

    Attributes:
        entries (`int`): logging steps that count; what came after them is not looked at.
        reason (`str`): for the record.
    """

    entries: int
    reason: str


def bands_of(rule: dict[str, Any]) -> Iterator[int]:
    """
    After how many logged values runs are compared, in ascending order.

    Args:
        rule (`dict[str, Any]`): `early_terminate`: with `min_iter`, bands at min_iter · eta^i without end; with
            `max_iter` and `s`, at max_iter / eta^i for i from 1 to s.
    """
    if "max_iter" not in rule:
        yield from (int(rule["min_iter"] * rule["eta"] ** i) for i in itertools.count())
        return
    bands = [rule["max_iter"] / rule["eta"] ** i for i in range(1, rule["s"] + 1)]
    yield from sorted(int(band) for band in bands if band >= 1)


def cut(history: Sequence[float], earlier: Sequence[Sequence[float]], rule: dict[str, Any], goal: str) -> int | None:
    """
    Where a run is to be ended.

    Args:
        history (`Sequence[float]`): the metric's values so far, in order.
        earlier (`Sequence[Sequence[float]]`): those of the runs before it.
        rule (`dict[str, Any]`): `early_terminate`.
        goal (`str`): "minimize" or "maximize".

    Returns:
        `int`, *optional*: how many values it has had by then; `None` where it goes on.
    """
    sign = -1 if goal == "maximize" else 1
    for band in bands_of(rule):
        if band >= len(history):
            return None
        there = sorted(sign * values[band] for values in (*earlier, history) if len(values) > band)
        if min(sign * value for value in history[: band + 1]) > there[int(len(there) / rule["eta"])]:
            return band + 1
    return None


def early_stop(
    entries: Sequence[Entry], metric: str, earlier: Sequence[Sequence[float]], rule: dict[str, Any], goal: str
) -> EarlyStop | None:
    """As [`cut`], from the logging steps of a run."""
    with_metric = [i for i, entry in enumerate(entries) if metric in entry]
    history = [entries[i][metric] for i in with_metric]
    count = cut(history, earlier, rule, goal)
    if count is None:
        return None
    best = (max if goal == "maximize" else min)(history[:count])
    reason = f"after {count} logged values its best {metric} was {best:.4g}, not among the best 1/{rule['eta']:g}"
    return EarlyStop(with_metric[count - 1] + 1, reason)


class RunLog:
    """
    The logging steps in a run's output, read on from where the last call ended.

    A run that was interrupted goes on from a checkpoint and logs some steps again: those of the new start replace them,
    by the "epoch" that the trainer prints. A program that prints none begins anew.

    Args:
        path (`Path`): the log; it may not be there yet.
    """

    def __init__(self, path: Path):
        self.path, self.entries = path, list[Entry]()
        self._read, self._resumed = 0, False

    def read(self) -> list[Entry]:
        """All logging steps so far; of their values, the finite numbers."""
        if self.path.is_file():
            with self.path.open("rb") as file:
                file.seek(self._read)
                text, end, _ = file.read().rpartition(b"\n")  # the last line may be half written
            self._read += len(text) + len(end)
            for line in text.decode(errors="replace").splitlines():
                if line.startswith(BEGINS):
                    self._resumed = True
                for found in ENTRY.findall(line):
                    self._add(_numbers(found))
        return self.entries

    def _add(self, entry: Entry) -> None:
        if not entry:
            return
        if self._resumed:
            at = entry.get("epoch", -math.inf)
            self.entries = [one for one in self.entries if one.get("epoch", math.inf) < at]
            self._resumed = False
        self.entries.append(entry)


def _numbers(text: str) -> Entry:
    try:
        found = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return {}
    numbers = {}
    for name, value in found.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            continue
        if math.isfinite(number):
            numbers[name] = number
    return numbers
