"""Log-probabilities of a few ids at each token, and which ids are the likeliest.

Products are in autocast's dtype with fp32 sums, and nothing is rounded after that: a KL is a small difference of large
logits, which 16 bits would lose. Where the gradient can be foreseen, it is formed while the logits are there, as in
`fused.py`; else the backward pass projects again instead of keeping logits, like TRL's kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from .._trl import gathered_head
from ..signals import HiddenStates
from .comparison import COMPARED, comparison
from .fused import as_expected, on_any_process
from .gradients import Gradients
from .lm_head import LMHead
from .tiles import Projection, TileMemory, parts, tiles


# Tile sizes of the search for the likeliest ids: tokens and ids
TOKEN_TILE, VOCAB_TILE = 1024, 32768


class FewIds(NamedTuple):
    """
    What is computed at N tokens, for K ids each; fp32 but for `ids`.

    Attributes:
        log_q (`torch.Tensor` of shape `(N, K)`): the student's log-probabilities, nats, with gradient.
        entropy (`torch.Tensor` of shape `(N,)`): the student's, nats.
        log_p (`torch.Tensor` of shape `(N, K)`): the teacher's log-probabilities, nats; `(N, 0)` without one.
        ids (`torch.Tensor` of shape `(N, K)`, int64): the ids: those given, then the student's most likely ones.
        comparison (`torch.Tensor` of shape `(5, n)`): how the models differ at n of the tokens, see
            [`~trl_distill.heads.comparison.comparison`].
    """

    log_q: torch.Tensor
    entropy: torch.Tensor
    log_p: torch.Tensor
    ids: torch.Tensor
    comparison: torch.Tensor


# from tokens (a slice), log_q and log_p `(n, K)` and ids `(n, K)` to the foreseen derivative of the loss by log_q
Foreseen = Callable[[slice, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _How:
    head: LMHead
    temperature: float
    teacher: HiddenStates | None = None
    teacher_dtype: torch.dtype = torch.float32
    top_k: int = 0
    foreseen: Foreseen | None = None
    positions: slice | None = None
    stops: tuple[int, ...] = ()


def log_probs_of(
    hidden: torch.Tensor, head: LMHead, ids: torch.Tensor, vocab_size: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probabilities of K ids at each position, and the entropy, from one projection.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`).
        head ([`~trl_distill.heads.lm_head.LMHead`]): of the same model.
        ids (`torch.Tensor` of shape `(N, K)`): ids; results for those beyond `vocab_size` are meaningless.
        vocab_size (`int`): a larger vocabulary is truncated to it and renormalised.
        temperature (`float`): softmax temperature.

    Returns:
        `tuple` of two `torch.Tensor`, fp32: log-probabilities `(N, K)`, with gradient to hidden states and head, and
        entropies `(N,)` in nats, without.
    """
    weight, bias = head.parameters()
    with gathered_head(weight, bias):
        if vocab_size < head.vocab_size:  # else the parameter itself, which the backward pass gathers again
            weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
        found = _LogProbs.apply(hidden.to(weight.device), weight, bias, ids, _How(head, temperature))
    return found[0], found[1]


def few_ids_of_both(
    hidden: torch.Tensor,
    head: LMHead,
    teacher: HiddenStates | None,
    ids: torch.Tensor,
    temperature: float,
    top_k: int = 0,
    foreseen: Foreseen | None = None,
    positions: slice | None = None,
    stops: tuple[int, ...] = (),
) -> FewIds:
    """
    Log-probabilities of a few ids under both models, from one projection of each.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`), head ([`~trl_distill.heads.lm_head.LMHead`]): the student's.
        teacher ([`~trl_distill.signals.HiddenStates`], *optional*): the teacher's, at the same tokens. A larger
            vocabulary than the student's is truncated and renormalised.
        ids (`torch.Tensor` of shape `(N, k)`): ids.
        temperature (`float`): softmax temperature of both.
        top_k (`int`): number of the student's most likely ids that are added to `ids`.
        foreseen (`Callable`, *optional*): gives the expected gradient, up to a common factor. If it is right, a
            projection is saved; if not, the result is still correct, but slower.
        positions (`slice`, *optional*): with start and step, the tokens at which the models are compared for the log.
        stops (`tuple[int, ...]`): ids that count as one in the comparison.
    """
    weight, bias = head.parameters()
    dtype = torch.float32 if teacher is None else _dtype(teacher.hidden)
    compared = None if teacher is None else positions
    how = _How(head, temperature, teacher, dtype, top_k, foreseen, compared, stops)
    with gathered_head(weight, bias):
        return FewIds(*_LogProbs.apply(hidden.to(weight.device), weight, bias, ids, how))


