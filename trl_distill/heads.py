"""The fused LM head: hidden states of student and teacher in, numbers per token out, never a (B, T, V) tensor.

Exact divergences and log-probabilities run in TRL's kernels, the logits of a few ids and the likeliest ids here; all
in tiles over tokens and vocabulary. Where hidden states come from is `forwards.py`'s business, what the numbers mean
that of `estimators.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ._compat import ChunkedDivergenceFunction, ChunkedLogProbFunction, gathered_head
from .objective import summands
from .signals import HiddenStates


# Divergences that TRL's kernel has, as the value of its `beta`; `None`: that is the divergence's alpha
KERNEL_BETA = {"reverse_kl": 1.0, "forward_kl": 0.0, "jsd": None}

# Tiles of what is projected here rather than in TRL's kernel: tokens, ids, and elements of gathered rows of a head
TOKEN_TILE, VOCAB_TILE, ROW_TILE = 1024, 32768, 2**24
LOGITS_TILE = 2**26  # elements of whole logits at a time, for divergences that the kernel lacks: 256 MiB in fp32


class LMHead:
    """
    An output layer as it turns hidden states into logits: `softcap · tanh(scale · (h Wᵀ + b) / softcap)`.

    Weight and bias are looked up at each use, since PEFT, FSDP and DeepSpeed replace them.

    Raises:
        ValueError: the model has no output layer, or one whose weight alone does not say what it does.
    """

    def __init__(self, model: PreTrainedModel):
        layer = model.get_output_embeddings()
        if layer is None:
            raise ValueError(f"{type(model).__name__} has no LM head. Use a causal language model (`...ForCausalLM`).")
        if hasattr(layer, "base_layer"):
            raise ValueError(
                "An adapter on the LM head is not supported: the divergence is computed from the head's weight, which "
                "does not hold it. Merge the adapter (`model.merge_and_unload()`) or leave `lm_head` out of its "
                "`target_modules`."
            )
        self._model = model
        config = model.config.get_text_config()
        self.logit_scale = logit_scale(config)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)

    @property
    def vocab_size(self) -> int:
        """Rows of the weight, also where ZeRO-3 holds none of them at the moment."""
        weight = self._model.get_output_embeddings().weight
        return getattr(weight, "ds_shape", weight.shape)[0]

    def parameters(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight `(V, H)` and bias `(V,)`; FSDP2's shards are gathered, once per call."""
        layer = self._model.get_output_embeddings()
        weight, bias = layer.weight, getattr(layer, "bias", None)
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
            bias = None if bias is None else bias.full_tensor()
        return weight, bias

    @contextmanager
    def whole(self) -> Iterator[LMHead]:
        """This head with weights that are gathered once, by ZeRO-3 or FSDP2, for as long as the context lasts."""
        weight, bias = self.parameters()
        with gathered_head(weight, bias):
            sharded = isinstance(self._model.get_output_embeddings().weight, DTensor)
            yield FrozenHead(self._model, weight, bias) if sharded else self

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """All logits `(..., V)`, for a few positions only: what the kernel is taken to compute."""
        weight, bias = self.parameters()
        logits = self.logit_scale * nn.functional.linear(hidden, weight, bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class FrozenHead(LMHead):
    """An output layer with weights that are given, where the model's own are others by the time they are used."""

    def __init__(self, model: PreTrainedModel, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__(model)
        self._weight, self._bias = weight, bias

    @property
    def vocab_size(self) -> int:
        return self._weight.shape[0]

    def parameters(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._weight, self._bias


def logit_scale(config: Any) -> float:
    """What the model multiplies its logits by before the softmax; each model family has its own name for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse, Falcon-H1
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)  # Granite, MiniCPM3 divide


def exact_divergence(
    student_hidden: torch.Tensor,  # (N, H_s)
    student_head: LMHead,
    signal: HiddenStates,  # (N, H_t)
    divergence: str = "reverse_kl",
    temperature: float = 1.0,
    alpha: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Divergence between the next-token distributions of student and teacher over the whole shared vocabulary.

    Where the vocabularies differ in size (padding rows), both distributions are renormalised over the ids that both
    have. Hidden states may be in any dtype; under autocast they are projected in its dtype, accumulated in fp32.

    Args:
        student_hidden: hidden states of the N judged positions.
        student_head: the student's output layer.
        signal: the teacher's hidden states at the same N positions, and its output layer.
        divergence: a name of [`~trl_distill.objective.summands`].
        temperature: softmax temperature of both.
        alpha: the divergence's own parameter.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(N,)`, fp32, in nats: the divergence, with gradient to the student's
        hidden states and head, and the student's entropy, without.
    """
    teacher_hidden, teacher_head = signal.hidden, signal.head
    weight, bias = student_head.parameters()
    teacher_weight, teacher_bias = teacher_head.parameters()
    if weight.device != teacher_weight.device:
        raise ValueError(
            f"The student's LM head is on {weight.device}, the teacher's on {teacher_weight.device}. Both project the "
            "same tokens, so place them on one device in their `device_map`."
        )
    shared = teacher_head.vocab_size
    if shared < student_head.vocab_size:  # the kernel itself cuts a teacher that is larger
        weight, bias = weight[:shared], None if bias is None else bias[:shared]
    if divergence not in KERNEL_BETA:
        how = _How(student_head, teacher_head, functools.partial(summands, divergence, alpha=alpha), temperature)
        return _TiledDivergence.apply(
            student_hidden.to(weight.device), weight, bias, teacher_hidden.to(weight.device), how
        )
    kernel_beta = KERNEL_BETA[divergence]
    return ChunkedDivergenceFunction.apply(
        student_hidden.to(weight.device),
        weight,
        bias,
        teacher_hidden.to(weight.device),
        teacher_weight,
        teacher_bias,
        alpha if kernel_beta is None else kernel_beta,
        temperature,
        student_head.logit_scale,
        student_head.softcap,
        teacher_head.logit_scale,
        teacher_head.softcap,
    )


class _How(NamedTuple):
    """What a tiled divergence is computed with, beside tensors."""

    student: LMHead
    teacher: LMHead
    summands: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    temperature: float


class _TiledDivergence(torch.autograd.Function):
    """
    Any sum over ids of a function of both log-probabilities, for `(N, H)` hidden states, in tiles of whole logits.

    Logits are computed again in the backward pass, so that none outlive their tile. As in the kernel, projections run
    in autocast's dtype and everything else in fp32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher_hidden, how):
        ctx.save_for_backward(hidden, weight, bias, teacher_hidden)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.how, ctx.dtype = how, dtype
        value, entropy = (torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(2))
        for rows, logits, log_p in _tiles(hidden, weight, bias, teacher_hidden, how, dtype):
            log_q = _log_probs(logits, how.student, how.temperature)
            value[rows] = how.summands(log_q, log_p).sum(-1)
            entropy[rows] = -(log_q.exp() * log_q).sum(-1)
        ctx.mark_non_differentiable(entropy)
        return value, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, bias, teacher_hidden = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_weight = grad_bias = None
        for rows, logits, log_p in _tiles(hidden, weight, bias, teacher_hidden, ctx.how, ctx.dtype):
            with torch.enable_grad():
                logits.requires_grad_()
                log_q = _log_probs(logits, ctx.how.student, ctx.how.temperature)
                value = ctx.how.summands(log_q, log_p).sum(-1)
            (found,) = torch.autograd.grad(value, logits, grad[rows])
            if grad_hidden is not None:
                grad_hidden[rows] = (found.to(ctx.dtype) @ weight.to(ctx.dtype)).to(hidden.dtype)
            if wants_weight:  # made here, where ZeRO-3 has gathered the weight and its shape is known
                grad_weight = torch.zeros_like(weight, dtype=torch.float32) if grad_weight is None else grad_weight
                grad_weight += found.to(ctx.dtype).T @ hidden[rows].to(ctx.dtype)
            if wants_bias:
                grad_bias = torch.zeros_like(bias, dtype=torch.float32) if grad_bias is None else grad_bias
                grad_bias += found.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def _tiles(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    teacher_hidden: torch.Tensor,
    how: _How,
    dtype: torch.dtype,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """
    Rows, the student's logits before scale and cap, and the teacher's log-probabilities, `(n, V)` in fp32.

    At least one tile, so that heads which ZeRO-3 has sharded are gathered on every process.
    """

    def logits(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        bias = None if bias is None else bias.to(dtype)
        return nn.functional.linear(states.to(dtype), weight.to(dtype), bias).float()

    teacher_weight, teacher_bias = how.teacher.parameters()
    with gathered_head(weight, bias), gathered_head(teacher_weight, teacher_bias):
        shared = weight.shape[0]  # a larger teacher is cut to the student's ids, and renormalised
        cut = teacher_weight[:shared], None if teacher_bias is None else teacher_bias[:shared]
        size = max(1, LOGITS_TILE // shared)
        for start in range(0, max(len(hidden), 1), size):
            rows = slice(start, start + size)
            with torch.no_grad():
                log_p = _log_probs(logits(teacher_hidden[rows], *cut), how.teacher, how.temperature)
                of_student = logits(hidden[rows], weight, bias)
            yield rows, of_student, log_p


def _log_probs(logits: torch.Tensor, head: LMHead, temperature: float) -> torch.Tensor:
    logits = head.logit_scale * logits
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return (logits / temperature).log_softmax(-1)


def log_probs_of(
    hidden: torch.Tensor, head: LMHead, ids: torch.Tensor, vocab_size: int, temperature: float
) -> torch.Tensor:
    """
    Log-probability of one id at each position, over the first `vocab_size` ids: `(N,)`, fp32, with gradient.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`).
        head ([`LMHead`]): the same model's.
        ids (`torch.Tensor` of shape `(N,)`).
        vocab_size (`int`): a larger vocabulary is cut to it, and renormalised.
        temperature (`float`): softmax temperature.
    """
    weight, bias = head.parameters()
    with gathered_head(weight, bias):
        if vocab_size < head.vocab_size:  # else the parameter itself, which the kernel gathers again in its backward
            weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
        return ChunkedLogProbFunction.apply(
            *(hidden.to(weight.device), weight, bias, ids.to(weight.device), temperature, VOCAB_TILE),
            *(head.softcap, head.logit_scale, ()),
        )[0]


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


def logits_of(hidden: torch.Tensor, head: LMHead, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    """
    Logits of a few ids at each position, divided by the temperature: `(N, K)`, fp32, with gradient.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`).
        head ([`LMHead`]): the same model's.
        ids (`torch.Tensor` of shape `(N, K)`).
        temperature (`float`): divides the logits.
    """
    weight, bias = head.parameters()
    logits = head.logit_scale * _RowLogits.apply(hidden.to(weight.device), weight, bias, ids.to(weight.device))
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits / temperature


class _RowLogits(torch.autograd.Function):
    """`h · W[ids] + b[ids]` for `(N, H)` and `(N, K)`, without ever holding `(N, K, H)`; sums in fp32."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids):
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.save_for_backward(hidden, weight, bias, ids)
        with gathered_head(weight, bias):
            logits = hidden.new_empty(ids.shape, dtype=torch.float32)
            for rows in _row_tiles(ids, hidden.shape[1]):
                columns = weight[ids[rows]].to(ctx.dtype).float()  # (n, K, H)
                logits[rows] = torch.einsum("nkh,nh->nk", columns, hidden[rows].to(ctx.dtype).float())
            logits = logits.to(ctx.dtype)  # rounded as TRL's kernel rounds, whose log Z they are compared with
            return (logits if bias is None else logits + bias[ids].to(ctx.dtype)).float()

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, bias, ids = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        with gathered_head(weight, bias):
            grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=hidden.device) if wants_weight else None
            for rows in _row_tiles(ids, hidden.shape[1]):
                if wants_hidden:
                    grad_hidden[rows] = torch.einsum("nk,nkh->nh", grad[rows], weight[ids[rows]].to(ctx.dtype).float())
                if grad_weight is not None:
                    outer = grad[rows][..., None] * hidden[rows].to(ctx.dtype).float()[:, None]  # (n, K, H)
                    grad_weight.index_add_(0, ids[rows].flatten(), outer.flatten(0, 1))
            grad_bias = None
            if wants_bias:
                grad_bias = torch.zeros_like(bias, dtype=torch.float32).index_add_(0, ids.flatten(), grad.flatten())
                grad_bias = grad_bias.to(bias.dtype)
        return (
            grad_hidden.to(hidden.dtype) if wants_hidden else None,
            grad_weight.to(weight.dtype) if grad_weight is not None else None,
            grad_bias,
            None,
        )


def _row_tiles(ids: torch.Tensor, width: int) -> Iterator[slice]:
    """Slices of rows such that a `(n, K, H)` tensor stays within `ROW_TILE` elements."""
    size = max(1, ROW_TILE // max(1, ids.shape[1] * width))
    for start in range(0, ids.shape[0], size):
        yield slice(start, start + size)
