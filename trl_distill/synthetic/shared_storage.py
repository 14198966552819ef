"""A work folder's copy in storage that other machines reach too: any that fsspec knows, such as `s3://bucket/run`.

Each machine keeps what it needs on its own disk and works there. What it finishes is uploaded, and what others have
finished is downloaded when a process begins, so nothing else has to know of it. A file with its final name is complete:
it is uploaded under another name and moved. A folder is complete with its `counts.json`, which is uploaded last.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path, PurePosixPath

import fsspec


WHOLE = ("prompts", "new_prompts")  # folders that count when all their files are there


LAST = "counts.json"


class SharedStorage:
    """
    Args:
        url (`str`): as fsspec reads it. Credentials come from where its file system takes them, such as variables.
        local (`Path`): the work folder on this machine.

    Raises:
        ValueError: the file system is unknown, or its package is not installed.
    """

    def __init__(self, url: str, local: Path):
        self.local = local
        try:
            self.files, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ValueError(f"`work_dir` cannot be used: {error}. Write a path, or a URL that fsspec knows.") from None
        self.root = self.root.rstrip("/")

    def pull(self) -> None:
        """Download what is not on this machine."""
        wanted = self._names()
        for folder in WHOLE:
            inside = [name for name in wanted if name.startswith(f"{folder}/")]
            wanted = [name for name in wanted if name not in set(inside)]
            if f"{folder}/{LAST}" in inside and not (self.local / folder).exists():
                self._pull_folder(folder, inside)
        for name in wanted:
            if not (self.local / name).exists():
                self._download(name, self.local / name)

    def push(self, path: Path) -> None:
        """Upload a finished file, or a folder with all its files."""
        if path.is_dir():
            self.discard(path.name)
        files = sorted((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.name == LAST)
        for file in files if path.is_dir() else [path]:
            target = f"{self.root}/{file.relative_to(self.local).as_posix()}"
            unfinished = f"{target}.{uuid.uuid4().hex}.unfinished"
            self.files.makedirs(target.rpartition("/")[0], exist_ok=True)
            self.files.put_file(str(file), unfinished)
            self.files.mv(unfinished, target)

    def push_missing(self, *names: str) -> None:
        """Upload what is finished here and missing there: whole folders, files of answers, and those of `names`."""
        there = set(self._names())
        for folder in WHOLE:
            if (self.local / folder).exists() and f"{folder}/{LAST}" not in there:
                self.push(self.local / folder)
        for path in sorted(self.local.rglob("*")):
            name = path.relative_to(self.local).as_posix()
            of = name.partition("/")[0]
            finished = path.suffix == ".jsonl" and not of.endswith(".unfinished") and of not in (*WHOLE, "dataset")
            if path.is_file() and name not in there and (finished or name in names):
                self.push(path)

    def differs(self, name: str) -> bool:
        """Whether a file is here and there, with different contents."""
        here, there = self.local / name, f"{self.root}/{name}"
        self.files.invalidate_cache()
        return here.exists() and self.files.exists(there) and self.files.cat_file(there) != here.read_bytes()

    def _names(self) -> list[str]:
        """All finished files there."""
        self.files.invalidate_cache()
        found = self.files.find(self.root) if self.files.exists(self.root) else []
        names = sorted(str(PurePosixPath(path).relative_to(PurePosixPath(self.root))) for path in found)
        return [name for name in names if not name.endswith(".unfinished")]

    def discard(self, name: str) -> None:
        """Remove a folder there, if there is one."""
        self.files.invalidate_cache()
        if self.files.exists(f"{self.root}/{name}"):
            self.files.rm(f"{self.root}/{name}", recursive=True)

    def _pull_folder(self, folder: str, names: list[str]) -> None:
        unfinished = self.local / f"{folder}.{os.getpid()}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        for name in names:
            self._download(name, unfinished / PurePosixPath(name).relative_to(folder))
        try:
            os.rename(unfinished, self.local / folder)
        except OSError:
            shutil.rmtree(unfinished)
            if not (self.local / folder).exists():  # otherwise another process was faster
                raise

    def _download(self, name: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f"{target.name}.{os.getpid()}.unfinished")
        self.files.get_file(f"{self.root}/{name}", str(unfinished))
        os.replace(unfinished, target)
