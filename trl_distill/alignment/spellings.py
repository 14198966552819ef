"""Spans of a completion in both spellings, for those who look at them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from .completions import AlignedCompletion
from .vocabularies import Vocabularies


@dataclass(frozen=True)
class Spelling:
    """
    A span in both spellings.

    Attributes:
        start, stop (`int`): positions of the student's tokens; the stop token's counts.
        student (`tuple[int, ...]`): the student's ids, without a stop token.
        teacher (`tuple[int, ...]`): the teacher's, likewise. Where its tokens for the text before have changed with
            what the span added, those changed ones come first.
        exact (`bool`): whether it is one closed id of both, or the stop token alone, so that nothing of it is sampled.
        charged (`bool`): whether a token in it left the student's canonical path.
    """

    start: int
    stop: int
    student: tuple[int, ...]
    teacher: tuple[int, ...]
    exact: bool
    charged: bool


def spellings(pair: Vocabularies, ids: Sequence[int], aligned: AlignedCompletion) -> list[Spelling]:
    """
    The whole spans of a completion.

    Args:
        pair ([`~trl_distill.alignment.vocabularies.Vocabularies`]): the tokenizers.
        ids (`Sequence[int]`): the student's tokens, without the stop token.
        aligned ([`~trl_distill.alignment.completions.AlignedCompletion`]): the completion, aligned.
    """
    ends = [*aligned.starts[1:], aligned.end]
    found = []
    for number, (start, stop) in enumerate(zip(aligned.starts, ends, strict=True)):
        if stop > aligned.end or stop <= start:
            continue  # cut
        before, after = aligned.places[number], aligned.places[number + 1]
        old, new = aligned.paths[before.path][: before.count], aligned.paths[after.path][: after.count]
        same = sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(old, new, strict=False)))
        own = tuple(ids[start:stop])
        closed = not own or own[0] in pair.closed
        charged = any(aligned.charged[start:stop])
        found.append(Spelling(start, stop, own, tuple(new[same:]), aligned.single[number] and closed, charged))
    return found


def shown(pair: Vocabularies, spelling: Spelling) -> str:
    """Both spellings in one line: `'a | b' against 'ab'`."""
    return f"'{pair.student.shown(list(spelling.student))}' against '{pair.teacher.shown(list(spelling.teacher))}'"
