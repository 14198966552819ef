"""Which checkpoints are complete, so that a run killed at any point can be resumed.

A checkpoint is complete once it holds a list of its files and their sizes; the list is written last, by an atomic
rename. The trainer writes the files themselves.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path


logger = logging.getLogger(__name__)


MARKER = "complete.json"


NAME = re.compile(r"checkpoint-(\d+)$")


def mark_complete(folder: str | os.PathLike) -> None:
    """Mark a checkpoint as complete: everything in `folder` has been written."""
    folder = Path(folder)
    unmark(folder)
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    unfinished = folder / f"{MARKER}.tmp"
    unfinished.write_text(json.dumps(files, indent=1) + "\n")
    unfinished.replace(folder / MARKER)


def unmark(folder: str | os.PathLike) -> None:
    """Remove the mark; call it before anything in `folder` is written again."""
    (Path(folder) / MARKER).unlink(missing_ok=True)


def what_is_missing(folder: str | os.PathLike) -> str | None:
    """Why a checkpoint is not complete, in a few words; `None` if it is."""
    folder = Path(folder)
    try:
        files = json.loads((folder / MARKER).read_text())
    except FileNotFoundError:
        return f"it has no {MARKER}, which is written last"
    except ValueError:
        return f"its {MARKER} cannot be read"
    for name, size in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != size:
            return f"{name} has {(folder / name).stat().st_size} bytes instead of {size}"
    return None


def last_complete(output_dir: str | os.PathLike | None) -> str | None:
    """
    The latest complete checkpoint, or `None`; newer ones that are incomplete are skipped with a warning.

    Args:
        output_dir: where the trainer writes `checkpoint-<step>`; need not exist.
    """
    root = Path(output_dir or "")
    found = [p for p in root.iterdir() if p.is_dir() and NAME.match(p.name)] if output_dir and root.is_dir() else []
    for folder in sorted(found, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        missing = what_is_missing(folder)
        if missing is None:
            return str(folder)
        logger.warning(
            f"The checkpoint {folder} is skipped: {missing}. If it was written by another program, name it: "
            f"`resume_from_checkpoint={str(folder)!r}`."
        )
    return None
