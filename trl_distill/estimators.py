"""Estimators of the divergence: what each computes from hidden states, and the term it makes of that.

Two steps, because they happen in two places. `measure` runs inside the student's forward, where the LM heads are
whole, and projects what is needed, in tiles. `term` runs in the trainer and turns those numbers into a loss per token,
with the formulas of `objective.py`. A new estimator is a class and one line in `make_estimator`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from . import objective
from .heads import LMHead, exact_divergence, log_probs_of, logits_of, top_ids
from .signals import HiddenStates


Measured = dict[str, torch.Tensor]


class Estimator(Protocol):
    """
    What the trainer and the student's forward ask of an estimator.

    Attributes:
        needs_log_probs (`bool`): whether the student's log-probability of the sampled token is needed, with gradient.
    """

    needs_log_probs: bool

    def measure(
        self,
        hidden: torch.Tensor,  # (N, H_s)
        head: LMHead,
        signal: HiddenStates,  # (N, H_t)
        sampled: torch.Tensor,  # (N,) ids
        log_q: torch.Tensor | None,  # (N,) the student's log-probability of `sampled`, at the sampling temperature
    ) -> Measured:
        """Per judged token, tensors of shape `(N,)` or `(N, K)`."""
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


class Full:
    """The exact divergence over the whole vocabulary: no noise of its own, and right on any prefix."""

    needs_log_probs = False

    def __init__(self, divergence: str, temperature: float, log_p_temperature: float | None = None):
        self.divergence, self.temperature, self.log_p_temperature = divergence, temperature, log_p_temperature

    def measure(self, hidden, head, signal, sampled, log_q) -> Measured:
        divergence, entropy = exact_divergence(hidden, head, signal, self.divergence, self.temperature)
        measured = {"divergence": divergence, "entropy": entropy}
        if self.log_p_temperature is not None and log_q is not None:  # for the log: do reward and teacher agree?
            shared = min(head.vocab_size, signal.head.vocab_size)
            measured["log_p"] = log_probs_of(signal.hidden, signal.head, sampled, shared, self.log_p_temperature)
        return measured

    def term(self, measured, log_q, ratio, weight) -> torch.Tensor:
        return measured["divergence"]


class Sampled:
    """The sampled token's log-ratio as a cost: unbiased, and noisy."""

    needs_log_probs = True

    def __init__(self, temperature: float):
        self.temperature = temperature

    def measure(self, hidden, head, signal, sampled, log_q) -> Measured:
        log_p = log_probs_of(signal.hidden, signal.head, sampled, head.vocab_size, self.temperature)
        return {"log_p": log_p}

    def term(self, measured, log_q, ratio, weight) -> torch.Tensor:
        return objective.sampled_reverse_kl(log_q, measured["log_p"], ratio, weight)


class TopK:
    """The student's K most likely ids exactly, the rest by the sampled token: unbiased for every K."""

    needs_log_probs = True

    def __init__(self, k: int, temperature: float):
        self.k, self.temperature = k, temperature

    def measure(self, hidden, head, signal, sampled, log_q) -> Measured:
        k = min(self.k, head.vocab_size)
        log_p = log_probs_of(signal.hidden, signal.head, sampled, head.vocab_size, self.temperature)
        if k == 0:
            empty = hidden.new_zeros((hidden.shape[0], 0), dtype=torch.float32)
            outside = torch.ones_like(sampled, dtype=torch.bool)
            return {"log_p": log_p, "head_log_q": empty, "head_log_p": empty, "outside": outside}
        ids = top_ids(hidden, head, k)  # (N, K)
        columns = torch.cat([ids, sampled[:, None]], dim=1)
        of_student = logits_of(hidden, head, columns, self.temperature)
        with torch.no_grad():
            of_teacher = logits_of(signal.hidden, signal.head, columns, self.temperature)
        # log p(v) = z_v − log Z, and log Z = z_y − log p(y): the normalisers come with the sampled token's
        return {
            "log_p": log_p,
            "head_log_q": of_student[:, :-1] - (of_student[:, -1] - log_q)[:, None],
            "head_log_p": of_teacher[:, :-1] - (of_teacher[:, -1] - log_p)[:, None],
            "outside": ~(ids == sampled[:, None]).any(-1),
        }

    def term(self, measured, log_q, ratio, weight) -> torch.Tensor:
        m = measured
        return objective.topk_reverse_kl(
            m["head_log_q"], m["head_log_p"], log_q, m["log_p"], m["outside"], ratio, weight
        )


def make_estimator(
    name: str, divergence: str, temperature: float, k: int, log_p_temperature: float | None = None
) -> Estimator:
    """
    The estimator that `kl_estimator` names.

    With `log_p_temperature`, "full" measures the sampled token too, at that temperature: one more projection of the
    teacher, for the log.
    """
    table: dict[str, Callable[[], Estimator]] = {
        "full": lambda: Full(divergence, temperature, log_p_temperature),
        "topk": lambda: TopK(k, temperature),
        "sampled": lambda: Sampled(temperature),
    }
    return table[name]()
