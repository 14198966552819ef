"""Images in a dataset's rows, and prompts with images as a processor turns them into token ids and pixels.

Images are where TRL takes them from: a column `image` or `images`, or parts of messages.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from PIL import Image as PILImage
from transformers import ProcessorMixin

from .._trl import prepare_multimodal_messages
from ..images import KINDS, EncodedPrompt
from .rows import CONVERSATIONS, tools_of


COLUMNS = ("image", "images")  # of a dataset


def is_processor(tokenizer: Any) -> bool:
    """Whether this is the processor of a vision-language model, with a tokenizer in it."""
    return isinstance(tokenizer, ProcessorMixin)


def images_of(row: dict[str, Any]) -> list[Any]:
    """The images in a row's columns; those in messages are not among them."""
    if row.get("images"):
        return list(row["images"])
    return [] if row.get("image") is None else [row["image"]]


def pictures_of(row: dict[str, Any]) -> list[Any]:
    """All images of a row's prompt, in the order in which it is read; see [`tidy_row`]."""
    prompt = prompt_of(row)
    if not isinstance(prompt, list):
        return []
    parts = [part for message in prompt if isinstance(message.get("content"), list) for part in message["content"]]
    return [part["image"] for part in parts if part.get("type") == "image"]


def in_messages(prompt: Any) -> bool:
    """Whether a prompt has an image, or a place for one, in its messages."""
    return isinstance(prompt, list) and any(
        isinstance(part, dict) and part.get("type") == "image"
        for message in prompt
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        for part in message["content"]
    )


def has_images(row: dict[str, Any]) -> bool:
    """Whether a row has an image for its prompt."""
    return bool(images_of(row)) or in_messages(row.get("prompt"))


def shows_images(dataset: Any) -> bool:
    """Whether a dataset has images, in any row; of a stream, whether it has columns for them."""
    columns = getattr(dataset, "column_names", None) or ()
    if not isinstance(dataset, Dataset):
        return isinstance(dataset, IterableDataset) and any(name in columns for name in COLUMNS)
    return any(
        _any_image(part[name])
        for name in (*COLUMNS, "prompt", *CONVERSATIONS)
        if name in columns
        for part in dataset.select_columns([name]).with_format("arrow").iter(batch_size=1000)
    )


def _any_image(values: pa.ChunkedArray) -> bool:
    """Whether a column has an image: a picture, a list of pictures, or messages with a part of the type "image"."""
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        values = values.flatten()
    if not pa.types.is_struct(values.type):
        return False  # prompts that are text
    fields = {field.name for field in values.type}
    if "content" in fields:
        return _any_image(values.field("content").filter(values.is_valid()))
    if "type" in fields:
        return pc.any(pc.equal(values.field("type"), "image")).as_py() or False
    return len(values) > values.null_count


def tidy_row(row: dict[str, Any]) -> dict[str, Any]:
    """
    A row whose messages have no parts with empty fields, which Arrow adds, and images as pictures.

    The same object if nothing changes.
    """
    changed = {}
    for column in ("prompt", "teacher_prompt", "completion"):
        if isinstance(row.get(column), list) and _in_parts(row[column]):
            changed[column] = [_tidy_message(message) for message in row[column]]
    if row.get("images"):
        changed["images"] = [picture(image) for image in row["images"]]
    if isinstance(row.get("image"), dict):
        changed["image"] = picture(row["image"])
    return {**row, **changed} if changed else row


def _in_parts(messages: list[Any]) -> bool:
    return any(isinstance(message, dict) and isinstance(message.get("content"), list) for message in messages)


