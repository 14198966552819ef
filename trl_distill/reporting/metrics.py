"""What is logged: means over the judged tokens, or the rows, of all processes, without a gradient."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from ..heads.comparison import COMPARED
from ..models.student import DistilledOutput
from ..rollouts import MicroBatch
from ..signals import TeacherScore


def means(accelerator: Accelerator, quantities: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """
    Mean of each quantity over what its mask marks, on all processes together: one reduction, one sync.

    Args:
        accelerator ([`~accelerate.Accelerator`]): the trainer's.
        quantities (`dict`): by name, values and a mask of the same shape: `(B, C)` for tokens, `(B,)` for rows. Values
            outside the mask may be anything, NaN included.

    Returns:
        `dict[str, float]`: the means; without those for which nothing counts on any process.
    """
    sums = [
        part
        for values, mask in quantities.values()
        for part in (values.detach().float().masked_fill(~mask.bool(), 0.0).sum(), mask.float().sum())
    ]
    totals = accelerator.reduce(torch.stack(sums), reduction="sum").view(-1, 2).tolist()
    return {name: total / count for name, (total, count) in zip(quantities, totals, strict=True) if count}


@torch.no_grad()
def reward_and_teacher(
    output: DistilledOutput,
    scores: list[TeacherScore],
    per_token: torch.Tensor,
    batch: MicroBatch,
    beta: float,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """
    What teacher and reward each ask for on one micro-batch.

    Args:
        output ([`~trl_distill.models.student.DistilledOutput`]): of the student.
        scores (`list` of [`~trl_distill.signals.TeacherScore`]): what it was measured against.
        per_token (`torch.Tensor` of shape `(B, C)`): KL in nats.
        batch ([`~trl_distill.rollouts.MicroBatch`]): with rewards and advantages where there are any.
        beta (`float`): weight of the divergence, reward per nat.

    Returns:
        Quantities of shape `(B, C)`: "entropy", the student's, and "distill/disagreement", 1 where the reward would
        raise the sampled token's probability and the teacher lower it, or the other way round. And of shape `(B,)`:
        "distill/sequence_kl", nats per completion, and "objective", reward minus beta times that; NaN without a reward,
        and where no token is judged.
    """
    device, mask = per_token.device, batch.mask
    completion = slice(-mask.shape[1], None)
    measured = [found.map(lambda values: values.to(device)) for found in output.measured or []]
    of_tokens: dict[str, torch.Tensor] = {}
    if output.log_probs is None:  # the same from every teacher's judgement, and 0 where it has none
        entropies = [found.entropy for found in measured if found.entropy is not None]
        of_tokens["entropy"] = torch.stack(entropies).amax(0) if entropies else torch.zeros_like(per_token)
    elif output.entropy is not None:
        of_tokens["entropy"] = output.entropy[:, completion].to(device)
    of_rows = {"distill/sequence_kl": (per_token * mask).sum(1).masked_fill(mask.sum(1) == 0, torch.nan)}
    if batch.rewards is None:
        return of_tokens, of_rows
    of_rows["objective"] = batch.rewards - beta * of_rows["distill/sequence_kl"]
    if output.log_probs is not None and all(found.log_p is not None for found in measured):
        log_q = output.log_probs[:, completion].to(device)
        toward_teacher = torch.zeros_like(per_token)
        for score, found in zip(scores, measured, strict=True):
            own = log_q if found.log_q is None else found.log_q
            toward_teacher += score.weight[:, None] * (found.log_p - own) * score.mask
        assert batch.advantages is not None
        toward_reward = batch.advantages.view(len(mask), -1)
        of_tokens["distill/disagreement"] = (toward_teacher * toward_reward < 0).float()
    return of_tokens, of_rows


@torch.no_grad()
def divergence_profile(
    output: DistilledOutput, per_token: torch.Tensor, mask: torch.Tensor, name: str
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """
    Where in a micro-batch the divergence is, and how student and teacher differ.

    Args:
        output ([`~trl_distill.models.student.DistilledOutput`]): of the student.
        per_token (`torch.Tensor` of shape `(B, C)`): the divergence, nats.
        mask (`torch.Tensor` of shape `(B, C)`, bool): judged tokens.
        name (`str`): of the divergence in the log.

    Returns:
        Quantities with their masks, the same ones on every process: `<name>/quarter1` to `4`, the divergence in the
        quarters of each completion; "distill/concentration", the share of tokens that carry 80 % of it;
        "distill/teacher_log_prob", of the tokens that the student wrote, where it was measured; and what
        [`~trl_distill.heads.comparison.comparison`] tells of a few tokens.
    """
    per_token, place, length = per_token.detach(), mask.cumsum(1) - 1, mask.sum(1, keepdim=True)
    quarter = (4 * place).div(length.clamp(min=1), rounding_mode="floor")
    found = {f"{name}/quarter{i + 1}": (per_token, mask & (quarter == i)) for i in range(4)}
    values = per_token[mask].clamp(min=0).sort(descending=True).values
    carried = values.cumsum(0) < 0.8 * values.sum()
    share = (carried.sum() + 1) / max(len(values), 1)
    found["distill/concentration"] = share.view(1), (values.sum() > 0).view(1)
    log_p = [one.log_p.to(per_token.device) for one in output.measured or [] if one.log_p is not None]
    alone = len(output.measured or []) == len(log_p) == 1
    found["distill/teacher_log_prob"] = (log_p[0], mask) if alone else (per_token, torch.zeros_like(mask))
    parts = [one.comparison.to(per_token.device) for one in output.measured or [] if one.comparison is not None]
    few = torch.cat(parts, dim=1) if parts else per_token.new_zeros(len(COMPARED), 0)
    found |= {f"distill/{what}": (row, torch.ones_like(row)) for what, row in zip(COMPARED, few, strict=True)}
    return found


@torch.no_grad()
def by_reward(per_token: torch.Tensor, mask: torch.Tensor, advantages: torch.Tensor) -> dict[str, Any]:
    """
    The divergence of completions that the reward is for, and of those that it is against.

    Args:
        per_token, mask: as in [`divergence_profile`].
        advantages (`torch.Tensor` of shape `(B,)` or `(B, C)`).

    Returns:
        Quantities with their masks: "rewarded" and "punished".
    """
    sign = advantages.view(len(mask), -1).expand_as(per_token)
    return {"rewarded": (per_token, mask & (sign > 0)), "punished": (per_token, mask & (sign < 0))}
