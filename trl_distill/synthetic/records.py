"""What the data engine passes from stage to stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .text import Text, as_completion


@dataclass(frozen=True)
class Candidate:
    """
    A completion on its way into the dataset.

    Attributes:
        prompt (`str` or messages): what was asked.
        text (`str`): the completion.
        stop_reason (`str`): "stop" or "length", or what else an endpoint says.
        teacher (`str`): who wrote it.
        score (`float`, *optional*): of the verifier.
        columns (`dict`): the dataset's other columns.
    """

    prompt: Text
    text: str
    stop_reason: str
    teacher: str
    score: float | None
    columns: dict[str, Any]

    def as_row(self, scored: bool) -> dict[str, Any]:
        """The row of the final dataset."""
        row = {"prompt": self.prompt, "completion": as_completion(self.text, self.prompt), **self.columns}
        row["teacher"] = self.teacher
        return {**row, "score": self.score} if scored else row


@dataclass(frozen=True)
class Completion:
    """
    Attributes:
        text (`str`): without the stop token.
        stop_reason (`str`): "stop" for an end of its own, "length" at the limit, or what else an endpoint says.
    """

    text: str
    stop_reason: str


@dataclass(frozen=True)
class Refusal:
    """
    Why one prompt gets no completion although its teacher works.

    Attributes:
        kind (`str`): the reason as it is counted.
        detail (`str`): the reason as it is listed.
    """

    kind: str
    detail: str


Answer = list[Completion] | Refusal


@dataclass(frozen=True)
class Answered:
    """
    One completion with what is known about it.

    Attributes:
        prompt (`str` or messages): what was asked.
        completion (`str`): its text.
        columns (`dict`): the dataset's other columns.
    """

    prompt: Text
    completion: str
    columns: dict[str, Any]


Score = float | Refusal
