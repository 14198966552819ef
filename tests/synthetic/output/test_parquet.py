"""Columns find one type for all rows; files are read by `datasets` with nothing changed."""

from __future__ import annotations

import pytest

from trl_distill.data.datasets import load_splits
from trl_distill.data.json_rows import Columns, groups
from trl_distill.synthetic.output import parquet as table
from trl_distill.synthetic.output.parquet import write_parquet


def test_types_that_fit_each_other():
    columns = Columns()
    columns.add([{"a": None, "b": 1}])
    columns.add([{"a": "x", "b": 0.5, "c": [{"role": "user"}]}, {"c": [{"role": "user", "name": "x"}]}])
    assert {name: str(kind) for name, kind in columns.types.items()} == {
        **{"a": "string", "b": "double"},
        "c": "list<item: struct<role: string, name: string>>",
    }


@pytest.mark.parametrize("values", [["x", 1], ["x", {"y": 1}], [2**70]])
def test_types_that_do_not(values):
    columns = Columns()
    for value in values[:-1]:
        columns.add([{"a": value}])
    with pytest.raises(ValueError, match="column 'a' does not hold the same kind"):
        columns.add([{"a": values[-1]}])
    with pytest.raises(ValueError, match="column 'a' does not hold the same kind"):
        Columns().add([{"a": value} for value in values])


def test_round_trip_over_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "BATCH", 3)
    monkeypatch.setattr(table, "ROWS_PER_FILE", 6)
    rows = [{"a": i, "b": "ä" * i if i % 2 else None, "c": None} for i in range(14)]
    columns = Columns()
    columns.add(rows)
    assert write_parquet(tmp_path / "data", iter(rows), columns.schema) == 14
    assert [path.name for path in sorted((tmp_path / "data").iterdir())] == [f"train-0000{i}.parquet" for i in range(3)]
    assert load_splits(str(tmp_path))["train"].to_list() == rows


def test_groups():
    assert list(groups(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(groups([], 2)) == []
