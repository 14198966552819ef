"""Weights of reward and teacher: the baseline of the rewards, and the schedule of `beta`."""

from __future__ import annotations

import math

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
