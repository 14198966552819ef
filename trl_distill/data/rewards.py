"""Reward functions outside of training: import, check and call them."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from .._trl import REWARD_ARGUMENTS
from .sampling import SampledCompletion


def import_reward(path: str) -> Callable:
    """The function with this import path; the current directory is searched too. Raises `ValueError` if it fails."""
    module_name, _, name = path.replace(":", ".").rpartition(".")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module_name or "trl.rewards"), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"The reward function {path!r} could not be imported ({error}). Write `module.function`, importable "
            "from the current directory, or the name of a function in `trl.rewards`."
        ) from None
    finally:
        sys.path.pop(0)


def check_rewards(functions: list[Any], dataset: Any) -> None:
    """
    Check that reward functions can be called with the arguments they will get, before anything is generated.

    Args:
        functions (`list`): rewards; models and functions without a readable signature are skipped.
        dataset: training dataset; nothing is checked if its columns are unknown.

    Raises:
        ValueError: a function needs an argument that does not exist, or does not accept one that is passed.
    """
    columns = getattr(dataset, "column_names", None)
    if columns is None:
        return
    columns = [name for name in columns if name not in ("prompt", "completion", "completion_ids")]
    for function in functions:
        if isinstance(function, str | nn.Module):
            continue
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # some builtins have none
            continue
        try:
            signature.bind(**dict.fromkeys([*REWARD_ARGUMENTS, *columns]))
        except TypeError as error:
            name = getattr(function, "__name__", type(function).__name__)
            raise ValueError(
                f"The reward function {name!r} cannot be called: {error}. It gets {', '.join(REWARD_ARGUMENTS)} "
                f"and the dataset's other columns ({', '.join(columns) or 'there are none'}), all by name. Accept "
                "those that it needs, and `**kwargs` for the rest."
            ) from None


RewardFunction = Callable[..., list[float | None]]


def scores(
    written: Sequence[SampledCompletion], functions: Sequence[RewardFunction], tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[float | None]]:
    """
    Scores of completions by each function, called as TRL calls them: with prompts, completions and columns.

    Args:
        written (`list` of [`~trl_distill.data.sampling.SampledCompletion`]): the completions.
        functions (`list`): reward functions.
        tokenizer: decodes the completions.

    Returns:
        `dict` by the function's name: a score for each completion, or `None`.

    Raises:
        ValueError: a function fails, or does not return a score or `None` for each completion.
    """
    rows = [row.row for row in written]
    names = rows[0] if rows else ()
    columns = {name: [row.get(name) for row in rows] for name in names if name not in ("prompt", "completion")}
    texts = [tokenizer.decode(row.completion, skip_special_tokens=True) for row in written]
    answers = [
        text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
        for row, text in zip(rows, texts, strict=True)
    ]
    by_name: dict[str, list[float | None]] = {}
    for function in functions if written else ():
        name = getattr(function, "__name__", type(function).__name__)
        given_ids = [row.completion for row in written]
        try:
            found = function(
                prompts=[row["prompt"] for row in rows], completions=answers, completion_ids=given_ids, **columns
            )
        except Exception as error:  # a user's own code
            given_to = f"the columns {', '.join(columns)}" if columns else "no columns"
            raise ValueError(
                f"The reward function {name!r} failed: {type(error).__name__}: {error}. It was given {given_to}, and "
                f"completions such as {answers[0]!r:.100}."
            ) from error
        if not isinstance(found, Sequence) or len(found) != len(written):
            raise ValueError(
                f"The reward function {name!r} returned {found!r:.100} for {len(written)} completions. Return "
                "a list with a number, or `None`, for each of them."
            )
        by_name[name] = [None if score is None else float(score) for score in found]
    return by_name
