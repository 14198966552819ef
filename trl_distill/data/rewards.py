"""Reward functions: import and check them, call them outside of training, and look at what they return in training."""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerState

from .._trl import REWARD_ARGUMENTS
from ..objective.user_functions import import_by_path
from .images import prompt_of
from .sampling import SampledCompletion, answer_texts


logger = logging.getLogger(__name__)


def import_reward(path: str) -> Callable:
    """
    The reward function with this import path; the current directory is searched too.

    Args:
        path (`str`): "module.function", or the name of a function in `trl.rewards`. An object that can be called is a
            function, too, and of a class an instance is made, without arguments.

    Raises:
        ValueError: there is none, or it cannot be called.
    """
    found = import_by_path(path, "reward function", default_module="trl.rewards")
    if inspect.isclass(found):
        try:
            found = found()
        except TypeError as error:
            raise ValueError(
                f"The reward function {path!r} is a class that cannot be made without arguments ({error}). Make an "
                "instance in that module, and name the instance."
            ) from None
    if not callable(found):
        raise ValueError(f"The reward function {path!r} is {found!r:.100}, which cannot be called. Name a function.")
    return found


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
            raise ValueError(
                f"The reward function {name_of_reward(function)!r} cannot be called: {error}. It gets "
                f"{', '.join(REWARD_ARGUMENTS)} and the dataset's other columns "
                f"({', '.join(columns) or 'there are none'}), all by name. Accept "
                "those that it needs, and `**kwargs` for the rest."
            ) from None


def checked_reward(function: Any) -> Any:
    """
    A reward function as training calls it, with an error that names it where TRL cannot use what it returns.

    Args:
        function: a reward function, sync or async; of a reward model nothing changes.

    Returns:
        One that returns the same. It raises `ValueError` if that is not a list with a number, or `None`, for each
        completion.
    """
    if isinstance(function, nn.Module):
        return function
    name, bare = name_of_reward(function), function
    while isinstance(bare, functools.partial):
        bare = bare.func
    if inspect.iscoroutinefunction(bare) or inspect.iscoroutinefunction(type(bare).__call__):

        async def later(**given: Any) -> Any:
            return _usable(name, await function(**given), len(given["prompts"]))

        return later

    def at_once(**given: Any) -> Any:
        return _usable(name, function(**given), len(given["prompts"]))

    return at_once


def _usable(name: str, found: Any, completions: int) -> Any:
    """What a reward function returned, if TRL can make rewards of it."""
    values = _values_of(name, found, completions)
    if not _are_numbers(values):
        value = next((value for value in values if not _are_numbers([value])), values[0])
        raise ValueError(
            f"The reward function {name!r} returned {_shown(value)} of type {type(value).__name__} as a reward. Return "
            "a `float` for each completion, or `None` where it has none."
        )
    return values


def _are_numbers(values: list[Any]) -> bool:
    """Whether TRL can make a tensor `(B,)` of rewards; `None` becomes NaN."""
    try:
        return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float32).ndim == 1
    except (TypeError, ValueError, RuntimeError):
        return False


def _values_of(name: str, found: Any, completions: int) -> list[Any]:
    """The values in what a reward function returned, one for each completion."""
    if isinstance(found, set | frozenset):
        raise ValueError(
            f"The reward function {name!r} returned a set, {found!r:.100}. It has no order, so it cannot be told which "
            "completion a score belongs to. Return a list."
        )
    try:
        values = None if isinstance(found, str | bytes | Mapping) else [*found]
    except TypeError:
        values = None
    if values is None or len(values) != completions:
        raise ValueError(
            f"The reward function {name!r} returned {found!r:.100} for {completions} completions. Return a list with "
            "a number, or `None`, for each of them."
        )
    return values


RewardFunction = Callable[..., Any]
"""What TRL takes: a function, sync or async, or an object that is called like one. It returns a score for each row."""


LARGEST = float(np.finfo(np.float32).max)  # training keeps rewards in fp32


_WARNED: dict[tuple[str, int], Any] = {}  # functions whose dropped scores were named; kept, so that no id comes twice


