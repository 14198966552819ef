"""Checks of a run's datasets before the first step: columns, number of rows, teachers and completions.

All of them raise an error that says what to change. The form of prompts is checked by `data/rows.py` when a dataset is
loaded.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from ..config import OPDConfig
from ..config_checks import divergences_of
from ..teachers.pool import weights_of


def check_datasets(train: Any, evaluation: Any, teachers: list[str], args: OPDConfig, writers: dict[str, Any]) -> None:
    """
    All checks of the datasets of a run.

    Args:
        train: training dataset.
        evaluation: evaluation dataset, several by name, or `None`.
        teachers (`list[str]`): names of the teachers.
        args ([`OPDConfig`]): resolved.
        writers (`dict`): by name, those arguments of the trainer that take part in writing completions; `None` if not
            given.

    Raises:
        ValueError: from the first check that fails.
    """
    removed = bool(args.remove_unused_columns)
    _check_weights(teachers, args)
    if writers["environment_factory"] is None:  # an environment may own the prompts
        check_train_dataset(train, args.prompts_per_generation)
        check_eval_datasets(evaluation)
        for dataset in (train, *(evaluation.values() if isinstance(evaluation, dict) else [evaluation])):
            check_teacher_columns(dataset, teachers, args)
    elif "teacher_prompt" in (getattr(train, "column_names", None) or ()):
        raise ValueError(
            "The dataset has a `teacher_prompt` column, but environments append observations to the prompts, which "
            "the teacher would not see. Drop the column, or the environments."
        )
    if args.lmbda < 1:
        check_completions(train, [name for name, given in writers.items() if given is not None], removed)


def check_train_dataset(dataset: Any, prompts_per_generation: int) -> None:
    """
    Check that the training dataset has a `prompt` column and fills at least one generation batch.

    Args:
        dataset: `Dataset` or `IterableDataset`; for the latter only the column names are checked, if known.
        prompts_per_generation (`int`): prompts per generation batch.
    """
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        raise ValueError(
            f"The training dataset has several splits. Pass one of them: `dataset['{next(iter(dataset))}']`."
        )
    _check_prompts(dataset, "training")
    if isinstance(dataset, Dataset) and len(dataset) < prompts_per_generation:
        raise ValueError(
            f"The training dataset has {len(dataset)} prompts, but one generation batch takes "
            f"{prompts_per_generation}, and incomplete ones are dropped: not a single step would be made. Lower "
            "`per_device_train_batch_size`, `gradient_accumulation_steps` or `generation_batch_size`, or give more "
            "prompts."
        )


def check_eval_datasets(datasets: Any) -> None:
    """Check the prompts of evaluation datasets, one or several by name, now instead of at the first evaluation."""
    for dataset in datasets.values() if isinstance(datasets, dict) else [datasets]:
        _check_prompts(dataset, "evaluation")


def _check_weights(teachers: list[str], args: OPDConfig) -> None:
    """Check `teacher_weights` against the teachers that there are."""
    if args.teacher_weights is None:
        return
    found = weights_of(args.teacher_weights, teachers, "`teacher_weights`", divergences_of(args))
    if len(teachers) == 1 and found != [1.0]:
        raise ValueError(
            f"`teacher_weights` is {args.teacher_weights}, but there is only one teacher. Set `beta` to weigh it, or "
            "give several teachers by name."
        )


def check_teacher_columns(dataset: Any, names: list[str], args: OPDConfig) -> None:
    """Check that with several teachers every row says which of them scores it, or `teacher_weights` does."""
    columns = getattr(dataset, "column_names", None)
    if columns is None or not isinstance(dataset, Dataset | IterableDataset):
        return
    if args.remove_unused_columns and ("teacher_prompt" in columns or (len(names) > 1 and "teacher" in columns)):
        raise ValueError(
            "`remove_unused_columns=True` drops the columns `teacher` and `teacher_prompt` before they are read. Set "
            "it to False, as it is by default."
        )
    if len(names) > 1 and "teacher" not in columns and args.teacher_weights is None:
        raise ValueError(
            f"There are several teachers ({', '.join(names)}), but a dataset has no `teacher` column that "
            "says which of them scores a row. Add it: a name, or weights by name. Or set `teacher_weights` for all "
            "rows."
        )
    if isinstance(dataset, Dataset) and len(names) > 1 and "teacher" in columns:
        for i, value in enumerate(dataset["teacher"]):
            own = args.teacher_weights if value is None else value
            weights_of(own, names, f"Row {i} of the training dataset", divergences_of(args))


def check_completions(dataset: Any, writers: list[str], removed: bool) -> None:
    """
    Check what is needed if some batches train on the dataset's completions (`lmbda` below 1).

    Args:
        dataset: training dataset; for a stream only the column names are checked, if known.
        writers (`list[str]`): the given arguments that take part in writing completions.
        removed (`bool`): `remove_unused_columns`.
    """
    if writers:
        raise ValueError(
            f"`lmbda` below 1 trains on completions of the dataset, which were written without `{writers[0]}`. Leave "
            "it out, or set `lmbda=1`."
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
            f"{sorted(columns)}. Rename the column that has them, generate some with `trl-distill generate`, or set "
            "`lmbda=1`."
        )
    for i, row in enumerate(dataset.select_columns(["prompt", "completion"]) if isinstance(dataset, Dataset) else ()):
        prompt, completion = row["prompt"], row["completion"]
        fits = isinstance(completion, str) == isinstance(prompt, str) and bool(completion)
        if not fits or (isinstance(completion, list) and [m.get("role") for m in completion] != ["assistant"]):
            raise ValueError(
                f"Row {i} of the training dataset has the completion {completion!r}; `lmbda` below 1 needs text with a "
                "prompt that is text, or one assistant message with a prompt of messages (earlier turns belong in the "
                "prompt)."
            )


def _check_prompts(dataset: Any, purpose: str) -> None:
    if not isinstance(dataset, Dataset | IterableDataset):
        return  # TRL raises for other types
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"The {purpose} dataset is empty. Check the split and the filters that made it.")
    columns = dataset.column_names
    if columns is not None and "prompt" not in columns:
        raise ValueError(
            f"The {purpose} dataset has no 'prompt' column; it has {sorted(columns)}. Rename the column that has the "
            "prompts: `dataset.rename_column('...', 'prompt')`."
        )
