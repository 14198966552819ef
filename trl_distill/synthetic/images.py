"""Images in prompts of the data engine: as files in the work folder, in requests, for verifiers, and in the dataset.

In the work folder a prompt's image parts name a file, `{"type": "image", "image": "<hash>.png"}`; whoever reads the
prompts gets its whole path. The hash is that of the pixels, so equal images are one file. In the dataset, images are in
the column `images`, and each has a place in the messages.
"""

from __future__ import annotations

import base64
import os
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from datasets import Features, List
from datasets import Image as ImageFeature
from PIL import Image
from transformers import AutoConfig

from ..data.images import COLUMNS, images_of, in_messages, prompt_of
from ..data.rows import RowError, read_prompt
from ..models.loading import load_processor
from ..models.properties import reads_images
from .records import Answered
from .text import Text


if TYPE_CHECKING:
    from .config import GenerateConfig


COLUMN = "images"  # of the dataset


SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}  # kept as they are


BLIND = {  # settings that have a model read prompts as text, and what it would do without the images
    "new_prompts": "write new prompts",
    "evolve": "rewrite prompts",
    "revise": "revise completions",
    "judge": "judge completions",
    "reward_model": "score completions",
    "difficulty_model": "measure difficulty",
    "human_data": "mix in other rows",
}


class ImageFiles:
    """
    The images of prompts as files.

    Args:
        folder (`Path`): made with the first image.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def prompt(self, row: dict[str, Any], name: str, where: str) -> Any:
        """
        A row's prompt in the form of the work folder.

        Args:
            row (`dict`): of the input; images are in its columns `image` and `images`, or in its messages.
            name (`str`): the column with the prompt.
            where (`str`): the row, for messages.

        Raises:
            RowError: prompt or images cannot be used.
        """
        images = [image for image in images_of(row) if image is not None]
        if not images and not in_messages(row[name]):
            return read_prompt(row[name], name, where)
        prompt = read_prompt(row[name], name, where, parts=True)
        if isinstance(prompt, str):
            reason = "images beside a prompt that is text"
            raise RowError(reason, f"{where} has images, but its prompt is text. Write messages.")
        try:
            placed = prompt_of({"prompt": [_without_empty(message) for message in prompt], "images": images})
        except ValueError as error:
            raise RowError("images that do not fit the messages", f"{where}: {error}") from None
        return [self._saved(message, where) for message in placed]

    def _saved(self, message: dict[str, Any], where: str) -> dict[str, Any]:
        parts = message.get("content")
        if not isinstance(parts, list):
            return message
        saved = [
            {"type": "image", "image": self._save(part.get("image"), where)} if part["type"] == "image" else part
            for part in parts
        ]
        return {**message, "content": saved}

    def _save(self, image: Any, where: str) -> str:
        """The name of the file with an image."""
        try:
            data = _bytes_of(image)
            with Image.open(BytesIO(data)) as opened:
                kind, pixels = str(opened.format), opened.convert("RGBA")
        except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
            raise RowError("image that cannot be read", f"{where}: {error}") from None
        if kind not in SUFFIXES:
            data, kind = _png(pixels), "PNG"
        key = blake2b(repr(pixels.size).encode() + pixels.tobytes(), digest_size=16).hexdigest()
        known = next(
            (name for suffix in SUFFIXES.values() if (self.folder / (name := f"{key}{suffix}")).exists()), None
        )
        if known is not None:
            return known
        self.folder.mkdir(exist_ok=True)
        name, unfinished = f"{key}{SUFFIXES[kind]}", self.folder / f"{key}.unfinished"
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.folder / name)  # a broken file under its name would be taken for the image
        return name


def _without_empty(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose parts have no empty fields, which Arrow adds."""
    if not isinstance(message.get("content"), list):
        return message
    parts = [{name: value for name, value in part.items() if value is not None} for part in message["content"]]
    return {**message, "content": parts}


def _bytes_of(image: Any) -> bytes:
    """The file of an image: of what Arrow stores, of a path, or a PNG of a PIL image."""
    if isinstance(image, dict) and image.get("bytes"):
        return image["bytes"]
    path = image.get("path") if isinstance(image, dict) else image
    if isinstance(path, str):
        return Path(path).read_bytes()
    if isinstance(image, Image.Image):
        return _png(image)
    raise TypeError(f"{type(image).__name__} is no image")


