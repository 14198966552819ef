"""What `trl-distill report` and `evaluate` do where prompts have images: processors, and who sees the images."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from ..checks.images import check_sight, differences, teacher_sees
from ..data.images import has_images, shows_images, tidy_row
from ..data.readers import PromptReader, encoder_of
from ..models.loading import load_processor
from .models import base_of, config_of, tokenizer_of


def processor_of(name: str) -> Any:
    """The processor saved with a vision-language model, or with an adapter's base; `None` for other models."""
    config = config_of(name)
    if config is None:
        return None
    return load_processor(name, config) or load_processor(base_of(name), config)


def readable_rows(
    dataset: Dataset, students: list[str], teacher: str | None, cross_tokenizer: bool = False
) -> list[dict[str, Any]]:
    """
    A dataset's rows, after a check that all models see the images in them.

    Args:
        dataset (`Dataset`): with a column "prompt".
        students (`list[str]`): names or folders.
        teacher (`str`, *optional*): likewise.
        cross_tokenizer (`bool`): whether the teacher reads completions as text.

    Raises:
        ValueError: there are images, and a model is a text model or has no processor, or a prompt is no conversation.
    """
    rows = list(dataset)
    if not shows_images(dataset):
        return rows
    for name in (*students, *([teacher] if teacher else [])):
        config = config_of(name)
        if name in students and config is not None:
            check_sight({"the dataset": dataset}, config)
        elif config is not None:
            finding = teacher_sees(config, name, served=False, reads_text=cross_tokenizer)
            if finding.level == "error":
                raise ValueError(f"{finding.found} {finding.advice}")
        if processor_of(name) is None:
            raise ValueError(
                f"The dataset has images, but {name!r} has no processor that could be loaded, which turns them into "
                "what a model reads. Save one beside it (`processor.save_pretrained(...)`), or drop the images."
            )
    for number, row in enumerate(rows):
        if isinstance(row["prompt"], str) and has_images(row):
            raise ValueError(
                f"Row {number} of the dataset has images, but its prompt is text, in which they have no place. Write "
                "messages: [{'role': 'user', 'content': '...'}]."
            )
    return [tidy_row(row) for row in rows]


def reader_of(name: str, teacher: str | None, template_kwargs: dict[str, Any] | None) -> PromptReader:
    """
    How a student and its teacher read prompts; a teacher with another processor gets prompts of its own.

    Args:
        name (`str`): the student's name or folder.
        teacher (`str`, *optional*): the teacher's.
        template_kwargs (`dict`, *optional*): keyword arguments of the chat template.
    """
    mine = processor_of(name)
    theirs = processor_of(teacher) if teacher and mine is not None else None
    student = encoder_of(tokenizer_of(name), mine, template_kwargs)
    if theirs is None or not differences(mine, theirs):
        return PromptReader(student)
    return PromptReader(student, encoder_of(None, theirs, template_kwargs, mine.chat_template))


def check_second_processor(rows: list[dict[str, Any]], first: str, second: str) -> None:
    """Raise `ValueError` if the second of two students would see other pixels than the first, whose it is given."""
    if not any(map(has_images, rows)):
        return
    different = differences(processor_of(first), processor_of(second))
    if different:
        raise ValueError(
            f"`--compare_with {second}` processes images differently than the first student ({different[0]}), whose "
            "pixels it would be given. Make a report for each of the two."
        )
