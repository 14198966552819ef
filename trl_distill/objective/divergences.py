"""Divergences between two distributions over the vocabulary, token by token."""

from __future__ import annotations

import math

import torch

from .custom import CustomDivergence


# The divergences, each with the default of its alpha; `None` for those without one
DIVERGENCES = {
    "reverse_kl": None,
    "forward_kl": None,
    "jsd": 0.5,
    "skewed_forward_kl": 0.1,
    "skewed_reverse_kl": 0.1,
    "mixed": 0.5,
}


def _kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    return log_a.exp() * (log_a - log_b)


def _mixture(log_a: torch.Tensor, log_b: torch.Tensor, alpha: float) -> torch.Tensor:
    """log(α a + (1 − α) b)."""
    if alpha in (0.0, 1.0):  # no log of 0
        return log_a if alpha == 1.0 else log_b
    return torch.logaddexp(log_a + math.log(alpha), log_b + math.log1p(-alpha))


def summands(divergence: str, log_q: torch.Tensor, log_p: torch.Tensor, alpha: float = 0.0) -> torch.Tensor:
    """
    The contribution of each id to a divergence of student q and teacher p. Their sum is the divergence, in nats.

        reverse_kl           KL(q ‖ p)                                   MiniLLM, arXiv 2306.08543
        forward_kl           KL(p ‖ q)                                   Hinton et al., arXiv 1503.02531
        jsd                  α KL(p ‖ m) + (1 − α) KL(q ‖ m),  m = α p + (1 − α) q      GKD, arXiv 2306.13649;
                             defined there as KL(p ‖ q) at α = 0 and KL(q ‖ p) at α = 1
        skewed_forward_kl    KL(p ‖ α p + (1 − α) q)                     DistiLLM, arXiv 2402.03898
        skewed_reverse_kl    KL(q ‖ α q + (1 − α) p)                     DistiLLM
        mixed                α KL(p ‖ q) + (1 − α) KL(q ‖ p)

    Args:
        divergence (`str`): a name above, or a [`~trl_distill.objective.custom.CustomDivergence`].
        log_q, log_p (`torch.Tensor` of shape `(...)`): log-probabilities of student and teacher.
        alpha (`float`): α in [0, 1]; ignored by the two KLs.

    Returns:
        `torch.Tensor` of shape `(...)`: nats.

    Raises:
        ValueError: the name is not known.
    """
    if isinstance(divergence, CustomDivergence):
        return divergence.function(log_q, log_p)
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
    A divergence in which the ids of a set C count as one: their summands are replaced by that of their total masses.

    For the reverse KL: KL − Σ_{c∈C} q_c log(q_c / p_c) + Q log(Q / P), with Q and P the masses on C. Used for stop
    tokens: student and teacher may end a turn with different ids.

    Args:
        value (`torch.Tensor` of shape `(...)`): the divergence over all ids, nats.
        log_q, log_p (`torch.Tensor` of shape `(..., |C|)`): log-probabilities of the ids in C.
        divergence, alpha: as in [`summands`].

    Returns:
        `torch.Tensor` of shape `(...)`: nats.
    """
    apart = summands(divergence, log_q, log_p, alpha).sum(-1)
    return value - apart + summands(divergence, log_q.logsumexp(-1), log_p.logsumexp(-1), alpha)


def reverse_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """
    KL(student ‖ teacher) = Σ_v q_v (log q_v − log p_v), with q = softmax(student / T) and p = softmax(teacher / T).

    The usual direction of on-policy distillation: the student pays for tokens that the teacher would not write
    (MiniLLM, arXiv 2306.08543). If the vocabularies differ in size, both are renormalised over the shared ids. The
    gradient in the student's logits is q (log q − log p − KL) / T; `tests/objective/test_objective.py` compares it with
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
