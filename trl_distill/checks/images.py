"""Checks for runs whose dataset has images: who sees them, and whether student and teacher see them alike."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from ..data.images import COLUMNS
from ..models.properties import reads_images
from .findings import Finding


def check_sight(datasets: dict[str, Any], config: PretrainedConfig) -> None:
    """
    Check that a dataset with images is for a student that sees them.

    Args:
        datasets (`dict`): those that have images, by their name for messages, such as "the training dataset".
        config (`PretrainedConfig`): the student's.

    Raises:
        ValueError: the student is a text model.
    """
    if reads_images(config):
        return
    for name, dataset in datasets.items():
        columns = [column for column in COLUMNS if column in dataset.column_names]
        where = f"the column {columns[0]!r}" if columns else "its messages"
        raise ValueError(
            f"{name[0].upper()}{name[1:]} has images in {where}, but the student ({config.model_type}) is a text "
            "model. Use a vision-language student, or drop the images."
        )


def teacher_sees(config: PretrainedConfig | None, name: str, served: bool, reads_text: bool) -> Finding:
    """Whether a teacher can judge answers to prompts with images; `reads_text`: whether it has another tokenizer."""
    problem, advice = "", ""
    if served:
        problem = (
            f"The teacher {name!r} is behind a server, which is asked with token ids alone: it would see no image."
        )
        advice = "Load the teacher in this process, or drop the images."
    elif config is not None and not reads_images(config):
        problem = f"The dataset has images, but the teacher {name!r} ({config.model_type}) is a text model."
        advice = "Use a vision-language teacher, or drop the images."
    elif reads_text:
        problem = f"The teacher {name!r} has another tokenizer, and `cross_tokenizer` is not made for images."
        advice = "Use a teacher with the student's tokenizer, or drop the images."
    if problem:
        return Finding("images", "error", problem, advice)
    return Finding("images", "ok", "Student and teacher see the images of the dataset.")


def no_processor(name: str) -> Finding:
    """What to say of a vision-language teacher whose processor could not be loaded."""
    return Finding(
        "processors",
        "warning",
        f"The processor of the teacher {name!r} could not be loaded, so it is given the student's pixels: of the same "
        "resolution and number of tokens.",
        "Load the teacher from a folder or hub name that holds its processor, with what that needs (torchvision).",
    )


def differences(student: Any, teacher: Any) -> list[str]:
    """Settings by which two processors turn the same image into different pixels or another number of tokens."""
    found = []
    mine, theirs = _settings(student), _settings(teacher)
    for name in sorted({*mine, *theirs}):
        if mine.get(name) != theirs.get(name):
            found.append(f"{name} {mine.get(name)!r} and {theirs.get(name)!r}")
    return found


def _settings(processor: Any) -> dict[str, Any]:
    """What a processor does with images, without names of classes and files."""
    of_images = processor.image_processor.to_dict()
    own = {name: value for name, value in vars(processor).items() if isinstance(value, int | float | str)}
    dropped = {"chat_template", "image_processor_type", "processor_class", "feature_extractor_type", "auto_map"}
    return {name: value for name, value in {**own, **of_images}.items() if name not in dropped}


def processors(different: list[str]) -> Finding:
    """What to say of two processors, by their [`differences`]."""
    if not different:
        return Finding("processors", "ok", "Student and teacher have the same processor.")
    shown = "; ".join(different[:3]) + ("; ..." if len(different) > 3 else "")
    return Finding(
        "processors",
        "ok",
        f"Student and teacher process images differently ({shown}), so the teacher gets prompts of its own, with its "
        "own pixels and number of image tokens.",
    )
