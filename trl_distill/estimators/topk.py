"""The divergence, exact over k ids, with a score function for the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config_checks import TOPK_DIVERGENCES
from ..heads.few_ids import log_probs_of, top_ids
from ..objective import terms
from ..signals import TokenLogProbs
from .base import TokenMeasures
from .log_probs import FromLogProbs, is_in, measured_also, teacher_log_probs, with_sampled


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

    def __init__(
        self, k: int, divergence: str, temperature: float, stops: list[int], also: frozenset[str] = frozenset()
    ):
        if divergence not in TOPK_DIVERGENCES:
            raise ValueError(f"`topk` has no estimate of divergence={divergence!r}. Use kl_estimator='full'.")
        self.k, self.divergence, self.temperature, self.stops, self.also = k, divergence, temperature, stops, also

    def measure(self, hidden, head, signal, sampled, log_q, slopes=None) -> TokenMeasures:
        if isinstance(signal, TokenLogProbs):
            chosen = signal.top_ids[:, : self.k]
        else:
            chosen = top_ids(hidden, head, min(self.k, head.vocab_size))  # (N, K)
        k, outside = chosen.shape[1], ~(chosen == sampled[:, None]).any(-1)
        unknown = chosen >= head.vocab_size  # padding rows of the teacher, which the student never writes
        ids = with_sampled(sampled, chosen.masked_fill(unknown, 0), self.stops)
        of_student, entropy = log_probs_of(hidden, head, ids, head.vocab_size, self.temperature)
        log_p, of_teacher = teacher_log_probs(signal, ids, head.vocab_size, self.temperature)
        both = of_student[:, 1:], of_teacher
        left_out = (unknown | is_in(chosen, self.stops)) if self.stops else unknown
        heads = [x[:, :k].masked_fill(left_out, _NEVER) for x in both]
        if self.stops:  # stop tokens leave the head and come back as one id
            heads = [torch.cat([x, y[:, k:].logsumexp(-1, keepdim=True)], 1) for x, y in zip(heads, both, strict=True)]
            outside &= ~is_in(sampled, self.stops)
        return TopKMeasures(
            log_p=log_p,
            log_q=of_student[:, 0].detach(),
            policy_log_q=of_student[:, 0],
            entropy=entropy,
            head_log_q=heads[0],
            head_log_p=heads[1],
            outside=outside,
            **measured_also(self.also, hidden, head, signal, sampled, self.temperature, self.stops),
        )

    def term(self, measured, log_q, ratio, weight) -> torch.Tensor:
        m = measured
        if self.divergence == "forward_kl":
            return terms.topk_forward_kl(m.head_log_q, m.head_log_p)
        return terms.topk_reverse_kl(m.head_log_q, m.head_log_p, m.log_q, m.log_p, m.outside, ratio, weight)


_NEVER = -1e4  # a log-probability whose exponential is 0, for both models, so that the id adds nothing
