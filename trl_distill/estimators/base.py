"""Estimators of the divergence: what each computes from hidden states, and the term it makes of that.

Two steps, because they happen in two places. `measure` runs inside the student's forward, where the LM heads are
whole, and projects what is needed, in tiles. `term` runs in the trainer and turns those numbers into a loss per token,
with the formulas of `objective.py`. A new estimator is a class and one line in `make_estimator`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ..heads.fused import ExpectedSlopes
from ..heads.lm_head import LMHead


Measured = dict[str, torch.Tensor]


class Estimator(Protocol):
    """
    What the trainer and the student's forward ask of an estimator.

    Attributes:
        needs_log_probs (`bool`): whether the student's log-probability of the sampled token is needed, with gradient.
        takes (`tuple` of types): the signals that it can work with.
        temperature (`float`): softmax temperature of both models.
        stops (`list[int]`): ids that count as one; empty where there is nothing to merge.
    """

    needs_log_probs: bool
    takes: tuple[type, ...]
    temperature: float
    stops: list[int]

    def shares_logits(self, device: torch.device) -> bool:
        """Whether `measure` also gives the student's log-probabilities at the sampling temperature: "own_log_q"."""
        ...

    def measure(
        self,
        hidden: torch.Tensor,  # (N, H_s)
        head: LMHead,
        signal: Any,  # one of `takes`, for the same N tokens
        sampled: torch.Tensor,  # (N,) ids
        log_q: torch.Tensor | None,  # (N,) the student's log-probability of `sampled`, at the sampling temperature
        slopes: ExpectedSlopes | None = None,  # what the gradients will be, where that is known
    ) -> Measured:
        """
        Per judged token, tensors of shape `(N,)` or `(N, K)`.

        With them may come "own_log_q", where logits are shared, and "looked", the [`~trl_distill.heads.comparison.comparison`].
        """
        ...

    def term(
        self,
        measured: Measured,
        log_q: torch.Tensor | None,
        ratio: torch.Tensor | None,
        weight: torch.Tensor | None,
    ) -> torch.Tensor:
        """A term (see `objective.py`), `(B, C)`, from what was measured, now of shape `(B, C)` or `(B, C, K)`."""
        ...
