"""The work folder: what is finished stays on disk, so that a run that was killed can be resumed.

A file or folder with its final name is complete: it is written under another name, synced and renamed. What is in the
files is left to the stages.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .shared_storage import WHOLE, SharedStorage


_FLOAT = "\0float"  # the name of an object's only value, a number that JSON does not have


ANSWERS = ("completions/*/*.jsonl", "rounds/*.jsonl", "evolved/*/*.jsonl")  # files that a model was asked for


SETTINGS = "settings.json"


class WorkFolder:
    """
    `<output_dir>.work`.

    Args:
        path (`Path`): made if it is not there.
        completions (`str`, *optional*): the folder in it with the completions that verifiers and filters read.
        storage (`str`, *optional*): URL of its copy for other machines; see [`SharedStorage`].
    """

    def __init__(self, path: Path, completions: str = "completions", storage: str | None = None):
        self.path, self.completions = path, completions
        self.storage = SharedStorage(storage, path) if storage else None
        self.pull()

    def pull(self) -> None:
        """
        Take over what other machines have finished.

        Raises:
            ValueError: answers that are here belong to another run than what is there.
        """
        if not self.storage:
            return
        if self.storage.differs(SETTINGS):
            if self._has_answers():
                raise ValueError(
                    f"{self.path} holds answers of a run with other settings than the one in `work_dir`. Pass another "
                    "`--output_dir` or `--work_dir`, or delete that folder if its answers are not needed."
                )
            self._discard_prompts()
            (self.path / SETTINGS).unlink()
        self.storage.pull()

    def share_all(self) -> None:
        """Give other machines what is finished here and missing there: a run may have ended between the two."""
        if self.storage:
            self.storage.push_missing(SETTINGS)

    def share(self, path: Path) -> None:
        """Give a finished file or folder to other machines."""
        if self.storage:
            self.storage.push(path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """
        Keep other runs out. The operating system releases the lock of a process that was killed.

        Raises:
            ValueError: another run has it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"Another run works in {self.path}. Wait for it, or pass another `--output_dir`."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def check_settings(self, settings: dict[str, Any], defaults: dict[str, Any] | None = None) -> None:
        """
        Note the settings that the stored answers depend on, or compare them with those noted before. While no model
        has answered, nothing can be lost: other settings then start over.

        Args:
            settings (`dict`): as JSON can hold them.
            defaults (`dict`, *optional*): stand for what was not noted: an older version did not have the setting.

        Raises:
            ValueError: they differ.
        """
        path = self.path / SETTINGS
        settings = json.loads(json.dumps(settings))
        if not path.exists():
            write_json(path, settings)
            return self.share(path)
        before = {**json.loads(json.dumps(defaults or {})), **read_json(path)}
        changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if changed and not self._has_answers():
            self._discard_prompts()
            if self.storage:
                for name in WHOLE:
                    self.storage.discard(name)
            write_json(path, settings)
            return self.share(path)
        if changed:
            changes = "; ".join(f"`{name}` was {before.get(name)!r}, now {settings.get(name)!r}" for name in changed)
            raise ValueError(
                f"{self.path} holds completions that were made with other settings: {changes}. Go back to those "
                "settings to continue, pass another `--output_dir` to start over beside it, or delete that folder to "
                "start over here."
            )

    def _has_answers(self) -> bool:
        return any(next(self.path.glob(made), None) for made in ANSWERS)

    def _discard_prompts(self) -> None:
        for name in WHOLE:
            shutil.rmtree(self.path / name, ignore_errors=True)

    def chunk(self, *parts: str | int) -> Path:
        """Path of a chunk's file: folders, then a number."""
        *folders, number = parts
        return self.path.joinpath(*map(str, folders), f"{number:06}.jsonl")

    def chunks(self, *folders: str | int) -> set[int]:
        """The numbers of the chunks whose files are in a folder."""
        folder = self.path.joinpath(*map(str, folders))
        if not folder.exists():
            return set()
        return {int(path.stem) for path in folder.iterdir() if path.suffix == ".jsonl"}

    @contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """An empty folder that gets its name when the block ends, and not before."""
        unfinished = self.path / f"{name}.unfinished"
        for leftover in (unfinished, self.path / name):
            shutil.rmtree(leftover, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        os.rename(unfinished, self.path / name)
        if name in WHOLE:
            self.share(self.path / name)


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object per line; the file is there when all are in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # the same process id may come from another machine or container
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.unfinished")
    with open(unfinished, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(dump(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file that was written with [`write_lines`] or [`dump`]."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line, object_hook=_number)


def write_json(path: Path, value: Any) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def dump(row: dict[str, Any]) -> str:
    """A row as one line. NaN and infinities, which columns may hold and JSON does not have, are written as objects."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return {_FLOAT: str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _number(found: dict[str, Any]) -> Any:
    return float(found[_FLOAT]) if found.keys() == {_FLOAT} else found


def digest(*parts: Any, size: int = 16) -> bytes:
    """A hash of values that JSON can hold."""
    return hashlib.blake2b(json.dumps(parts, ensure_ascii=True).encode(), digest_size=size).digest()


def seed_of(*parts: Any) -> int:
    """A seed below 2^31 that depends on all parts and nothing else."""
    return int.from_bytes(digest(*parts, size=4)) >> 1


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
