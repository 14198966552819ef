"""Win rates of one model against another: raw, and length-controlled as in AlpacaEval 2 (arXiv 2404.04475).

The length-controlled rate fits logit P(win) = θ + φ tanh(d / std(d)), with d the difference of the answers' lengths,
to all comparisons and gives P(win) at d = 0. AlpacaEval's third term, the difficulty of each instruction, is left out:
it is fitted on many models beforehand, and two models alone do not show it. A weak ridge keeps both finite. If one
model's answers are nearly always the longer ones, its quality and their length cannot be told apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .evaluation import DRAWS, Estimate, estimate


RIDGE = 0.01  # of θ and φ, in comparisons


@dataclass(frozen=True)
class Compared:
    """
    Two models' answers to one prompt.

    Attributes:
        prompt (`int`): index of the prompt.
        outcome (`float`, *optional*): 1 if the model wins, 0 if the other does, 0.5 for a tie; `None` if unread.
        longer_by (`int`): characters by which the model's answer is longer.
    """

    prompt: int
    outcome: float | None
    longer_by: int


def win_rates(found: Sequence[Compared], against: str) -> dict[str, Estimate]:
    """
    Win rates of a model with 95 % intervals, bootstrapped over prompts; comparisons that were not read are left out.

    Args:
        found (`Sequence[Compared]`): all comparisons of the model with another.
        against (`str`): the other's name.

    Returns:
        `dict` by name: the win rate (ties count half), the length-controlled one, and the share of longer answers.
    """
    read = [one for one in found if one.outcome is not None]
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(one.prompt for one in read))}
    prompts = np.array([places[one.prompt] for one in read], dtype=int)
    outcomes = np.array([one.outcome for one in read], dtype=float)
    longer = np.array([(np.sign(one.longer_by) + 1) / 2 for one in read], dtype=float)
    counts = np.bincount(prompts, minlength=len(places)).tolist()

    def share(values: np.ndarray) -> Estimate:
        return estimate(np.bincount(prompts, values, minlength=len(places)).tolist(), counts)

    return {
        f"win rate against {against}": share(outcomes),
        f"length-controlled against {against}": _length_controlled(
            outcomes, np.array([one.longer_by for one in read], dtype=float), prompts, len(places)
        ),
        f"longer than {against}": share(longer),
    }


def _length_controlled(outcomes: np.ndarray, longer_by: np.ndarray, prompts: np.ndarray, count: int) -> Estimate:
    if not count:
        return Estimate(float("nan"), float("nan"), float("nan"))
    spread = longer_by.std()
    feature = np.tanh(longer_by / spread) if spread > 0 else np.zeros_like(longer_by)
    value = rate_at_equal_length(outcomes, feature, np.ones_like(outcomes))
    drawn = np.random.default_rng(0).integers(count, size=(DRAWS, count))
    rates = [
        rate_at_equal_length(outcomes, feature, np.bincount(draw, minlength=count)[prompts].astype(float))
        for draw in drawn
    ]
    low, high = np.percentile(rates, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def rate_at_equal_length(outcomes: np.ndarray, feature: np.ndarray, weights: np.ndarray) -> float:
    """
    The probability of a win where the feature is 0, from a logistic regression (Newton's method).

    Args:
        outcomes (`np.ndarray`): (N,), from 0 to 1.
        feature (`np.ndarray`): (N,).
        weights (`np.ndarray`): (N,), how often each row counts.
    """
    x = np.stack([np.ones_like(feature), feature])  # (2, N)
    fitted = np.zeros(2)
    for _ in range(100):
        p = 1 / (1 + np.exp(-(fitted @ x)))
        gradient = x @ (weights * (outcomes - p)) - RIDGE * fitted
        curvature = (x * (weights * p * (1 - p))) @ x.T + RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        fitted += step / max(1.0, float(np.abs(step).max()))  # at most 1, since far steps of Newton may diverge
        if np.abs(step).max() < 1e-9:
            break
    return float(1 / (1 + np.exp(-fitted[0])))
