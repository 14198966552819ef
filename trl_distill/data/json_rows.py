"""Reads JSON files: one object per line, or one list of objects. Text that looks like a date stays text.

Each row has its place in the file, so that errors name the line. The contents of rows are checked by `rows.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict

from .rows import with_flat_parts


SUFFIXES = (".jsonl", ".json")


BATCH = 1000  # number of rows whose types are determined at a time


@dataclass(frozen=True)
class InputRow:
    """
    One row of an input.

    Attributes:
        where (`str`): "line 3" or "row 3", counted from 1.
        row (`dict`, *optional*): its columns; `None` if it cannot be read.
        fault (`str`, *optional*): why it cannot be read.
    """

    where: str
    row: dict[str, Any] | None
    fault: str | None = None


def read_json_rows(path: Path) -> Iterator[InputRow]:
    """The rows of a file, one at a time; a row that cannot be read has a `fault`."""
    with open(path, "rb") as file:
        if path.suffix == ".json" and file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _read_list(path)
            return
        file.seek(0)
        for number, line in enumerate(file, start=1):
            yield _read_object(line, f"line {number}")


def _read_list(path: Path) -> Iterator[InputRow]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        yield InputRow("the list", None, f"broken JSON: {error}")
        return
    for number, row in enumerate(rows, start=1):
        fault = None if isinstance(row, dict) else "not a JSON object"
        yield InputRow(f"row {number}", row if fault is None else None, fault)


def _read_object(line: bytes, where: str) -> InputRow:
    try:
        row = json.loads(line.decode("utf-8-sig"))
        json.dumps(row, ensure_ascii=False).encode()  # lone surrogates can be read, but not written to a file
    except UnicodeError:
        return InputRow(where, None, "not UTF-8 text")
    except (ValueError, RecursionError):
        return InputRow(where, None, "broken JSON" if line.strip() else "empty line")
    return InputRow(where, row) if isinstance(row, dict) else InputRow(where, None, "no JSON object")


def load_json(files: Mapping[str, Sequence[Path]], streaming: bool = False) -> Any:
    """
    Splits of a dataset from JSON files.

    Args:
        files (`dict[str, list[Path]]`): the files of each split.
        streaming (`bool`): read rows when they are used. In any case, types are determined in one pass beforehand.

    Returns:
        `DatasetDict` or `IterableDatasetDict`.

    Raises:
        ValueError: a line is not a JSON object, or a column has values of different types; the message says where.
    """
    kind = IterableDataset if streaming else Dataset
    splits = {}
    for split, paths in files.items():
        columns = Columns()
        for group in groups(_located(paths), BATCH):
            columns.add([row for _, row in group], [where for where, _ in group])
        if not columns.types:
            raise ValueError(f"The dataset file {str(paths[0])!r} is empty.")
        # `datasets` caches the result by these arguments, so they must change with the contents
        states = ((path.absolute(), path.stat()) for path in paths)
        stamp = tuple(f"{path} {state.st_mtime_ns} {state.st_size}" for path, state in states)
        splits[split] = kind.from_generator(
            _rows,
            features=Features.from_arrow_schema(columns.schema),
            gen_kwargs={"paths": list(paths), "stamp": stamp},  # `datasets` shards lists
        )
    return (IterableDatasetDict if streaming else DatasetDict)(splits)


def _rows(paths: Sequence[Path], stamp: Sequence[str]) -> Iterator[dict[str, Any]]:
    for _, row in _located(paths):
        yield row


def _located(paths: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """All rows with their places; empty lines are skipped."""
    for path in paths:
        for found in read_json_rows(path):
            if found.fault == "empty line":
                continue
            if found.row is None:
                raise ValueError(
                    f"The dataset {str(path)!r} could not be read: {found.where}: {found.fault}. A `.jsonl` file holds "
                    "one JSON object per line, a `.json` file may hold a list of them."
                )
            yield f"{found.where} of {path.name}", with_flat_parts(found.row)


class Columns:
    """The columns of all rows that were added, each with a type for all of its values."""

    def __init__(self) -> None:
        self.types: dict[str, pa.DataType] = {}
        self._from: dict[str, str] = {}  # column: the place of its first value

    def add(self, rows: list[dict[str, Any]], where: Sequence[str] = ()) -> None:
        """
        Add rows.

        Args:
            rows (`list[dict]`): more rows.
            where (`list[str]`, *optional*): their places, for messages.

        Raises:
            ValueError: values of a column have no type in common.
        """
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [row.get(name) for row in rows]
            try:
                self.types[name] = _common(self.types.get(name, pa.null()), values)
            except (pa.ArrowException, OverflowError, TypeError) as error:
                raise ValueError(
                    f"The column {name!r} does not hold the same kind of value in all rows "
                    f"({self._found(name, values, where)}: {error}). A dataset's column has one type: write all its "
                    "values alike, or leave the column out."
                ) from None
            if where and name not in self._from:
                pairs = zip(where, values, strict=True)
                if (first := next((place for place, value in pairs if value is not None), None)) is not None:
                    self._from[name] = first

    def _found(self, name: str, values: list[Any], where: Sequence[str]) -> str:
        """The types of values; with places, the first value that does not fit those before it."""
        if not where:
            return ", ".join(sorted({type(value).__name__ for value in values if value is not None}))
        known, before = self.types.get(name, pa.null()), self._from.get(name, "")
        for place, value in zip(where, values, strict=True):
            try:
                known = _common(known, [value])
            except (pa.ArrowException, OverflowError, TypeError):
                return f"{_kind(value)} in {place}, but {known} before, as in {before}"
            if value is not None and not before:
                before = place
        return "all of them together"

    @property
    def schema(self) -> pa.Schema:
        """The types of all columns; a column without values has type string."""
        return pa.schema([(name, pa.string() if pa.types.is_null(t) else t) for name, t in self.types.items()])


def _common(known: pa.DataType, values: list[Any]) -> pa.DataType:
    pair = [pa.schema([("", kind)]) for kind in (known, pa.array(values).type)]
    return pa.unify_schemas(pair, promote_options="permissive").field(0).type


def _kind(value: Any) -> str:
    return f"{value!r:.50} ({type(value).__name__})"


def groups(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` rows; the last one may be shorter."""
    iterator = iter(rows)
    while group := list(islice(iterator, size)):
        yield group
