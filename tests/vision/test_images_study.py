"""The miniature with images: its task, and its models made again."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import succeeds
from transformers import AutoModelForImageTextToText, AutoProcessor

from scripts.studies.images.drawings import COLOURS, WORDINGS, correct, problems
from scripts.studies.images.make_models import make_processor
from scripts.studies.images.run import parse


ROOT = Path(__file__).parents[2]


def shapes_in(picture: Image.Image) -> tuple[int, str]:
    """Quarters with a shape, and the colour that is nearest to the shapes'."""
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    drawn = (pixels != pixels[0, 0]).any(-1)  # no shape reaches the corner
    half = len(drawn) // 2
    quarters = [drawn[:half, :half], drawn[:half, half:], drawn[half:, :half], drawn[half:, half:]]
    mean = pixels[drawn].mean(0)
    return sum(part.any() for part in quarters), min(COLOURS, key=lambda name: np.abs(mean - COLOURS[name]).sum())


def test_answers_name_what_is_drawn():
    rows = problems(200, seed=5)
    for image, answer in zip(rows["image"], rows["answer"], strict=True):
        count, colour = shapes_in(image)
        assert answer.startswith(f"{count} {colour} ")
        assert answer.endswith("s") == (count > 1)
    assert len(set(rows["answer"])) > 50  # of 60
    assert {prompt[0]["content"] for prompt in rows["prompt"]} == set(WORDINGS)


def test_circles_squares_and_triangles_look_different():
    """By the share of its box that a single shape fills."""
    filled: dict[str, list[float]] = {}
    for row in problems(400, seed=6):
        if row["answer"].startswith("1 "):
            pixels = np.asarray(row["image"]).astype(int)
            drawn = (pixels != pixels[0, 0]).any(-1)
            height, width = (drawn.any(axis).sum() for axis in (0, 1))
            filled.setdefault(row["answer"].split()[-1], []).append(drawn.sum() / (height * width))
    assert min(filled["square"]) == 1
    assert max(filled["triangle"]) < min(filled["circle"]) < max(filled["circle"]) < 1


def test_problems_repeat_with_the_seed_alone():
    one, longer, other = problems(20, seed=5), problems(30, seed=5), problems(20, seed=6)
    assert one["answer"] == longer["answer"][:20] != other["answer"]
    assert all(np.array_equal(a, b) for a, b in zip(one["image"], longer["image"][:20], strict=True))


def test_only_the_whole_answer_is_right():
    said = ["3 red circles", " 3 red circles ", "3 red circle", "2 red circles", "", "3 red circles red"]
    assert correct(said, ["3 red circles"] * 6) == [1, 1, 0, 0, 0, 0]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "3 red circles"}]}]
    assert correct([parts, [{"role": "assistant", "content": "3 red circles"}]], ["3 red circles"] * 2) == [1, 1]


@pytest.mark.slow
def test_models_can_be_made_again(tmp_path):
    """The whole way with very few steps: what comes out knows nothing, but loads, and the teacher is the larger one."""
    steps = ("--teacher_steps", "2", "--student_steps", "2", "--held_out", "4")
    words = [sys.executable, "-m", "scripts.studies.images.make_models", "--output_dir", tmp_path, *steps]
    succeeds(words, cwd=ROOT)
    sizes = [AutoModelForImageTextToText.from_pretrained(tmp_path / n).num_parameters() for n in ("student", "teacher")]
    assert sizes[0] < sizes[1]
    assert (
        AutoProcessor.from_pretrained(tmp_path / "student").tokenizer.get_vocab()
        == make_processor().tokenizer.get_vocab()
    )


def test_models_that_are_not_there_are_asked_for_before_anything_runs(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(["--models", str(tmp_path)])
    assert "has no student and no teacher. Make the models: python -m scripts.studies.images.make_models" in (
        " ".join(capsys.readouterr().err.split())
    )
