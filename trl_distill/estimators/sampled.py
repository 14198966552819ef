"""The reverse KL estimated from the sampled token alone."""

from __future__ import annotations

import torch

from ..objective import terms
from .base import TokenMeasures
from .log_probs import FromLogProbs, is_in, with_sampled


class Sampled(FromLogProbs):
    """The log-ratio of the sampled token as a cost: unbiased but noisy."""

    def __init__(self, temperature: float, stops: list[int], also: frozenset[str] = frozenset()):
        self.temperature, self.stops, self.also = temperature, stops, also

    def chosen_ids(self, head, signal, sampled) -> tuple[torch.Tensor, int]:
        return with_sampled(sampled, self.stops), 0

    def measures_of(self, log_q, log_p, ids, signal, sampled, head) -> TokenMeasures:
        of_student, of_teacher = log_q[:, 0].detach(), log_p[:, 0]
        if self.stops:
            stopped = is_in(sampled, self.stops)
            of_teacher = torch.where(stopped, log_p[:, 1:].logsumexp(-1), of_teacher)
            of_student = torch.where(stopped, log_q[:, 1:].detach().logsumexp(-1), of_student)
        return TokenMeasures(log_p=of_teacher, log_q=of_student)

    def term(self, measured, log_q, ratio, weight) -> torch.Tensor:
        return terms.sampled_reverse_kl(measured.log_q, measured.log_p, ratio, weight)
