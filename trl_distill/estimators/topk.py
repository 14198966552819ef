"""The divergence, exact over k ids, with a score function for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..config_checks import TOPK_DIVERGENCES
from ..heads.projections import top_ids
from ..objective import terms
from ..signals import TokenLogProbs
from .base import TokenMeasures
from .log_probs import FromLogProbs, is_in, log_probs_of_few_ids, teacher_log_p


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

    def __init__(self, k: int, divergence: str, temperature: float, stops: list[int]):
        if divergence not in TOPK_DIVERGENCES:
            raise ValueError(f"`topk` has no estimate of divergence={divergence!r}. Use kl_estimator='full'.")
        self.k, self.divergence, self.temperature, self.stops = k, divergence, temperature, stops

    def measure(self, hidden, head, signal, sampled, log_q, slopes=None) -> TokenMeasures:
        log_p = teacher_log_p(signal, sampled, head.vocab_size, self.temperature)
        if isinstance(signal, TokenLogProbs):
            ids = signal.top_ids[:, : self.k]
        else:
            ids = top_ids(hidden, head, min(self.k, head.vocab_size))  # (N, K)
        outside = ~(ids == sampled[:, None]).any(-1)
        unknown = ids >= head.vocab_size  # padding rows of the teacher, which the student never writes
        ids = ids.masked_fill(unknown, 0)
        chosen: list[Any] = [ids, self.stops] if self.stops else [ids]
        both = log_probs_of_few_ids(hidden, head, signal, chosen, sampled, log_q, log_p, self.temperature)
        k, left_out = ids.shape[1], (unknown | is_in(ids, self.stops)) if self.stops else unknown
        heads = [x[:, :k].masked_fill(left_out, _NEVER) for x in both]
        if self.stops:  # stop tokens leave the head and come back as one id
            heads = [torch.cat([x, y[:, k:].logsumexp(-1, keepdim=True)], 1) for x, y in zip(heads, both, strict=True)]
            outside &= ~is_in(sampled, self.stops)
        return TopKMeasures(log_p=log_p, head_log_q=heads[0], head_log_p=heads[1], outside=outside)

    def term(self, measured, log_q, ratio, weight) -> torch.Tensor:
        m = measured
        if self.divergence == "forward_kl":
            return terms.topk_forward_kl(m.head_log_q, m.head_log_p)
        return terms.topk_reverse_kl(m.head_log_q, m.head_log_p, log_q, m.log_p, m.outside, ratio, weight)


_NEVER = -1e4  # a log-probability whose exponential is 0, for both models, so that the id adds nothing
