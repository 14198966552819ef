"""The divergence estimated from the sampled token alone."""

from __future__ import annotations

import torch

from ..objective import terms
from .base import Measured
from .log_probs import _columns, _FromLogProbs, _is_in, _log_p


class Sampled(_FromLogProbs):
    """The sampled token's log-ratio as a cost: unbiased, and noisy."""

    def __init__(self, temperature: float, stops: list[int]):
        self.temperature, self.stops = temperature, stops

    def measure(self, hidden, head, signal, sampled, log_q, slopes=None) -> Measured:
        log_p = _log_p(signal, sampled, head.vocab_size, self.temperature)
        if not self.stops:
            return {"log_p": log_p}
        of_student, of_teacher = _columns(hidden, head, signal, [self.stops], sampled, log_q, log_p, self.temperature)
        stopped = _is_in(sampled, self.stops)
        return {
            "log_p": torch.where(stopped, of_teacher.logsumexp(-1), log_p),
            "log_q": torch.where(stopped, of_student.logsumexp(-1), log_q).detach(),
        }

    def term(self, measured, log_q, ratio, weight) -> torch.Tensor:
        return terms.sampled_reverse_kl(measured.get("log_q", log_q), measured["log_p"], ratio, weight)
