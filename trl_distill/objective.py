"""The mathematics, as pure functions on tensors. Shapes are `(..., V)` or `(B, C)`; nothing here knows a model.

The trainer computes the same quantities from hidden states, in tiles (`heads.py`); these are the definitions that the
tests hold it to, and what small models are measured with.
"""

from __future__ import annotations

import torch


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
