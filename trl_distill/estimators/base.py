"""The interface of an estimator of the divergence, and what it measures.

Two steps in two places: `measure` runs inside the student's forward pass, where the LM heads are gathered, and projects
what is needed, in tiles. `term` runs in the loss and turns the measures into a loss per token, with the formulas of
`trl_distill.objective`.
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
    Measures of each judged token: of shape `(N,)` in the student's forward pass, and `(B, C)` afterwards, with 0 at
    tokens that are not judged. An estimator that needs more adds fields in a subclass.

    Attributes:
        divergence (`torch.Tensor`, *optional*): in nats, with gradient to the student.
        entropy (`torch.Tensor`, *optional*): the student's entropy at the divergence's temperature, nats.
        log_p (`torch.Tensor`, *optional*): the teacher's log-probability of the sampled token.
        log_q (`torch.Tensor`, *optional*): the student's, if stop tokens count as one; without gradient.
        policy_log_q (`torch.Tensor`, *optional*): the student's with gradient, if it comes from the same logits as the
            divergence.
        comparison (`torch.Tensor` of shape `(5, n)`, *optional*): how the models differ at n of the tokens, see
            [`~trl_distill.heads.comparison.comparison`].
        teacher_entropy (`torch.Tensor`, *optional*): the teacher's entropy at the divergence's temperature, nats.
        agreement (`torch.Tensor`, *optional*): 1 where both models have the same most likely id, else 0.
        starts (`torch.Tensor`, bool, *optional*): the first token of each span, which holds the span's value; `None` if
            each token is a span.
    """

    divergence: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    log_p: torch.Tensor | None = None
    log_q: torch.Tensor | None = None
    policy_log_q: torch.Tensor | None = None
    comparison: torch.Tensor | None = None
    teacher_entropy: torch.Tensor | None = None
    agreement: torch.Tensor | None = None
    starts: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """What was measured, by name: engines find tensors in a module's output where they lie in dictionaries."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """A copy with `change` applied to each per-token tensor, that is to all but `comparison`."""
        per_token = {name: value for name, value in self.tensors().items() if name != "comparison"}
        return replace(self, **{name: change(value) for name, value in per_token.items()})


class Estimator(Protocol):
    """
    What the trainer and the student's forward pass need from an estimator.

    Attributes:
        needs_log_probs (`bool`): whether it needs the student's log-probabilities of the sampled tokens, with gradient.
        takes (`tuple` of types): the types of signals that it accepts.
        measures (`type`): [`TokenMeasures`], or the subclass that `measure` returns.
        temperature (`float`): softmax temperature of both models.
        stops (`list[int]`): stop tokens that count as one; empty if none are merged.
        profiles (`bool`): whether to log the profile of the divergence and the comparison of the models.
        also (`frozenset[str]`): further measures of a local teacher that a token weighting needs: "teacher_entropy",
            "agreement".
    """

    needs_log_probs: bool
    takes: tuple[type, ...]
    temperature: float
    stops: list[int]
    profiles: bool
    also: frozenset[str]

    @property
    def measures(self) -> type[TokenMeasures]: ...

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
        slopes: ExpectedSlopes | None = None,  # the expected gradients, if known
        start: int | None = None,  # decides at which tokens the models are compared for the log
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
        """A loss term `(B, C)` (see `objective/terms.py`) from the measures, which are now `(B, C)` or `(B, C, K)`."""
        ...