class _LogProbs(torch.autograd.Function):
    """See [`log_probs_of`] and [`few_ids_of_both`]."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, how):
        ctx.dtype, ctx.head, ctx.temperature = _dtype(hidden), how.head, how.temperature
        ids = ids.to(hidden.device)
        chosen = ids.new_empty(len(ids), ids.shape[1] + how.top_k)
        chosen[:, : ids.shape[1]] = ids
        compared = 0 if how.positions is None else len(range(len(ids))[how.positions])
        of_teacher = 0 if how.teacher is None else chosen.shape[1]
        shapes = (chosen.shape, (len(ids),), (len(ids), of_teacher), (len(COMPARED), compared))
        log_q, entropy, log_p, differ = (hidden.new_empty(shape, dtype=torch.float32) for shape in shapes)
        found = FewIds(log_q, entropy, log_p, chosen, differ)
        forms = how.foreseen is not None and any(ctx.needs_input_grad[:3])
        grads = Gradients.wanted_by(ctx.needs_input_grad) if forms else None
        expected = torch.empty_like(log_q) if forms else None
        with _projection(ctx, hidden, weight, bias) as ours, _teachers(how, len(ours.weight)) as theirs:
            if grads is not None:
                grads.begin(hidden, weight)
            for rows in tiles(len(hidden), len(ours.weight), hidden.device):
                states = hidden[rows].to(ctx.dtype)
                tile = _measure(ours, theirs, rows, states, how, found, expected)
                if grads is not None:
                    grads.add(rows, tile, states, ours.weight)  # which now holds the derivatives
        ctx.save_for_backward(hidden, weight, bias, chosen, expected)
        ctx.formed = grads
        ctx.mark_non_differentiable(entropy, log_p, chosen, differ)
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    def backward(ctx, grad, *_):
        hidden, weight, bias, ids, expected = ctx.saved_tensors
        grads, ctx.formed = ctx.formed, None
        grad = None if grad is None else grad.float()
        if grads is not None and ctx.dtype == torch.float16 and not grads.are_finite:
            grads = None  # a larger derivative than fp16 has; those of the given gradient carry the loss scale
        rest = grad
        if grads is None:
            grads = Gradients.wanted_by(ctx.needs_input_grad)
        else:
            factor, (rest,) = as_expected([grad], [expected])
            grads.scale(factor)
        if on_any_process(rest is not None, weight):  # not as expected: project again
            _add_gradients(ctx, grads, hidden, weight, bias, ids, rest)
        return (*grads.as_given(hidden, weight, bias), None, None)


def _dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype of the factors of a product: autocast's, or that of the hidden states."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _measure(
    ours: Projection,
    theirs: Projection | None,
    rows: slice,
    states: torch.Tensor,
    how: _How,
    found: FewIds,
    expected: torch.Tensor | None,
) -> torch.Tensor:
    """
    Write what is computed at a tile of tokens to `found`, and the foreseen gradient to `expected`.

    Returns:
        `torch.Tensor` of shape `(n, V)`: with `expected`, derivatives by the projected logits; else logits.
    """
    size, given, tile = len(ours.weight), found.ids.shape[1] - how.top_k, ours(states)
    other_tile = None
    if theirs is not None and how.teacher is not None:
        other_tile = theirs(how.teacher.hidden[rows].to(theirs.weight.device, how.teacher_dtype))
    for part in parts(rows, size, states.device):
        here = slice(part.start - rows.start, part.stop - rows.start)
        logits = ours.finish(tile[here], how.temperature)
        if how.top_k:
            found.ids[part, given:] = logits.topk(how.top_k).indices
        ids = found.ids[part].clamp(max=size - 1)
        mass, product = (TileMemory(name, logits.device).take(*logits.shape) for name in ("mass", "product"))
        log_norm, norm = _normaliser(logits, mass)
        found.log_q[part] = logits.gather(1, ids) - log_norm
        mean = torch.mul(mass, logits, out=product).sum(-1, keepdim=True) / norm
        found.entropy[part] = (log_norm - mean)[:, 0]
        if theirs is not None and other_tile is not None:
            other = theirs.finish(other_tile[here], how.temperature)
            other_norm, _ = _normaliser(other, product.to(other.device))
            found.log_p[part] = (other.gather(1, ids.to(other.device)) - other_norm).to(logits.device)
            _compare(found, part, how, logits, log_norm, other, other_norm)
        if expected is not None and how.foreseen is not None:
            expected[part] = how.foreseen(part, found.log_q[part], found.log_p[part], found.ids[part])
            _derive(ours, logits, mass, norm, ids, expected[part], how.temperature)
    return tile


def _normaliser(logits: torch.Tensor, mass: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log of the normaliser, and the sum of `mass`, which becomes e^(logit − largest); `(n, 1)` each."""
    highest = logits.amax(-1, keepdim=True)
    norm = torch.sub(logits, highest, out=mass).exp_().sum(-1, keepdim=True)
    return highest + norm.log(), norm


