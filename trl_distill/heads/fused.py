"""The exact divergence from one projection of each model: values and gradients, tile by tile, in one pass.

What a token's divergence weighs in the loss is nearly always known before the forward pass. Then its gradient is formed
where the logits are at hand, and nothing is projected again: four products with a head instead of six. A gradient that
arrives otherwise is made up for in the backward pass. The forms of the divergence are in `objective.py`, other
projections in `heads.py`, tiles and their memory in `tiles.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .._trl import gathered_head
from ..objective import divergences
from .comparison import COMPARED, comparison
from .lm_head import LMHead, check_same_device
from .tiles import Projection, TileMemory, parts, tiles


GRADIENT_TOLERANCE = 1e-5  # relative: how far a gradient may be from what was expected and still count as that


@dataclass(frozen=True)
class DivergenceSpec:
    """
    What is computed from two heads.

    Attributes:
        divergence (`str`): a name of [`~trl_distill.objective.summands`].
        alpha (`float`): its parameter.
        temperature (`float`): softmax temperature of both models.
        stops (`tuple[int, ...]`): ids that count as one.
    """

    divergence: str = "reverse_kl"
    alpha: float = 0.0
    temperature: float = 1.0
    stops: tuple[int, ...] = ()


class TokenStatistics(NamedTuple):
    """
    Per judged token, of shape `(N,)`, fp32, in nats.

    `divergence` and `log_q`, the student's log-probability of the sampled token, carry gradients; the student's
    `entropy` and the teacher's `log_p` of the sampled token do not. Nor does `comparison`: how the models differ at a
    few tokens, see [`~trl_distill.heads.comparison.comparison`].
    """

    divergence: torch.Tensor
    log_q: torch.Tensor
    entropy: torch.Tensor
    log_p: torch.Tensor
    comparison: torch.Tensor


class ExpectedSlopes(NamedTuple):
    """Derivatives of the loss by divergence and log-probability of each judged token, `(N,)`, as far as foreseen."""

    divergence: torch.Tensor
    log_q: torch.Tensor | None = None


def fused_divergence(
    hidden: torch.Tensor,
    head: LMHead,
    teacher_hidden: torch.Tensor,
    teacher_head: LMHead,
    form: DivergenceSpec,
    sampled: torch.Tensor | None = None,
    slopes: ExpectedSlopes | None = None,
    look: slice | None = None,
) -> TokenStatistics:
    """
    Divergence of student and teacher over the ids that both have, and what else the same logits tell.

    Args:
        hidden (`torch.Tensor` of shape `(N, H_s)`): the student's.
        head ([`~trl_distill.heads.LMHead`]): the student's.
        teacher_hidden (`torch.Tensor` of shape `(N, H_t)`).
        teacher_head ([`~trl_distill.heads.LMHead`]).
        form ([`Form`]): which divergence, and how.
        sampled (`torch.Tensor` of shape `(N,)`, *optional*): ids whose log-probabilities are wanted; of those that one
            model lacks they mean nothing.
        slopes ([`Slopes`], *optional*): what the gradient will be, up to a common factor. Right slopes save two
            projections; wrong ones cost time, not correctness.
        look (`slice`, *optional*): with start and step, the tokens at which the models are compared for the log.
    """
    weight, bias = head.parameters()
    teacher_weight, _ = teacher_head.parameters()
    check_same_device(weight, teacher_weight)
    device = weight.device
    shared = min(head.vocab_size, teacher_head.vocab_size)
    if shared < head.vocab_size:
        weight, bias = weight[:shared], None if bias is None else bias[:shared]
    ids = torch.zeros(len(hidden), dtype=torch.long) if sampled is None else sampled.clamp(max=shared - 1)
    expected = [None if slope is None else slope.float() for slope in slopes or (None, None)]
    how = _How(form, head, teacher_head, look)
    found = _Fused.apply(hidden.to(device), weight, bias, teacher_hidden.to(device), ids.to(device), *expected, how)
    return TokenStatistics(*found)


@dataclass(frozen=True)
class _How:
    form: DivergenceSpec
    student: LMHead
    teacher: LMHead
    look: slice | None


class _Fused(torch.autograd.Function):
    """See [`fused_divergence`]. Projections in autocast's dtype, summed in fp32; everything else in fp32."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher_hidden, ids, slope, slope_log_q, how):
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.how = how
        forms_gradient = slope is not None and any(ctx.needs_input_grad[:3])
        grads = _Gradients.wanted_by(ctx.needs_input_grad) if forms_gradient else None
        compared = 0 if how.look is None else len(range(len(hidden))[how.look])
        shapes = [(len(hidden),)] * 4 + [(len(COMPARED), compared)]
        found = TokenStatistics(*(hidden.new_empty(shape, dtype=torch.float32) for shape in shapes))
        _run(ctx, (hidden, weight, bias, teacher_hidden, ids), found, grads, slope, slope_log_q)
        ctx.save_for_backward(hidden, weight, bias, teacher_hidden, ids, slope, slope_log_q)
        ctx.formed = grads
        ctx.mark_non_differentiable(found.entropy, found.log_p, found.comparison)
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    def backward(ctx, grad, grad_log_q, *_):
        *tensors, slope, slope_log_q = ctx.saved_tensors
        grads, ctx.formed = ctx.formed, None
        given = [None if g is None else g.float() for g in (grad, grad_log_q)]
        if grads is None:
            grads, rest = _Gradients.wanted_by(ctx.needs_input_grad), given
        else:
            factor, rest = _compared(given, [slope, slope_log_q])
            grads.scale(factor)
        if on_any_process(any(part is not None for part in rest), tensors[1]):  # not foreseen: the logits once more
            _run(ctx, tensors, None, grads, *rest)
        hidden, weight, bias = tensors[:3]
        return (*grads.as_given(hidden, weight, bias), *[None] * 5)


