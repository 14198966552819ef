"""Log-probabilities of a few ids at each token, and which ids are the likeliest.

Products are in autocast's dtype with fp32 sums, and nothing is rounded after that: a KL is a small difference of large
logits, which 16 bits would lose. Like TRL's kernel, the backward pass projects again instead of keeping logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .._trl import gathered_head
from .gradients import Gradients
from .lm_head import LMHead
from .tiles import Projection, TileMemory, parts, tiles


# Tile sizes of the search for the likeliest ids: tokens and ids
TOKEN_TILE, VOCAB_TILE = 1024, 32768


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
        ids = ids.to(weight.device).clamp(max=vocab_size - 1)
        return _LogProbs.apply(hidden.to(weight.device), weight, bias, ids, head, temperature)


class _LogProbs(torch.autograd.Function):
    """See [`log_probs_of`]."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, head, temperature):
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.head, ctx.temperature = head, temperature
        ctx.save_for_backward(hidden, weight, bias, ids)
        log_probs = hidden.new_empty(ids.shape, dtype=torch.float32)
        entropy = hidden.new_empty(len(ids), dtype=torch.float32)
        with _projection(ctx, hidden, weight, bias) as project:
            for part, logits in _logits(project, hidden, ctx, None):
                log_norm = logits.logsumexp(-1, keepdim=True)  # (n, 1)
                log_probs[part] = logits.gather(1, ids[part]) - log_norm
                mass = TileMemory("mass", hidden.device).take(*logits.shape)
                torch.sub(logits, log_norm, out=mass).exp_()
                entropy[part] = log_norm[:, 0] - mass.mul_(logits).sum(-1)
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, bias, ids = ctx.saved_tensors
        grads, grad = Gradients.wanted_by(ctx.needs_input_grad), grad.float()
        with _projection(ctx, hidden, weight, bias) as project:
            grads.begin(hidden, weight)
            for part, logits in _logits(project, hidden, ctx, grads):
                log_norm = logits.logsumexp(-1, keepdim=True)
                # by logit u: Σ_k g_k (1[u = id_k] − q_u)
                derivative = TileMemory("mass", hidden.device).take(*logits.shape)
                torch.sub(logits, log_norm, out=derivative).exp_().mul_(-grad[part].sum(-1, keepdim=True))
                derivative.scatter_add_(1, ids[part], grad[part])
                project.backward_through_scale(derivative, logits, ctx.temperature)
                logits.copy_(derivative)
        return (*grads.as_given(hidden, weight, bias), None, None, None)


@contextmanager
def _projection(
    ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> Iterator[Projection]:
    with torch.autocast(hidden.device.type, enabled=False), gathered_head(weight, bias):
        yield Projection(ctx.head, weight, bias, ctx.dtype, "student")


def _logits(
    project: Projection, hidden: torch.Tensor, ctx: Any, grads: Gradients | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Tokens with their logits `(n, V)`, part by part. With `grads`, the caller overwrites logits by derivatives."""
    size = len(project.weight)
    for rows in tiles(len(hidden), size, hidden.device):
        states = hidden[rows].to(ctx.dtype)
        tile = project(states)
        for part in parts(rows, size, hidden.device):
            yield part, project.finish(tile[part.start - rows.start : part.stop - rows.start], ctx.temperature)
        if grads is not None:
            grads.add(rows, tile, states, project.weight)


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
