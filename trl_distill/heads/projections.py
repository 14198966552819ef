"""LM heads: hidden states of student and teacher in, numbers per token out, never a (B, T, V) tensor.

Log-probabilities run in TRL's kernels, the logits of a few ids and the likeliest ids here; all in tiles over tokens and
vocabulary. The exact divergence is in `fused.py`, and in TRL's kernel where there is Triton. Where hidden states come
from is `forwards.py`'s business, what the numbers mean that of `estimators.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ._compat import ChunkedDivergenceFunction, ChunkedLogProbFunction, gathered_head
from .objective import as_one_class, summands
from .signals import HiddenStates


# Metrics look at whole logits of every so many-th token, at most so many in a micro-step, and at so many likeliest ids
LOOK_EVERY, LOOK_MOST, TOP = 61, 128, 16
COMPARED = ("reverse_kl", "forward_kl", "teacher_entropy", "top1_agreement", "top_overlap")

# Tiles of what is projected here rather than in TRL's kernel: tokens, ids, and elements of gathered rows of a head
TOKEN_TILE, VOCAB_TILE, ROW_TILE = 1024, 32768, 2**24


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
        logits = (weight @ hidden.flatten(0, -2).T).T  # for few rows many times as fast on CPUs as the other way round
        logits = logits.unflatten(0, hidden.shape[:-1])
        logits = self.logit_scale * (logits if bias is None else logits + bias.to(logits.dtype))
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


def kernel_divergence(
    student_hidden: torch.Tensor,  # (N, H_s)
    student_head: LMHead,
    signal: HiddenStates,  # (N, H_t)
    kernel_beta: float,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    KL either way or JSD by TRL's kernel, which runs in Triton where there is one.

    Where the vocabularies differ in size (padding rows), both distributions are renormalised over the ids that both
    have. Hidden states may be in any dtype; under autocast they are projected in its dtype, accumulated in fp32.

    Args:
        student_hidden: hidden states of the N judged positions.
        student_head: the student's output layer.
        signal: the teacher's hidden states at the same N positions, and its output layer.
        kernel_beta: as the kernel counts: 0 the forward KL, 1 the reverse KL, between them the JSD.
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
    if shared < student_head.vocab_size:  # the kernel itself cuts a teacher that is larger
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


def check_same_device(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Both heads project the same tokens; raises `ValueError` where they lie apart."""
    if student.device != teacher.device:
        raise ValueError(
            f"The student's LM head is on {student.device}, the teacher's on {teacher.device}. Both project the same "
            "tokens, so place them on one device in their `device_map`."
        )


def log_probs_of(
    hidden: torch.Tensor, head: LMHead, ids: torch.Tensor, vocab_size: int, temperature: float, entropy: bool = False
) -> Any:
    """
    Log-probability of one id at each position, over the first `vocab_size` ids: `(N,)`, fp32, with gradient.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`).
        head ([`LMHead`]): the same model's.
        ids (`torch.Tensor` of shape `(N,)`).
        vocab_size (`int`): a larger vocabulary is cut to it, and renormalised.
        temperature (`float`): softmax temperature.
        entropy (`bool`): return the entropy of each position, too: a pair of tensors.
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


def where_to_look(sampled: torch.Tensor) -> slice:
    """
    Which of the judged tokens are looked at: every so many-th, from one on that the tokens themselves draw.

    The step is odd, or completions that are cut at one length would show the same places; with a fixed start, batches
    of few tokens would show little but first tokens. One is looked at wherever there is one.

    Args:
        sampled (`torch.Tensor` of shape `(N,)`): their ids.
    """
    step = max(LOOK_EVERY, -(-len(sampled) // LOOK_MOST)) | 1
    start = int(sampled.sum()) % min(step, len(sampled)) if len(sampled) else 0
    return slice(start, None, step)


@torch.no_grad()
def differences(log_q: torch.Tensor, log_p: torch.Tensor, stops: Sequence[int] = ()) -> torch.Tensor:
    """
    How student and teacher differ at a few tokens, for the log.

    Args:
        log_q, log_p (`torch.Tensor` of shape `(n, V)`): log-probabilities of student and teacher.
        stops (`Sequence[int]`): ids that count as one, but for the entropy.

    Returns:
        `torch.Tensor` of shape `(len(COMPARED), n)`, fp32, in the order of `COMPARED`: both KLs and the teacher's
        entropy in nats, agreement on the likeliest id (0 or 1), and the share of both models' `TOP` likeliest ids in
        common.
    """
    kls = [summands(name, log_q, log_p).sum(-1) for name in ("reverse_kl", "forward_kl")]
    ranked = [log_q, log_p]
    if stops:
        ours, theirs = (x[:, list(stops)] for x in ranked)
        kls = [as_one_class(kl, ours, theirs, name) for kl, name in zip(kls, ("reverse_kl", "forward_kl"), strict=True)]
        ranked = [x.index_fill(1, torch.tensor(stops, device=x.device), -torch.inf) for x in ranked]
        for x, merged in zip(ranked, (ours, theirs), strict=True):
            x[:, stops[0]] = merged.logsumexp(-1)
    likeliest = [x.topk(min(TOP, x.shape[1])).indices for x in ranked]
    common = (likeliest[0][:, :, None] == likeliest[1][:, None]).any(-1)
    return torch.stack(
        [
            *kls,
            -(log_p.exp() * log_p).sum(-1),
            (likeliest[0][:, 0] == likeliest[1][:, 0]).float(),
            common.float().mean(-1),
        ]
    )


@torch.no_grad()
def compared(
    hidden: torch.Tensor,
    head: LMHead,
    signal: HiddenStates,
    temperature: float,
    sampled: torch.Tensor,
    stops: Sequence[int] = (),
) -> torch.Tensor:
    """
    [`differences`] where no logits are at hand: [`where_to_look`] says at which tokens.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`): the student's.
        head ([`LMHead`]): the student's.
        signal ([`~trl_distill.signals.HiddenStates`]): the teacher's, at the same tokens.
        temperature (`float`): softmax temperature of both.
        sampled (`torch.Tensor` of shape `(N,)`): ids of the tokens.
        stops (`Sequence[int]`): ids that count as one.
    """
    chosen = where_to_look(sampled)
    shared = min(head.vocab_size, signal.head.vocab_size)
    log_q, log_p = (
        (which.logits(states[chosen].to(which.parameters()[0].device)).float()[:, :shared] / temperature).log_softmax(
            -1
        )
        for which, states in ((head, hidden), (signal.head, signal.hidden))
    )
    return differences(log_q, log_p.to(log_q.device), stops)
