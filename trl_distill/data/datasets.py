"""Loads datasets by the name given to a command: a local file, a local folder, or a dataset on the hub.

JSON files are read by `json_rows.py`, and rows are checked by `rows.py`. What else a training run needs is checked in
`checks/datasets.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from .json_rows import SUFFIXES, load_json
from .rows import CONVERSATIONS, check_rows


def load_splits(name: str, config: str | None = None, streaming: bool = False) -> Any:
    """
    All splits of a dataset.

    Args:
        name (`str`): a `.jsonl` file (one object per line) or a `.json` file (also a list of objects), as split
            "train"; a folder written by `save_to_disk`; a folder of data files; or a name on the hub. In local JSON,
            text that looks like a date stays text.
        config (`str`, *optional*): the dataset's configuration, for a folder of data files or the hub.
        streaming (`bool`): read while training instead of beforehand.

    Returns:
        `DatasetDict` or `IterableDatasetDict`.

    Raises:
        ValueError: there is no such dataset, or a file cannot be read.
    """
    path = Path(name)
    try:
        if path.suffix in SUFFIXES:
            if not path.is_file():
                raise ValueError(f"The dataset file {name!r} does not exist.")
            if path.stat().st_size == 0:
                raise ValueError(f"The dataset file {name!r} is empty.")
            return load_json({"train": [path]}, streaming)
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            dataset = load_from_disk(name)
            return dataset if isinstance(dataset, DatasetDict) else DatasetDict(train=dataset)
        if path.is_file():
            raise ValueError(
                f"The dataset {name!r} is a {path.suffix or 'file without a suffix'}, which is not read here. Save it "
                "as `.jsonl` or `.json` (`datasets.load_dataset('csv', ...)`, then `to_json`), or as a folder "
                "(`save_to_disk`)."
            )
        if path.is_dir() and not any(path.iterdir()):
            raise ValueError(f"The dataset folder {name!r} is empty.")
        if path.is_dir() and (files := _json_files(name, config)):
            return load_json(files, streaming)
        return load_dataset(name, name=config, streaming=streaming)
    except DatasetGenerationError as error:
        raise ValueError(f"The dataset {name!r} could not be read: {error.__cause__ or error}.") from None
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"The dataset {name!r} could not be found: it is not a local file or folder, and the hub does not have it. "
            f"({error})"
        ) from None


def _json_files(folder: str, config: str | None) -> dict[str, list[Path]]:
    """The files of each split of a local folder, as `datasets` assigns them; none if some are not plain JSON."""
    if not any(path.suffix in SUFFIXES for path in Path(folder).rglob("*")):
        return {}
    found: Any = load_dataset_builder(folder, name=config).config.data_files or {}
    files = {str(split): [Path(path) for path in paths] for split, paths in found.items()}
    plain = all(path.suffix in SUFFIXES and path.is_file() for paths in files.values() for path in paths)
    return files if plain else {}


def with_prompts(dataset: Any, name: str = "the dataset", check: bool = True, parts: bool = False) -> Any:
    """
    A dataset with checked rows, in the form of prompts and completions; see [`~trl_distill.data.rows.check_row`].

    Args:
        dataset: `Dataset`, `IterableDataset`, or several of them by name. Anything else, and a dataset without a column
            for prompts, is returned unchanged.
        name (`str`): its name in messages, such as "the training dataset".
        check (`bool`): without it, a dataset with a `prompt` column is returned unchanged, for TRL to judge.
        parts (`bool`): whether messages may have images, and keep their parts.

    Raises:
        RowError: a row cannot be used; for a stream this is raised when it is read.
    """
    if isinstance(dataset, dict):
        return type(dataset)({split: with_prompts(single, name, check, parts) for split, single in dataset.items()})
    if not isinstance(dataset, Dataset | IterableDataset):
        return dataset
    columns = dataset.column_names
    if columns is not None and not {"prompt", *CONVERSATIONS}.intersection(columns):
        return dataset
    if not check and columns is not None and "prompt" in columns:
        return dataset
    return check_rows(dataset, name, parts)


def take_split(splits: Any, split: str, purpose: str) -> Any:
    """One split of a dataset; raises `ValueError` with the existing ones if there is none of this name."""
    if split not in splits:
        raise ValueError(
            f"The dataset has no split {split!r} for {purpose}; it has {', '.join(splits)}. Name one of them with "
            f"`--dataset_{'train' if purpose == 'training' else 'test'}_split`."
        )
    return splits[split]
