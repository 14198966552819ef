"""The mathematics, as pure functions on tensors: `(..., V)` logits, `(B, C)` tokens, `(B, C, K)` heads of a top-k.

Nothing here knows a model. q is the student, p the teacher, y the sampled token; k1 = log q(y) − log p(y).

A *term* is a tensor whose value estimates the KL of each token and whose gradient, averaged over samples y ~ q, is that
of the KL. The two differ for sampled quantities: k1 as a loss has the right value and an expected gradient of zero.
"""

from __future__ import annotations

import math

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


def _kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    return log_a.exp() * (log_a - log_b)


def _mixture(log_a: torch.Tensor, log_b: torch.Tensor, alpha: float) -> torch.Tensor:
    """log(α a + (1 − α) b)."""
    if alpha in (0.0, 1.0):  # no log of 0
        return log_a if alpha == 1.0 else log_b
    return torch.logaddexp(log_a + math.log(alpha), log_b + math.log1p(-alpha))


def summands(divergence: str, log_q: torch.Tensor, log_p: torch.Tensor, alpha: float = 0.0) -> torch.Tensor:
    """
    What each id adds to a divergence of student q and teacher p; the sum over all ids is the divergence, in nats.

        reverse_kl           KL(q ‖ p)                                   MiniLLM, arXiv 2306.08543
        forward_kl           KL(p ‖ q)                                   Hinton et al., arXiv 1503.02531
        jsd                  α KL(p ‖ m) + (1 − α) KL(q ‖ m),  m = α p + (1 − α) q      GKD, arXiv 2306.13649;
                             by its convention KL(p ‖ q) at α = 0 and KL(q ‖ p) at α = 1
        skewed_forward_kl    KL(p ‖ α p + (1 − α) q)                     DistiLLM, arXiv 2402.03898
        skewed_reverse_kl    KL(q ‖ α q + (1 − α) p)                     the same
        mixed                α KL(p ‖ q) + (1 − α) KL(q ‖ p)

    Args:
        divergence (`str`): a name above.
        log_q, log_p (`torch.Tensor` of shape `(...)`): log-probabilities of student and teacher.
        alpha (`float`): α in [0, 1]; the KLs have none.

    Returns:
        `torch.Tensor` of shape `(...)`.
    """
    if divergence == "reverse_kl" or (divergence == "jsd" and alpha == 1.0):
        return _kl(log_q, log_p)
    if divergence == "forward_kl" or (divergence == "jsd" and alpha == 0.0):
        return _kl(log_p, log_q)
    if divergence == "jsd":
        log_m = _mixture(log_p, log_q, alpha)
        return alpha * _kl(log_p, log_m) + (1 - alpha) * _kl(log_q, log_m)
    if divergence == "skewed_forward_kl":
        return _kl(log_p, _mixture(log_p, log_q, alpha))
    if divergence == "skewed_reverse_kl":
        return _kl(log_q, _mixture(log_q, log_p, alpha))
    if divergence == "mixed":
        return alpha * _kl(log_p, log_q) + (1 - alpha) * _kl(log_q, log_p)
    raise ValueError(f"There is no divergence {divergence!r}.")


def as_one_class(
    value: torch.Tensor, log_q: torch.Tensor, log_p: torch.Tensor, divergence: str = "reverse_kl", alpha: float = 0.0
) -> torch.Tensor:
    """
    A divergence in which a few ids count as one: their summands are taken out, and that of their masses put in.

    For the reverse KL: KL − Σ_{c∈C} q_c log(q_c / p_c) + Q log(Q / P), Q and P the masses on C. For stop tokens:
    student and teacher may end a turn with different ids and agree that it ends.

    Args:
        value (`torch.Tensor` of shape `(...)`): the divergence over all ids, nats.
        log_q, log_p (`torch.Tensor` of shape `(..., |C|)`): log-probabilities of the ids in C.
        divergence, alpha: as in [`summands`].

    Returns:
        `torch.Tensor` of shape `(...)`: nats.
    """
    apart = summands(divergence, log_q, log_p, alpha).sum(-1)
    return value - apart + summands(divergence, log_q.logsumexp(-1), log_p.logsumexp(-1), alpha)


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


def leave_one_out(advantages: torch.Tensor, valid: torch.Tensor, group: int) -> torch.Tensor:
    """
    Turn rewards minus their group's mean into rewards minus the mean of the others: times n / (n − 1).

    The group's mean contains the row itself, which shrinks the reward's gradient by (n − 1) / n and so raises the
    effective beta (RLOO, arXiv 2402.14740).

    Args:
        advantages (`torch.Tensor` of shape `(R,)`): rewards minus the mean over each group's valid rewards.
        valid (`torch.Tensor` of shape `(R,)`, bool): rows that have a reward at all.
        group (`int`): rows per group; groups are consecutive.

    Returns:
        `torch.Tensor` of shape `(R,)`; unchanged where a group has one valid reward or none.
    """
    n = valid.view(-1, group).sum(1, keepdim=True).expand(-1, group).reshape(-1).to(advantages.dtype)
    return torch.where(n > 1, advantages * n / (n - 1).clamp(min=1), advantages)


def scheduled_beta(schedule: str, start: float, end: float, step: int, steps: int) -> float:
    """
    Weight of the divergence at a global step: "constant", "linear" or "cosine" from `start` to `end`, or "step".

    A function of the step alone, so that a resumed run needs no state. "step" holds `start` and jumps to `end` at
    `steps`; the others arrive there at `steps` and stay.
    """
    if schedule == "constant":
        return start
    done = min(step / steps, 1.0) if steps > 0 else 0.0  # of unknown length before training starts
    if schedule == "step":
        return end if done >= 1.0 else start
    return start + (end - start) * (done if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * done)))


def reverse_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """
    KL(student ‖ teacher) = Σ_v q_v (log q_v − log p_v), with q = softmax(student / T) and p = softmax(teacher / T).

    The direction of on-policy distillation: the student is charged for what it says and the teacher would not
    (MiniLLM, arXiv 2306.08543). Where the vocabularies differ in size, both are renormalised over the shared ids.
    Its gradient in the student's logits is q (log q − log p − KL) / T; `tests/test_objective.py` holds it to
    enumeration.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V_s)`).
        teacher_logits (`torch.Tensor` of shape `(..., V_t)`).
        temperature (`float`): softmax temperature of both.

    Returns:
        `torch.Tensor` of shape `(...)`: nats.
    """
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    log_q = torch.log_softmax(student_logits[..., :shared].float() / temperature, dim=-1)
    log_p = torch.log_softmax(teacher_logits[..., :shared].float() / temperature, dim=-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)
