"""What `topk` and `sampled` share: measures from the log-probabilities of a few ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..heads.comparison import compared_positions
from ..heads.few_ids import Foreseen, few_ids_of_both, log_probs_of, top_ids
from ..heads.fused import ExpectedSlopes, scaled
from ..heads.lm_head import LMHead
from ..signals import HiddenStates, Signal, TokenLogProbs
from .base import TokenMeasures


class FromLogProbs:
    """
    Base of estimators that use log-probabilities of a few ids: one projection of each model.

    They come from a projection of the estimator's own, with fp32 sums, even where TRL's forward pass has already given
    some: its logits are rounded to 16 bits, and a KL is a small difference of such numbers. The gradient is that of
    `term` on fresh rollouts, and of the policy loss if it is known; so it is formed while the logits are there.
    """

    needs_log_probs, profiles = True, True
    takes: tuple[type, ...] = (HiddenStates, TokenLogProbs)
    measures: type[TokenMeasures] = TokenMeasures
    also: frozenset[str] = frozenset()
    has_exact_part = False  # whether the term has a gradient beside that of the sampled token's ratio
    temperature: float
    stops: list[int]

    def shares_logits(self, device: torch.device) -> bool:
        return True  # the temperature is always that of sampling

    def measure(self, hidden, head, signal, sampled, log_q, slopes=None, start=None) -> TokenMeasures:
        ids, top_k = self.chosen_ids(head, signal, sampled)
        local = isinstance(signal, HiddenStates)
        found = few_ids_of_both(
            hidden,
            head,
            signal if local else None,
            ids,
            self.temperature,
            top_k=top_k,
            foreseen=self._foreseen(head, signal, sampled, log_q is None, slopes),
            positions=compared_positions(sampled, start) if self.profiles and local else None,
            stops=tuple(self.stops),
        )
        measured = self.measures_of(found.log_q, self._log_p(signal, found.log_p), found.ids, signal, sampled, head)
        more = measured_also(self.also, hidden, head, signal, sampled, self.temperature, self.stops)
        return replace(
            measured,
            policy_log_q=found.log_q[:, 0],
            entropy=found.entropy,
            comparison=found.comparison if self.profiles and local else None,
            **more,
        )

    def chosen_ids(self, head: LMHead, signal: Signal, sampled: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Ids `(N, k)`, the sampled ones first, and the number of the student's most likely ones behind them."""
        raise NotImplementedError

    def measures_of(
        self,
        log_q: torch.Tensor,
        log_p: torch.Tensor,
        ids: torch.Tensor,
        signal: Signal,
        sampled: torch.Tensor,
        head: LMHead,
    ) -> TokenMeasures:
        """
        What `term` needs, for some of the tokens.

        Args:
            log_q (`torch.Tensor` of shape `(n, K)`): the student's log-probabilities of `ids`, with gradient.
            log_p (`torch.Tensor` of shape `(n, K)`): the teacher's; as far as the signal has them.
            ids (`torch.Tensor` of shape `(n, K)`): the sampled ids, then others.
            signal ([`HiddenStates`] or [`TokenLogProbs`]): the teacher's at these tokens.
            sampled (`torch.Tensor` of shape `(n,)`): ids of the tokens.
            head ([`LMHead`]): the student's.
        """
        raise NotImplementedError

    def term(self, measured: Any, log_q: Any, ratio: Any, weight: Any) -> torch.Tensor:
        raise NotImplementedError

    @staticmethod
    def _log_p(signal: Signal, found: torch.Tensor) -> torch.Tensor:
        """The teacher's log-probabilities: of the sampled token, and of the ids that a served teacher gives."""
        if isinstance(signal, TokenLogProbs):
            return torch.cat([signal.log_p[:, None], signal.top_log_p], dim=1)
        return found

    def _foreseen(
        self, head: LMHead, signal: Signal, sampled: torch.Tensor, fresh: bool, slopes: ExpectedSlopes | None
    ) -> Foreseen | None:
        """
        The derivative of the loss on fresh rollouts by log-probabilities; `None` if the loss is not known yet.

        Args:
            fresh (`bool`): whether the ratio is 1, with the gradient of these log-probabilities. If it comes from
                TRL's, they get no gradient from it.
            slopes ([`ExpectedSlopes`], *optional*): derivatives by the term, and by the sampled log-probability.
        """
        if slopes is None or slopes.divergence is None or not (fresh or self.has_exact_part):
            return None
        by_term, by_policy = scaled(slopes)
        assert by_term is not None

        def derivative(rows: slice, log_q: torch.Tensor, log_p: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            some = signal.map(lambda tensor: tensor[rows])
            with torch.enable_grad():
                own = log_q.detach().requires_grad_()
                measured = self.measures_of(own, self._log_p(some, log_p), ids, some, sampled[rows], head)
                ratio = (own[:, 0] - own[:, 0].detach()).exp() if fresh else torch.ones_like(own[:, 0])
                loss = (by_term[rows] * self.term(measured, own[:, 0], ratio, None)).sum()
                if by_policy is not None and fresh:
                    loss = loss + (by_policy[rows] * own[:, 0]).sum()
                return torch.autograd.grad(loss, own)[0]

        return derivative


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


def with_sampled(sampled: torch.Tensor, *others: torch.Tensor | list[int]) -> torch.Tensor:
    """Ids `(N, 1 + K)`: the sampled ones first, then tensors `(N, k)` and lists that are the same for all tokens."""
    rows = [x if isinstance(x, torch.Tensor) else torch.tensor(x).expand(len(sampled), -1) for x in others if len(x)]
    return torch.cat([sampled[:, None], *(x.to(sampled.device) for x in rows)], dim=1)
