"""Images in a dataset's rows, and prompts with images as a processor turns them into token ids and pixels.

Images are where TRL takes them from: a column `image` or `images`, or parts of messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from PIL import Image as PILImage
from transformers import ProcessorMixin

from .._trl import prepare_multimodal_messages
from ..images import KINDS, EncodedPrompt
from .rows import CONVERSATIONS, tools_of


COLUMNS = ("image", "images")  # of a dataset


FIRST_ROWS = 100  # of a dataset that are searched for images in messages


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
    """Whether a dataset may have images, by its columns and, if it can be read without consuming it, its first rows."""
    columns = getattr(dataset, "column_names", None) or ()
    if not isinstance(dataset, Dataset):
        return isinstance(dataset, IterableDataset) and any(name in columns for name in COLUMNS)
    names = [name for name in (*COLUMNS, "prompt", *CONVERSATIONS) if name in columns]
    few = dataset.select_columns(names).with_format(None) if names else []
    rows = (few[number] for number in range(min(len(few), FIRST_ROWS)))
    return any(images_of(row) or any(in_messages(row.get(name)) for name in names) for row in rows)


def tidy_row(row: dict[str, Any]) -> dict[str, Any]:
    """
    A row whose messages have no parts with empty fields, which Arrow adds, and images as pictures.

    The same object if nothing changes.
    """
    changed = {}
    for column in ("prompt", "teacher_prompt"):
        if in_messages(row.get(column)):
            changed[column] = [_tidy_message(message) for message in row[column]]
    if row.get("images"):
        changed["images"] = [picture(image) for image in row["images"]]
    if isinstance(row.get("image"), dict):
        changed["image"] = picture(row["image"])
    return {**row, **changed} if changed else row


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
    if not isinstance(prompt, list) or not (images or in_messages(prompt)):
        return prompt
    parts = [part for message in prompt if isinstance(message.get("content"), list) for part in message["content"]]
    own = any(part.get("image") is not None for part in parts)
    return prepare_multimodal_messages(prompt, images=[] if own else images)


def encode(
    processor: Any,
    prompts: Sequence[Any],
    template_kwargs: dict[str, Any] | None = None,
    tools: Sequence[Any] | None = None,
    chat_template: Any = None,
) -> list[EncodedPrompt]:
    """
    Prompts as a vision-language model reads them, rendered and tokenised as TRL does for generation.

    One at a time, since how a processor concatenates the pixels of several prompts depends on the family. Equal prompts
    that follow each other, as in a group, are encoded once.

    Args:
        processor (`ProcessorMixin`): turns messages with pictures into token ids and pixels.
        prompts (`list`): text, or messages with pictures in them.
        template_kwargs (`dict`, *optional*): keyword arguments of the chat template.
        tools (`list`, *optional*): those of each row.
        chat_template (`str`, *optional*): in place of the processor's.
    """
    found: list[EncodedPrompt] = []
    before: Any = None
    for prompt, own in zip(prompts, tools or [None] * len(prompts), strict=True):
        if before is None or before != (prompt, own):
            found.append(_encoded(processor, prompt, template_kwargs or {}, own, chat_template))
        else:
            found.append(found[-1])
        before = (prompt, own)
    return found


def _encoded(processor: Any, prompt: Any, template_kwargs: dict[str, Any], tools: Any, template: Any) -> EncodedPrompt:
    if isinstance(prompt, str):
        return EncodedPrompt(list(processor(text=[prompt])["input_ids"][0]))
    messages = prepare_multimodal_messages(prompt)
    given = processor.apply_chat_template(
        conversation=[messages],
        tools=tools_of(tools),
        chat_template=template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **template_kwargs,
    )
    return as_encoded(given, sum(part["type"] == "image" for message in messages for part in message["content"] or ()))


def as_encoded(given: Any, images: int) -> EncodedPrompt:
    """What a processor returns for one prompt with so many images."""
    fields = {name: value for name, value in given.items() if name not in ("input_ids", "attention_mask")}
    kinds = {name: _tensor(fields.pop(name))[0].long() for name in KINDS if name in fields}
    pixels = {name: _tensor(value) for name, value in fields.items()} if images else {}
    return EncodedPrompt(list(given["input_ids"][0]), pixels, kinds, images)


def _tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(np.array(value))
