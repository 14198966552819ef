"""Which answers are compared with each other, and the ranking that follows from it (Bradley-Terry). Pure functions."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np


PRIOR = 0.5  # wins of each side that every compared pair gets beside its verdicts, so that scores stay finite


PER_ANSWER = 3  # comparisons for each answer, where not all pairs are compared


def chosen_pairs(answers: int, comparisons: int | None, seed: int) -> list[tuple[int, int]]:
    """
    Pairs of answers to compare: all, or a part that connects all answers and has each about equally often.

    The answers are put on a ring in an order drawn by seed. First come neighbours on the ring, then those with one
    between them, and so on.

    Args:
        answers (`int`): how many there are.
        comparisons (`int`, *optional*): at most so many pairs, at least `answers - 1`. Three for each answer unless
            given, which is all pairs of up to seven.
        seed (`int`): of the order.

    Returns:
        `list[tuple[int, int]]`: pairs of positions, the lower first.
    """
    order = list(range(answers))
    random.Random(seed).shuffle(order)
    ring = (
        tuple(sorted((order[i], order[(i + step) % answers])))
        for step in range(1, answers // 2 + 1)
        for i in range(answers)
    )
    most = PER_ANSWER * answers if comparisons is None else comparisons
    return [(pair[0], pair[1]) for pair in itertools.islice(dict.fromkeys(ring), most)]


def bradley_terry(
    answers: int, outcomes: Sequence[tuple[int, int, float]], prior: float = PRIOR, tolerance: float = 1e-10
) -> list[float]:
    """
    Scores s with P(a beats b) = 1 / (1 + exp(s_b - s_a)), fitted by the MM algorithm (Hunter 2004).

    Args:
        answers (`int`): how many there are.
        outcomes (`list[tuple[int, int, float]]`): two answers, and what the first gets: 1, 0, or 0.5 for a tie.
        prior (`float`): wins that both sides of each compared pair get beside these. With it two answers have the
            scores ±log((wins + prior) / (losses + prior)) / 2.
        tolerance (`float`): largest change of a score in the last step.

    Returns:
        `list[float]`: scores in nats. Of answers that comparisons connect the mean is 0, so an answer that was
        compared with no other has 0, and answers that nothing connects cannot be told apart by it.
    """
    wins = np.zeros((answers, answers))
    compared = np.zeros((answers, answers), dtype=bool)
    for a, b, won in outcomes:
        wins[a, b] += won
        wins[b, a] += 1 - won
        compared[a, b] = compared[b, a] = True
    wins += prior * compared
    games, total = wins + wins.T, wins.sum(axis=1)
    part = _parts(compared)
    scores, alone = np.zeros(answers), total == 0
    for _ in range(100_000):
        strength = np.exp(scores)
        weight = (games / (strength[:, None] + strength[None, :])).sum(axis=1)
        new = np.where(alone, 0.0, np.log(np.where(alone, 1.0, total)) - np.log(np.where(alone, 1.0, weight)))
        for members in part:
            new[members] -= new[members].mean()
        moved = np.abs(new - scores).max(initial=0.0)
        scores = new
        if moved < tolerance:
            break
    return [float(score) for score in scores]


def _parts(compared: np.ndarray) -> list[list[int]]:
    """Answers that comparisons connect, part by part."""
    left, parts = set(range(len(compared))), list[list[int]]()
    while left:
        found, edge = set[int](), {min(left)}
        while edge:
            found |= edge
            edge = {int(j) for i in edge for j in np.flatnonzero(compared[i])} - found
        parts.append(sorted(found))
        left -= found
    return parts
