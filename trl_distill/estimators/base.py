"""What an estimator of the divergence is, and what it measures.

Two steps, because they happen in two places. `measure` runs inside the student's forward pass, where the LM heads are
whole, and projects what is needed, in tiles. `term` runs in the loss and turns those numbers into a loss per token,
with the formulas of `trl_distill.objective`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self

import torch

from ..heads.fused import ExpectedSlopes
from ..heads.lm_head import LMHead


@dataclass(frozen=True)
class TokenMeasures:
    """
    What was measured of each judged token: of shape `(N,)` in the student's forward pass, `(B, C)` afterwards, 0 at
    tokens that are not judged. An estimator whose `term` needs more adds fields in a subclass.

    Attributes:
        divergence (`torch.Tensor`, *optional*): in nats, with a gradient to the student.
        entropy (`torch.Tensor`, *optional*): of the student at the divergence's temperature, nats.
        log_p (`torch.Tensor`, *optional*): the teacher's log-probability of the sampled token.
        log_q (`torch.Tensor`, *optional*): the student's, where ids count as one; without a gradient.
        policy_log_q (`torch.Tensor`, *optional*): the student's with a gradient, where the divergence's logits are used
            for it too.
        comparison (`torch.Tensor` of shape `(5, n)`, *optional*): how the models differ at n of the tokens, see
            [`~trl_distill.heads.comparison.comparison`].
    """

    divergence: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    log_p: torch.Tensor | None = None
    log_q: torch.Tensor | None = None
    policy_log_q: torch.Tensor | None = None
    comparison: torch.Tensor | None = None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """With each tensor that has one row per token changed in the same way; `comparison` has none."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "comparison"}
        return replace(self, **{name: change(value) for name, value in values.items() if value is not None})


class Estimator(Protocol):
    """
    What the trainer and the student's forward ask of an estimator.

    Attributes:
        needs_log_probs (`bool`): whether the student's log-probability of the sampled token is needed, with gradient.
        takes (`tuple` of types): the signals that it can work with.
        temperature (`float`): softmax temperature of both models.
        stops (`list[int]`): ids that count as one; empty where there is nothing to merge.
        profiles (`bool`): whether to measure for the log where the divergence is and how the models differ.
    """

    needs_log_probs: bool
    takes: tuple[type, ...]
    temperature: float
    stops: list[int]
    profiles: bool

    def shares_logits(self, device: torch.device) -> bool:
        """Whether `measure` also gives the student's log-probabilities at the sampling temperature: `policy_log_q`."""
        ...

    def measure(
        self,
        hidden: torch.Tensor,  # (N, H_s)
        head: LMHead,
        signal: Any,  # one of `takes`, for the same N tokens
        sampled: torch.Tensor,  # (N,) ids
        log_q: torch.Tensor | None,  # (N,) the student's log-probability of `sampled`, at the sampling temperature
        slopes: ExpectedSlopes | None = None,  # what the gradients will be, where that is known
    ) -> TokenMeasures:
        """Measures of shape `(N,)` or `(N, K)`."""
        ...

    def term(
        self,
        measured: Any,  # TokenMeasures, or the subclass that `measure` returned
        log_q: torch.Tensor | None,
        ratio: torch.Tensor | None,
        weight: torch.Tensor | None,
    ) -> torch.Tensor:
        """A term (see `objective/terms.py`), `(B, C)`, from what was measured, now of shape `(B, C)` or `(B, C, K)`."""
        ...