def _png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "png")
    return file.getvalue()


def images_in(prompt: Text) -> list[str]:
    """The images of a prompt: names, or paths, of their files."""
    contents = [message.get("content") for message in prompt] if isinstance(prompt, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part["image"] for part in parts if part["type"] == "image"]


def names_of(prompt: Text) -> list[str]:
    """What tells prompts with equal words apart: the names of their images' files, hashes of the pixels."""
    return [Path(image).stem for image in images_in(prompt)]


def _mapped(prompt: Text, change: Any) -> Any:
    """A prompt with another object for each image part; the same object if there is none."""
    if isinstance(prompt, str) or not in_messages(prompt):
        return prompt
    return [
        {**message, "content": [change(part) if part["type"] == "image" else part for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in prompt
    ]


def with_paths(prompt: Text, folder: Path) -> Text:
    """A prompt of the work folder with the whole paths of its images."""
    return _mapped(prompt, lambda part: {**part, "image": str(folder / part["image"])})


def with_pictures(row: Answered) -> Answered:
    """A completion with its prompt as reward functions get it in training: PIL images in it, and in `images`."""
    if COLUMN not in row.columns:
        return row
    pictures = {path: _loaded(path) for path in images_in(row.prompt)}
    prompt = _mapped(row.prompt, lambda part: {**part, "image": pictures[part["image"]]})
    columns = {**row.columns, COLUMN: [pictures[path] for path in images_in(row.prompt)]}
    return Answered(prompt, row.completion, columns)


def _loaded(path: str) -> Image.Image:
    with Image.open(path) as opened:
        opened.load()
        return opened


def as_openai(prompt: Text) -> Text:
    """A prompt as chat endpoints read it: images as data URIs."""
    return _mapped(prompt, lambda part: {"type": "image_url", "image_url": {"url": _data_uri(Path(part["image"]))}})


def _data_uri(path: Path) -> str:
    kind = path.suffix[1:].replace("jpg", "jpeg")
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def as_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the dataset: images, by the paths of their files, in a column, with places in messages of parts."""
    prompt = [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in row["prompt"]
    ]
    return {**row, "prompt": _mapped(prompt, lambda _: {"type": "image"}), COLUMN: images_in(row["prompt"])}


def as_stored(row: dict[str, Any]) -> dict[str, Any]:
    """A row as Parquet holds it, with the files of its images."""
    return {**row, COLUMN: [{"bytes": Path(path).read_bytes(), "path": Path(path).name} for path in row[COLUMN]]}


def image_schema(schema: pa.Schema) -> pa.Schema:
    """The schema of a dataset with images, by which `datasets` reads them as pictures."""
    return Features({**Features.from_arrow_schema(schema), COLUMN: List(ImageFeature())}).arrow_schema


def check_images(config: GenerateConfig) -> None:
    """
    Check, for prompts with images, that all who read them see the images.

    Raises:
        ValueError: a teacher does not, or a setting has another model read prompts as text.
    """
    for name, what in BLIND.items():
        if getattr(config, name):
            raise ValueError(
                f"The prompts have images, and `{name}` would {what} without seeing them. Leave it out, or drop the "
                f"images (columns {' and '.join(COLUMNS)}, and image parts of messages)."
            )
    for name, address in config.teachers.items():
        if address.kind == "vllm":
            raise ValueError(
                f"The prompts have images, which are not given to the teacher {name!r} in vLLM in this process. Serve "
                "it (`vllm serve`) and name the endpoint, or leave out `vllm:` to use transformers."
            )
        if address.kind != "transformers":
            continue
        model = AutoConfig.from_pretrained(address.model)
        if not reads_images(model):
            raise ValueError(
                f"The prompts have images, but the teacher {name!r} ({model.model_type}) is a text model. Name a "
                "vision-language model, or drop the images."
            )
        if load_processor(address.model, model) is None:
            raise ValueError(
                f"The prompts have images, but the teacher {name!r} has no processor that could be loaded, which turns "
                "them into what a model reads. Save one beside it: `processor.save_pretrained(...)`."
            )