def on_any_process(needed: bool, weight: torch.Tensor) -> bool:
    """Where ZeRO-3 has sharded a weight, whether any process needs it: then all take part in gathering it."""
    if not hasattr(weight, "ds_id"):
        return needed
    found = torch.tensor(float(needed), device=weight.device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return bool(found.item())


def _compared(
    given: list[torch.Tensor | None], foreseen: list[torch.Tensor | None]
) -> tuple[float, list[torch.Tensor | None]]:
    """The factor by which gradients are those that were foreseen, and what is left of each beyond that, or `None`."""
    pairs = [(g, s) for g, s in zip(given, foreseen, strict=True) if g is not None and s is not None]
    overlap = sum((g * s).sum().item() for g, s in pairs)
    size = sum((s * s).sum().item() for _, s in pairs)
    factor = overlap / size if size else 1.0
    largest = max((g.abs().max().item() for g in given if g is not None and g.numel()), default=0.0)
    rest: list[torch.Tensor | None] = []
    for g, s in zip(given, foreseen, strict=True):
        if g is None and s is None:
            rest.append(None)
            continue
        left = (0 if g is None else g) - (0 if s is None else factor * s)
        assert isinstance(left, torch.Tensor)
        rest.append(left if left.numel() and left.abs().max().item() > GRADIENT_TOLERANCE * largest else None)
    return factor, rest


class _Gradients:
    """Gradients in hidden states, weight and bias, summed in fp32 over tiles; `None` for what needs none."""

    def __init__(self, hidden: bool, weight: bool, bias: bool):
        self.wants = hidden, weight, bias
        self.hidden: torch.Tensor | None = None
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None

    @classmethod
    def wanted_by(cls, needs_input_grad: tuple[bool, ...]) -> _Gradients:
        return cls(*needs_input_grad[:3])

    def begin(self, hidden: torch.Tensor, weight: torch.Tensor) -> None:
        """Made where ZeRO-3 has gathered the weight and its shape is known."""
        if self.wants[0] and self.hidden is None:
            self.hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        if self.wants[2] and self.bias is None:
            self.bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=hidden.device)

    def add(self, rows: slice, found: torch.Tensor, states: torch.Tensor, weight: torch.Tensor) -> None:
        """Of a tile: derivatives by the projected logits `(n, V)`, fp32; hidden states and weight in their dtype."""
        rounded = found.to(states.dtype)
        if self.hidden is not None:
            _add_product(self.hidden[rows], rounded, weight)
        if self.wants[1]:
            self.weight = _add_product(self.weight, rounded.T, states)
        if self.bias is not None:
            self.bias += found.sum(0)

    def scale(self, factor: float) -> None:
        for tensor in (self.hidden, self.weight, self.bias) if factor != 1.0 else ():
            if tensor is not None:
                tensor.mul_(factor)

    def as_given(self, *inputs: torch.Tensor | None) -> list[torch.Tensor | None]:
        """In the dtype of the inputs."""
        sums = (self.hidden, self.weight, self.bias)
        return [None if s is None or i is None else s.to(i.dtype) for s, i in zip(sums, inputs, strict=True)]


