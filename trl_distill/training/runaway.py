"""Guards against runaway completions: most of them cut, or repeating themselves.

`safeguards.py` calls them once per generation batch.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import RunawayError


PATIENCE = 3  # generation batches in a row before a guard stops the run


GRAM = 4  # tokens


class Guard:
    """
    Stops a run whose metric is above a limit in several generation batches in a row.

    Args:
        what (`str`): what the metric is a share of, for the message.
        limit (`float`, *optional*): in [0, 1); `None` never stops.
        advice (`str`): what to change, for the message.
    """

    def __init__(self, what: str, limit: float | None, advice: str):
        self.what, self.limit, self.advice = what, limit, advice
        self._above = 0

    def check(self, value: float) -> None:
        """Count `value`; raises [`RunawayError`] after `PATIENCE` values in a row above the limit."""
        self._above = self._above + 1 if self.limit is not None and value > self.limit else 0
        if self._above >= PATIENCE:
            raise RunawayError(
                f"{value:.0%} of {self.what}, more than {self.limit:.0%} in {PATIENCE} generation batches in a row. "
                f"{self.advice}"
            )


def repetition(ids: torch.Tensor, mask: torch.Tensor, gram: int = GRAM) -> torch.Tensor:
    """
    Share of each completion's n-grams that occur earlier in the same completion.

    Args:
        ids (`torch.Tensor` of shape `(B, C)`): right-padded completions.
        mask (`torch.Tensor` of shape `(B, C)`): 1 on their tokens.
        gram (`int`): n.

    Returns:
        `torch.Tensor` of shape `(B,)`: 0 where a completion is shorter than n.
    """
    if ids.shape[1] < gram:
        return torch.zeros(len(ids), device=ids.device)
    windows = ids.cpu().unfold(1, gram, 1)  # (B, C - n + 1, n); there, each row's count need not be waited for
    whole = mask.cpu().bool().unfold(1, gram, 1).all(-1)
    shares = []
    for row, valid in zip(windows, whole, strict=True):
        known = row[valid]
        shares.append(1 - len(known.unique(dim=0)) / len(known) if len(known) else 0.0)
    return torch.tensor(shares, device=ids.device)


def written(batch: dict[str, Any], pad: int) -> torch.Tensor:
    """
    Mask of the tokens that the student wrote: `(B, C)`, bool; tool output is left out.

    `mask_truncated_completions` empties the mask of a completion that was cut, but those are the ones to watch: for
    them, all tokens but padding count.

    Args:
        batch (`dict`): with "completion_ids" and "completion_mask" of shape `(B, C)`, and optionally "tool_mask".
        pad (`int`): id of the padding token.
    """
    ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
    found = torch.where(mask.any(1, keepdim=True), mask, ids != pad)
    return found & batch["tool_mask"].bool() if "tool_mask" in batch else found
