"""What is logged: means over the judged tokens, or the rows, of all processes, without a gradient."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from .forwards import DistilledOutput
from .signals import Judgement


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
def forces(
    output: DistilledOutput,
    judgements: list[Judgement],
    per_token: torch.Tensor,
    mask: torch.Tensor,
    inputs: dict[str, Any],
    beta: float,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """
    What teacher and reward each ask for on one micro-batch.

    Args:
        output ([`~trl_distill.forwards.DistilledOutput`]): of the student.
        judgements (`list` of [`~trl_distill.signals.Judgement`]): what it was measured against.
        per_token (`torch.Tensor` of shape `(B, C)`): KL in nats.
        mask (`torch.Tensor` of shape `(B, C)`): judged tokens.
        inputs (`dict`): the micro-batch, with "rewards" and "advantages" of shape `(B,)` where there are rewards.
        beta (`float`): weight of the divergence, reward per nat.

    Returns:
        Quantities of shape `(B, C)`: "entropy", the student's, and "distill/disagreement", 1 where the reward would
        raise the sampled token's probability and the teacher lower it, or the other way round. And of shape `(B,)`:
        "distill/sequence_kl", nats per completion, and "objective", reward minus beta times that; NaN without a reward.
    """
    device, completion = per_token.device, slice(-mask.shape[1], None)
    measured = [{name: values.to(device) for name, values in found.items()} for found in output.measured or []]
    of_tokens: dict[str, torch.Tensor] = {}
    if output.log_probs is None:  # the same from every teacher's judgement, and 0 where it has none
        entropies = [found["entropy"] for found in measured]
        of_tokens["entropy"] = torch.stack(entropies).amax(0) if entropies else torch.zeros_like(per_token)
    elif output.entropy is not None:
        of_tokens["entropy"] = output.entropy[:, completion].to(device)
    of_rows = {"distill/sequence_kl": (per_token * mask).sum(1)}
    if "rewards" in inputs:
        of_rows["objective"] = inputs["rewards"] - beta * of_rows["distill/sequence_kl"]
    if "rewards" in inputs and output.log_probs is not None and all("log_p" in found for found in measured):
        log_q = output.log_probs[:, completion].to(device)
        toward_teacher = torch.zeros_like(per_token)
        for judgement, found in zip(judgements, measured, strict=True):
            toward_teacher += judgement.weight[:, None] * (found["log_p"] - found.get("log_q", log_q)) * judgement.mask
        toward_reward = inputs["advantages"].view(len(mask), -1)
        of_tokens["distill/disagreement"] = (toward_teacher * toward_reward < 0).float()
    return of_tokens, of_rows