def name_of_reward(function: Any) -> str:
    """A reward function's name as in TRL: the function's own, also of a partial one, or an object's class."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def as_score(value: Any) -> float | None:
    """
    One score as a number; `None` for what is not a finite number in fp32.

    In training, `None` and NaN are no score, too, but an infinite reward ends the run.

    Args:
        value: a number, a boolean, or an array or tensor with one element. Text is not a number.
    """
    try:
        value = value.item() if hasattr(value, "item") else value
        if isinstance(value, str | bytes | bytearray):  # `float` would read it
            return None
        number = float(value)
    except Exception:  # a user's object may raise anything
        return None
    return number if abs(number) <= LARGEST else None  # false for NaN


def call_reward(
    function: RewardFunction, completions: int, given: dict[str, Any], name: str | None = None
) -> list[float | None]:
    """
    Call a reward function as TRL does; async functions are waited for.

    Args:
        function: the reward function.
        completions (`int`): number of completions.
        given (`dict`): arguments by name: "prompts", "completions", "completion_ids" and the dataset's columns. What
            training would pass besides (`trainer_state`, `log_extra`, `log_metric`) is added. A function without
            `**kwargs` gets only the arguments that it names.
        name (`str`, *optional*): its name in messages.

    Returns:
        `list[float | None]`: a finite number for each completion, or `None` for no score, see [`as_score`].

    Raises:
        ValueError: the function fails, returns a set, which has no order, or does not return one value for each
            completion.
    """
    name = name or name_of_reward(function)
    try:
        found = function(**_accepted(function, given))
        if inspect.isawaitable(found):
            found = asyncio.run_coroutine_threadsafe(_awaited(found), _event_loop(os.getpid())).result()
        found = found if isinstance(found, str | bytes | Mapping | set | frozenset | None) else [*found]
    except Exception as error:  # a user's own code
        columns = [key for key in given if key not in REWARD_ARGUMENTS]
        given_to = f"the columns {', '.join(columns)}" if columns else "no columns"
        first = next(iter(given.get("completions", ())), None)
        raise ValueError(
            f"The reward function {name!r} failed: {type(error).__name__}: {error}. It was given {given_to}, and "
            f"completions such as {first!r:.100}."
        ) from error
    values = _values_of(name, found, completions)
    numbers = [as_score(value) for value in values]
    dropped = [value for value, number in zip(values, numbers, strict=True) if number is None and not _is_none(value)]
    if dropped and (name, id(function)) not in _WARNED:
        _WARNED[name, id(function)] = function
        logger.warning(
            f"The reward function {name!r} returned {len(dropped)} of {completions} scores that are no finite numbers, "
            f"such as {_shown(dropped[0])} of type {type(dropped[0]).__name__}. They count as no score. Return a "
            "`float` for each completion, or `None`."
        )
    return numbers


def _is_none(value: Any) -> bool:
    """Whether a function says that it has no score: `None` or NaN."""
    try:
        return value is None or bool(value != value)
    except Exception:  # arrays, and a user's object
        return False


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.100}"
    except Exception:  # a user's object
        return "a value"


def _accepted(function: RewardFunction, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a function takes."""
    given = {**given, "trainer_state": TrainerState(), "log_extra": _unlogged, "log_metric": _unlogged}
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have none
        return given
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return given
    names = {parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY}
    return {name: value for name, value in given.items() if name in names}


def _unlogged(*_: Any, **__: Any) -> None:
    """In the place of TRL's functions that log for a reward function: there is no log."""


async def _awaited(found: Any) -> Any:
    return await found


@functools.cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """A process's event loop for all calls, as in training: open connections of a function belong to one loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async reward functions", daemon=True).start()
    return loop


def scores(
    written: Sequence[SampledCompletion], functions: Sequence[RewardFunction], tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[float | None]]:
    """
    Scores of completions by each function, called as TRL calls them: with prompts, completions and columns.

    Args:
        written (`list` of [`~trl_distill.data.sampling.SampledCompletion`]): the completions.
        functions (`list`): reward functions.
        tokenizer: decodes the completions, see [`~trl_distill.data.sampling.answer_texts`].

    Returns:
        `dict` by the function's name, numbered if several have the same: a score for each completion, or `None`.

    Raises:
        ValueError: a function fails, or does not return one value for each completion.
    """
    rows = [row.row for row in written]
    names = dict.fromkeys(name for row in rows for name in row if name not in ("prompt", "completion"))
    stops = {token for row in written if not row.truncated for token in row.completion[-1:]}
    texts = answer_texts(tokenizer, [row.completion for row in written], stops)
    given = {
        **{name: [row.get(name) for row in rows] for name in names},
        "prompts": [prompt_of(row) for row in rows],
        "completions": [
            text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
            for row, text in zip(rows, texts, strict=True)
        ],
        "completion_ids": [row.completion for row in written],
    }
    by_name: dict[str, list[float | None]] = {}
    for function in functions if written else ():
        name = name_of_reward(function)
        numbered = itertools.chain([name], (f"{name} {i}" for i in itertools.count(2)))
        free = next(one for one in numbered if one not in by_name)
        by_name[free] = call_reward(function, len(written), given, name)
    return by_name
