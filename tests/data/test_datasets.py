"""Datasets by one name: files, folders, and what is said where there is none."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, DatasetDict

from trl_distill.data.datasets import load_splits, take_split


ROWS = [{"prompt": "a b", "answer": "1"}, {"prompt": "c", "answer": "2"}]


def test_jsonl_file(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert list(load_splits(str(file))["train"]) == ROWS
    assert list(load_splits(str(file), streaming=True)["train"]) == ROWS


@pytest.mark.parametrize("as_dict", [False, True])
def test_folder_that_datasets_saved(tmp_path, as_dict):
    dataset = Dataset.from_list(ROWS)
    (DatasetDict(train=dataset, test=dataset) if as_dict else dataset).save_to_disk(tmp_path / "saved")
    splits = load_splits(str(tmp_path / "saved"))
    assert list(take_split(splits, "train", "training")) == ROWS
    assert ("test" in splits) is as_dict


def test_folder_of_files(tmp_path):
    (tmp_path / "data").mkdir()
    Dataset.from_list(ROWS).to_parquet(tmp_path / "data" / "train.parquet")
    assert list(load_splits(str(tmp_path / "data"))["train"]) == ROWS


def test_missing_split_lists_those_that_exist():
    with pytest.raises(ValueError, match=r"no split 'test' for evaluation; it has train\. .*--dataset_test_split"):
        take_split(DatasetDict(train=Dataset.from_list(ROWS)), "test", "evaluation")


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_splits(str(tmp_path / "nothing.jsonl"))


def test_empty_file_and_folder(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"file .* is empty"):
        load_splits(str(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match=r"folder .* is empty"):
        load_splits(str(tmp_path / "nothing"))


def test_broken_file(tmp_path):
    file = tmp_path / "broken.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(ValueError, match="could not be read"):
        load_splits(str(file))


def test_unknown_name():
    with pytest.raises(ValueError, match="could not be found"):
        load_splits("nobody/has-such-a-dataset")


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "prompts.csv").write_text("prompt\na b\n")
    with pytest.raises(ValueError, match=r"is a \.csv, which is not read here\. Save it as `\.jsonl`"):
        load_splits(str(tmp_path / "prompts.csv"))
