"""Divergences over the ids that two vocabularies share, with stop tokens as one id and all other ids as another.

One projection of each model in the forward pass, and one in the backward pass, tile by tile; never `(N, V)`.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..objective.divergences import summands
from ..signals import SharedIds
from .gradients import Gradients
from .lm_head import LMHead, check_same_device
from .shared_ids import logits_of_both, projections, shared_stops


LEAST = math.log(1e-7)  # of the mass of all other ids: rounding may leave less, or none


def closed_divergence(
    hidden: torch.Tensor,
    head: LMHead,
    teacher_hidden: torch.Tensor,
    teacher_head: LMHead,
    shared: SharedIds,
    divergence: str,
    alpha: float,
    temperature: float,
) -> torch.Tensor:
    """
    A divergence of student and teacher over shared ids, "stop" and "any other id".

    By the data processing inequality it is a lower bound, for every f-divergence, of the one between what both say of
    the text that comes next, as far as an id of one is that of the other.

    Args:
        hidden (`torch.Tensor` of shape `(n, H_s)`): the student's hidden states.
        head ([`~trl_distill.heads.lm_head.LMHead`]): the student's.
        teacher_hidden (`torch.Tensor` of shape `(n, H_t)`): the teacher's hidden states.
        teacher_head ([`~trl_distill.heads.lm_head.LMHead`]): the teacher's.
        shared ([`~trl_distill.signals.SharedIds`]): the ids, below both vocabularies' ends.
        divergence (`str`), alpha (`float`): as in [`~trl_distill.objective.divergences.summands`].
        temperature (`float`): softmax temperature of both.

    Returns:
        `torch.Tensor` of shape `(n,)`, fp32: nats, with gradient.

    Raises:
        ValueError: the two heads are on different devices.
    """
    weight, bias = head.parameters()
    check_same_device(weight, teacher_head.parameters()[0])
    device = weight.device
    moved = SharedIds(shared.student.to(device), shared.teacher.to(device), *shared_stops(shared))
    how = (head, teacher_head, moved, temperature, divergence, alpha)
    return _Closed.apply(hidden.to(device), weight, bias, teacher_hidden.to(device), how)


class _Closed(torch.autograd.Function):
    """See [`closed_divergence`]."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher_hidden, how):
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.how = how
        ctx.save_for_backward(hidden, weight, bias, teacher_hidden)
        total = hidden.new_empty(len(hidden), dtype=torch.float32)
        with projections(ctx, hidden, weight, bias) as both:
            for part, ours, theirs in logits_of_both(both, hidden, teacher_hidden, ctx, None):
                total[part] = _value(ours, theirs, how)
        return total

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, bias, teacher_hidden = ctx.saved_tensors
        grads, grad = Gradients.wanted_by(ctx.needs_input_grad), grad.float()
        with projections(ctx, hidden, weight, bias) as both:
            grads.begin(hidden, weight)
            for part, ours, theirs in logits_of_both(both, hidden, teacher_hidden, ctx, grads):
                with torch.enable_grad():
                    logits = ours.detach().requires_grad_()
                    (derivative,) = torch.autograd.grad(_value(logits, theirs, ctx.how), logits, grad[part])
                derivative = derivative.contiguous()
                both[0].backward_through_scale(derivative, ours, ctx.how[3])
                ours.copy_(derivative)
        return (*grads.as_given(hidden, weight, bias), None, None)


def _value(ours: torch.Tensor, theirs: torch.Tensor, how: Any) -> torch.Tensor:
    """The divergence at n positions from logits `(n, V_s)` and `(n, V_t)`."""
    _, _, shared, _, divergence, alpha = how
    stops = shared_stops(shared)
    log_q = _classes(ours, shared.student, stops[0])
    log_p = _classes(theirs, shared.teacher, stops[1])
    others = [len(ids) + len(ends) < logits.shape[1] for ids, ends, logits in _sizes(ours, theirs, shared)]
    if not any(others):  # rounding alone would say what is left
        log_q, log_p = log_q[:, :-1], log_p[:, :-1]
    return summands(divergence, log_q, log_p, alpha).sum(-1)


def _sizes(ours: torch.Tensor, theirs: torch.Tensor, shared: SharedIds) -> Any:
    stops = shared_stops(shared)
    return ((shared.student, stops[0], ours), (shared.teacher, stops[1], theirs))


def _classes(logits: torch.Tensor, ids: torch.Tensor, stops: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities `(n, K + 2)` of the ids, of the stop tokens together, and of all others together."""
    norm = logits.logsumexp(-1, keepdim=True)
    ends = torch.tensor(stops, device=logits.device)
    mine = torch.cat([ids, ends])
    rest = logits.index_fill(1, mine, -torch.inf).logsumexp(-1, keepdim=True) - norm
    if len(mine) == logits.shape[1]:
        rest = torch.full_like(norm, LEAST)
    stop = logits[:, ends].logsumexp(-1, keepdim=True)
    return torch.cat([logits[:, ids] - norm, stop - norm, rest.clamp(min=LEAST)], dim=1)
