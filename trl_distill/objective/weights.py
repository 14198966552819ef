"""Weights of reward and teachers: baselines of the rewards, the schedule of `beta`, weights of several teachers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch


def leave_one_out(advantages: torch.Tensor, valid: torch.Tensor, group: int) -> torch.Tensor:
    """
    Turn rewards minus the group's mean into rewards minus the mean of the other rows, by a factor n / (n − 1).

    The group's mean includes the row itself, which scales the reward's gradient by (n − 1) / n and so raises the
    effective beta (leave-one-out baseline: RLOO, arXiv 2402.14740).

    Args:
        advantages (`torch.Tensor` of shape `(R,)`): rewards minus the mean over each group's valid rewards.
        valid (`torch.Tensor` of shape `(R,)`, bool): rows that have a reward.
        group (`int`): rows per group; groups are consecutive.

    Returns:
        `torch.Tensor` of shape `(R,)`; unchanged in groups with fewer than two valid rewards.
    """
    n = valid.view(-1, group).sum(1, keepdim=True).expand(-1, group).reshape(-1).to(advantages.dtype)
    return torch.where(n > 1, advantages * n / (n - 1).clamp(min=1), advantages)


def mean_of_others(
    rewards: torch.Tensor,
    keys: torch.Tensor,
    earlier_sum: torch.Tensor | float = 0.0,
    earlier_count: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """
    A baseline for each reward: the mean of the other rewards with the same key, and of earlier ones.

    A row's own reward stays out, so the baseline does not depend on the row's completion, and subtracting it leaves the
    expected gradient as it is (RLOO, arXiv 2402.14740). That holds for any keys that do not depend on completions.

    Args:
        rewards (`torch.Tensor` of shape `(R,)`): NaN for rows without a reward, which are left out of all means.
        keys (`torch.Tensor` of shape `(R,)`, int64): rows with equal keys are compared.
        earlier_sum, earlier_count (`torch.Tensor` of shape `(R,)`): sum and number of earlier rewards of the row's key.

    Returns:
        `torch.Tensor` of shape `(R,)`, fp64: NaN where there is no other reward.
    """
    valid = ~rewards.isnan()
    values = torch.where(valid, rewards, 0.0).double()
    found, group = keys.unique(return_inverse=True)
    sums, counts = (
        values.new_zeros(len(found)).index_add(0, group, own)[group] - own for own in (values, valid.double())
    )
    sums, counts = sums + earlier_sum, counts + earlier_count
    return torch.where(counts > 0, sums / counts.clamp(min=1), torch.nan)


def scheduled_beta(schedule: str, start: float, end: float, step: int, steps: int) -> float:
    """
    Weight of the divergence at a global step: "constant", "linear" or "cosine" from `start` to `end`, or "step".

    It depends on the step alone, so a resumed run needs no state.

    Args:
        schedule (`str`): "step" jumps from `start` to `end` at `steps`; "linear" and "cosine" reach `end` at `steps`.
        start, end (`float`): the weights, reward per nat.
        step (`int`): optimizer steps made.
        steps (`int`): length of the schedule in optimizer steps.
    """
    if schedule == "constant":
        return start
    done = min(step / steps, 1.0) if steps > 0 else 0.0  # before training starts, `steps` may be 0
    if schedule == "step":
        return end if done >= 1.0 else start
    return start + (end - start) * (done if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * done)))


def check_teacher_weights(weights: Mapping[str, Any], where: str, divergences: Sequence[str] = ("reverse_kl",)) -> None:
    """
    Check the weights of several teachers on one row.

    Weights that add up to 1 may be negative for the reverse KL: Σ_i w_i KL(q ‖ p_i) is KL(q ‖ ∏ p_i^{w_i} / Z) − log Z,
    so the minimum is the geometric mixture, which can lie beyond a teacher (ExOPD, arXiv 2602.12125).

    Args:
        weights (`dict[str, float]`): by the teachers' names.
        where (`str`): what has the weights, at the start of error messages, with its verb.
        divergences (`list[str]`): those that the run minimises.

    Raises:
        ValueError: weights are not finite or all 0; or some are negative and do not add up to 1, or belong to a
            divergence for which they have no such minimum.
    """
    given = dict(weights)
    numbers = all(isinstance(weight, int | float) and math.isfinite(weight) for weight in given.values())
    if not numbers or not any(given.values()):
        raise ValueError(f"{where} the teachers {given}; weights must be finite numbers, and not all of them 0.")
    if min(given.values()) >= 0:
        return
    total = sum(given.values())
    if abs(total - 1) > 1e-6:
        raise ValueError(
            f"{where} the teachers {given}, whose weights add up to {total:g}. With a negative one they must add up to "
            "1: then they are the exponents of the mixture that is the target. With a sum of 0 or less there is no "
            "target, and the student would only be driven away from a teacher. Scale the whole term with `beta`."
        )
    others = [name for name in divergences if name != "reverse_kl"]
    if others:
        raise ValueError(
            f"{where} the teachers {given}, but a negative weight needs the reverse KL, and the run minimises "
            f"{others[0]!r}: it averages over a teacher's tokens, or is bounded, so with a negative weight it is no "
            "divergence from any mixture, and can fall without limit. Use divergence='reverse_kl' (and, with `lmbda` "
            "below 1, off_policy_divergence='reverse_kl'), or weights that are not negative."
        )
