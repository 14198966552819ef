"""The task of the miniature with images: read what is drawn.

A picture of 32 x 32 pixels shows one to four shapes of one kind and one colour, on a background that is hardly ever
quite white. The answer names them: "3 red circles". It is asked for in three wordings. There are 60 answers, and next
to no picture comes twice: places, sizes, shades and background are drawn anew.
"""

from __future__ import annotations

import random
from typing import Any

from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw


SIDE = 32  # pixels
MAX_COMPLETION_LENGTH = 6  # tokens; an answer has 4 with its end
COLOURS = {
    "red": (210, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (230, 190, 30),
    "purple": (140, 50, 160),
}
SHAPES = ("circle", "square", "triangle")
WORDINGS = ("What is drawn here ?", "Say what you see .", "Number , colour and shape ?")


def problems(size: int, seed: int) -> Dataset:
    """
    `size` problems, the same for the same `seed`.

    Columns: `prompt` (one user message, text only), `image` (the picture, which TRL puts in front of the text) and
    `answer`.
    """
    chance = random.Random(seed)
    columns: dict[str, list[Any]] = {"prompt": [], "image": [], "answer": []}
    for _ in range(size):
        image, answer = draw(chance)
        columns["prompt"].append([{"role": "user", "content": chance.choice(WORDINGS)}])
        columns["image"].append(image)
        columns["answer"].append(answer)
    message = {"role": Value("string"), "content": Value("string")}
    features = Features({"prompt": [message], "image": ImageFeature(), "answer": Value("string")})
    return Dataset.from_dict(columns, features=features)


def draw(chance: random.Random) -> tuple[Image.Image, str]:
    """A picture and its answer."""
    count, colour, shape = chance.randint(1, 4), chance.choice(list(COLOURS)), chance.choice(SHAPES)
    picture = Image.new("RGB", (SIDE, SIDE), tuple(chance.randint(205, 255) for _ in range(3)))
    pencil = ImageDraw.Draw(picture)
    shade = tuple(max(0, min(255, value + chance.randint(-25, 25))) for value in COLOURS[colour])
    for quarter in chance.sample(range(4), count):  # one shape in a quarter, so that none hides another
        across = chance.randint(7, 12)
        left = chance.randint(1, SIDE // 2 - across - 1) + SIDE // 2 * (quarter % 2)
        top = chance.randint(1, SIDE // 2 - across - 1) + SIDE // 2 * (quarter // 2)
        box = (left, top, left + across, top + across)
        if shape == "circle":
            pencil.ellipse(box, fill=shade)
        elif shape == "square":
            pencil.rectangle(box, fill=shade)
        else:
            pencil.polygon([(left, box[3]), (box[2], box[3]), (left + across // 2, top)], fill=shade)
    return picture, f"{count} {colour} {shape}{'s' if count > 1 else ''}"


def correct(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Reward function: 1.0 where the completion is the answer, else 0.0."""
    texts = [c if isinstance(c, str) else _text(c[0]["content"]) for c in completions]
    return [float(text.strip() == gold) for text, gold in zip(texts, answer, strict=True)]


def _text(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
