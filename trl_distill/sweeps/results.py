"""The files of a sweep's folder: what they are called, how they are written, and what is read from them.

Nothing here or in `sweep_draw.py` imports PyTorch, so that `sweep.py` leaves the memory to its runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


SWEEP, PARAMETERS, RESULT, FAILURE = "sweep.json", "parameters.json", "result.json", "failure.json"  # the first: of all


NEVER = ("step", "epoch", "total_flos")  # logged, but no metrics


def write(path: Path, content: dict[str, Any]) -> None:
    """All of it or nothing: a file that is there is whole."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    part.replace(path)


@dataclass(frozen=True)
class Row:
    """One run: its number, what was drawn for it, its metrics, and what went wrong."""

    run: str
    settings: dict[str, Any]
    metrics: dict[str, float]
    failure: str = ""


def last_means(log_history: list[dict[str, Any]], last: int) -> dict[str, float]:
    """Each logged quantity as the mean of its last `last` values; what is no number, or NaN, does not count."""
    values: dict[str, list[float]] = {}
    for entry in log_history:
        for name, value in entry.items():
            if name not in NEVER and isinstance(value, int | float) and value == value:
                values.setdefault(name, []).append(value)
    return {name: sum(found[-last:]) / len(found[-last:]) for name, found in values.items()}


def collect(folder: Path) -> list[Row]:
    """All runs of the sweep in `folder` that have ended, in their order."""
    rows = []
    for run in sorted(path for path in folder.iterdir() if path.is_dir()):
        for name in (RESULT, FAILURE):
            if (run / name).is_file():
                found = json.loads((run / name).read_text())
                rows.append(Row(run.name, found["settings"], found.get("metrics", {}), found.get("failure", "")))
                break
    return rows
