"""A model's last hidden states: forwards that end before the LM head, rows packed where attention allows it."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..heads.lm_head import LMHead
from ..rollouts import Rollouts
from ..signals import HiddenStates
from .properties import unwrap_adapter


def add_teacher_forward(model: nn.Module) -> None:
    """
    Give a model a forward that ends before its LM head: `model(rollouts=rollouts)` returns [`HiddenStates`].

    Called without `rollouts` the model behaves as before.
    """
    base = unwrap_adapter(model)
    LMHead(base)  # raises where there is none to use
    original_forward = unbound_forward(base)

    @functools.wraps(original_forward)  # keeps the signature, which `generate` inspects
    def forward(self: PreTrainedModel, *args: Any, rollouts: Rollouts | None = None, **kwargs: Any) -> Any:
        if rollouts is None:
            return original_forward(self, *args, **kwargs)
        hidden = last_hidden(self, *args, **kwargs)
        # A plain dataclass on purpose: accelerate would cast the tensors of a `ModelOutput` to fp32
        return HiddenStates(judged_states(hidden, rollouts.mask), LMHead(self))

    base.forward = types.MethodType(forward, base)


def unbound_forward(model: nn.Module) -> Callable[..., Any]:
    """`model.forward` as a function of the model, so that a deep copy computes with its own weights."""
    forward = model.forward
    if hasattr(forward, "__func__"):
        return forward.__func__
    # a device map's hook is a partial of its own, with the module inside
    return functools.wraps(forward)(lambda _self, *args, **kwargs: forward(*args, **kwargs))


def packs(model: PreTrainedModel) -> bool:
    """Whether a model's attention takes rows of any length one after another, without a mask."""
    return str(model.config._attn_implementation).startswith("flash_attention")


def last_hidden(model: PreTrainedModel, *args: Any, **kwargs: Any) -> torch.Tensor:
    """
    Last hidden state `(B, T, H)` of the backbone; 0 on padding where rows were packed.

    Packed, all rows are one sequence without padding; positions that begin again tell transformers where each begins.
    """
    ids, attended = kwargs.get("input_ids"), kwargs.get("attention_mask")
    if args or ids is None or attended is None or set(kwargs) - {"input_ids", "attention_mask"} or not packs(model):
        return model.base_model(*args, use_cache=False, **kwargs).last_hidden_state
    kept = attended.bool()
    positions = (attended.cumsum(1) - 1)[kept][None]
    packed = model.base_model(input_ids=ids[kept][None], position_ids=positions, use_cache=False).last_hidden_state[0]
    spread = packed.new_zeros(*ids.shape, packed.shape[-1])
    return spread.masked_scatter(kept[..., None], packed)


def judged_states(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Hidden states `(B, T, H)` at the positions that predict the judged ones of the last C tokens: `(N, H)`."""
    completion_length = mask.shape[1]
    # counted from the right: prompts may differ in length between teacher and student, or hold virtual tokens
    return hidden[:, -completion_length - 1 : -1][mask.to(hidden.device)]


def scatter(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
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
