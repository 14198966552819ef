"""Prompts come in: every row of the input becomes a prompt, or a skip that says where and why.

Rows are read one at a time and written to chunks of a fixed size, which all later stages go by. Of prompts that are
equal but for case and white space the first stays. Making new prompts is left to `new_prompts.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import IterableDataset
from datasets.exceptions import DatasetGenerationError

from ...data.datasets import load_splits, take_split
from ...data.images import COLUMNS as IMAGES
from ...data.json_rows import BATCH, SUFFIXES, Columns, InputRow, groups, read_json_rows
from ...data.rows import CONVERSATIONS, RowError, read_prompt
from ...server_urls import without_login
from ..images import ImageFiles, images_in, names_of, with_paths
from ..output.counts import Skip, SkipFile, Stage
from ..records import PromptRow
from ..text import content, flat, normal
from ..work_folder import WorkFolder, digest, dump, read_json, read_lines, write_json, write_lines
from .dedup import Seen


if TYPE_CHECKING:
    from .contamination import Benchmarks


RESERVED = ("completion", "teacher", "score", "chosen", "rejected", "messages")  # not taken over from the input


def read_rows(name: str, config: str | None = None, split: str = "train") -> Iterator[InputRow]:
    """
    The rows of a dataset, one at a time.

    Raises:
        ValueError: there is no such dataset or split.
    """
    path = Path(name)
    if path.suffix in SUFFIXES:
        if not path.is_file():
            raise ValueError(f"The dataset file {without_login(name)!r} does not exist.")
        take_split({"train": path}, split, "training")
        yield from read_json_rows(path)
        return
    rows = take_split(load_splits(name, config, streaming=True), split, "training")
    if not isinstance(rows, IterableDataset):
        rows = rows.to_iterable_dataset()  # one that `save_to_disk` wrote; it stays on disk
    if rows.features is not None:
        rows = rows.decode(False)  # images as their files
    try:
        for number, row in enumerate(rows, start=1):
            yield InputRow(f"row {number}", row)
    except DatasetGenerationError as error:
        said = without_login(f"The dataset {name!r} could not be read: {error.__cause__ or error}.")
        raise ValueError(said) from None


def prompt_and_columns(found: InputRow, files: ImageFiles | None = None) -> tuple[Any, dict[str, Any], str | None]:
    """A row's prompt, its other columns, and why it cannot be used (or `None`); its images go to `files`, if given."""
    if found.row is None:
        return None, {}, found.fault
    row = found.row
    name = next((name for name in ("prompt", *CONVERSATIONS) if name in row), None)
    if name is None:
        return None, {}, "no column `prompt` or `messages`"
    left_out = (*RESERVED, name, *(IMAGES if files else ()))
    columns = {key: value for key, value in row.items() if key not in left_out}
    try:
        prompt = files.prompt(row, name, found.where) if files else read_prompt(row[name], name, found.where)
        return prompt, columns, None
    except RowError as error:
        return None, columns, error.reason


class Ingest:
    """
    Reads all prompts into the work folder, once.

    Args:
        work (`WorkFolder`): gets a folder "prompts": chunks, `counts.json` and `skipped.jsonl`.
        chunk_size (`int`): prompts in a file.
        routed (`Collection[str]`, *optional*): teachers, where the column `teacher` says which of them completes a row.
        benchmarks (`Benchmarks`, *optional*): with which prompts must share no n-gram.
    """

    def __init__(
        self,
        work: WorkFolder,
        chunk_size: int,
        routed: Collection[str] | None = None,
        benchmarks: Benchmarks | None = None,
    ):
        self.work, self.chunk_size, self.routed, self.benchmarks = work, chunk_size, routed, benchmarks

    def run(self, rows: Iterator[InputRow], limit: int | None = None) -> None:
        """
        Read, unless it was done before.

        Raises:
            ValueError: no prompt is left, or a column holds values of different kinds.
        """
        if (self.work.path / "prompts").exists():
            return
        self.read, self.unique = Stage("read", "rows"), Stage("equal prompts", "prompts")
        self.clean = Stage("contamination", "rows")
        self.columns = Columns()
        self.text: bool | None = None
        self.examples: list[str] = []
        with self.work.folder("prompts") as folder:
            self.files, self.images = ImageFiles(folder / "images"), False
            self.seen = Seen(folder / "seen.db")
            with SkipFile(folder / "skipped.jsonl") as self.skips:
                chunks = write_chunks(folder, self._prompts(rows, limit), self.chunk_size)
            self.seen.close()
            (folder / "seen.db").unlink()
            if not self.unique.kept:
                raise ValueError(
                    f"There is no prompt among {self.read.seen} rows. {' '.join(self.examples)} Each row needs a "
                    "column `prompt` (text, or messages that end with the user's) or such `messages`."
                )
            columns = [name for name in self.columns.types if name != "prompt"]
            columns += ["images"] if self.images else []
            stages = [self.read, *([self.clean] if self.benchmarks else []), self.unique]
            PromptCounts(stages, chunks, columns, bool(self.text), self.images).write(folder)

    def _prompts(self, rows: Iterator[InputRow], limit: int | None) -> Iterator[PromptRow]:
        for group in groups(self._usable(rows, limit), BATCH):
            self.columns.add([{"prompt": _words(row.prompt), **row.columns} for row in group])
            yield from group

    def _usable(self, rows: Iterator[InputRow], limit: int | None) -> Iterator[PromptRow]:
        """The rows with a prompt that was not there before."""
        for found in rows:
            if limit is not None and self.unique.kept >= limit:
                return
            prompt, columns, fault = prompt_and_columns(found, self.files)
            if fault is None and self.routed is not None:
                columns["teacher"] = (found.row or {}).get("teacher")
                fault = None if columns["teacher"] in self.routed else "column `teacher` names none of the teachers"
            if fault is None and self.text not in (None, isinstance(prompt, str)):
                fault = f"prompt is {'text' if isinstance(prompt, str) else 'messages'}, unlike those before"
            if not self.read.count(fault):
                self._skip(found, str(fault))
                continue
            self.text = isinstance(prompt, str)
            if not self._is_clean(found, prompt):
                continue
            if self.unique.count(None if self.seen.add(prompt_key(prompt)) else "equal to an earlier prompt"):
                row = PromptRow(self.unique.kept - 1, prompt, columns)
                _check_storable(row, found.where)
                self.images = self.images or bool(images_in(prompt))
                yield row

    def _is_clean(self, found: InputRow, prompt: Any) -> bool:
        """Whether a prompt shares no n-gram with a benchmark; counted and listed."""
        overlap = self.benchmarks.overlap(prompt) if self.benchmarks else None
        if overlap:
            self.skips.add(Skip(self.clean.name, found.where, overlap.detail))
        return self.clean.count(overlap.reason if overlap else None)

    def _skip(self, found: InputRow, fault: str) -> None:
        self.skips.add(Skip("read", found.where, fault))
        if len(self.examples) < 3:
            columns = f" (columns: {', '.join(found.row)})" if found.row is not None else ""
            self.examples.append(f"{found.where}: {fault}{columns}.")


