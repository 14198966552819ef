"""What a source of completions is, and how the stages ask one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ...errors import TeacherAnswerError
from ..records import Answer
from ..text import Text


if TYPE_CHECKING:
    from ..config import GenerateConfig


class AllRefusedError(TeacherAnswerError):
    """
    A source was asked for the first time and refused every prompt, so its settings are probably at fault.

    Attributes:
        answers (`list[Refusal]`): the refusals. They count if the source answered others before, in an earlier run.
    """

    def __init__(self, message: str, answers: list[Answer]):
        super().__init__(message)
        self.answers = answers


Seeds = int | Sequence[int]


def seeds_of(seed: Seeds, count: int) -> list[int]:
    """A seed for each of `count` prompts; see [`Source.complete`]."""
    seeds = list(range(seed, seed + count)) if isinstance(seed, int) else list(seed)
    assert len(seeds) == count, f"{len(seeds)} seeds for {count} prompts"
    return seeds


class Source(Protocol):
    """Completes prompts."""

    def complete(self, prompts: list[Text], seed: Seeds) -> list[Answer]:
        """
        Completions of each prompt, or why there are none; as many answers as prompts.

        Args:
            prompts (`list`): texts or messages.
            seed (`int` or `list[int]`): a seed for each prompt; a single number is the first one's, the next has one
                more. A model that samples whole batches takes that of a batch's first prompt.

        Raises:
            TeacherUnavailable: no answer for a reason that may pass.
            ValueError, TeacherAnswerError: no prompt at all can be answered.
            AllRefusedError: none of these was, and none before.
        """
        ...

    def close(self) -> None:
        """Give back memory and connections."""
        ...


def ask(worker: Source, prompts: list[Text], seeds: Seeds, answered_before: Callable[[], bool]) -> list[Answer]:
    """
    One answer to each prompt.

    Args:
        worker (`Source`): who is asked.
        prompts (`list`): texts or messages. If there are none, no request is sent.
        seeds (`int` or `list[int]`): as in [`Source.complete`].
        answered_before (`Callable[[], bool]`): whether the source answered other prompts before, perhaps in an earlier
            run. Its settings are then not at fault if it refuses all of these.

    Raises:
        AllRefusedError: it refuses every prompt, and has answered none before.
    """
    if not prompts:
        return []
    try:
        return worker.complete(prompts, seeds)
    except AllRefusedError as error:
        if not answered_before():
            raise
        return error.answers


@dataclass(frozen=True)
class Sampling:
    """
    Attributes:
        n (`int`): completions of a prompt.
        max_tokens (`int`): of one completion.
        temperature (`float`): 0 is greedy.
        top_p (`float`): nucleus.
    """

    n: int = 1
    max_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0

    @classmethod
    def from_config(cls, config: GenerateConfig) -> Sampling:
        return cls(config.completions_per_prompt, config.max_completion_length, config.temperature, config.top_p)
