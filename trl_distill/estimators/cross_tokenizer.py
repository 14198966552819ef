"""The reverse KL between texts, for a teacher with another tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..heads.few_ids import log_probs_of
from ..heads.shared_ids import shared_divergence
from ..objective.spans import Spans, span_reverse_kl
from ..signals import AlignedStates
from .base import TokenMeasures
from .log_probs import is_in, with_sampled


CHARGE = 10.0  # nats for a token that leaves the student's canonical path: its text keeps e^-10 of its weight


@dataclass(frozen=True)
class SpanMeasures(TokenMeasures):
    """
    [`TokenMeasures`] and the spans; `divergence` is the exact part, at starts of spans.

    Attributes:
        whole, inside, span_log_p, first_log_p: as in [`~trl_distill.objective.spans.Spans`].
        charged (`torch.Tensor`, bool): tokens that left the canonical path.
        exact (`torch.Tensor`, bool): tokens whose span is one of both and was summed exactly.
    """

    whole: torch.Tensor | None = None
    inside: torch.Tensor | None = None
    span_log_p: torch.Tensor | None = None
    first_log_p: torch.Tensor | None = None
    charged: torch.Tensor | None = None
    exact: torch.Tensor | None = None


class CrossTokenizer:
    """
    Exact over ids that both vocabularies have, where both tokenizations begin anew; the score function for the rest.

    Args:
        temperature (`float`): softmax temperature of both models, which is that of sampling.
        stops (`list[int]`): the student's stop tokens, which count as one.
        charge (`float`): nats for a token that leaves the student's canonical path.
    """

    needs_log_probs, profiles = True, False
    takes: tuple[type, ...] = (AlignedStates,)
    also: frozenset[str] = frozenset()
    measures: type[TokenMeasures] = SpanMeasures

    def __init__(self, temperature: float, stops: list[int], charge: float = CHARGE):
        self.temperature, self.stops, self.charge = temperature, stops, charge

    def shares_logits(self, device: torch.device) -> bool:
        return True

    def measure(self, hidden, head, signal, sampled, log_q, slopes=None) -> SpanMeasures:
        own, entropy = log_probs_of(hidden, head, with_sampled(sampled, self.stops), head.vocab_size, self.temperature)
        stopped = is_in(sampled, self.stops)
        log_q = torch.where(stopped, own[:, 1:].logsumexp(-1), own[:, 0]).detach()
        at = signal.starts.nonzero()[:, 0]
        teachers_id = teacher_ids(signal.shared, sampled[at], head.vocab_size)
        exact, first = shared_divergence(
            *(hidden[at], head, signal.hidden[at], signal.head, signal.shared, teachers_id.clamp(min=0)),
            temperature=self.temperature,
        )
        nothing = torch.zeros_like(entropy)
        inside = torch.zeros_like(stopped).index_copy(0, at, teachers_id >= 0)
        first_log_p = nothing.index_copy(0, at, first)
        single = signal.single & inside  # one number, however it was rounded
        return SpanMeasures(
            divergence=nothing.index_copy(0, at, exact),
            entropy=entropy,
            log_q=log_q,
            policy_log_q=own[:, 0],
            starts=signal.starts,
            whole=signal.whole,
            inside=inside,
            span_log_p=torch.where(single, first_log_p, signal.log_p),
            first_log_p=first_log_p,
            charged=signal.charged,
            exact=single,
        )

    def term(self, measured, log_q, ratio, weight) -> torch.Tensor:
        m = measured
        charges = self.charge * m.charged.float()
        spans = Spans(m.starts, m.whole, m.inside, m.span_log_p, m.first_log_p, charges)
        return span_reverse_kl(m.divergence, m.log_q, spans, ratio, weight)


def teacher_ids(shared, sampled: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The teacher's ids for shared ids of the student, `(n,)`; -1 for others. A stop token is one of the teacher's."""
    table = torch.full((vocab_size,), -1, dtype=torch.long, device=sampled.device)
    table[shared.student.to(sampled.device)] = shared.teacher.to(sampled.device)
    table[list(shared.student_stops)] = shared.teacher_stops[0]
    return table[sampled]
