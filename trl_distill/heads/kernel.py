"""Divergences by TRL's kernel, which GPUs run in Triton. Our own computation of any divergence is in `fused.py`."""

from __future__ import annotations

import torch

from .._trl import ChunkedDivergenceFunction
from ..signals import HiddenStates
from .lm_head import LMHead, check_same_device


def kernel_divergence(
    student_hidden: torch.Tensor,  # (N, H_s)
    student_head: LMHead,
    signal: HiddenStates,  # (N, H_t)
    kernel_beta: float,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Either KL or the JSD by TRL's kernel.

    If the vocabularies differ in size (padding rows), both distributions are renormalised over the shared ids. Hidden
    states may have any dtype; under autocast they are projected in its dtype and accumulated in fp32.

    Args:
        student_hidden: the student's hidden states at the N positions that predict judged tokens.
        student_head: the student's output layer.
        signal: the teacher's hidden states at the same N positions, and its output layer.
        kernel_beta: the kernel's parameter: 0 is the forward KL, 1 the reverse KL, values between them the JSD.
        temperature: softmax temperature of both.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(N,)`, fp32, in nats: the divergence, with gradient to the student's
        hidden states and head, and the student's entropy, without.
    """
    teacher_hidden, teacher_head = signal.hidden, signal.head
    weight, bias = student_head.parameters()
    teacher_weight, teacher_bias = teacher_head.parameters()
    check_same_device(weight, teacher_weight)
    shared = teacher_head.vocab_size
    if shared < student_head.vocab_size:  # the kernel itself truncates a larger teacher
        weight, bias = weight[:shared], None if bias is None else bias[:shared]
    return ChunkedDivergenceFunction.apply(
        student_hidden.to(weight.device),
        weight,
        bias,
        teacher_hidden.to(weight.device),
        teacher_weight,
        teacher_bias,
        kernel_beta,
        temperature,
        student_head.logit_scale,
        student_head.softcap,
        teacher_head.logit_scale,
        teacher_head.softcap,
    )