@contextmanager
def _teachers(how: _How, size: int) -> Iterator[Projection | None]:
    """The teacher's projection onto the first `size` ids, if there is one."""
    if how.teacher is None:
        yield None
        return
    weight, bias = how.teacher.head.parameters()
    with gathered_head(weight, bias):
        shared = weight[:size], None if bias is None else bias[:size]
        yield Projection(how.teacher.head, *shared, how.teacher_dtype, "teacher")


def _compare(
    found: FewIds,
    part: slice,
    how: _How,
    logits: torch.Tensor,
    log_norm: torch.Tensor,
    other: torch.Tensor,
    other_norm: torch.Tensor,
) -> None:
    """Compare the models at those tokens of a part that are among the chosen positions."""
    at = how.positions
    if at is None:
        return
    earlier, upto = (len(range(end)[at]) for end in (part.start, part.stop))
    if earlier < upto:
        some = slice(at.start + earlier * at.step - part.start, None, at.step)
        log_p = (other[some] - other_norm[some]).to(logits.device)
        found.comparison[:, earlier:upto] = comparison(logits[some] - log_norm[some], log_p, how.stops)


def _derive(
    project: Projection,
    logits: torch.Tensor,
    mass: torch.Tensor,
    norm: torch.Tensor,
    ids: torch.Tensor,
    slope: torch.Tensor,
    temperature: float,
) -> None:
    """Overwrite finished logits, whose probabilities are `mass / norm`, by the derivative by projected logits."""
    factor = -slope.sum(-1, keepdim=True) / norm  # by logit u: Σ_k g_k (1[u = id_k] − q_u)
    capped = project.head.softcap is not None  # then the scale's derivative needs the logits
    derivative = torch.mul(mass, factor, out=mass if capped else logits)
    derivative.scatter_add_(1, ids, slope)
    project.backward_through_scale(derivative, logits, temperature)
    if capped:
        logits.copy_(derivative)


def _add_gradients(
    ctx: Any,
    grads: Gradients,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    grad: torch.Tensor | None,
) -> None:
    """Project again, and add the gradients for derivatives `(N, K)` of the loss by log-probabilities."""
    grad = torch.zeros(ids.shape, device=hidden.device) if grad is None else grad
    with _projection(ctx, hidden, weight, bias) as project:
        size = len(project.weight)
        grads.begin(hidden, weight)
        for rows in tiles(len(hidden), size, hidden.device):
            states = hidden[rows].to(ctx.dtype)
            tile = project(states)
            for part in parts(rows, size, hidden.device):
                logits = project.finish(tile[part.start - rows.start : part.stop - rows.start], ctx.temperature)
                mass = TileMemory("mass", hidden.device).take(*logits.shape)
                _, norm = _normaliser(logits, mass)
                _derive(project, logits, mass, norm, ids[part].clamp(max=size - 1), grad[part], ctx.temperature)
            grads.add(rows, tile, states, project.weight)


@contextmanager
def _projection(
    ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> Iterator[Projection]:
    with torch.autocast(hidden.device.type, enabled=False), gathered_head(weight, bias):
        yield Projection(ctx.head, weight, bias, ctx.dtype, "student")


@torch.no_grad()
def top_ids(hidden: torch.Tensor, head: LMHead, k: int) -> torch.Tensor:
    """The `k` most likely ids at each position: `(N, H)` to `(N, k)`, in tiles over tokens and vocabulary."""
    weight, bias = head.parameters()
    chosen = []
    with gathered_head(weight, bias):
        for rows in hidden.to(weight.device).split(TOKEN_TILE):
            best, ids = rows.new_full((rows.shape[0], k), -torch.inf), rows.new_zeros((rows.shape[0], k)).long()
            for start in range(0, weight.shape[0], VOCAB_TILE):  # scale, soft cap and temperature keep the order
                tile = slice(start, start + VOCAB_TILE)
                logits = nn.functional.linear(rows, weight[tile].to(rows.dtype), None if bias is None else bias[tile])
                values, places = logits.topk(min(k, logits.shape[1]))
                best, order = torch.cat([best, values.to(best.dtype)], dim=1).topk(k)
                ids = torch.cat([ids, places + start], dim=1).gather(1, order)
            chosen.append(ids)
    return torch.cat(chosen) if chosen else hidden.new_zeros((0, k)).long()
