"""What is logged under `distill/`: means over the judged tokens of all processes, without a gradient."""

from __future__ import annotations

import torch
from accelerate import Accelerator


def token_means(accelerator: Accelerator, mask: torch.Tensor, **per_token: torch.Tensor) -> dict[str, float]:
    """
    Mean of each quantity over the tokens that `mask` marks, on all processes together: one reduction, one sync.

    Args:
        accelerator ([`~accelerate.Accelerator`]): the trainer's.
        mask (`torch.Tensor` of shape `(B, C)`).
        per_token (`torch.Tensor` of shape `(B, C)`): quantities by name.

    Returns:
        `dict[str, float]`: the means; 0.0 where no token counts at all.
    """
    sums = [(values.detach().float() * mask).sum() for values in per_token.values()]
    totals = accelerator.reduce(torch.stack([mask.sum().float(), *sums]), reduction="sum").tolist()
    return {name: total / max(totals[0], 1.0) for name, total in zip(per_token, totals[1:], strict=True)}