def _check_storable(row: PromptRow, where: str) -> None:
    """JSON must be able to hold a row: later stages read it from there."""
    try:
        dump(row.as_dict())
    except TypeError as error:
        raise ValueError(
            f"{where}: a column holds something that is no text, number or list ({error}). Leave such columns out of "
            "the dataset."
        ) from None


def _words(prompt: Any) -> Any:
    """A prompt with text instead of parts, for its type."""
    return prompt if isinstance(prompt, str) else [{**message, "content": content(message)} for message in prompt]


def write_chunks(folder: Path, rows: Iterator[PromptRow], size: int) -> int:
    """Write rows to files of `size` each; returns how many files there are."""
    number = 0
    for number, chunk in enumerate(groups(rows, size), start=1):
        write_lines(folder / f"{number - 1:06}.jsonl", (row.as_dict() for row in chunk))
    return number


@dataclass(frozen=True)
class PromptCounts:
    """
    What a folder of prompts holds, as `counts.json` in it.

    Attributes:
        stages (`list[Stage]`): that led to it.
        chunks (`int`): files of prompts.
        columns (`list[str]`): of the input, beside the prompt.
        text (`bool`): whether prompts are text; otherwise messages.
        images (`bool`): whether some of them have images.
    """

    stages: list[Stage]
    chunks: int
    columns: list[str]
    text: bool
    images: bool = False

    def write(self, folder: Path) -> None:
        """Write `counts.json`."""
        stages = [stage.as_dict() for stage in self.stages]
        counts = {"stages": stages, "chunks": self.chunks, "columns": self.columns, "text": self.text}
        write_json(folder / "counts.json", counts | ({"images": True} if self.images else {}))

    @classmethod
    def read(cls, folder: Path) -> PromptCounts:
        found = read_json(folder / "counts.json")
        stages = [Stage.from_dict(stage) for stage in found["stages"]]
        return cls(stages, found["chunks"], found["columns"], found["text"], found.get("images", False))


def prompt_key(prompt: Any) -> bytes:
    """Equal for prompts that differ in case and white space only, and have the same images."""
    if isinstance(prompt, str):
        return digest(normal(prompt, fold_case=True))
    words = [[message["role"], normal(flat([message]), fold_case=True)] for message in prompt]
    return digest(words, *names_of(prompt))


class Prompts:
    """
    The chunks of prompts in a work folder: those that were read, then those that were made.

    Attributes:
        columns (`list[str]`): of the input, beside the prompt.
        text (`bool`): whether prompts are text; otherwise messages.
        images (`bool`): whether some of them have images.
    """

    def __init__(self, work: WorkFolder):
        self.folders = [path for name in ("prompts", "new_prompts") if (path := work.path / name).exists()]
        counts = [PromptCounts.read(folder) for folder in self.folders]
        self.columns, self.text, self.images = counts[0].columns, counts[0].text, counts[0].images
        self.stages = [stage for found in counts for stage in found.stages]
        self._chunks = [found.chunks for found in counts]  # in each folder

    def __len__(self) -> int:
        """How many chunks there are."""
        return sum(self._chunks)

    @property
    def total(self) -> int:
        """How many prompts there are."""
        return sum(stage.kept for stage in self.stages if stage.unit == "prompts")

    def chunk(self, number: int) -> list[PromptRow]:
        """The prompts of one chunk."""
        which = 0 if number < self._chunks[0] else 1
        path = self.folders[which] / f"{number - which * self._chunks[0]:06}.jsonl"
        rows = [PromptRow.from_dict(row) for row in read_lines(path)]
        if not self.images:
            return rows
        return [replace(row, prompt=with_paths(row.prompt, self.folders[which] / "images")) for row in rows]

    def skips(self) -> Iterator[Skip]:
        """What could not be used on the way here."""
        for folder in self.folders:
            yield from (Skip(**row) for row in read_lines(folder / "skipped.jsonl"))
