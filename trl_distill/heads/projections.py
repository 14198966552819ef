"""Projections by an LM head: hidden states in, values per token out, never a (B, T, V) tensor.

Log-probabilities are computed by TRL's kernels, logits of a few ids and top-k ids here; all in tiles over tokens and
vocabulary. The exact divergence is in `fused.py`, or in TRL's kernel if it runs in Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .._trl import ChunkedDivergenceFunction, ChunkedLogProbFunction, gathered_head
from ..signals import HiddenStates
from .lm_head import LMHead, check_same_device


# Tile sizes of the projections here: tokens, ids, and elements of a head's gathered rows
TOKEN_TILE, VOCAB_TILE, ROW_TILE = 1024, 32768, 2**24


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


def log_probs_of(
    hidden: torch.Tensor, head: LMHead, ids: torch.Tensor, vocab_size: int, temperature: float, entropy: bool = False
) -> Any:
    """
    Log-probability of one id at each position, over the first `vocab_size` ids: `(N,)`, fp32, with gradient.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`).
        head ([`LMHead`]): of the same model.
        ids (`torch.Tensor` of shape `(N,)`): one id per position.
        vocab_size (`int`): a larger vocabulary is truncated to it and renormalised.
        temperature (`float`): softmax temperature.
        entropy (`bool`): also return the entropy at each position `(N,)`, in nats, as the second of a pair.
    """
    weight, bias = head.parameters()
    with gathered_head(weight, bias):
        if vocab_size < head.vocab_size:  # else the parameter itself, which the kernel gathers again in its backward
            weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
        found = ChunkedLogProbFunction.apply(
            *(hidden.to(weight.device), weight, bias, ids.to(weight.device), temperature, VOCAB_TILE),
            *(head.softcap, head.logit_scale, ("entropy",) if entropy else ()),
        )
    return found[:2] if entropy else found[0]


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
        head ([`LMHead`]): of the same model.
        ids (`torch.Tensor` of shape `(N, K)`): K ids per position.
        temperature (`float`): divides the logits.
    """
    weight, bias = head.parameters()
    logits = head.logit_scale * _RowLogits.apply(hidden.to(weight.device), weight, bias, ids.to(weight.device))
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits / temperature


class _RowLogits(torch.autograd.Function):
    """`h · W[ids] + b[ids]` for `(N, H)` and `(N, K)`, without an `(N, K, H)` tensor; sums are in fp32."""

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
            logits = logits.to(ctx.dtype)  # rounded like TRL's kernel, whose log Z is subtracted from them
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
    """Slices of rows for which an `(n, K, H)` tensor has at most about `ROW_TILE` elements."""
    size = max(1, ROW_TILE // max(1, ids.shape[1] * width))
    for start in range(0, ids.shape[0], size):
        yield slice(start, start + size)
