"""Thumbnails of the images in prompts, as data URIs: small, decoded and written anew, so that nothing else comes along.

Images are never fetched: of one that is given as a URL, only its name is shown.
"""

from __future__ import annotations

import base64
import os
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ...data.images import picture, prompt_of
from .table import Picture


SIDE = 160  # pixels on the longer side of a thumbnail


MOST = 3  # thumbnails of one prompt


QUALITY = 80  # of JPEG


def images_in(row: dict[str, Any]) -> list[Any]:
    """The images of a row's prompt in the order in which they stand in its messages."""
    prompt = prompt_of(row)
    contents = [message.get("content") for message in prompt] if isinstance(prompt, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [_given(part) for part in parts if part.get("type") == "image"]


def _given(part: dict[str, Any]) -> Any:
    """What an image part holds under one of the names that processors read."""
    return next((part[name] for name in ("image", "path", "url", "base64") if part.get(name) is not None), None)


def pictures_of(row: dict[str, Any]) -> tuple[Picture, ...]:
    """The images of a row's prompt for its card; only the first `MOST` with a thumbnail."""
    images = images_in(row)
    return tuple(_picture(image, f"image {i + 1} of {len(images)}", i < MOST) for i, image in enumerate(images))


def _picture(image: Any, name: str, drawn: bool) -> Picture:
    name += f", {os.path.basename(image)[:80]}" if isinstance(image, str) and len(image) < 1000 else ""
    if not drawn:
        return Picture(name)
    try:
        opened = _opened(image)
        if opened is None:
            return Picture(name)
        width, height = opened.size
        small = _small(opened)
        return Picture(f"{name}, {width} × {height} pixels", _data_uri(small), *small.size)
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError):  # what PIL raises for bad files
        return Picture(f"{name}, not readable")


def _opened(image: Any) -> Image.Image | None:
    """A PIL image; `None` for a URL, or what is not known here."""
    if isinstance(image, str):
        return Image.open(image) if os.path.isfile(image) else None
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    found = picture(image)
    return found if isinstance(found, Image.Image) else None


def _small(image: Image.Image) -> Image.Image:
    """The image in RGB on white, upright, and scaled down to `SIDE`."""
    image = ImageOps.exif_transpose(image)  # a copy
    image.thumbnail((SIDE, SIDE))
    if image.has_transparency_data:
        above = image.convert("RGBA")
        white = Image.new("RGBA", above.size, "white")
        return Image.alpha_composite(white, above).convert("RGB")
    return image.convert("RGB")


def _data_uri(image: Image.Image) -> str:
    """As PNG or JPEG, whichever is shorter."""
    found = []
    for kind, how in (("png", {"optimize": True}), ("jpeg", {"quality": QUALITY})):
        file = BytesIO()
        image.save(file, kind, **how)
        found.append(f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}")
    return min(found, key=len)
