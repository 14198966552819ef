"""One check of a dataset's rows: prompts and conversations in the form that chat templates and TRL read.

Equivalent forms are converted: text parts become text, ShareGPT's `from` and `value` become `role` and `content`, and a
whole conversation becomes prompt and completion. Anything else raises an error with the row, the column and what to
write instead. What else a run needs, such as completions, is checked in `checks/datasets.py`.

Where a dataset has images, messages keep their parts: text and images (`parts=True`).
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from datasets import Features, IterableDataset, LargeList, List, Value

from ..errors import RowError


CONVERSATIONS = ("messages", "conversations")  # columns with whole conversations, by TRL's and by ShareGPT's name


PROMPTS = ("prompt", "teacher_prompt")


COLUMNS = (*PROMPTS, "completion", *CONVERSATIONS)  # those that are checked


ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")  # that chat templates render


SHAREGPT = {"human": "user", "gpt": "assistant"}  # its other roles have the same names


EXAMPLE = "[{'role': 'user', 'content': '...'}]"


def check_row(row: dict[str, Any], where: str, parts: bool = False) -> dict[str, Any]:
    """
    A row with its prompt, completion and conversation in TRL's form; the same object if nothing changes.

    Args:
        row (`dict`): a row of a dataset. A conversation without a prompt is split before its last message if that is
            the assistant's; otherwise all of it is the prompt, and the completion is `None`.
        where (`str`): the row, for messages, such as "Row 3 of the training dataset".
        parts (`bool`): whether messages may have images, and keep their parts.

    Raises:
        RowError: the prompt or the teacher's prompt cannot be used, or a message is malformed.
    """
    name = next((name for name in CONVERSATIONS if name in row), None)
    if "prompt" not in row:
        if name is None:
            raise RowError(
                "no column `prompt` or `messages`",
                f"{where} has no column `prompt` or `messages`; it has {', '.join(row) or 'none'}. Rename the one that "
                "has the prompts.",
            )
        turns = read_messages(row[name], name, where, parts) if isinstance(row[name], list) else row[name]
        answered = isinstance(turns, list) and bool(turns) and turns[-1]["role"] == "assistant"
        rest = {key: value for key, value in row.items() if key != name}
        row = {**rest, "prompt": turns[:-1] if answered else turns, "completion": turns[-1:] if answered else None}
    changes = {}
    for column in PROMPTS:
        if column == "prompt" or row.get(column) is not None:
            changes[column] = read_prompt(row[column], column, where, parts)
    if isinstance(row.get("completion"), list):
        changes["completion"] = read_messages(row["completion"], "completion", where, parts)
    changes = {column: value for column, value in changes.items() if value is not row[column]}
    return {**row, **changes} if changes else row


def read_prompt(prompt: Any, column: str, where: str, parts: bool = False) -> Any:
    """
    A prompt as text or messages; the same object if nothing changes. With `parts`, messages may have images.

    Raises:
        RowError: it is empty, of another type, or ends with an assistant message.
    """
    shown = f"{where} has the {column.replace('_', ' ')} {prompt!r:.200}"
    rule = "a prompt is text or a list of messages, and not empty"
    drop = f"Drop such rows: `dataset.filter(lambda row: row[{column!r}])`."
    if prompt is None:
        raise RowError("no prompt", f"{shown}; {rule}. {drop}")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise RowError("empty prompt", f"{shown}; {rule}. {drop}")
        return prompt
    if not isinstance(prompt, list):
        raise RowError("prompt is neither text nor messages", f"{shown}; {rule}. Write text, or {EXAMPLE}.")
    prompt = read_messages(prompt, column, where, parts)
    if prompt and prompt[-1]["role"] == "assistant":
        raise RowError(
            "prompt ends with an assistant's message",
            f"{where} has a {column.replace('_', ' ')} that ends with an assistant message, after which a rollout "
            "would begin another turn. Let prompts end with the user's message, and put an answer, or the beginning of "
            "one, into the column `completion`.",
        )
    if not prompt or _is_empty(prompt[-1].get("content")):
        raise RowError("empty prompt", f"{shown}; {rule}: the last message must have text. {drop}")
    return prompt


def _is_empty(content: Any) -> bool:
    """Whether a message has neither text nor an image."""
    if not isinstance(content, list):
        return not (content or "").strip()
    return not any(part.get("type") == "image" or (part.get("text") or "").strip() for part in content)


def read_messages(messages: list[Any], column: str, where: str, parts: bool = False) -> list[dict[str, Any]]:
    """
    Messages with `role` and text as `content`; the same object if nothing changes. With `parts`, content that is given
    as parts stays so.

    Raises:
        RowError: an element is not a message, has an unknown role, or has content other than text (or, with `parts`,
            images).
    """
    found = [_message(message, column, where, parts) for message in messages]
    return messages if all(new is old for new, old in zip(found, messages, strict=True)) else found


def _message(message: Any, column: str, where: str, parts: bool) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, dict) else None
    if isinstance(message, dict) and role is None and isinstance(message.get("from"), str):
        rest = {key: value for key, value in message.items() if key not in ("from", "value", "role", "content")}
        role = SHAREGPT.get(message["from"], message["from"])
        message = {"role": role, "content": message.get("value"), **rest}
    if not isinstance(role, str):
        raise RowError(
            f"{'completion' if column == 'completion' else 'prompt'} is neither text nor messages",
            f"{where} has {message!r:.100} in the list {column!r}, which is not a message. Write {EXAMPLE}, or plain "
            "text in the place of the list.",
        )
    if role not in ROLES:
        raise RowError(
            f"unknown role {role!r}",
            f"{where} has a message of the role {role!r} in {column!r}, which chat templates do not render. Write one "
            f"of {', '.join(ROLES[:5])}.",
        )
    content = message.get("content")
    if content is None or isinstance(content, str):
        return message
    if parts and _are_parts(content):
        return message
    text = flat_parts(content)
    if text is None:
        raise RowError(
            "content that is not text",
            f"{where} has the content {content!r:.200} in {column!r}, which is not text"
            + (" and images: write text, or " if parts else " alone. Only text is read here: write text, or ")
            + "parts such as [{'type': 'text', 'text': '...'}]"
            + ("." if parts else ", and drop rows with images."),
        )
    return {**message, "content": text}


def _are_parts(content: Any) -> bool:
    """Whether a message's content is a list of text and images."""
    return isinstance(content, list) and all(
        isinstance(part, dict)
        and (part.get("type") == "image" or (part.get("type") == "text" and isinstance(part.get("text"), str)))
        for part in content
    )


