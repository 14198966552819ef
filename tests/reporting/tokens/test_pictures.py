"""Thumbnails: small, of the right picture, with nothing of the original file but its pixels; and what has none."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from trl_distill.reporting.tokens import page
from trl_distill.reporting.tokens.page import THUMBNAILS
from trl_distill.reporting.tokens.pictures import SIDE, pictures_of
from trl_distill.reporting.tokens.table import Picture


def row(*images, **more):
    return {"prompt": [{"role": "user", "content": "What is it?"}], "images": list(images), **more}


def drawn(picture: Picture) -> Image.Image:
    kind, text = re.fullmatch(r"data:image/(png|jpeg);base64,([A-Za-z0-9+/=]+)", picture.uri).groups()
    found = Image.open(BytesIO(base64.b64decode(text)))
    assert found.format.lower() == kind
    assert found.size == (picture.width, picture.height)
    return found


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("size", "expected"), [((640, 320), (160, 80)), ((90, 900), (16, 160)), ((20, 10), (20, 10))])
def test_a_thumbnail_is_the_picture_scaled_down(size, expected):
    half = Image.new("RGB", size, "red")
    half.paste("blue", (size[0] // 2, 0, *size))
    (found,) = pictures_of(row(half))
    small = drawn(found).convert("RGB")
    assert small.size == expected
    assert max(small.size) <= SIDE
    assert found.alt == f"image 1 of 1, {size[0]} × {size[1]} pixels"
    left, right = (np.array(small.getpixel((x, small.height // 2))) for x in (1, small.width - 2))
    assert np.abs(left - (255, 0, 0)).max() < 40
    assert np.abs(right - (0, 0, 255)).max() < 40


def test_noise_becomes_a_small_jpeg_and_a_drawing_a_png():
    photo, drawing = pictures_of(row(noise(1000, 1000), Image.new("RGB", (1000, 1000), "red")))
    assert photo.uri.startswith("data:image/jpeg")
    assert len(photo.uri) < 40_000
    assert drawing.uri.startswith("data:image/png")
    assert len(drawing.uri) < 1000


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "I;16", "F"])
def test_every_mode_is_drawn(mode):
    (found,) = pictures_of(row(Image.new(mode, (30, 30))))
    assert drawn(found).convert("RGB").size == (30, 30)


def test_what_is_transparent_is_white():
    (found,) = pictures_of(row(Image.new("RGBA", (4, 4), (0, 0, 0, 0))))
    assert drawn(found).convert("RGB").getpixel((1, 1)) == (255, 255, 255)


def test_only_pixels_are_taken_over_from_a_file(tmp_path):
    """Not its other contents, such as the place where a photo was taken; and it stands upright."""
    image = Image.new("RGB", (40, 20), "green")
    exif = image.getexif()
    exif[0x0112], exif[0x010E] = 6, "secret place"  # turned by 90 degrees; description
    image.save(tmp_path / "a.jpg", exif=exif)
    (found,) = pictures_of(row(str(tmp_path / "a.jpg")))
    small = drawn(found)
    assert small.size == (20, 40)
    assert b"secret" not in base64.b64decode(found.uri.partition(",")[2])
    assert found.alt.startswith("image 1 of 1, a.jpg, ")
    assert str(tmp_path) not in found.alt


@pytest.mark.parametrize("form", ["bytes", "array", "message", "teacher's own"])
def test_where_images_may_stand(form):
    image = Image.new("RGB", (12, 8), "green")
    file = BytesIO()
    image.save(file, "png")
    given = {
        "bytes": row({"bytes": file.getvalue(), "path": None}),
        "array": row(np.asarray(image)),
        "message": {
            "prompt": [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "?"}]}]
        },
        "teacher's own": row(image, teacher_prompt=[{"role": "user", "content": "Look!"}]),
    }[form]
    (found,) = pictures_of(given)
    assert drawn(found).size == (12, 8)


def test_what_cannot_be_shown_is_named(tmp_path):
    (tmp_path / "torn.png").write_bytes(b"no picture")
    found = pictures_of(row("https://example.org/pictures/far.png", str(tmp_path / "torn.png"), {"bytes": b"x" * 20}))
    assert [one.uri for one in found] == [""] * 3
    assert [one.alt for one in found] == [
        "image 1 of 3, far.png",
        "image 2 of 3, torn.png, not readable",
        "image 3 of 3, not readable",
    ]


def test_of_many_images_the_first_three_are_drawn():
    found = pictures_of(row(*(noise(20, 20, seed) for seed in range(5))))
    assert [bool(one.uri) for one in found] == [True] * 3 + [False] * 2
    assert found[4].alt == "image 5 of 5"


def data_of(html: str) -> dict:
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.S)[1])


def with_pictures(table, *groups):
    rows = zip(table.completions, groups, strict=True)
    return replace(table, completions=tuple(replace(one, pictures=tuple(group)) for one, group in rows))


def test_a_picture_is_in_the_page_once_and_all_together_stay_small(table):
    small, large = Picture("a", "data:image/png;base64,AAAA", 1, 1), Picture("b", "d" * (THUMBNAILS - 10), 9, 9)
    html = page(with_pictures(table(), [small, large], [small], [Picture("far.png")]))
    found = data_of(html)
    assert found["pictures"] == [small.uri]
    assert [one["pictures"] for one in found["rows"]] == [
        [["a", 1, 1, 0], ["b", 9, 9, None]],
        [["a", 1, 1, 0]],
        [["far.png", 0, 0, None]],
    ]
    assert len(html) < len(page(table())) + 1000


def test_only_a_page_with_pictures_may_show_any(table):
    seen = page(with_pictures(table(), [Picture("a", "data:image/png;base64,AAAA", 1, 1)], [], []))
    assert "img-src data:;" in seen
    assert "img-src" not in page(table())
