"""Loss terms per token, as pure functions on tensors: `(B, C)` tokens, `(B, C, K)` for the ids of a top-k.

No models here. q is the student, p the teacher, y the sampled token, and k1 = log q(y) − log p(y).

A *term* is a tensor whose value estimates the KL of each token and whose gradient, averaged over samples y ~ q, is that
of the KL. For sampled quantities these differ: k1 as a loss has the right value, but an expected gradient of zero.
"""

from __future__ import annotations

import torch
from torch import nn


def term(value: torch.Tensor, surrogate: torch.Tensor) -> torch.Tensor:
    """A tensor with the value of `value` and the gradient of `surrogate`."""
    return value.detach() + (surrogate - surrogate.detach())


def sampled_reverse_kl(
    log_q: torch.Tensor, log_p: torch.Tensor, ratio: torch.Tensor, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """
    One token's estimate of KL(q ‖ p): value ρ k1, gradient ρ k1 ∇log q(y).

    This is the score-function gradient: its mean over y is ∇KL(q ‖ p), and the mean of the value is KL(q ‖ p). k1 is
    detached, so that it acts as a cost, like a reward with the opposite sign.

    Args:
        log_q (`torch.Tensor` of shape `(B, C)`): the student's log-probability of each sampled token.
        log_p (`torch.Tensor` of shape `(B, C)`): the teacher's.
        ratio (`torch.Tensor` of shape `(B, C)`): ρ = q(y) / q_rollout(y), with gradient; 1 on fresh rollouts.
        weight (`torch.Tensor` of shape `(B, C)`, *optional*): ρ of this token alone, for the value, where `ratio` also
            has a factor for the whole sequence. Defaults to the value of `ratio`.

    Returns:
        `torch.Tensor` of shape `(B, C)`: nats.
    """
    k1 = (log_q - log_p).detach()
    return term((ratio if weight is None else weight) * k1, ratio * k1)


def topk_reverse_kl(
    head_log_q: torch.Tensor,
    head_log_p: torch.Tensor,
    log_q: torch.Tensor,
    log_p: torch.Tensor,
    outside: torch.Tensor,
    ratio: torch.Tensor,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    KL(q ‖ p), exact over a set S of ids (the head), and by the score function for all others (the tail).

        value     Σ_{v∈S} q_v k1_v + 1[y ∉ S] ρ k1_y
        gradient  Σ_{v∈S} ∇q_v k1_v + 1[y ∉ S] ρ k1_y ∇log q(y)

    Unbiased for every S that does not depend on the sampled token y, such as the student's or the teacher's top-k. The
    "+1" of ∇(q log q) is left out of both parts, since it sums to zero over all ids. If S is the whole vocabulary, this
    is the exact KL; if S is empty, it is [`sampled_reverse_kl`].

    Args:
        head_log_q (`torch.Tensor` of shape `(B, C, K)`): the student's log-probabilities of the ids in S.
        head_log_p (`torch.Tensor` of shape `(B, C, K)`): the teacher's.
        log_q, log_p, ratio, weight (`torch.Tensor` of shape `(B, C)`): as in [`sampled_reverse_kl`].
        outside (`torch.Tensor` of shape `(B, C)`, bool): whether the sampled token lies outside S.

    Returns:
        `torch.Tensor` of shape `(B, C)`: nats.
    """
    head = (head_log_q.exp() * (head_log_q - head_log_p).detach()).sum(-1)
    tail = torch.where(outside, sampled_reverse_kl(log_q, log_p, ratio, weight), 0.0)
    return head + tail


def topk_forward_kl(head_log_q: torch.Tensor, head_log_p: torch.Tensor) -> torch.Tensor:
    """
    KL(p ‖ q) in which all ids outside of a set S count as one: Σ_{v∈S} p_v log(p_v / q_v) + P̄ log(P̄ / Q̄).

    P̄ and Q̄ are the masses outside of S. This is a lower bound of the forward KL, exact if S is the whole vocabulary;
    the gradient is that of the bound. It depends on the prefix alone, so it is right on any text.

    Args:
        head_log_q (`torch.Tensor` of shape `(B, C, K)`): the student's log-probabilities of the ids in S.
        head_log_p (`torch.Tensor` of shape `(B, C, K)`): the teacher's.

    Returns:
        `torch.Tensor` of shape `(B, C)`: nats.
    """

    def outside(head: torch.Tensor) -> torch.Tensor:  # log of the mass outside; rounding can make it negative
        return torch.log(-torch.expm1(head.logsumexp(-1).clamp(max=-1e-7)))

    tail_q, tail_p = outside(head_log_q), outside(head_log_p)
    return (head_log_p.exp() * (head_log_p - head_log_q)).sum(-1) + tail_p.exp() * (tail_p - tail_q)


def future_kl(per_token: torch.Tensor, mask: torch.Tensor, discount: float) -> torch.Tensor:
    """
    The later KL that is credited to each token: F_t = γ R_{t+1} with R_t = KL_t + γ R_{t+1}, over the judged tokens.

    Tokens that are not judged (tool output, padding) neither add nor discount. Computed as a reverse scan: the
    recurrence is composed with itself over 1, 2, 4, ... steps, log₂ C operations for C tokens.

    Args:
        per_token (`torch.Tensor` of shape `(B, C)`): KL of each token, nats; only its value is used.
        mask (`torch.Tensor` of shape `(B, C)`): 1 where a token is judged.
        discount (`float`): γ in [0, 1].

    Returns:
        `torch.Tensor` of shape `(B, C)`: nats, without gradient; 0 where a token is not judged.
    """
    judged = mask.bool()
    returns = torch.where(judged, per_token.detach(), 0.0)  # R_t over the next `span` tokens
    factors = torch.where(judged, discount, torch.ones_like(returns))  # the factor of R beyond those
    span = 1
    while span < returns.shape[1]:
        beyond = nn.functional.pad(returns[:, span:], (0, span))
        returns = returns + factors * beyond
        factors = factors * nn.functional.pad(factors[:, span:], (0, span), value=1.0)
        span *= 2
    following = nn.functional.pad(returns[:, 1:], (0, 1))
    return torch.where(judged, discount * following, 0.0)


def sequence_term(
    per_token: torch.Tensor,
    mask: torch.Tensor,
    ratio: torch.Tensor,
    discount: float,
    starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    A per-token term that is also credited with the later KL it leads to: KL_t + ρ_t F_t in the gradient.

    With γ = 1 the gradients sum to that of the sequence KL; with γ = 0 this is `per_token` itself, a partial gradient
    with much lower variance. The value is always that of `per_token`.

    Args:
        per_token (`torch.Tensor` of shape `(B, C)`): a term, exact or estimated.
        mask (`torch.Tensor` of shape `(B, C)`): 1 where a token is judged.
        ratio (`torch.Tensor` of shape `(B, C)`): ρ as in [`sampled_reverse_kl`].
        discount (`float`): γ in [0, 1].
        starts (`torch.Tensor` of shape `(B, C)`, bool, *optional*): the first token of each span, which holds the
            span's value; the discount then counts spans. `None` if each token is one.

    Returns:
        `torch.Tensor` of shape `(B, C)`: nats.
    """
    if discount == 0.0:
        return per_token
    if starts is None:
        return term(per_token, per_token + ratio * future_kl(per_token, mask, discount))
    place = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    own = place.masked_fill(~starts, 0).cummax(1).values  # the start of each token's span
    future = future_kl(per_token, starts, discount).gather(1, own) * mask
    return term(per_token, per_token + ratio * future)
