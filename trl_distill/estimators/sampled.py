"""The reverse KL estimated from the sampled token alone."""

from __future__ import annotations

import torch

from ..objective import terms
from .base import TokenMeasures
from .log_probs import FromLogProbs, is_in, log_probs_of_few_ids, teacher_log_p


class Sampled(FromLogProbs):
    """The log-ratio of the sampled token as a cost: unbiased but noisy."""

    def __init__(self, temperature: float, stops: list[int]):
        self.temperature, self.stops = temperature, stops

    def measure(self, hidden, head, signal, sampled, log_q, slopes=None) -> TokenMeasures:
        log_p = teacher_log_p(signal, sampled, head.vocab_size, self.temperature)
        if not self.stops:
            return TokenMeasures(log_p=log_p)
        of_student, of_teacher = log_probs_of_few_ids(
            hidden, head, signal, [self.stops], sampled, log_q, log_p, self.temperature
        )
        stopped = is_in(sampled, self.stops)
        return TokenMeasures(
            log_p=torch.where(stopped, of_teacher.logsumexp(-1), log_p),
            log_q=torch.where(stopped, of_student.logsumexp(-1), log_q).detach(),
        )

    def term(self, measured, log_q, ratio, weight) -> torch.Tensor:
        own = log_q if measured.log_q is None else measured.log_q
        return terms.sampled_reverse_kl(own, measured.log_p, ratio, weight)
