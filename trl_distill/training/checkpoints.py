"""Which checkpoints are complete, so that a run killed at any point can be resumed.

A checkpoint is complete once it holds a list of its files and their sizes; the list is written last, by an atomic
rename. The trainer writes the files themselves. A file of the right size can still be unreadable, after a crash of the
machine or a bad copy, so those that are cheap to read are read.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from transformers import TrainerState


logger = logging.getLogger(__name__)


MARKER = "complete.json"


STATE = "trainer_state.json"  # transformers' name


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
    """Why a checkpoint cannot be resumed from, in a few words; `None` if it can: it is complete and readable."""
    folder = Path(folder)
    try:
        files: Any = json.loads((folder / MARKER).read_text())
    except FileNotFoundError:
        return f"it has no {MARKER}, which is written last"
    except ValueError:
        files = None
    if not isinstance(files, dict):
        return f"its {MARKER} cannot be read"
    for name, size in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != size:
            return f"{name} has {(folder / name).stat().st_size} bytes instead of {size}"
    return what_is_broken(folder)


def what_is_broken(folder: str | os.PathLike) -> str | None:
    """
    Which file of a checkpoint cannot be read, in a few words; `None` if none is found.

    Read are the trainer's state and all JSON. Of other files the first bytes are looked at: those of weights and
    optimizers never begin with eight zeros, but blocks that a crashed machine did not write are zeros.
    """
    for path in sorted(Path(folder).rglob("*")):
        if not path.is_file() or path.name == MARKER:
            continue
        try:
            if path.name == STATE:
                TrainerState.load_from_json(str(path))
            elif path.suffix == ".json":
                json.loads(path.read_text("utf-8"))
            else:
                with path.open("rb") as file:
                    if file.read(8) == bytes(8):
                        raise ValueError("it begins with zeros")
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            return f"{path.relative_to(folder)} cannot be read ({error})"
    return None


def last_complete(output_dir: str | os.PathLike | None) -> str | None:
    """
    The latest complete checkpoint, or `None`; newer ones that are incomplete or unreadable are skipped with a warning.

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
