"""The exact divergence from one projection of each model: values and gradients, tile by tile, in one pass.

The weight of a token's divergence in the loss is nearly always known before the forward pass. Then its gradient is
computed while the logits are there, and nothing is projected again: four products with a head instead of six. If
another gradient arrives, the backward pass computes the difference. Formulas of divergences are in
`objective/divergences.py`, other projections in `few_ids.py` and `kernel.py`, tiles and their memory in `tiles.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .._trl import gathered_head
from ..objective import divergences
from .comparison import COMPARED, comparison
from .gradients import Gradients
from .lm_head import LMHead, check_same_device
from .tiles import Projection, TileMemory, parts, tiles


LARGEST_SLOPE = 16.0  # a token's derivatives by logits then stay below 65504, the largest fp16, up to 4000 nats
GRADIENT_TOLERANCE = 1e-5  # relative difference up to which a gradient counts as the expected one


@dataclass(frozen=True)
class DivergenceSpec:
    """
    Which divergence is computed, and how.

    Attributes:
        divergence (`str`): a name of [`~trl_distill.objective.divergences.summands`].
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
    What is computed for N judged tokens, fp32.

    Attributes:
        divergence (`torch.Tensor` of shape `(N,)`): nats, with gradient.
        log_q (`torch.Tensor` of shape `(N,)`): the student's log-probability of the sampled token, with gradient.
        entropy (`torch.Tensor` of shape `(N,)`): the student's, nats, without gradient.
        log_p (`torch.Tensor` of shape `(N,)`): the teacher's log-probability of the sampled token, without gradient.
        comparison (`torch.Tensor` of shape `(5, n)`): how the models differ at n of the tokens, see
            [`~trl_distill.heads.comparison.comparison`].
    """

    divergence: torch.Tensor
    log_q: torch.Tensor
    entropy: torch.Tensor
    log_p: torch.Tensor
    comparison: torch.Tensor


class ExpectedSlopes(NamedTuple):
    """Derivatives of the loss by the divergence and the log-probability of each judged token, `(N,)`, where known."""

    divergence: torch.Tensor | None
    log_q: torch.Tensor | None = None


def fused_divergence(
    hidden: torch.Tensor,
    head: LMHead,
    teacher_hidden: torch.Tensor,
    teacher_head: LMHead,
    spec: DivergenceSpec,
    sampled: torch.Tensor | None = None,
    slopes: ExpectedSlopes | None = None,
    positions: slice | None = None,
) -> TokenStatistics:
    """
    Divergence of student and teacher over the ids that both have, and other statistics from the same logits.

    Args:
        hidden (`torch.Tensor` of shape `(N, H_s)`): the student's hidden states.
        head ([`~trl_distill.heads.lm_head.LMHead`]): the student's.
        teacher_hidden (`torch.Tensor` of shape `(N, H_t)`): the teacher's hidden states.
        teacher_head ([`~trl_distill.heads.lm_head.LMHead`]): the teacher's.
        spec ([`DivergenceSpec`]): which divergence, and how.
        sampled (`torch.Tensor` of shape `(N,)`, *optional*): ids whose log-probabilities are wanted; for ids that one
            model lacks these are meaningless.
        slopes ([`ExpectedSlopes`], *optional*): the expected gradient, up to a common factor. If it is right, two
            projections are saved; if not, the result is still correct, but slower.
        positions (`slice`, *optional*): with start and step, the tokens at which the models are compared for the log.

    Returns:
        [`TokenStatistics`].

    Raises:
        ValueError: the two heads are on different devices.
    """
    weight, bias = head.parameters()
    teacher_weight, _ = teacher_head.parameters()
    check_same_device(weight, teacher_weight)
    device = weight.device
    shared = min(head.vocab_size, teacher_head.vocab_size)
    if shared < head.vocab_size:
        weight, bias = weight[:shared], None if bias is None else bias[:shared]
    ids = torch.zeros(len(hidden), dtype=torch.long) if sampled is None else sampled.clamp(max=shared - 1)
    expected = scaled(slopes)
    settings = _Settings(spec, head, teacher_head, positions)
    found = _Fused.apply(
        hidden.to(device), weight, bias, teacher_hidden.to(device), ids.to(device), *expected, settings
    )
    return TokenStatistics(*found)


def scaled(slopes: ExpectedSlopes | None) -> list[torch.Tensor | None]:
    """Slopes by a common factor, with `LARGEST_SLOPE` as the largest: others may underflow where products are fp16."""
    given = [None if slope is None else slope.float() for slope in slopes or (None, None)]
    largest = [slope.abs().amax() for slope in given if slope is not None and slope.numel()]
    if not largest:
        return given
    factor = LARGEST_SLOPE / torch.stack(largest).amax().clamp(min=torch.finfo(torch.float32).tiny * LARGEST_SLOPE)
    return [None if slope is None else slope * factor for slope in given]


@dataclass(frozen=True)
class _Settings:
    spec: DivergenceSpec
    student: LMHead
    teacher: LMHead
    positions: slice | None


class _Fused(torch.autograd.Function):
    """See [`fused_divergence`]. Projections are in autocast's dtype with fp32 sums; everything else is in fp32."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher_hidden, ids, slope, slope_log_q, settings):
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.settings = settings
        forms_gradient = slope is not None and any(ctx.needs_input_grad[:3])
        grads = Gradients.wanted_by(ctx.needs_input_grad) if forms_gradient else None
        compared = 0 if settings.positions is None else len(range(len(hidden))[settings.positions])
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
        if grads is not None and ctx.dtype == torch.float16 and not grads.are_finite:
            grads = None  # a larger derivative than fp16 has; those of the given gradient carry the loss scale
        given = [None if g is None else g.float() for g in (grad, grad_log_q)]
        if grads is None:
            grads, rest = Gradients.wanted_by(ctx.needs_input_grad), given
        else:
            factor, rest = as_expected(given, [slope, slope_log_q])
            grads.scale(factor)
        if on_any_process(any(part is not None for part in rest), tensors[1]):  # not as expected: project again
            _run(ctx, tensors, None, grads, *rest)
        hidden, weight, bias = tensors[:3]
        return (*grads.as_given(hidden, weight, bias), *[None] * 5)


