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
from .packing import is_exact, packed_hidden, packs
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


def last_hidden(model: PreTrainedModel, *args: Any, **kwargs: Any) -> torch.Tensor:
    """
    Last hidden state `(B, T, H)` of the backbone; 0 on padding where rows were packed into one sequence.
    """
    given = {name: value for name, value in kwargs.items() if value is not None}  # PEFT hands `None`s on
    ids: Any = given.get("input_ids")
    attended: Any = given.get("attention_mask")
    if not args and set(given) == {"input_ids", "attention_mask"} and packs(model) and is_exact(model, ids, attended):
        return packed_hidden(model.base_model, ids, attended)
    return model.base_model(*args, use_cache=False, **kwargs).last_hidden_state


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
