"""What rewards and the teacher weigh: baselines of rewards, the schedule of `beta`."""

from __future__ import annotations

import math

import torch


def leave_one_out(advantages: torch.Tensor, valid: torch.Tensor, group: int) -> torch.Tensor:
    """
    Turn rewards minus their group's mean into rewards minus the mean of the others: times n / (n − 1).

    The group's mean contains the row itself, which shrinks the reward's gradient by (n − 1) / n and so raises the
    effective beta (RLOO, arXiv 2402.14740).

    Args:
        advantages (`torch.Tensor` of shape `(R,)`): rewards minus the mean over each group's valid rewards.
        valid (`torch.Tensor` of shape `(R,)`, bool): rows that have a reward at all.
        group (`int`): rows per group; groups are consecutive.

    Returns:
        `torch.Tensor` of shape `(R,)`; unchanged where a group has one valid reward or none.
    """
    n = valid.view(-1, group).sum(1, keepdim=True).expand(-1, group).reshape(-1).to(advantages.dtype)
    return torch.where(n > 1, advantages * n / (n - 1).clamp(min=1), advantages)


def scheduled_beta(schedule: str, start: float, end: float, step: int, steps: int) -> float:
    """
    Weight of the divergence at a global step: "constant", "linear" or "cosine" from `start` to `end`, or "step".

    A function of the step alone, so that a resumed run needs no state. "step" holds `start` and jumps to `end` at
    `steps`; the others arrive there at `steps` and stay.
    """
    if schedule == "constant":
        return start
    done = min(step / steps, 1.0) if steps > 0 else 0.0  # of unknown length before training starts
    if schedule == "step":
        return end if done >= 1.0 else start
    return start + (end - start) * (done if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * done)))
