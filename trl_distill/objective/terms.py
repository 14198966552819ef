"""The mathematics, as pure functions on tensors: `(..., V)` logits, `(B, C)` tokens, `(B, C, K)` heads of a top-k.

Nothing here knows a model. q is the student, p the teacher, y the sampled token; k1 = log q(y) − log p(y).

A *term* is a tensor whose value estimates the KL of each token and whose gradient, averaged over samples y ~ q, is that
of the KL. The two differ for sampled quantities: k1 as a loss has the right value and an expected gradient of zero.
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

    The score-function gradient; its mean over the rollout's y is ∇KL(q ‖ p), and the mean of the value KL(q ‖ p). k1 is
    detached: it stands as a cost, as a reward would with the opposite sign.

    Args:
        log_q (`torch.Tensor` of shape `(B, C)`): the student's log-probability of each sampled token.
        log_p (`torch.Tensor` of shape `(B, C)`): the teacher's.
        ratio (`torch.Tensor` of shape `(B, C)`): ρ = q(y) / q_rollout(y), which carries the gradient; its value is 1 on
            fresh rollouts.
        weight (`torch.Tensor` of shape `(B, C)`, *optional*): ρ of this token alone, for the value, where `ratio` holds
            a factor of the whole sequence. Defaults to the value of `ratio`.

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
    KL(q ‖ p) with an exact head over a set S of ids, and the score function for the tail.

        value     Σ_{v∈S} q_v k1_v + 1[y ∉ S] ρ k1_y
        gradient  Σ_{v∈S} ∇q_v k1_v + 1[y ∉ S] ρ k1_y ∇log q(y)

    Unbiased for every S that does not depend on the sampled token y: the student's top-k, or the teacher's. The "+1" of
    ∇(q log q) is left out of head and tail alike; over both it sums to zero. With S the whole vocabulary this is the
    exact KL, with S empty [`sampled_reverse_kl`].

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
    KL(p ‖ q) with the ids outside of a set S taken as one: Σ_{v∈S} p_v log(p_v / q_v) + P̄ log(P̄ / Q̄).

    P̄ and Q̄ are the masses outside. A lower bound of the forward KL, exact where S is the whole vocabulary; its gradient
    is that of the bound. A function of the prefix alone, so right on any rollout.

    Args:
        head_log_q (`torch.Tensor` of shape `(B, C, K)`): the student's log-probabilities of the ids in S.
        head_log_p (`torch.Tensor` of shape `(B, C, K)`): the teacher's.

    Returns:
        `torch.Tensor` of shape `(B, C)`: nats.
    """

    def outside(head: torch.Tensor) -> torch.Tensor:  # log of the mass outside; rounding may leave less than nothing
        return torch.log(-torch.expm1(head.logsumexp(-1).clamp(max=-1e-7)))

    tail_q, tail_p = outside(head_log_q), outside(head_log_p)
    return (head_log_p.exp() * (head_log_p - head_log_q)).sum(-1) + tail_p.exp() * (tail_p - tail_q)


def future_kl(per_token: torch.Tensor, mask: torch.Tensor, discount: float) -> torch.Tensor:
    """
    What each token still has to answer for: F_t = γ R_{t+1} with R_t = KL_t + γ R_{t+1}, over the judged tokens.

    Tokens that are not judged (tool output, padding) neither add nor discount. A reverse scan: the recurrence is
    composed with itself over 1, 2, 4, ... steps, so that a completion of C tokens takes log₂ C operations.

    Args:
        per_token (`torch.Tensor` of shape `(B, C)`): KL of each token, nats; only its value is used.
        mask (`torch.Tensor` of shape `(B, C)`): 1 where a token is judged.
        discount (`float`): γ in [0, 1].

    Returns:
        `torch.Tensor` of shape `(B, C)`: nats, without gradient; 0 where a token is not judged.
    """
    judged = mask.bool()
    returns = torch.where(judged, per_token.detach(), 0.0)  # R_t over the next `span` tokens
    factors = torch.where(judged, discount, torch.ones_like(returns))  # what R beyond those is multiplied by
    span = 1
    while span < returns.shape[1]:
        beyond = nn.functional.pad(returns[:, span:], (0, span))
        returns = returns + factors * beyond
        factors = factors * nn.functional.pad(factors[:, span:], (0, span), value=1.0)
        span *= 2
    following = nn.functional.pad(returns[:, 1:], (0, 1))
    return torch.where(judged, discount * following, 0.0)


def sequence_term(per_token: torch.Tensor, mask: torch.Tensor, ratio: torch.Tensor, discount: float) -> torch.Tensor:
    """
    A per-token term that also answers for the KL it leads to: KL_t + ρ_t F_t in its gradient.

    With γ = 1 its summed gradient is that of the sequence KL; with γ = 0 it is `per_token` itself, a partial gradient
    of much lower variance. The value stays that of `per_token`.

    Args:
        per_token (`torch.Tensor` of shape `(B, C)`): a term, exact or estimated.
        mask (`torch.Tensor` of shape `(B, C)`): 1 where a token is judged.
        ratio (`torch.Tensor` of shape `(B, C)`): ρ as in [`sampled_reverse_kl`].
        discount (`float`): γ in [0, 1].

    Returns:
        `torch.Tensor` of shape `(B, C)`: nats.
    """
    if discount == 0.0:
        return per_token
    return term(per_token, per_token + ratio * future_kl(per_token, mask, discount))