def _add_product(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`total += a @ b` in fp32, whatever the factors are rounded to; a new sum where there is none yet."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return torch.mm(a.float(), b.float()) if total is None else total.addmm_(a.float(), b.float())
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def _run(
    ctx: Any,
    tensors: Any,
    found: TokenStatistics | None,
    grads: _Gradients | None,
    slope: torch.Tensor | None,
    slope_log_q: torch.Tensor | None,
) -> None:
    """All tiles: fill in `found`, and add to `grads` what the slopes make of the divergence and of log q."""
    hidden, weight, bias, teacher_hidden, ids = tensors
    how, dtype = ctx.how, ctx.dtype
    teacher_weight, teacher_bias = how.teacher.parameters()
    plain = torch.autocast(hidden.device.type, enabled=False)  # which would round the sums, too
    with plain, gathered_head(weight, bias), gathered_head(teacher_weight, teacher_bias):
        shared = weight.shape[0]
        teacher_weight, teacher_bias = teacher_weight[:shared], None if teacher_bias is None else teacher_bias[:shared]
        ours = Projection(how.student, weight, bias, dtype, "student")
        teachers = Projection(how.teacher, teacher_weight, teacher_bias, dtype, "teacher")
        if grads is not None:
            grads.begin(hidden, weight)
        for rows in tiles(len(hidden), shared, hidden.device):
            states = hidden[rows].to(dtype)
            both = ours(states), teachers(teacher_hidden[rows].to(dtype))
            for part in parts(rows, shared, hidden.device):
                logits, theirs = (which[part.start - rows.start : part.stop - rows.start] for which in both)
                of_student = ours.finish(logits, how.form.temperature)
                block = LogitsTile(of_student, teachers.finish(theirs, how.form.temperature), how.form)
                if found is not None:
                    block.record(found, part, ids[part, None], how.look)
                slopes = [None if s is None else s[part, None] for s in (slope, slope_log_q)]
                derivative = block.measure(found and found.divergence[part], grads is not None, *slopes)
                if derivative is not None:
                    if slopes[1] is not None:
                        derivative.scatter_add_(1, ids[part, None], slopes[1])
                    ours.backward_through_scale(derivative, of_student, how.form.temperature)
            if grads is not None:
                grads.add(rows, both[1], states, ours.weight)  # where the derivatives were left


class LogitsTile:
    """Logits of both models at a few tokens, `(n, V)`, and what becomes of them, in the memory of the teacher's."""

    def __init__(self, ours: torch.Tensor, theirs: torch.Tensor, form: DivergenceSpec):
        self.ours, self.theirs, self.form = ours, theirs, form
        self.mass, self.product = (TileMemory(name, ours.device).take(*ours.shape) for name in ("mass", "product"))
        highest = theirs.amax(-1, keepdim=True)
        norm = torch.sub(theirs, highest, out=self.product).exp_().sum(-1, keepdim=True)  # (n, 1)
        self.log_norm_p = highest + norm.log_()
        highest = ours.amax(-1, keepdim=True)
        torch.sub(ours, highest, out=self.mass).exp_()  # q, but for its sum
        self.norm = self.mass.sum(-1, keepdim=True)
        self.log_norm_q = highest + self.norm.log()

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Under q: `(n, V)` to `(n, 1)`."""
        return torch.mul(self.mass, values, out=self.product).sum(-1, keepdim=True) / self.norm

    def record(self, found: TokenStatistics, rows: slice, at: torch.Tensor, look: slice | None) -> None:
        """Write what is no divergence; `at` are the sampled ids, `(n, 1)`."""
        found.log_q[rows] = (self.ours.gather(1, at) - self.log_norm_q)[:, 0]
        found.log_p[rows] = (self.theirs.gather(1, at) - self.log_norm_p)[:, 0]
        found.entropy[rows] = (self.log_norm_q - self.mean(self.ours))[:, 0]
        earlier, upto = (0, 0) if look is None else (len(range(end)[look]) for end in (rows.start, rows.stop))
        if look is not None and earlier < upto:
            here = slice(look.start + earlier * look.step - rows.start, None, look.step)
            log_q, log_p = self.ours[here] - self.log_norm_q[here], self.theirs[here] - self.log_norm_p[here]
            found.comparison[:, earlier:upto] = comparison(log_q, log_p, self.form.stops)

    def measure(
        self,
        value: torch.Tensor | None,
        wanted: bool,
        slope: torch.Tensor | None,
        slope_log_q: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """
        Write the divergence to `value`; return slope · ∂divergence − slope_log_q · q by the logits, where `wanted`.

        With Σ_v f(log q_v) as the divergence and g = ∂f, the derivative by logit u is g_u − q_u Σ_v g_v.
        """
        if self.form.divergence == "reverse_kl" and not self.form.stops:  # q (log q − log p − KL): norms cancel
            difference = torch.sub(self.ours, self.theirs, out=self.theirs)
            mean = self.mean(difference)
            divergence = (mean - self.log_norm_q + self.log_norm_p)[:, 0]
            if wanted:
                factor = torch.zeros_like(self.norm) if slope is None else slope / self.norm
                of_log_q = 0.0 if slope_log_q is None else slope_log_q / self.norm
                difference.mul_(factor).sub_(mean * factor + of_log_q).mul_(self.mass)
        else:
            divergence, derivative = self._by_autograd(wanted)
            if derivative is not None:
                q = self.mass.div_(self.norm)
                derivative.addcmul_(q, derivative.sum(-1, keepdim=True), value=-1.0)
                derivative.mul_(0.0 if slope is None else slope)
                if slope_log_q is not None:
                    derivative.addcmul_(q, slope_log_q.expand_as(q), value=-1.0)
                self.theirs.copy_(derivative)
        if value is not None:
            value.copy_(divergence)
        return self.theirs if wanted else None

    def _by_autograd(self, wanted: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Any form, stop tokens merged: its value and its derivatives by the log-probabilities."""
        form, log_p = self.form, self.theirs - self.log_norm_p
        with torch.enable_grad():
            log_q = (self.ours - self.log_norm_q).requires_grad_(wanted)
            divergence = divergences.summands(form.divergence, log_q, log_p, form.alpha).sum(-1)
            if form.stops:
                ours, theirs = (x[:, list(form.stops)] for x in (log_q, log_p))
                divergence = divergences.as_one_class(divergence, ours, theirs, form.divergence, form.alpha)
            if not wanted:
                return divergence, None
            (derivative,) = torch.autograd.grad(divergence.sum(), log_q)
        return divergence.detach(), derivative