def flat_parts(content: Any) -> str | None:
    """The text of a message's content that is given as parts; `None` if one of them is not text."""
    if not isinstance(content, list):
        return None
    texts: list[Any] = [
        part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part for part in content
    ]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None


def with_flat_parts(row: dict[str, Any]) -> dict[str, Any]:
    """A row with text instead of text parts in its messages; a column of a table cannot have both."""
    changed = {}
    for column in COLUMNS:
        if isinstance(row.get(column), list):
            changed[column] = [_with_flat_parts(message) for message in row[column]]
    return {**row, **changed} if changed else row


def _with_flat_parts(message: Any) -> Any:
    text = flat_parts(message.get("content")) if isinstance(message, dict) else None
    return message if text is None else {**message, "content": text}


def check_rows(dataset: Any, name: str, parts: bool = False) -> Any:
    """
    A dataset with every row as [`check_row`] returns it: checked at once, or for a stream when it is read.

    Args:
        dataset (`Dataset` or `IterableDataset`): with known columns.
        name (`str`): for messages, such as "the training dataset".
        parts (`bool`): whether messages may have images, and keep their parts.

    Raises:
        RowError: for the first row that cannot be used; for a stream when that row is read.
    """
    check = partial(_check_numbered, name=name, parts=parts)
    if dataset.features is None:  # a stream whose columns are unknown until it is read
        return dataset.map(check, with_indices=True)
    features = converted_features(dataset.features, parts)
    drop = [column for column in dataset.features if column not in features]
    if isinstance(dataset, IterableDataset):
        return dataset.map(check, with_indices=True, remove_columns=drop, features=features)
    columns = [column for column in COLUMNS if column in dataset.column_names]
    changed, number = False, 0
    for part in dataset.with_format(None).select_columns(columns).iter(batch_size=1000):
        for values in zip(*part.values(), strict=True):
            row = dict(zip(part, values, strict=True))
            changed |= check(row, number) is not row
            number += 1
    return dataset.map(check, with_indices=True, remove_columns=drop, features=features) if changed else dataset


def _check_numbered(row: dict[str, Any], number: int, name: str, parts: bool) -> dict[str, Any]:
    return check_row(row, f"Row {number} of {name}", parts)


def converted_features(features: Features, parts: bool = False) -> Features:
    """The types of a dataset's columns after [`check_row`]."""
    found: dict[str, Any] = dict(features)
    name = next((name for name in CONVERSATIONS if name in found), None)
    if "prompt" not in found and name is not None:
        turns = found.pop(name)
        found |= {"prompt": turns, "completion": turns}
    return Features({name: _converted(kind, parts) if name in COLUMNS[:3] else kind for name, kind in found.items()})


def _converted(kind: Any, parts: bool) -> Any:
    """The type of messages with text as content, or with the parts that it has; other types are unchanged."""
    fields = getattr(kind, "feature", None)
    if not isinstance(kind, List | LargeList) or not isinstance(fields, dict):
        return kind
    rest = {name: value for name, value in fields.items() if name not in ("from", "value", "role", "content")}
    content = fields.get("content") if parts else None
    return List({"role": Value("string"), "content": content or Value("string"), **rest})


def tools_of(tools: Any) -> list[Any] | None:
    """A row's `tools` in the form for chat templates; in TRL's datasets it is a list or JSON text."""
    return (json.loads(tools) if isinstance(tools, str) and tools else tools) or None
