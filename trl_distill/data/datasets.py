"""What scripts name on the command line: datasets (a local file, a local folder or one on the hub) and rewards.

What the trainer needs of a dataset is checked in `checks.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError


JSON_SUFFIXES = (".jsonl", ".json")


def load_splits(name: str, config: str | None = None, streaming: bool = False) -> Any:
    """
    All splits of a dataset.

    Args:
        name (`str`): a `.jsonl` file (one object per line, split "train"), a folder that `save_to_disk` wrote, a
            folder of data files, or a name on the hub.
        config (`str`, *optional*): the configuration, for the last two.
        streaming (`bool`): read while training instead of beforehand.

    Returns:
        `DatasetDict` or `IterableDatasetDict`.

    Raises:
        ValueError: nothing is found under that name, or a file cannot be read.
    """
    path = Path(name)
    try:
        if path.suffix in JSON_SUFFIXES:
            if not path.is_file():
                raise ValueError(f"The dataset file {name!r} does not exist.")
            if path.stat().st_size == 0:
                raise ValueError(f"The dataset file {name!r} is empty.")
            return load_dataset("json", data_files={"train": str(path)}, streaming=streaming)
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
        return load_dataset(name, name=config, streaming=streaming)
    except DatasetGenerationError as error:
        raise ValueError(
            f"The dataset {name!r} could not be read: {error.__cause__ or error}. A `.jsonl` file holds one JSON "
            "object per line, all with the same keys."
        ) from None
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"The dataset {name!r} could not be found: it is no local file or folder, and the hub did not give it. "
            f"({error})"
        ) from None


def with_prompts(dataset: Any) -> Any:
    """
    A dataset of whole conversations (a `messages` column, no `prompt`) as prompts and completions; others as they are.

    The completion is the last message, where the assistant has written it, and the prompt everything before; where the
    user has the last word there is none.

    Args:
        dataset: `Dataset`, `IterableDataset`, several of them by name, or anything else, which passes through.
    """
    if isinstance(dataset, dict):
        return type(dataset)({name: with_prompts(single) for name, single in dataset.items()})
    columns = getattr(dataset, "column_names", None)
    if not isinstance(dataset, Dataset | IterableDataset) or columns is None:
        return dataset
    if "messages" not in columns or "prompt" in columns:
        return dataset
    return dataset.map(_split_messages, remove_columns=["messages"])


def _split_messages(row: dict[str, Any]) -> dict[str, Any]:
    messages = row["messages"] or []
    answered = bool(messages) and messages[-1]["role"] == "assistant"
    return {
        "prompt": messages[:-1] if answered else messages,
        "completion": messages[-1:] if answered else None,
    }


def take_split(splits: Any, split: str, purpose: str) -> Any:
    """One split, or a `ValueError` that lists those that exist."""
    if split not in splits:
        raise ValueError(
            f"The dataset has no split {split!r} for {purpose}; it has {', '.join(splits)}. Name one of them with "
            f"`--dataset_{'train' if purpose == 'training' else 'test'}_split`."
        )
    return splits[split]