def on_any_process(needed: bool, weight: torch.Tensor) -> bool:
    """Whether any process needs a weight that ZeRO-3 has sharded, so that all must take part in gathering it."""
    if not hasattr(weight, "ds_id"):
        return needed
    found = torch.tensor(float(needed), device=weight.device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return bool(found.item())


def as_expected(
    given: list[torch.Tensor | None], expected: list[torch.Tensor | None]
) -> tuple[float, list[torch.Tensor | None]]:
    """
    The factor between the given and the expected gradients, and the remainder of each, `None` if negligible.

    Python waits once for the device: for all numbers together.
    """
    known = [x for x in (*given, *expected) if x is not None and x.numel()]
    if not known:
        return 1.0, [None for _ in given]
    zero = known[0].new_zeros(())
    pairs = [(g, s) for g, s in zip(given, expected, strict=True) if g is not None and s is not None]
    size = sum(((s * s).sum() for _, s in pairs), zero)
    factor = torch.where(size > 0, sum(((g * s).sum() for g, s in pairs), zero) / size, 1.0)
    rest: list[torch.Tensor | None] = []
    for g, s in zip(given, expected, strict=True):
        if s is None:
            rest.append(g)
        else:
            rest.append(-factor * s if g is None else g - factor * s)
    largest = torch.stack([_largest(g, zero) for g in given]).amax()
    left = torch.stack([_largest(one, zero) for one in rest])
    number, *differ = torch.cat([factor[None], (left > GRADIENT_TOLERANCE * largest).float()]).tolist()
    return number, [one if differs else None for one, differs in zip(rest, differ, strict=True)]


def _largest(values: torch.Tensor | None, zero: torch.Tensor) -> torch.Tensor:
    """The largest absolute value, a scalar; 0 if there is none."""
    return zero if values is None or not values.numel() else values.abs().amax()


def _run(
    ctx: Any,
    tensors: Any,
    found: TokenStatistics | None,
    grads: Gradients | None,
    slope: torch.Tensor | None,
    slope_log_q: torch.Tensor | None,
) -> None:
    """Go through all tiles: write statistics to `found`, and add the gradients for the given slopes to `grads`."""
    hidden, weight, bias, teacher_hidden, ids = tensors
    settings, dtype = ctx.settings, ctx.dtype
    teacher_weight, teacher_bias = settings.teacher.parameters()
    plain = torch.autocast(hidden.device.type, enabled=False)  # autocast would round the sums too
    with plain, gathered_head(weight, bias), gathered_head(teacher_weight, teacher_bias):
        shared = weight.shape[0]
        teacher_weight, teacher_bias = teacher_weight[:shared], None if teacher_bias is None else teacher_bias[:shared]
        ours = Projection(settings.student, weight, bias, dtype, "student")
        teachers = Projection(settings.teacher, teacher_weight, teacher_bias, dtype, "teacher")
        if grads is not None:
            grads.begin(hidden, weight)
        for rows in tiles(len(hidden), shared, hidden.device):
            states = hidden[rows].to(dtype)
            both = ours(states), teachers(teacher_hidden[rows].to(dtype))
            for part in parts(rows, shared, hidden.device):
                logits, theirs = (which[part.start - rows.start : part.stop - rows.start] for which in both)
                of_student = ours.finish(logits, settings.spec.temperature)
                block = LogitsTile(of_student, teachers.finish(theirs, settings.spec.temperature), settings.spec)
                if found is not None:
                    block.record(found, part, ids[part, None], settings.positions)
                slopes = [None if s is None else s[part, None] for s in (slope, slope_log_q)]
                derivative = block.measure(found and found.divergence[part], grads is not None, *slopes)
                if derivative is not None:
                    if slopes[1] is not None:
                        derivative.scatter_add_(1, ids[part, None], slopes[1])
                    ours.backward_through_scale(derivative, of_student, settings.spec.temperature)
            if grads is not None:
                grads.add(rows, both[1], states, ours.weight)  # both[1] now holds the derivatives


class LogitsTile:
    """Logits of both models at n tokens, `(n, V)`; derivatives overwrite the teacher's logits to save memory."""

    def __init__(self, ours: torch.Tensor, theirs: torch.Tensor, spec: DivergenceSpec):
        self.ours, self.theirs, self.spec = ours, theirs, spec
        self.mass, self.product = (TileMemory(name, ours.device).take(*ours.shape) for name in ("mass", "product"))
        highest = theirs.amax(-1, keepdim=True)
        norm = torch.sub(theirs, highest, out=self.product).exp_().sum(-1, keepdim=True)  # (n, 1)
        self.log_norm_p = highest + norm.log_()
        highest = ours.amax(-1, keepdim=True)
        torch.sub(ours, highest, out=self.mass).exp_()  # q, unnormalised
        self.norm = self.mass.sum(-1, keepdim=True)
        self.log_norm_q = highest + self.norm.log()

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean under q: `(n, V)` to `(n, 1)`."""
        return torch.mul(self.mass, values, out=self.product).sum(-1, keepdim=True) / self.norm

    def record(self, found: TokenStatistics, rows: slice, at: torch.Tensor, positions: slice | None) -> None:
        """Write all statistics but the divergence; `at` are the sampled ids, `(n, 1)`."""
        found.log_q[rows] = (self.ours.gather(1, at) - self.log_norm_q)[:, 0]
        found.log_p[rows] = (self.theirs.gather(1, at) - self.log_norm_p)[:, 0]
        found.entropy[rows] = (self.log_norm_q - self.mean(self.ours))[:, 0]
        earlier, upto = (0, 0) if positions is None else (len(range(end)[positions]) for end in (rows.start, rows.stop))
        if positions is not None and earlier < upto:
            here = slice(positions.start + earlier * positions.step - rows.start, None, positions.step)
            log_q, log_p = self.ours[here] - self.log_norm_q[here], self.theirs[here] - self.log_norm_p[here]
            found.comparison[:, earlier:upto] = comparison(log_q, log_p, self.spec.stops)

    def measure(
        self,
        value: torch.Tensor | None,
        wanted: bool,
        slope: torch.Tensor | None,
        slope_log_q: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """
        Write the divergence to `value`, if given; if `wanted`, return slope · ∂divergence − slope_log_q · q by logits.

        With Σ_v f(log q_v) as the divergence and g = ∂f, the derivative by logit u is g_u − q_u Σ_v g_v.
        """
        if self.spec.divergence == "reverse_kl" and not self.spec.stops:  # q (log q − log p − KL): normalisers cancel
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
        """Any divergence, with merged stop tokens: its value, and its derivatives by the log-probabilities."""
        spec, log_p = self.spec, self.theirs - self.log_norm_p
        with torch.enable_grad():
            log_q = (self.ours - self.log_norm_q).requires_grad_(wanted)
            divergence = divergences.summands(spec.divergence, log_q, log_p, spec.alpha).sum(-1)
            if spec.stops:
                ours, theirs = (x[:, list(spec.stops)] for x in (log_q, log_p))
                divergence = divergences.as_one_class(divergence, ours, theirs, spec.divergence, spec.alpha)
            if not wanted:
                return divergence, None
            (derivative,) = torch.autograd.grad(divergence.sum(), log_q)
        return divergence.detach(), derivative.contiguous()  # autograd may expand it from fewer numbers
