"""What `topk` and `sampled` share: measures from the log-probabilities of a few ids."""

from __future__ import annotations

from typing import Any

import torch

from ..heads.lm_head import LMHead
from ..heads.projections import log_probs_of, logits_of
from ..signals import HiddenStates, Signal, TokenLogProbs
from .base import TokenMeasures


class FromLogProbs:
    """Base of estimators that use the student's log-probabilities."""

    needs_log_probs, profiles = True, True
    takes: tuple[type, ...] = (HiddenStates, TokenLogProbs)
    measures: type[TokenMeasures] = TokenMeasures

    def shares_logits(self, device: torch.device) -> bool:
        return False


def is_in(ids: torch.Tensor, few: list[int]) -> torch.Tensor:
    return torch.isin(ids, torch.tensor(few, device=ids.device))


@torch.no_grad()
def teacher_log_p(signal: Signal, sampled: torch.Tensor, vocab_size: int, temperature: float) -> torch.Tensor:
    """The teacher's log-probability of each sampled token, `(N,)`."""
    if isinstance(signal, TokenLogProbs):
        return signal.log_p
    return log_probs_of(signal.hidden, signal.head, sampled, vocab_size, temperature)


def log_probs_of_few_ids(
    hidden: torch.Tensor,
    head: LMHead,
    signal: Signal,
    chosen: list[Any],
    sampled: torch.Tensor,
    log_q: torch.Tensor,
    log_p: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probabilities of a few ids under student and teacher, `(N, K)` each.

    log p(v) = z_v − log Z with log Z = z_y − log p(y), so the normaliser follows from the sampled token y.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`): the student's.
        head ([`~trl_distill.heads.lm_head.LMHead`]): the student's.
        signal ([`HiddenStates`] or [`TokenLogProbs`]): the teacher's.
        chosen (`list`): ids `(N, k)`, or lists of ids that are the same for all tokens; concatenated to K.
        sampled (`torch.Tensor` of shape `(N,)`): the sampled ids.
        log_q, log_p (`torch.Tensor` of shape `(N,)`): their log-probabilities under student and teacher.
        temperature (`float`): softmax temperature of both.
    """
    rows = [x if isinstance(x, torch.Tensor) else torch.tensor(x).expand(len(sampled), -1) for x in chosen]
    ids = torch.cat([*(x.to(sampled.device) for x in rows), sampled[:, None]], dim=1)
    of_student = logits_of(hidden, head, ids, temperature)
    of_student = of_student[:, :-1] - (of_student[:, -1] - log_q)[:, None]
    if isinstance(signal, TokenLogProbs):
        return of_student, signal.top_log_p[:, : of_student.shape[1]]
    with torch.no_grad():
        of_teacher = logits_of(signal.hidden, signal.head, ids, temperature)
        return of_student, of_teacher[:, :-1] - (of_teacher[:, -1] - log_p)[:, None]
