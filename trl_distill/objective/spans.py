"""The divergence between texts: a term per token from spans in which both models spell the same bytes.

Pure functions on tensors. A span of the student's tokens i costs C = Σ_i log q_i − log p, where log p is that of the
teacher's tokens in it, plus a charge for each token that left the student's canonical path. docs/objective.md derives
this.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .terms import term


@dataclass(frozen=True)
class Spans:
    """
    Spans of B completions of C tokens. All tensors have the shape `(B, C)`; tokens that are not judged are False or 0.

    Attributes:
        starts (bool): whether a span begins with the token; the first judged token of a row does.
        whole (bool): whether the token's span ends before its completion is cut.
        inside (bool): at starts, whether the token is one of those that are summed exactly.
        log_p (fp32): at starts, the log-probability of the teacher's tokens of the span, nats.
        first_log_p (fp32): at starts, if `inside`, the teacher's log-probability of the token alone.
        charges (fp32): what a token is charged for leaving the canonical path, nats.
    """

    starts: torch.Tensor
    whole: torch.Tensor
    inside: torch.Tensor
    log_p: torch.Tensor
    first_log_p: torch.Tensor
    charges: torch.Tensor


def remainders(log_q: torch.Tensor, spans: Spans) -> torch.Tensor:
    """
    What each token is credited with by the score function: the rest of its span's cost that the exact part leaves over.

    For the first token of a span R = C − 1[y ∈ S] (log q(y) − log p(y)). For a later one the same, without what was
    known before it: earlier tokens' log q and charges. A span that is not whole costs its charges alone.
    Values behind the last judged token of a row mean nothing.

    Args:
        log_q (`torch.Tensor` of shape `(B, C)`): the student's log-probability of each token, stop tokens as one.
        spans ([`Spans`]): the spans.

    Returns:
        `torch.Tensor` of shape `(B, C)`: nats, without gradient; 0 where a whole span is one token of both in S.
    """
    log_q = log_q.detach()
    place = torch.arange(log_q.shape[1], device=log_q.device).expand_as(log_q)
    start = place.masked_fill(~spans.starts, 0).cummax(1).values  # of each token's span
    number = spans.starts.cumsum(1)  # of each token's span; 0 at none

    def of_span(values: torch.Tensor) -> torch.Tensor:  # the value at the span's start
        return values.gather(1, start)

    def earlier(values: torch.Tensor) -> torch.Tensor:  # the sum over the span's tokens before this one
        before = values.double().cumsum(1) - values
        return (before - of_span(before)).to(values.dtype)

    def from_here(values: torch.Tensor) -> torch.Tensor:  # the sum over this and the later tokens of the span
        totals = torch.zeros(len(values), values.shape[1] + 1, dtype=torch.float64, device=values.device)
        totals.scatter_add_(1, number, values.double())
        return totals.gather(1, number).to(values.dtype) - earlier(values)

    counted = log_q.masked_fill(spans.starts & spans.inside, 0.0)
    # what was known before a token is left out whether its span will be whole or not, which depends on the token
    rest = torch.where(spans.whole, from_here(counted) - of_span(spans.log_p), -earlier(counted))
    # what the teacher gave to the first token is known before the later ones, whether the span will be whole or not
    rest = rest + of_span(torch.where(spans.inside, spans.first_log_p, 0.0))
    # the first token's log q is in no `counted`: a span that is not whole takes it back from its exact part
    back = torch.where(spans.whole, 0.0, of_span(torch.where(spans.inside, log_q, 0.0)))
    return torch.where(number > 0, rest - back + from_here(spans.charges), 0.0)


def span_reverse_kl(
    exact: torch.Tensor, log_q: torch.Tensor, spans: Spans, ratio: torch.Tensor, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The reverse KL between texts: exact over a set S where both tokenizations begin anew, by the score function else.

        value     at the start of a span, Σ_{v∈S} q_v (log q_v − log p_v) + ρ R; 0 elsewhere
        gradient  Σ_{v∈S} ∇q_v (log q_v − log p_v), and ρ R ∇log q(y) for each token of the span

    The "+1" of ∇(q log q) is left out: over all that a token could be it sums to zero. Where a span may be cut, that
    depends on the token, so that those in a span that is not whole, whose log q is not counted, have R − 1.

    Unbiased for every S that does not depend on the sampled tokens, and for every way to choose the starts before the
    tokens behind them are known.

    Args:
        exact (`torch.Tensor` of shape `(B, C)`): the sum over S at starts, with gradient; 0 elsewhere.
        log_q (`torch.Tensor` of shape `(B, C)`): as in [`remainders`].
        spans ([`Spans`]): the spans.
        ratio, weight (`torch.Tensor` of shape `(B, C)`): as in [`~trl_distill.objective.terms.sampled_reverse_kl`].

    Returns:
        `torch.Tensor` of shape `(B, C)`: nats.
    """
    rest = remainders(log_q, spans)
    value = exact + torch.where(spans.starts, (ratio if weight is None else weight) * rest, 0.0)
    return term(value, exact + ratio * (rest - (~spans.whole).to(rest.dtype)))
