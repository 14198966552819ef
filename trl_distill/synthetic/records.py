"""What the data engine passes from stage to stage."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
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
        aspects (`dict[str, float]`): the judge's scores of aspects.
        draft (`Candidate`, *optional*): what this is a revision of.
        difficulty (`dict[str, float | None]`): the columns of its difficulty, where that was measured.
    """

    prompt: Text
    text: str
    stop_reason: str
    teacher: str
    score: float | None
    columns: dict[str, Any]
    aspects: dict[str, float] = field(default_factory=dict)
    difficulty: dict[str, float | None] = field(default_factory=dict)
    draft: Candidate | None = None

    def as_row(self, scored: bool) -> dict[str, Any]:
        """The row of the final dataset."""
        row = {"prompt": self.prompt, "completion": as_completion(self.text, self.prompt), **self.columns}
        row["teacher"] = self.teacher
        if scored:
            row |= {"score": self.score, **self.aspect_columns()}
        return {**row, **self.difficulty}

    def aspect_columns(self, prefix: str = "") -> dict[str, float]:
        """The columns of the aspects' scores."""
        return {f"{prefix}score_{name}": score for name, score in self.aspects.items()}


@dataclass(frozen=True)
class Completion:
    """
    Attributes:
        text (`str`): without the stop token.
        stop_reason (`str`): "stop" for an end of its own, "length" at the limit, or what else an endpoint says.
        reasoning (`str`, *optional*): what the endpoint gave beside the text; `None` where it is not kept.
    """

    text: str
    stop_reason: str
    reasoning: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The completion as JSON; `asdict` is slower, and this is called for each."""
        row = {"text": self.text, "stop_reason": self.stop_reason}
        return row if self.reasoning is None else {**row, "reasoning": self.reasoning}


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
class AspectScores:
    """
    Attributes:
        score (`float`): the weighted mean.
        aspects (`dict[str, float]`): of each aspect.
    """

    score: float
    aspects: dict[str, float]


Score = float | AspectScores | Refusal


@dataclass(frozen=True)
class PromptRow:
    """
    A prompt in the work folder.

    Attributes:
        id (`int`): its number, counted over all prompts.
        prompt (`str` or messages): what is asked.
        columns (`dict`): the input's other columns.
    """

    id: int
    prompt: Text
    columns: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The row as a line of JSON holds it."""
        return {"id": self.id, "prompt": self.prompt, "columns": self.columns}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> PromptRow:
        return cls(found["id"], found["prompt"], found["columns"])


@dataclass(frozen=True)
class PromptAnswer:
    """
    What one teacher answered to one prompt.

    Attributes:
        id (`int`): of the prompt.
        answer (`list[Completion]` or `Refusal`): its completions, or why there are none.
    """

    id: int
    answer: Answer

    @property
    def completions(self) -> list[Completion]:
        """The completions; none where the prompt was refused."""
        return [] if isinstance(self.answer, Refusal) else self.answer

    def as_dict(self) -> dict[str, Any]:
        """The answer as a line of JSON holds it."""
        return {"id": self.id, **answer_as_dict(self.answer)}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> PromptAnswer:
        return cls(found["id"], answer_from_dict(found))


@dataclass(frozen=True)
class PromptScores:
    """
    The verifier's scores of one teacher's completions of one prompt.

    Attributes:
        id (`int`): of the prompt.
        scores (`list[float | AspectScores | Refusal]`): of each completion, or why there is none.
    """

    id: int
    scores: list[Score]

    def as_dict(self) -> dict[str, Any]:
        """The scores as a line of JSON holds them."""
        return {"id": self.id, "scores": [s if isinstance(s, float | int) else asdict(s) for s in self.scores]}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> PromptScores:
        return cls(found["id"], [_score(score) for score in found["scores"]])


def _score(found: Any) -> Score:
    """A score from JSON."""
    if not isinstance(found, dict):
        return found
    return Refusal(**found) if "kind" in found else AspectScores(**found)


def answer_as_dict(answer: Answer) -> dict[str, Any]:
    """An answer as JSON: its completions, or its refusal."""
    if isinstance(answer, Refusal):
        return {"refusal": asdict(answer)}
    return {"completions": [completion.as_dict() for completion in answer]}


def answer_from_dict(found: dict[str, Any]) -> Answer:
    """An answer from JSON."""
    if "refusal" in found:
        return Refusal(**found["refusal"])
    return [Completion(**completion) for completion in found["completions"]]


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
