"""Rows as a table: which columns there are and of which type, and Parquet files that `datasets` reads.

What the rows mean is left to the stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


BATCH = 1000  # rows


ROWS_PER_FILE = 100_000


class Columns:
    """The columns of all rows that were added, each with the type that holds all its values."""

    def __init__(self) -> None:
        self.types: dict[str, pa.DataType] = {}

    def add(self, rows: list[dict[str, Any]]) -> None:
        """
        Raises:
            ValueError: a column holds values that have no type in common.
        """
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [row.get(name) for row in rows]
            try:
                found = pa.array(values).type
                known = self.types.get(name, pa.null())
                pair = [pa.schema([(name, kind)]) for kind in (known, found)]
                self.types[name] = pa.unify_schemas(pair, promote_options="permissive").field(name).type
            except (pa.ArrowException, OverflowError, TypeError) as error:
                kinds = sorted({type(value).__name__ for value in values if value is not None})
                raise ValueError(
                    f"The column {name!r} does not hold the same kind of value in all rows ({', '.join(kinds)}: "
                    f"{error}). A dataset's column has one type: write all its values alike, or leave the column out."
                ) from None

    @property
    def schema(self) -> pa.Schema:
        """A column without any value is one of text."""
        return pa.schema([(name, pa.string() if pa.types.is_null(t) else t) for name, t in self.types.items()])


def groups(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size`, the last one shorter."""
    iterator = iter(rows)
    while group := list(islice(iterator, size)):
        yield group


def write_parquet(folder: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> int:
    """Write rows as `train-00000.parquet`, `train-00001.parquet` ...; returns how many rows there were."""
    folder.mkdir(parents=True)
    written, writer, total = 0, None, 0
    try:
        for group in groups(rows, BATCH):
            if writer is None or written >= ROWS_PER_FILE:
                if writer is not None:
                    writer.close()
                writer, written = pq.ParquetWriter(folder / f"train-{total // ROWS_PER_FILE:05}.parquet", schema), 0
            arrays = [pa.array([row.get(field.name) for row in group], type=field.type) for field in schema]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            written, total = written + len(group), total + len(group)
    finally:
        if writer is not None:
            writer.close()
    return total
