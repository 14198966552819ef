"""Divergences between texts, for teachers with another tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..heads.closed_ids import closed_divergence
from ..heads.few_ids import log_probs_of
from ..heads.shared_ids import shared_divergence
from ..objective.spans import Spans, span_reverse_kl
from ..signals import AlignedLogProbs, AlignedStates, SharedIds
from .base import Estimator, TokenMeasures
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
    The reverse KL: exact over ids that both vocabularies have, where both tokenizations begin anew; the score function
    for the rest. From a served teacher, which gives no distributions, all of it comes from the score function.

    Args:
        temperature (`float`): softmax temperature of both models, which is that of sampling.
        stops (`list[int]`): the student's stop tokens, which count as one.
        charge (`float`): nats for a token that leaves the student's canonical path.
    """

    needs_log_probs, profiles = True, False
    takes: tuple[type, ...] = (AlignedStates, AlignedLogProbs)
    also: frozenset[str] = frozenset()
    measures: type[TokenMeasures] = SpanMeasures

    def __init__(self, temperature: float, stops: list[int], charge: float = CHARGE):
        self.temperature, self.stops, self.charge = temperature, stops, charge

    def shares_logits(self, device: torch.device) -> bool:
        return True

    def measure(self, hidden, head, signal, sampled, log_q, slopes=None, start=None) -> SpanMeasures:
        own, entropy = log_probs_of(hidden, head, with_sampled(sampled, self.stops), head.vocab_size, self.temperature)
        stopped = is_in(sampled, self.stops)
        log_q = torch.where(stopped, own[:, 1:].logsumexp(-1), own[:, 0]).detach()
        exact, first_log_p, inside = self._exact(hidden, head, signal, sampled)
        single = signal.single & inside  # one number, however it was rounded
        return SpanMeasures(
            divergence=exact,
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

    def _exact(self, hidden, head, signal, sampled) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The sum over shared ids at starts, the teacher's log p of the sampled one, and whether it is one; `(N,)`."""
        nothing = torch.zeros(len(sampled), device=hidden.device)
        inside = torch.zeros_like(nothing, dtype=torch.bool)
        if not isinstance(signal, AlignedStates):
            return nothing, nothing, inside
        at = signal.starts.nonzero()[:, 0]
        teachers_id = teacher_ids(signal.shared, sampled[at], head.vocab_size)
        exact, first = shared_divergence(
            *(hidden[at], head, signal.hidden[at], signal.head, signal.shared, teachers_id.clamp(min=0)),
            temperature=self.temperature,
        )
        inside = inside.index_copy(0, at, teachers_id >= 0)
        return nothing.index_copy(0, at, exact), nothing.index_copy(0, at, first), inside

    def term(self, measured, log_q, ratio, weight) -> torch.Tensor:
        m = measured
        charges = self.charge * m.charged.float()
        spans = Spans(m.starts, m.whole, m.inside, m.span_log_p, m.first_log_p, charges)
        return span_reverse_kl(m.divergence, m.log_q, spans, ratio, weight)


class ClosedIds:
    """
    Any other divergence, where both tokenizations begin anew, over the ids that both have and all others as one class.

    It depends on the prefix alone, and is a lower bound of the divergence between what may come next. What lies inside
    of the other class, and between two such positions, is not learnt from.

    Args:
        divergence (`str`), alpha (`float`): as in [`~trl_distill.objective.divergences.summands`].
        temperature (`float`): softmax temperature of both models.
        stops (`list[int]`): the student's stop tokens, which count as one.
    """

    needs_log_probs, profiles = False, False
    takes: tuple[type, ...] = (AlignedStates,)
    also: frozenset[str] = frozenset()
    measures: type[TokenMeasures] = SpanMeasures

    def __init__(self, divergence: str, alpha: float, temperature: float, stops: list[int]):
        self.divergence, self.alpha, self.temperature, self.stops = divergence, alpha, temperature, stops

    def shares_logits(self, device: torch.device) -> bool:
        return False

    def measure(self, hidden, head, signal, sampled, log_q, slopes=None, start=None) -> SpanMeasures:
        at = signal.starts.nonzero()[:, 0]
        _, entropy = log_probs_of(hidden.detach(), head, sampled[:, None], head.vocab_size, self.temperature)
        found = closed_divergence(
            *(hidden[at], head, signal.hidden[at], signal.head, signal.shared),
            divergence=self.divergence,
            alpha=self.alpha,
            temperature=self.temperature,
        )
        inside = torch.zeros_like(signal.starts)
        inside[at] = teacher_ids(signal.shared, sampled[at], head.vocab_size) >= 0
        return SpanMeasures(
            divergence=torch.zeros_like(entropy).index_copy(0, at, found),
            entropy=entropy,
            starts=signal.starts,
            charged=signal.charged,
            exact=signal.single & inside,
        )

    def term(self, measured, log_q, ratio, weight) -> torch.Tensor:
        return measured.divergence


class ByTokenizer:
    """
    Several teachers, of which some have the student's tokenizer: each signal goes to the estimator that takes it.

    Args:
        ids ([`~trl_distill.estimators.base.Estimator`]): for teachers with the student's ids.
        texts ([`CrossTokenizer`] or [`ClosedIds`]): for the others.
    """

    profiles = False
    measures: type[TokenMeasures] = SpanMeasures  # those of `ids` lack its own fields

    def __init__(self, ids: Estimator, texts: CrossTokenizer | ClosedIds):
        self.ids, self.texts = ids, texts
        self.needs_log_probs = ids.needs_log_probs or texts.needs_log_probs
        self.takes: tuple[type, ...] = (*ids.takes, *texts.takes)
        self.temperature, self.stops, self.also = ids.temperature, ids.stops, ids.also

    def shares_logits(self, device: torch.device) -> bool:
        return False

    def measure(self, hidden, head, signal, sampled, log_q, slopes=None, start=None) -> TokenMeasures:
        estimator = self.texts if isinstance(signal, AlignedStates | AlignedLogProbs) else self.ids
        return estimator.measure(hidden, head, signal, sampled, log_q, slopes, start)

    def term(self, measured: Any, log_q, ratio, weight) -> torch.Tensor:
        estimator = self.ids if measured.starts is None else self.texts
        return estimator.term(measured, log_q, ratio, weight)


def teacher_ids(shared: SharedIds, sampled: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The teacher's ids for shared ids of the student, `(n,)`; -1 for others. A stop token is one of the teacher's."""
    table = torch.full((vocab_size,), -1, dtype=torch.long, device=sampled.device)
    table[shared.student.to(sampled.device)] = shared.teacher.to(sampled.device)
    table[list(shared.student_stops)] = shared.teacher_stops[0]
    return table[sampled]
