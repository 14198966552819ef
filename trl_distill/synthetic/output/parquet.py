"""Rows as Parquet files that `datasets` reads. What the rows mean is left to the stages."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...data.json_rows import BATCH, groups


ROWS_PER_FILE = 100_000


def write_parquet(folder: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema, batch: int | None = None) -> int:
    """
    Write rows as `train-00000.parquet`, `train-00001.parquet` ...; returns how many rows there were.

    Args:
        folder (`Path`): made here.
        rows (`Iterable[dict]`): the rows.
        schema (`pa.Schema`): their columns.
        batch (`int`, *optional*): rows in memory at a time. Defaults to `BATCH`.
    """
    folder.mkdir(parents=True)
    written, writer, total = 0, None, 0
    try:
        for group in groups(rows, batch or BATCH):
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
