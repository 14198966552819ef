"""The files of a sweep's folder: what they are called, how they are written, and what is read from them.

Nothing here imports PyTorch: the memory is left to the runs.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


SWEEP = "sweep.json"  # of the whole sweep; the others are in each run's folder


PARAMETERS, RESULT, FAILURE, LOG = "parameters.json", "result.json", "failure.json", "log.txt"


NEVER = ("step", "epoch", "total_flos")  # logged, but no metrics


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is either whole or not there."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    part.replace(path)


@dataclass(frozen=True)
class Row:
    """
    A run that has ended.

    Attributes:
        run (`str`): its number, which is its folder's name.
        settings (`dict[str, Any]`): what was drawn for it.
        metrics (`dict[str, float]`): means over its last logged steps; none where it failed.
        failure (`str`): its status and the last lines of its log; empty unless it failed.
        stopped (`str`): why it was ended early; empty unless it was.
    """

    run: str
    settings: dict[str, Any]
    metrics: dict[str, float]
    failure: str = ""
    stopped: str = ""


def last_means(log_history: list[dict[str, Any]], last: int) -> dict[str, float]:
    """The mean of each logged quantity over its last `last` values; text, NaN and infinite values do not count."""
    values: dict[str, list[float]] = {}
    for entry in log_history:
        for name, value in entry.items():
            if name not in NEVER and isinstance(value, int | float) and math.isfinite(value):
                values.setdefault(name, []).append(value)
    return {name: sum(found[-last:]) / len(found[-last:]) for name, found in values.items()}


def collect(folder: Path) -> list[Row]:
    """All runs of the sweep in `folder` that have ended, by number."""
    rows = []
    for run in sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: (len(path.name), path)):
        for name in (RESULT, FAILURE):
            if (run / name).is_file():
                found = json.loads((run / name).read_text())
                texts = {key: found.get(key, "") for key in ("failure", "stopped")}
                rows.append(Row(run.name, found["settings"], found.get("metrics", {}), **texts))
                break
    return rows
