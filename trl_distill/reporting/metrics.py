"""Metrics: means over judged tokens or rows of all processes, without gradient."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from ..heads.comparison import COMPARED
from ..models.student import DistilledOutput
from ..places import take
from ..rollouts import MicroBatch
from ..signals import TeacherScore


def means(accelerator: Accelerator, quantities: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """
    Masked mean of each quantity over all processes, with one reduction and one synchronisation.

    Args:
        accelerator ([`~accelerate.Accelerator`]): the trainer's.
        quantities (`dict`): by name, values and a mask of the same shape: `(B, C)` for tokens, `(B,)` for rows. Values
            outside of the mask are ignored, even NaN.

    Returns:
        `dict[str, float]`: the means, without quantities whose masks are empty on all processes.
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
    How reward and teacher compare on one micro-batch.

    Args:
        output ([`~trl_distill.models.student.DistilledOutput`]): of the student's forward pass.
        scores (`list` of [`~trl_distill.signals.TeacherScore`]): the teachers' scores.
        per_token (`torch.Tensor` of shape `(B, C)`): the divergence, nats.
        batch ([`~trl_distill.rollouts.MicroBatch`]): the micro-batch, with rewards and advantages if there are any.
        beta (`float`): weight of the divergence, reward per nat.

    Returns:
        Two `dict`s of quantities. Of shape `(B, C)`: "entropy", the student's, nats; and "distill/disagreement", 1
        where the reward would raise the sampled token's probability and the teacher lower it, or vice versa. Of shape
        `(B,)`: "distill/sequence_kl", nats per completion, and "objective", the reward minus beta times that; NaN
        without a reward or judged tokens.
    """
    device, mask = per_token.device, batch.mask
    completion = slice(-mask.shape[1], None)
    measured = [found.map(lambda values: values.to(device)) for found in output.measured or []]
    of_tokens: dict[str, torch.Tensor] = {}
    if output.log_probs is None:  # the same with every teacher, and 0 at tokens that it does not score
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
    output: DistilledOutput, scores: list[TeacherScore], per_token: torch.Tensor, mask: torch.Tensor, name: str
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """
    Where in the completions the divergence is, and how student and teacher differ.

    Args:
        output ([`~trl_distill.models.student.DistilledOutput`]): of the student's forward pass.
        scores (`list` of [`~trl_distill.signals.TeacherScore`]): the teachers' scores. A teacher whose weights are all
            negative is no target, so it is not compared with the student.
        per_token (`torch.Tensor` of shape `(B, C)`): the divergence, nats.
        mask (`torch.Tensor` of shape `(B, C)`, bool): the judged tokens.
        name (`str`): name of the divergence in the log.

    Returns:
        Quantities with their masks, with the same names on every process: `<name>/quarter1` to `4`, the divergence in
        each quarter of the completions; "distill/concentration", the share of tokens with 80 % of its positive part;
        "distill/teacher_log_prob" of the sampled tokens, if measured; the values of
        [`~trl_distill.heads.comparison.comparison`] at a sample of the tokens, and "distill/compared_tokens", its size.
    """
    per_token, place, length = per_token.detach(), mask.cumsum(1) - 1, mask.sum(1, keepdim=True)
    quarter = (4 * place).div(length.clamp(min=1), rounding_mode="floor")
    found = {f"{name}/quarter{i + 1}": (per_token, mask & (quarter == i)) for i in range(4)}
    values = take(per_token, mask).clamp(min=0).sort(descending=True).values
    carried = values.cumsum(0) < 0.8 * values.sum()
    share = (carried.sum() + 1) / max(len(values), 1)
    found["distill/concentration"] = share.view(1), (values.sum() > 0).view(1)
    log_p = [one.log_p.to(per_token.device) for one in output.measured or [] if one.log_p is not None]
    alone = len(output.measured or []) == len(log_p) == 1
    found["distill/teacher_log_prob"] = (log_p[0], mask) if alone else (per_token, torch.zeros_like(mask))
    parts = [
        one.comparison.to(per_token.device)
        for score, one in zip(scores, output.measured or [], strict=True)
        if one.comparison is not None and (not score.rows or (score.weight > 0).any())  # a single one's weight is 1
    ]
    few = torch.cat(parts, dim=1) if parts else per_token.new_zeros(len(COMPARED), 0)
    found |= {f"distill/{what}": (row, torch.ones_like(row)) for what, row in zip(COMPARED, few, strict=True)}
    compared = few.new_tensor([few.shape[1]])
    found["distill/compared_tokens"] = compared, compared > 0
    return found


@torch.no_grad()
def by_reward(per_token: torch.Tensor, mask: torch.Tensor, advantages: torch.Tensor) -> dict[str, Any]:
    """
    The divergence of completions with positive and with negative advantage.

    Args:
        per_token, mask: as in [`divergence_profile`].
        advantages (`torch.Tensor` of shape `(B,)` or `(B, C)`).

    Returns:
        Quantities with their masks: "rewarded" (positive advantage) and "punished" (negative).
    """
    sign = advantages.view(len(mask), -1).expand_as(per_token)
    return {"rewarded": (per_token, mask & (sign > 0)), "punished": (per_token, mask & (sign < 0))}
