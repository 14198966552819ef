"""The data of a token-level report: completions, each model's probabilities of their tokens, and means.

Plain data without tensors, models or HTML. `collect.py` makes it, and `page.py` shows it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


TOP = 5  # number of most likely ids that are kept of each distribution


@dataclass(frozen=True)
class Opinion:
    """
    One model's probabilities at each token of a completion; all tuples have the completion's length.

    Attributes:
        log_probs (`tuple[float, ...]`): log-probability of the sampled token, nats.
        top (`tuple` of `tuple` of `(int, float)`): the most likely ids and their probabilities, in descending order.
    """

    log_probs: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]


@dataclass(frozen=True)
class View(Opinion):
    """
    A student's probabilities, and their divergence from the teacher's.

    Attributes:
        kl (`tuple[float, ...]`): KL(student ‖ teacher) at each position over the whole vocabulary, nats.
        forward_kl (`tuple[float, ...]`): KL(teacher ‖ student), nats.
    """

    kl: tuple[float, ...]
    forward_kl: tuple[float, ...]


@dataclass(frozen=True)
class Span:
    """
    Tokens of a completion that a teacher with another tokenizer compares as one text.

    Attributes:
        start, stop (`int`): the tokens' positions.
        student, teacher (`str`): the text in the tokens of both, with " | " between them.
        exact (`bool`): whether it is one closed id of both, so that nothing of its cost is sampled.
        charged (`bool`): whether a token in it is not how the student's tokenizer writes the text.
    """

    start: int
    stop: int
    student: str
    teacher: str
    exact: bool
    charged: bool


@dataclass(frozen=True)
class Picture:
    """
    An image in a prompt.

    Attributes:
        alt (`str`): what is said in its place.
        uri (`str`): the thumbnail as a data URI; empty where there is none.
        width, height (`int`): of the thumbnail, pixels.
    """

    alt: str
    uri: str = ""
    width: int = 0
    height: int = 0


@dataclass(frozen=True)
class Completion:
    """
    One scored completion.

    Attributes:
        prompt (`str`): the prompt as readable text.
        ids (`tuple[int, ...]`): its token ids, stop token included.
        texts (`tuple[str, ...]`): the part of its text that each token adds; empty if a token only begins a character.
        truncated (`bool`): whether it was cut before a stop token.
        rewards (`dict[str, float | None]`): by reward function; `None` if it gave no score.
        teacher ([`Opinion`]): the teacher's probabilities.
        views (`tuple` of [`View`]): one for each student, in the order of `TokenTable.students`.
        spans (`tuple` of [`Span`]): with a teacher that has another tokenizer. A span's KL and the teacher's
            log-probability then stand at its first token, and the teacher's most likely ids are its own.
        pictures (`tuple` of [`Picture`]): the images in the prompt.
    """

    prompt: str
    ids: tuple[int, ...]
    texts: tuple[str, ...]
    truncated: bool
    rewards: dict[str, float | None]
    teacher: Opinion
    views: tuple[View, ...]
    spans: tuple[Span, ...] = ()
    pictures: tuple[Picture, ...] = ()

    @property
    def reward(self) -> float | None:
        """The sum of the functions that gave a score; `None` if none did."""
        found = [reward for reward in self.rewards.values() if reward is not None]
        return sum(found) if found else None


@dataclass(frozen=True)
class Summary:
    """Means over the completions of a report, for one student; `None` if there are no values."""

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
    The data of a whole report.

    Attributes:
        title (`str`): title of the page.
        teacher (`str`): name of the teacher.
        students (`tuple[str, ...]`): names of one student, or of two to compare; the first wrote the completions.
        completions (`tuple` of [`Completion`]): the scored completions.
        labels (`dict[int, str]`): text of every id that occurs.
        own (`tuple` of [`Summary`]): if two students are compared, each one on its own completions.
        settings (`dict[str, str]`): sampling settings, for the foot of the page.
    """

    title: str
    teacher: str
    students: tuple[str, ...]
    completions: tuple[Completion, ...]
    labels: dict[int, str]
    own: tuple[Summary, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the finite values; `None` if there are none."""
    found = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.fmean(found) if found else None


def summary(completions: Sequence[Completion], student: int = 0) -> Summary:
    """Means over all tokens, or all completions, for the student with index `student`."""
    views = [completion.views[student] for completion in completions]
    pairs = [
        (ours[0][0], theirs[0][0])
        for view, completion in zip(views, completions, strict=True)
        for ours, theirs in zip(view.top, completion.teacher.top, strict=True)
        if theirs and not completion.spans  # ids of another tokenizer are not compared
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
    Mean KL(student ‖ teacher) by position in the completion, over the completions that are long enough.

    Args:
        completions (`list` of [`Completion`]): the scored completions.
        student (`int`): index of the student.
        points (`int`): maximum number of points; for longer completions neighbouring positions are averaged.
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
