"""The reverse KL estimated from the sampled token alone."""

from __future__ import annotations

import torch

from ..heads.few_ids import log_probs_of
from ..objective import terms
from .base import TokenMeasures
from .log_probs import FromLogProbs, is_in, measured_also, teacher_log_probs, with_sampled


class Sampled(FromLogProbs):
    """The log-ratio of the sampled token as a cost: unbiased but noisy."""

    def __init__(self, temperature: float, stops: list[int], also: frozenset[str] = frozenset()):
        self.temperature, self.stops, self.also = temperature, stops, also

    def measure(self, hidden, head, signal, sampled, log_q, slopes=None) -> TokenMeasures:
        ids = with_sampled(sampled, self.stops)
        own, entropy = log_probs_of(hidden, head, ids, head.vocab_size, self.temperature)
        log_p, of_teacher = teacher_log_probs(signal, ids, head.vocab_size, self.temperature)
        log_q = own[:, 0].detach()
        if self.stops:
            stopped, of_student = is_in(sampled, self.stops), own[:, 1:].detach()
            log_p = torch.where(stopped, of_teacher.logsumexp(-1), log_p)
            log_q = torch.where(stopped, of_student.logsumexp(-1), log_q)
        more = measured_also(self.also, hidden, head, signal, sampled, self.temperature, self.stops)
        return TokenMeasures(log_p=log_p, log_q=log_q, policy_log_q=own[:, 0], entropy=entropy, **more)

    def term(self, measured, log_q, ratio, weight) -> torch.Tensor:
        return terms.sampled_reverse_kl(measured.log_q, measured.log_p, ratio, weight)
