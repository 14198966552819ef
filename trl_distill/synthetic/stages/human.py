"""Human data: rows in any of TRL's usual shapes become prompt and completion, and are mixed in at an exact share.

Where the rows come from is left to `ingest.py`; duplicates are looked for by the caller.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from ...data.json_rows import InputRow
from ...data.rows import CONVERSATIONS, RowError, read_messages, read_prompt
from ...server_urls import without_login
from ..text import Text, flat
from .ingest import read_rows


HUMAN = "human"  # what the column `teacher` says


def read_human(found: InputRow, text: bool) -> dict[str, Any] | str:
    """
    A row with `prompt` and `completion`, or why there is none.

    Args:
        found (`InputRow`): a row with these columns, or with `messages` that end with the assistant's.
        text (`bool`): whether the teachers' rows are text. Text becomes messages where they are not; messages cannot
            become text, since that would guess a template.
    """
    row = found.row
    if row is None:
        return str(found.fault)
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
    elif turns := next((row[name] for name in CONVERSATIONS if isinstance(row.get(name), list)), None):
        prompt, completion = turns[:-1], turns[-1:]
    else:
        return "no columns `prompt` and `completion`, nor `messages`"
    try:
        prompt = read_prompt(prompt, "prompt", found.where)
        completion = _read_completion(completion, found.where)
    except RowError as error:
        return error.reason
    if isinstance(prompt, str) != isinstance(completion, str):
        return "prompt and completion are not both text or both messages"
    if text and not isinstance(prompt, str):
        return "messages, where the teachers' prompts are text"
    return {"prompt": _shape(prompt, "user", text), "completion": _shape(completion, "assistant", text)}


def check_human(name: str, text: bool) -> None:
    """
    Look at the first rows before any teacher is asked.

    Raises:
        ValueError: there is no such dataset, or none of its first rows can be used.
    """
    first = [read_human(found, text) for found in islice(read_rows(name), 100)]
    if all(isinstance(row, str) for row in first):
        why = f"none of its first {len(first)} rows can be used: {first[0]}" if first else "it has no rows"
        raise ValueError(
            f"The human data {without_login(name)!r} cannot be mixed in: {why}. Rows need `prompt` and `completion`, "
            "or `messages` that end with the assistant's, as text or messages like the teachers' prompts."
        )


def _read_completion(completion: Any, where: str) -> Text:
    """A completion as text, or as one message of the assistant."""
    if isinstance(completion, list):
        completion = read_messages(completion, "completion", where)
        if [message["role"] for message in completion] != ["assistant"]:
            raise RowError("completion is not one message of the assistant", where)
    said = completion[0].get("content") if isinstance(completion, list) else completion
    if not isinstance(said, str) or not said.strip():
        raise RowError("empty completion", where)
    return completion


def _shape(value: Text, role: str, text: bool) -> Text:
    if isinstance(value, str):
        return value if text else [{"role": role, "content": value}]
    return [{"role": message["role"], "content": message.get("content") or ""} for message in value]


def human_needed(synthetic: int, share: float) -> int:
    """How many human rows make up that share of all rows, to the nearest."""
    return round(synthetic * share / (1 - share))


def mixed(
    synthetic: Iterable[dict[str, Any]],
    count: int,
    human: Iterable[dict[str, Any]],
    available: int,
    take: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """
    `count` synthetic rows in their order, with `take` of the `available` human rows spread evenly at random among them.

    Both choices are made row by row (Knuth's algorithm S), so that nothing but the current row is in memory.
    """
    draw, chosen, ours = random.Random(seed), _sample(human, available, take, random.Random(seed + 1)), iter(synthetic)
    while count or take:
        if draw.random() * (count + take) < take:
            take -= 1
            yield next(chosen)
        else:
            count -= 1
            yield next(ours)


def _sample(rows: Iterable[dict[str, Any]], available: int, take: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    """`take` of `available` rows, each choice of rows equally likely, in their order."""
    for row in rows:
        if draw.random() * available < take:
            take -= 1
            yield row
        available -= 1


def text_of(row: dict[str, Any]) -> tuple[str, str]:
    """Prompt and completion as text, to look for duplicates; of a pair, both completions."""
    answers = [row[name] for name in ("completion", "chosen", "rejected") if name in row]
    return flat(row["prompt"]), "\n".join(map(flat, answers))
