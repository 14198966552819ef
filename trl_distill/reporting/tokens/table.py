"""What a token-level report holds, as plain data: completions, what each model thinks of their tokens, and their means.

No tensor, no model and no HTML: where the numbers come from is `collect.py`'s business, how they are shown `page.py`'s.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


TOP = 5  # alternatives that are kept of each distribution


@dataclass(frozen=True)
class Opinion:
    """
    What one model thinks of each token of a completion; all tuples have the completion's length.

    Attributes:
        log_probs (`tuple[float, ...]`): of the token that was sampled, nats.
        top (`tuple` of `tuple` of `(int, float)`): its likeliest ids with their probabilities, the likeliest first.
    """

    log_probs: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]


@dataclass(frozen=True)
class View(Opinion):
    """
    A student's opinion, and how far it is from the teacher's.

    Attributes:
        kl (`tuple[float, ...]`): KL(student ‖ teacher) at each position over the whole vocabulary, nats.
        forward_kl (`tuple[float, ...]`): KL(teacher ‖ student), nats.
    """

    kl: tuple[float, ...]
    forward_kl: tuple[float, ...]


@dataclass(frozen=True)
class Completion:
    """
    One completion, judged.

    Attributes:
        prompt (`str`): as a person reads it.
        ids (`tuple[int, ...]`): its tokens, with the stop token.
        texts (`tuple[str, ...]`): their shares in its text; empty for a token that only begins a character.
        truncated (`bool`): whether it was cut before it ended by itself.
        rewards (`dict[str, float | None]`): by function; `None` where one gave no score.
        teacher ([`Opinion`]): the teacher's.
        views (`tuple` of [`View`]): of each student, in the order of the report's names.
    """

    prompt: str
    ids: tuple[int, ...]
    texts: tuple[str, ...]
    truncated: bool
    rewards: dict[str, float | None]
    teacher: Opinion
    views: tuple[View, ...]

    @property
    def reward(self) -> float | None:
        """The sum over the functions that gave a score; `None` where none did."""
        found = [reward for reward in self.rewards.values() if reward is not None]
        return sum(found) if found else None


@dataclass(frozen=True)
class Summary:
    """Means over the completions of a report, for one student; `None` where there is nothing to take the mean of."""

    completions: int
    tokens: int
    kl: float | None
    forward_kl: float | None
    log_prob: float | None
    agreement: float | None
    reward: float | None
    truncated: float | None


@dataclass(frozen=True)
class TokenTable:
    """
    A whole report.

    Attributes:
        title (`str`): what it is about.
        teacher (`str`): who judged.
        students (`tuple[str, ...]`): one, or the two that are compared; the first wrote the completions.
        completions (`tuple` of [`Completion`]).
        labels (`dict[int, str]`): text of every id that occurs.
        own (`tuple` of [`Summary`]): where two are compared, each on completions of its own.
        settings (`dict[str, str]`): how it was made, for the foot of the page.
    """

    title: str
    teacher: str
    students: tuple[str, ...]
    completions: tuple[Completion, ...]
    labels: dict[int, str]
    own: tuple[Summary, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are numbers; `None` where none is."""
    found = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.fmean(found) if found else None


def summary(completions: Sequence[Completion], student: int = 0) -> Summary:
    """Means over all tokens, and over all completions, as student number `student` sees them."""
    views = [completion.views[student] for completion in completions]
    pairs = [
        (ours[0][0], theirs[0][0])
        for view, completion in zip(views, completions, strict=True)
        for ours, theirs in zip(view.top, completion.teacher.top, strict=True)
    ]
    return Summary(
        completions=len(completions),
        tokens=sum(len(completion.ids) for completion in completions),
        kl=mean(value for view in views for value in view.kl),
        forward_kl=mean(value for view in views for value in view.forward_kl),
        log_prob=mean(value for view in views for value in view.log_probs),
        agreement=mean(float(ours == theirs) for ours, theirs in pairs),
        reward=mean(completion.reward for completion in completions),
        truncated=mean(float(completion.truncated) for completion in completions),
    )


@dataclass(frozen=True)
class Point:
    """Mean KL of the tokens from position `first` to `last` (from 1, inclusive), over `count` tokens."""

    first: int
    last: int
    kl: float
    count: int


def curve(completions: Sequence[Completion], student: int = 0, points: int = 100) -> list[Point]:
    """
    Mean KL(student ‖ teacher) by position in the completion, over those that get so far.

    Args:
        completions: judged.
        student (`int`): whose.
        points (`int`): at most so many; of longer completions neighbouring positions are taken together.
    """
    longest = max((len(completion.ids) for completion in completions), default=0)
    width = max(1, math.ceil(longest / points))
    found = []
    for first in range(0, longest, width):
        values = [
            value
            for completion in completions
            for value in completion.views[student].kl[first : first + width]
            if math.isfinite(value)
        ]
        if values:
            found.append(Point(first + 1, min(first + width, longest), statistics.fmean(values), len(values)))
    return found
