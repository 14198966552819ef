"""The fused LM head: hidden states of student and teacher in, per-token divergence out, never a (B, T, V) tensor.

One backbone pass of the student serves everything: TRL's log-probabilities and entropy, where the policy loss wants
them, and the divergence. The projection runs in TRL's kernel, in tiles over tokens and vocabulary. It happens inside
the (re-)patched `model.forward`, where DDP, ZeRO-3 and FSDP expect parameters to be used. What is done with the
divergence is left to the trainer.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ._compat import ChunkedDivergenceFunction, ChunkedLogProbFunction, FusedCausalLMOutput, gathered_head
from .signals import HiddenStates, Rollouts


# The value of the kernel's `beta` that selects each divergence
KERNEL_BETA = {"reverse_kl": 1.0}

# Tiles of what is projected here rather than in TRL's kernel: tokens, ids, and elements of gathered rows of a head
TOKEN_TILE, VOCAB_TILE, ROW_TILE = 1024, 32768, 2**24


@dataclass
class DistilledOutput(FusedCausalLMOutput):
    """
    Output of a student whose forward was given `rollouts` and a teacher's `signal`.

    Attributes:
        measured (`dict[str, torch.Tensor]`): what the estimator measured, of shape `(B, C)` or `(B, C, K)`, 0 where
            `Rollouts.mask` is. Only the student receives a gradient. TRL's own fields are filled where
            log-probabilities were asked for, and `None` otherwise.
    """

    measured: dict[str, torch.Tensor] | None = None


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

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """All logits `(..., V)`, for a few positions only: what the kernel is taken to compute."""
        weight, bias = self.parameters()
        logits = self.logit_scale * nn.functional.linear(hidden, weight, bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Divergence between the next-token distributions of student and teacher over the whole shared vocabulary.

    Where the vocabularies differ in size (padding rows), both distributions are renormalised over the ids that both
    have. Hidden states may be in any dtype; under autocast they are projected in its dtype, accumulated in fp32.

    Args:
        student_hidden: hidden states of the N judged positions.
        student_head: the student's output layer.
        signal: the teacher's hidden states at the same N positions, and its output layer.
        divergence: a key of `KERNEL_BETA`.
        temperature: softmax temperature of both.

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
    return ChunkedDivergenceFunction.apply(
        student_hidden.to(weight.device),
        weight,
        bias,
        teacher_hidden.to(weight.device),
        teacher_weight,
        teacher_bias,
        KERNEL_BETA[divergence],
        temperature,
        student_head.logit_scale,
        student_head.softcap,
        teacher_head.logit_scale,
        teacher_head.softcap,
    )


@torch.no_grad()
def log_probs_of(
    hidden: torch.Tensor, head: LMHead, ids: torch.Tensor, vocab_size: int, temperature: float
) -> torch.Tensor:
    """
    Log-probability of one id at each position, over the first `vocab_size` ids: `(N,)`, fp32, without gradient.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`).
        head ([`LMHead`]): the same model's.
        ids (`torch.Tensor` of shape `(N,)`).
        vocab_size (`int`): a larger vocabulary is cut to it, and renormalised.
        temperature (`float`): softmax temperature.
    """
    weight, bias = head.parameters()
    with gathered_head(weight, bias):
        weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
        return ChunkedLogProbFunction.apply(
            *(hidden.to(weight.device), weight, bias, ids, temperature, VOCAB_TILE, head.softcap, head.logit_scale, ())
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
    logits = head.logit_scale * _RowLogits.apply(hidden.to(weight.device), weight, bias, ids)
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
            return logits if bias is None else logits + bias[ids].float()

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


def add_teacher_forward(model: nn.Module) -> None:
    """
    Give a model a forward that ends before its LM head: `model(rollouts=rollouts)` returns [`HiddenStates`].

    Called without `rollouts` the model behaves as before.
    """
    base = unwrap_adapter(model)
    LMHead(base)  # raises where there is none to use
    original_forward = _unbound_forward(base)

    @functools.wraps(original_forward)  # keeps the signature, which `generate` inspects
    def forward(self: PreTrainedModel, *args: Any, rollouts: Rollouts | None = None, **kwargs: Any) -> Any:
        if rollouts is None:
            return original_forward(self, *args, **kwargs)
        output = self.base_model(*args, use_cache=False, **kwargs)
        # A plain dataclass on purpose: accelerate would cast the tensors of a `ModelOutput` to fp32
        return HiddenStates(_judged(output.last_hidden_state, rollouts.mask), LMHead(self))

    base.forward = types.MethodType(forward, base)


def add_student_forward(
    model: nn.Module, measure: Callable[..., dict[str, torch.Tensor]], fp32_head: bool = False
) -> None:
    """
    Teach a student's forward to answer with what an estimator measures against a teacher's signal.

    `model(input_ids, attention_mask, rollouts=..., signal=...)` returns a [`DistilledOutput`]. With TRL's
    `fused_lm_head=True` (and `labels`) it also carries what TRL's forward computes, from the same backbone pass;
    without, no log-probabilities are computed. Called without `rollouts` the model behaves as before.

    Args:
        model: the student, on top of TRL's fused LM head; its forward is extended in place.
        measure: an estimator's `measure`, see [`~trl_distill.estimators.Estimator`].
        fp32_head (`bool`): project in fp32, outside autocast (TRL's `cast_lm_head_to_fp32`).
    """
    base = unwrap_adapter(model)
    LMHead(base)
    fused_forward = _unbound_forward(base)

    @functools.wraps(fused_forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        rollouts: Rollouts | None = None,
        signal: HiddenStates | None = None,
        fused_lm_head: bool = False,
        **kwargs: Any,
    ) -> Any:
        if rollouts is None or signal is None:
            return fused_forward(self, *args, fused_lm_head=fused_lm_head, **kwargs)
        mask, log_q = rollouts.mask, None
        if fused_lm_head:
            with last_hidden_state(self.base_model) as caught:
                fields = dict(fused_forward(self, *args, fused_lm_head=True, **kwargs))
            hidden = caught[0]
            log_q = fields["log_probs"][:, -mask.shape[1] :][mask]
        else:
            fields = {}
            hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        hidden = _judged(hidden, mask)
        context: Any = nullcontext()
        if fp32_head:
            hidden, signal = hidden.float(), HiddenStates(signal.hidden.float(), signal.head)
            context = torch.autocast(hidden.device.type, enabled=False)
        sampled = rollouts.input_ids[:, -mask.shape[1] :][mask]
        with context:
            measured = measure(hidden, LMHead(self), signal, sampled, log_q)
        return DistilledOutput(**fields, measured={name: _scatter(x, mask) for name, x in measured.items()})

    base.forward = types.MethodType(forward, base)


class JudgedModel:
    """
    Calls the student with a teacher's signal added, once, and remembers the output.

    TRL's loss only ever calls its `model`, so this gives it its log-probabilities and us the divergence of the same
    forward.
    """

    def __init__(self, model: nn.Module, rollouts: Rollouts, signal: HiddenStates):
        self._model, self._rollouts, self._signal = model, rollouts, signal
        self._output: DistilledOutput | None = None

    def __call__(self, **inputs: Any) -> DistilledOutput:
        if self._output is not None:
            raise RuntimeError("TRL called the student twice for one micro-batch; the divergence would be ambiguous.")
        self._output = self._model(**inputs, rollouts=self._rollouts, signal=self._signal)
        return self._output

    @property
    def output(self) -> Any:
        if self._output is None:
            raise RuntimeError("TRL's policy loss did not call the student, so there is no divergence to add.")
        return self._output


def _unbound_forward(model: nn.Module) -> Callable[..., Any]:
    """`model.forward` as a function of the model, so that a deep copy computes with its own weights."""
    forward = model.forward
    if hasattr(forward, "__func__"):
        return forward.__func__
    # a device map's hook is a partial of its own, with the module inside
    return functools.wraps(forward)(lambda _self, *args, **kwargs: forward(*args, **kwargs))


def unwrap_adapter(model: Any) -> PreTrainedModel:
    """The transformers model under a PEFT wrapper, or the model itself."""
    return model.get_base_model() if is_peft_model(model) else model


def _judged(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Hidden states `(B, T, H)` at the positions that predict the judged ones of the last C tokens: `(N, H)`."""
    completion_length = mask.shape[1]
    # counted from the right: prompts may differ in length between teacher and student, or hold virtual tokens
    return hidden[:, -completion_length - 1 : -1][mask.to(hidden.device)]


def _scatter(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`(N, ...)` back to `(B, C, ...)`, zero elsewhere; stays connected to the graph when N is 0."""
    mask = mask.to(values.device).view(*mask.shape, *[1] * (values.dim() - 1)).expand(*mask.shape, *values.shape[1:])
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


@contextmanager
def last_hidden_state(backbone: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Catch the last hidden state of the one call of `backbone` in this context."""
    caught: list[torch.Tensor] = []
    hook = backbone.register_forward_hook(lambda _module, _args, output: caught.append(output.last_hidden_state))
    try:
        yield caught
    finally:
        hook.remove()
