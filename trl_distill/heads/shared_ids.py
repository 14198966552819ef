"""The exact part of the divergence from a teacher with another tokenizer: the sum over ids that both vocabularies have.

One projection of each model in the forward pass, and one in the backward pass, tile by tile; never `(N, V)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .._trl import gathered_head
from ..signals import SharedIds
from .gradients import Gradients
from .lm_head import LMHead, check_same_device
from .tiles import Projection, parts, tiles


def shared_divergence(
    hidden: torch.Tensor,
    head: LMHead,
    teacher_hidden: torch.Tensor,
    teacher_head: LMHead,
    shared: SharedIds,
    asked: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Σ_{v∈S} q_v (log q_v − log p_v) over shared ids S, with stop tokens as one of them, and log p of one id each.

    The gradient is Σ_{v∈S} ∇q_v (log q_v − log p_v): the "+1" of ∇(q log q) is left out, as in the score function of
    the other ids.

    Args:
        hidden (`torch.Tensor` of shape `(n, H_s)`): the student's hidden states.
        head ([`~trl_distill.heads.lm_head.LMHead`]): the student's.
        teacher_hidden (`torch.Tensor` of shape `(n, H_t)`): the teacher's hidden states.
        teacher_head ([`~trl_distill.heads.lm_head.LMHead`]): the teacher's.
        shared ([`~trl_distill.signals.SharedIds`]): S, below both vocabularies' ends.
        asked (`torch.Tensor` of shape `(n,)`): ids of the teacher; a stop token stands for all of them.
        temperature (`float`): softmax temperature of both.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(n,)`, fp32, nats: the sum, with gradient, and the teacher's
        log-probabilities of `asked`, without.

    Raises:
        ValueError: the two heads are on different devices.
    """
    weight, bias = head.parameters()
    check_same_device(weight, teacher_head.parameters()[0])
    device = weight.device
    moved = SharedIds(shared.student.to(device), shared.teacher.to(device), *shared_stops(shared))
    tensors = (hidden.to(device), weight, bias, teacher_hidden.to(device), asked.to(device))
    return _Shared.apply(*tensors, (head, teacher_head, moved, temperature))


def shared_stops(shared: SharedIds) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return shared.student_stops, shared.teacher_stops


class _Shared(torch.autograd.Function):
    """See [`shared_divergence`]."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher_hidden, asked, how):
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.how = how
        ctx.save_for_backward(hidden, weight, bias, teacher_hidden)
        total, log_p = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(2))
        with projections(ctx, hidden, weight, bias) as both:
            for part, ours, theirs in logits_of_both(both, hidden, teacher_hidden, ctx, None):
                tile = _Tile(ours, theirs, how[2])
                total[part] = tile.total
                log_p[part] = tile.log_p_of(asked[part])
        ctx.mark_non_differentiable(log_p)
        return total, log_p

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, bias, teacher_hidden = ctx.saved_tensors
        grads, grad = Gradients.wanted_by(ctx.needs_input_grad), grad.float()
        with projections(ctx, hidden, weight, bias) as both:
            grads.begin(hidden, weight)
            for part, ours, theirs in logits_of_both(both, hidden, teacher_hidden, ctx, grads):
                derivative = _Tile(ours, theirs, ctx.how[2]).derivative().mul_(grad[part, None])
                both[0].backward_through_scale(derivative, ours, ctx.how[3])
                ours.copy_(derivative)
        return (*grads.as_given(hidden, weight, bias), None, None, None)


@contextmanager
def projections(
    ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> Iterator[tuple[Projection, Projection]]:
    """Both models' projections, with whole heads; `ctx.how` begins with these."""
    head, teacher_head = ctx.how[:2]
    theirs = teacher_head.parameters()
    plain = torch.autocast(hidden.device.type, enabled=False)  # autocast would round the sums too
    with plain, gathered_head(weight, bias), gathered_head(*theirs):
        yield (
            Projection(head, weight, bias, ctx.dtype, "student"),
            Projection(teacher_head, theirs[0], theirs[1], ctx.dtype, "teacher"),
        )


def logits_of_both(
    both: tuple[Projection, Projection],
    hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    ctx: Any,
    grads: Gradients | None,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Positions with both models' logits, part by part. With `grads`, the caller overwrites the student's."""
    ours, theirs = both
    widest, temperature = max(len(ours.weight), len(theirs.weight)), ctx.how[3]
    for rows in tiles(len(hidden), widest, hidden.device):
        states = hidden[rows].to(ctx.dtype)
        tile, other = ours(states), theirs(teacher_hidden[rows].to(ctx.dtype))
        for part in parts(rows, widest, hidden.device):
            here = slice(part.start - rows.start, part.stop - rows.start)
            yield part, ours.finish(tile[here], temperature), theirs.finish(other[here], temperature)
        if grads is not None:
            grads.add(rows, tile, states, ours.weight)


class _Tile:
    """Both models' logits at n positions, `(n, V_s)` and `(n, V_t)`; shared ids are columns of both."""

    def __init__(self, ours: torch.Tensor, theirs: torch.Tensor, shared: SharedIds):
        self.ours, self.theirs, self.shared = ours, theirs, shared
        self.log_norm_q, self.log_norm_p = (logits.logsumexp(-1, keepdim=True) for logits in (ours, theirs))
        log_q = ours[:, shared.student] - self.log_norm_q  # (n, K)
        log_p = theirs[:, shared.teacher] - self.log_norm_p
        self.summands = log_q.exp() * (log_q - log_p)
        stops = [list(ids) for ids in shared_stops(shared)]
        self.stop_q = ours[:, stops[0]] - self.log_norm_q
        self.stop_log_p = (theirs[:, stops[1]] - self.log_norm_p).logsumexp(-1)
        stop_log_q = self.stop_q.logsumexp(-1)
        self.stop_difference = (stop_log_q - self.stop_log_p)[:, None]
        self.total = self.summands.sum(-1) + stop_log_q.exp() * self.stop_difference[:, 0]

    def log_p_of(self, ids: torch.Tensor) -> torch.Tensor:
        """The teacher's log-probability of one id at each position, of stop tokens together."""
        alone = (self.theirs.gather(1, ids[:, None]) - self.log_norm_p)[:, 0]
        stops = torch.isin(ids, torch.tensor(self.shared.teacher_stops, device=ids.device))
        return torch.where(stops, self.stop_log_p, alone)

    def derivative(self) -> torch.Tensor:
        """By logit u of the student: q_u (1[u ∈ S] (log q_u − log p_u) − total)."""
        found = torch.sub(self.ours, self.log_norm_q).exp_().mul_(-self.total[:, None])
        found.index_add_(1, self.shared.student, self.summands)
        stops = torch.tensor(self.shared.student_stops, device=found.device)
        return found.index_add_(1, stops, self.stop_q.exp() * self.stop_difference)
