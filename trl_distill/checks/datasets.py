"""What a run needs of its datasets before the first step: columns, their number of rows, teachers and completions.

All of it stops the run with what to change. That rows hold prompts is checked where datasets are taken in, by
`data/rows.py`; what is checked of models and tokenizers is beside this file.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from ..config import OPDConfig
from ..teachers.pool import weights_of


def check_datasets(train: Any, evaluation: Any, teachers: list[str], args: OPDConfig, writers: dict[str, Any]) -> None:
    """
    All checks of one run.

    Args:
        train: dataset for training.
        evaluation: for evaluation, one or several by name, or `None`.
        teachers (`list[str]`): their names.
        args ([`OPDConfig`]): resolved.
        writers (`dict`): arguments of the trainer that take part in writing a completion, by name; `None` where not
            given.

    Raises:
        ValueError: at the first that fails.
    """
    removed = bool(args.remove_unused_columns)
    if writers["environment_factory"] is None:  # an environment may own the prompts
        check_train_dataset(train, args.prompts_per_generation)
        check_eval_datasets(evaluation)
        for dataset in (train, *(evaluation.values() if isinstance(evaluation, dict) else [evaluation])):
            check_teacher_columns(dataset, teachers, removed)
    elif "teacher_prompt" in (getattr(train, "column_names", None) or ()):
        raise ValueError(
            "The dataset has a `teacher_prompt` column, but environments add to the prompts what is observed, which "
            "the teacher would not be shown. Drop the column, or the environments."
        )
    if args.lmbda < 1:
        check_completions(train, [name for name, given in writers.items() if given is not None], removed)


def check_train_dataset(dataset: Any, prompts_per_generation: int) -> None:
    """
    A training dataset must have a `prompt` column and fill at least one generation batch.

    Args:
        dataset: `Dataset` or `IterableDataset`; of the latter only the column names, where known, are checked.
        prompts_per_generation (`int`): prompts that one generation batch takes.
    """
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        raise ValueError(f"The training dataset has several splits. Take one: `dataset['{next(iter(dataset))}']`.")
    _check_prompts(dataset, "training")
    if isinstance(dataset, Dataset) and len(dataset) < prompts_per_generation:
        raise ValueError(
            f"The training dataset has {len(dataset)} prompts, but one generation batch takes "
            f"{prompts_per_generation}, and incomplete ones are dropped: not a single step would be made. Lower "
            "`per_device_train_batch_size`, `gradient_accumulation_steps` or `generation_batch_size`, or give more "
            "prompts."
        )


def check_eval_datasets(datasets: Any) -> None:
    """Evaluation datasets, one or several by name, need prompts too: found out now, not at the first evaluation."""
    for dataset in datasets.values() if isinstance(datasets, dict) else [datasets]:
        _check_prompts(dataset, "evaluation")


def check_teacher_columns(dataset: Any, names: list[str], removed: bool = False) -> None:
    """With several teachers, every row must say which of them scores it."""
    columns = getattr(dataset, "column_names", None)
    if columns is None or not isinstance(dataset, Dataset | IterableDataset):
        return
    if removed and ("teacher_prompt" in columns or len(names) > 1):
        raise ValueError(
            "`remove_unused_columns=True` drops the columns `teacher` and `teacher_prompt` before they are read. Set "
            "it to False, as it is by default."
        )
    if len(names) > 1 and "teacher" not in columns:
        raise ValueError(
            f"There are several teachers ({', '.join(names)}), but a dataset has no `teacher` column that "
            "says who judges a row: a name, or weights by name."
        )
    if isinstance(dataset, Dataset) and len(names) > 1:
        for i, value in enumerate(dataset["teacher"]):
            weights_of(value, names, f"Row {i} of the training dataset")


def check_completions(dataset: Any, writers: list[str], removed: bool) -> None:
    """
    What is needed where some batches train on the dataset's completions (`lmbda` below 1).

    Args:
        dataset: for training; of a stream only the column names, where known, are checked.
        writers (`list[str]`): arguments that were given and that take part in writing a completion.
        removed (`bool`): `remove_unused_columns`.
    """
    if writers:
        raise ValueError(
            f"`lmbda` below 1 trains on completions of the dataset, which `{writers[0]}` had no part in. Leave it out, "
            "or set `lmbda=1`."
        )
    if removed:
        raise ValueError(
            "`remove_unused_columns=True` drops the column `completion` before it is read. Set it to False, as it is "
            "by default."
        )
    columns = getattr(dataset, "column_names", None)
    if columns is None:
        return
    if "completion" not in columns:
        raise ValueError(
            f"`lmbda` below 1 trains on the dataset's `completion` column, but the training dataset has only "
            f"{sorted(columns)}. Rename the column that holds them, write some with scripts/generate.py, or set "
            "`lmbda=1`."
        )
    for i, row in enumerate(dataset.select_columns(["prompt", "completion"]) if isinstance(dataset, Dataset) else ()):
        prompt, completion = row["prompt"], row["completion"]
        fits = isinstance(completion, str) == isinstance(prompt, str) and bool(completion)
        if not fits or (isinstance(completion, list) and [m.get("role") for m in completion] != ["assistant"]):
            raise ValueError(
                f"Row {i} of the training dataset has the completion {completion!r}; `lmbda` below 1 needs text beside "
                "a prompt that is text, or one assistant message beside messages (earlier turns belong into the "
                "prompt)."
            )


def _check_prompts(dataset: Any, purpose: str) -> None:
    if not isinstance(dataset, Dataset | IterableDataset):
        return  # TRL says what it takes
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"The {purpose} dataset is empty. Check the split and the filters that made it.")
    columns = dataset.column_names
    if columns is not None and "prompt" not in columns:
        raise ValueError(
            f"The {purpose} dataset has no 'prompt' column; it has {sorted(columns)}. Rename the column that holds the "
            "prompts: `dataset.rename_column('...', 'prompt')`."
        )
