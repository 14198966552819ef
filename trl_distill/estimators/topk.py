"""The divergence, exact over k ids, with a score function for the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config_checks import TOPK_DIVERGENCES
from ..objective import terms
from ..signals import TokenLogProbs
from .base import TokenMeasures
from .log_probs import FromLogProbs, is_in, with_sampled


@dataclass(frozen=True)
class TopKMeasures(TokenMeasures):
    """
    [`TokenMeasures`] and the head of both distributions.

    Attributes:
        head_log_q, head_log_p (`torch.Tensor` of shape `(..., K)`): log-probabilities of the head's ids.
        outside (`torch.Tensor`, bool): whether the sampled token is outside of the head.
    """

    head_log_q: torch.Tensor | None = None
    head_log_p: torch.Tensor | None = None
    outside: torch.Tensor | None = None


class TopK(FromLogProbs):
    """
    The K most likely ids exactly, the rest from the sampled token: unbiased for every K.

    The ids are the student's top K, or the teacher's if the teacher gives log-probabilities instead of hidden states.
    For the forward KL the rest counts as one id, which gives a lower bound.
    """

    measures = TopKMeasures
    has_exact_part = True

    def __init__(
        self, k: int, divergence: str, temperature: float, stops: list[int], also: frozenset[str] = frozenset()
    ):
        if divergence not in TOPK_DIVERGENCES:
            raise ValueError(f"`topk` has no estimate of divergence={divergence!r}. Use kl_estimator='full'.")
        self.k, self.divergence, self.temperature, self.stops, self.also = k, divergence, temperature, stops, also

    def chosen_ids(self, head, signal, sampled) -> tuple[torch.Tensor, int]:
        """The sampled id, the stop tokens, and the head."""
        if isinstance(signal, TokenLogProbs):
            chosen = signal.top_ids[:, : self.k].to(sampled.device)
            unknown = chosen >= head.vocab_size  # padding rows of the teacher, which the student never writes
            return with_sampled(sampled, self.stops, chosen.masked_fill(unknown, 0)), 0
        return with_sampled(sampled, self.stops), min(self.k, head.vocab_size)

    def measures_of(self, log_q, log_p, ids, signal, sampled, head) -> TopKMeasures:
        first = 1 + len(self.stops)  # of the head's columns
        chosen, served = ids[:, first:], isinstance(signal, TokenLogProbs)
        outside = ~(chosen == sampled[:, None]).any(-1)
        left_out = is_in(chosen, self.stops) if self.stops else torch.zeros_like(chosen, dtype=torch.bool)
        if served:
            real = signal.top_ids[:, : self.k].to(chosen.device)
            outside = ~(real == sampled[:, None]).any(-1)
            left_out = left_out | (real >= head.vocab_size)
        of_teacher = log_p[:, 1 : 1 + chosen.shape[1]] if served else log_p[:, first:]
        heads = [x.masked_fill(left_out, _NEVER) for x in (log_q[:, first:], of_teacher)]
        if self.stops:  # stop tokens leave the head and come back as one id
            stopped = [x[:, 1:first].logsumexp(-1, keepdim=True) for x in (log_q, log_p)]
            heads = [torch.cat(pair, dim=1) for pair in zip(heads, stopped, strict=True)]
            outside &= ~is_in(sampled, self.stops)
        return TopKMeasures(
            log_p=log_p[:, 0],
            log_q=log_q[:, 0].detach(),
            head_log_q=heads[0],
            head_log_p=heads[1],
            outside=outside,
        )

    def term(self, measured, log_q, ratio, weight) -> torch.Tensor:
        m = measured
        if self.divergence == "forward_kl":
            return terms.topk_forward_kl(m.head_log_q, m.head_log_p)
        return terms.topk_reverse_kl(m.head_log_q, m.head_log_p, m.log_q, m.log_p, m.outside, ratio, weight)


_NEVER = -1e4  # a log-probability whose exponential is 0, for both models, so that the id adds nothing
