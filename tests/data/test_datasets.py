"""Datasets by one name: files, folders, and what is said where there is none."""

from __future__ import annotations

import json
import os

import pytest
from datasets import Dataset, DatasetDict

from trl_distill.data.datasets import load_splits, take_split, with_prompts


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


DATED = [{"prompt": "a", "day": "2024-05-01", "at": "2024-05-01T10:00:00Z", "n": "007"}, {"prompt": "b", "at": None}]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("shape", ["jsonl", "json", "list", "folder"])
def test_json_is_read_as_it_stands(tmp_path, shape, streaming):
    """What looks like a date stays text, before any verifier sees it."""
    lines = "\ufeff" + "\n".join(json.dumps(row) for row in DATED) + "\n\n"
    file = tmp_path / f"rows.{'jsonl' if shape == 'jsonl' else 'json'}"
    if shape == "folder":
        (tmp_path / "data").mkdir()
        for split in ("train", "test"):
            (tmp_path / "data" / f"{split}.jsonl").write_text(lines)
        file = tmp_path / "data"
    else:
        file.write_text("\n " + json.dumps(DATED) if shape == "list" else lines)
    splits = load_splits(str(file), streaming=streaming)
    assert list(splits) == (["train", "test"] if shape == "folder" else ["train"])
    for split in splits:
        assert list(splits[split]) == [DATED[0], {"prompt": "b", "day": None, "at": None, "n": None}]
        assert splits[split].column_names == ["prompt", "day", "at", "n"]


def test_a_file_that_changed_is_read_anew(tmp_path):
    file = tmp_path / "prompts.jsonl"
    for text in ("a", "b"):
        file.write_text(json.dumps({"prompt": text}))
        os.utime(file, ns=(0, ord(text)))
        assert list(load_splits(str(file))["train"]) == [{"prompt": text}]


def test_messages_of_text_and_of_parts_beside_each_other(tmp_path):
    file, parts = tmp_path / "prompts.jsonl", [{"type": "text", "text": "b"}]
    rows = [{"prompt": [{"role": "user", "content": content}]} for content in ("a", parts)]
    file.write_text("\n".join(map(json.dumps, rows)))
    found = with_prompts(load_splits(str(file))["train"])
    assert [prompt[0]["content"] for prompt in found["prompt"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, None, "x"], r"column 'a' .*'x' \(str\) in line 3 of rows.jsonl, but int64 before, as in line 1"),
        ([None, "x", "y", 2.5], r"2\.5 \(float\) in line 4 of rows.jsonl, but string before, as in line 2"),
        (["x"] * 1500 + [True], r"True \(bool\) in line 1501 of rows.jsonl, but string before, as in line 1 "),
        ([1, 2**70], r"in line 2 of rows.jsonl"),
        ([["x"], "x"], r"'x' \(str\) in line 2 "),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_values_of_different_kinds_are_named_with_their_lines(tmp_path, values, message, streaming):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "p", "a": value}) + "\n" for value in values))
    with pytest.raises(ValueError, match=message):
        load_splits(str(file), streaming=streaming)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": \n', "line 2: broken JSON"),
        ('{"a": 1}\n[1]\n', "line 2: no JSON object"),
        ('{"a": "\\ud800"}', "line 1: not UTF-8 text"),
        ("\n\n", "is empty"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, text, message):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_splits(str(tmp_path / "rows.jsonl"))


def test_unknown_name():
    with pytest.raises(ValueError, match="could not be found"):
        load_splits("nobody/has-such-a-dataset")


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "prompts.csv").write_text("prompt\na b\n")
    with pytest.raises(ValueError, match=r"is a \.csv, which is not read here\. Save it as `\.jsonl`"):
        load_splits(str(tmp_path / "prompts.csv"))