def _tidy_message(message: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(message.get("content"), list):
        return message
    parts = [{name: value for name, value in part.items() if value is not None} for part in message["content"]]
    return {**message, "content": [{**p, "image": picture(p["image"])} if "image" in p else p for p in parts]}


def picture(image: Any) -> Any:
    """A PIL image from what Arrow stores (`{"bytes": ..., "path": ...}`); anything else unchanged."""
    if not (isinstance(image, dict) and {"bytes", "path"} & set(image)):
        return image
    source = BytesIO(image["bytes"]) if image.get("bytes") else image.get("path")
    return image if source is None else PILImage.open(source)


def prompt_of(row: dict[str, Any], column: str = "prompt") -> Any:
    """
    A row's prompt with its images as parts of the first user message, as TRL shows it to the student.

    The teacher's own prompt (`column="teacher_prompt"`) gets the row's images too, unless it has images itself.

    Args:
        row (`dict`): see [`tidy_row`].
        column (`str`): "prompt" or "teacher_prompt".

    Returns:
        Text, messages, or `None` if the row has no such prompt.
    """
    prompt, images = row.get(column), images_of(row)
    if column != "prompt" and prompt and not images:
        images = pictures_of(row)
    if isinstance(prompt, str) and images:
        raise ValueError(
            f"A row has images, and the {column.replace('_', ' ')} {prompt[:100]!r}, which is text. Write it as "
            "messages, [{'role': 'user', 'content': ...}], so that the chat template says where the images stand."
        )
    if not isinstance(prompt, list) or not (images or in_messages(prompt)):
        return prompt
    parts = [part for message in prompt if isinstance(message.get("content"), list) for part in message["content"]]
    shown = [part for part in parts if part.get("type") == "image"]
    if any(part.get("image") is not None for part in shown):
        return prepare_multimodal_messages(prompt)
    try:
        return prepare_multimodal_messages(prompt if shown else _with_places(prompt, len(images)), images=images)
    except ValueError as error:
        raise ValueError(f"{error} In the {column.replace('_', ' ')} {prompt!r:.300}.") from None


def _with_places(messages: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Messages with places for so many images, before the text of the first user message, if that is given as parts."""
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None or not isinstance(messages[first]["content"], list):
        return messages  # TRL makes the places
    content = [*({"type": "image"} for _ in range(count)), *messages[first]["content"]]
    return [*messages[:first], {**messages[first], "content": content}, *messages[first + 1 :]]


def encode(
    processor: Any,
    prompts: Sequence[Any],
    template_kwargs: dict[str, Any] | None = None,
    tools: Sequence[Any] | None = None,
    chat_template: Any = None,
) -> list[EncodedPrompt]:
    """
    Prompts as a vision-language model reads them, rendered and tokenised as TRL does for generation.

    Those with images one at a time, since how a processor concatenates the pixels of several prompts depends on the
    family. Equal ones that follow each other, as in a group, are encoded once. All others at once.

    Args:
        processor (`ProcessorMixin`): turns messages with pictures into token ids and pixels.
        prompts (`list`): text, or messages with pictures in them.
        template_kwargs (`dict`, *optional*): keyword arguments of the chat template.
        tools (`list`, *optional*): those of each row.
        chat_template (`str`, *optional*): in place of the processor's.
    """
    read = functools.partial(_encoded, processor, template_kwargs or {}, chat_template)
    given = list(zip(prompts, tools or [None] * len(prompts), strict=True))
    found: dict[int, EncodedPrompt] = {}
    plain: dict[str, list[int]] = {}  # places of prompts without images, by what may be read together
    for place, (prompt, own) in enumerate(given):
        if not in_messages(prompt):
            plain.setdefault(json.dumps([isinstance(prompt, str), own]), []).append(place)
        elif place and given[place - 1][1] == own and _equal(given[place - 1][0], prompt):
            found[place] = found[place - 1]
        else:
            (found[place],) = read([prompt], own)
    for places in plain.values():
        found |= dict(zip(places, read([given[place][0] for place in places], given[places[0]][1]), strict=True))
    return [found[place] for place in range(len(given))]


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except ValueError:  # numpy's arrays do not say
        return False


def _encoded(
    processor: Any, template_kwargs: dict[str, Any], template: Any, prompts: Sequence[Any], tools: Any
) -> list[EncodedPrompt]:
    """Several prompts without images, or one with some."""
    if isinstance(prompts[0], str):
        return [EncodedPrompt(list(ids)) for ids in processor(text=list(prompts))["input_ids"]]
    messages = [prepare_multimodal_messages(prompt) for prompt in prompts]
    given = processor.apply_chat_template(
        conversation=messages,
        tools=tools_of(tools),
        chat_template=template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **template_kwargs,
    )
    images = sum(part["type"] == "image" for message in messages[0] for part in message["content"] or ())
    fields = {name: value for name, value in given.items() if name not in ("input_ids", "attention_mask")}
    kinds = {name: fields.pop(name) for name in KINDS if name in fields}
    pixels = {name: _tensor(value) for name, value in fields.items()} if images else {}
    return [
        EncodedPrompt(list(ids), pixels, {name: _tensor(of_all[row]).long() for name, of_all in kinds.items()}, images)
        for row, ids in enumerate(given["input_ids"])
    ]


def _tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(np.array(value))
