"""What `topk` and `sampled` share: measures from the log-probabilities of a few ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..heads.few_ids import log_probs_of, top_ids
from ..heads.lm_head import LMHead
from ..signals import HiddenStates, Signal, TokenLogProbs
from .base import TokenMeasures


class FromLogProbs:
    """
    Base of estimators that use log-probabilities of a few ids.

    They come from a projection of the estimator's own, with fp32 sums, even where TRL's forward pass has already given
    some: its logits are rounded to 16 bits, and a KL is a small difference of such numbers.
    """

    needs_log_probs, profiles = True, True
    takes: tuple[type, ...] = (HiddenStates, TokenLogProbs)
    measures: type[TokenMeasures] = TokenMeasures
    also: frozenset[str] = frozenset()

    def shares_logits(self, device: torch.device) -> bool:
        return True  # the temperature is always that of sampling


def is_in(ids: torch.Tensor, few: list[int]) -> torch.Tensor:
    return torch.isin(ids, torch.tensor(few, device=ids.device))


@torch.no_grad()
def teacher_log_p(signal: Signal, sampled: torch.Tensor, vocab_size: int, temperature: float) -> torch.Tensor:
    """The teacher's log-probability of each sampled token, `(N,)`."""
    if isinstance(signal, TokenLogProbs):
        return signal.log_p
    return log_probs_of(signal.hidden, signal.head, sampled[:, None], vocab_size, temperature)[0][:, 0]


@torch.no_grad()
def measured_also(
    also: frozenset[str],
    hidden: torch.Tensor,
    head: LMHead,
    signal: Signal,
    sampled: torch.Tensor,
    temperature: float,
    stops: Sequence[int] = (),
) -> dict[str, torch.Tensor]:
    """
    What a token weighting needs beyond an estimator's own measures; each costs projections of its own.

    Args:
        also (`frozenset[str]`): "teacher_entropy", one projection of the teacher; "agreement", one of each model.
        hidden (`torch.Tensor` of shape `(N, H)`), head ([`LMHead`]): the student's.
        signal ([`~trl_distill.signals.HiddenStates`]): the teacher's.
        sampled (`torch.Tensor` of shape `(N,)`): ids of the tokens.
        temperature (`float`): of both.
        stops (`Sequence[int]`): ids that count as one in the agreement; the entropy counts each.

    Returns:
        `dict`: those of `also`, `(N,)`, fp32.
    """
    found: dict[str, torch.Tensor] = {}
    if not also:
        return found
    assert isinstance(signal, HiddenStates)
    if "teacher_entropy" in also:
        shared = min(head.vocab_size, signal.head.vocab_size)
        found["teacher_entropy"] = log_probs_of(signal.hidden, signal.head, sampled[:, None], shared, temperature)[1]
    if "agreement" in also:
        ours, theirs = (
            top_ids(states.detach(), which, 1)[:, 0] for states, which in ((hidden, head), (signal.hidden, signal.head))
        )
        if stops:
            ours, theirs = (ids.where(~is_in(ids, list(stops)), stops[0]) for ids in (ours, theirs))
        found["agreement"] = (ours == theirs.to(ours.device)).float()
    return found


@torch.no_grad()
def teacher_log_probs(
    signal: Signal, ids: torch.Tensor, vocab_size: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The teacher's log-probabilities of the sampled tokens, `(N,)`, and of other ids, `(N, K)`.

    Args:
        signal ([`HiddenStates`] or [`TokenLogProbs`]): the teacher's; the latter has its own first K ids.
        ids (`torch.Tensor` of shape `(N, 1 + K)`): the sampled ids, then the others.
        vocab_size (`int`): the student's; a larger teacher is renormalised over it.
        temperature (`float`): softmax temperature.
    """
    if isinstance(signal, TokenLogProbs):
        return signal.log_p, signal.top_log_p[:, : ids.shape[1] - 1]
    log_p, _ = log_probs_of(signal.hidden, signal.head, ids, vocab_size, temperature)
    return log_p[:, 0], log_p[:, 1:]


def with_sampled(sampled: torch.Tensor, *others: torch.Tensor | list[int]) -> torch.Tensor:
    """Ids `(N, 1 + K)`: the sampled ones first, then tensors `(N, k)` and lists that are the same for all tokens."""
    rows = [x if isinstance(x, torch.Tensor) else torch.tensor(x).expand(len(sampled), -1) for x in others if len(x)]
    return torch.cat([sampled[:, None], *(x.to(sampled.device) for x in rows)], dim=1)
