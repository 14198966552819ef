"""A model's last hidden states: a forward pass that ends before the LM head, with packed rows where possible."""

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
from ..places import places, take
from ..rollouts import Rollouts
from ..signals import HiddenStates
from . import shared_prompts
from .packing import is_exact, packed_hidden, packs, pays
from .properties import backbone_of, unwrap_adapter
from .shared_prompts import Prompts


def add_teacher_forward(model: nn.Module) -> None:
    """
    Add a forward pass that ends before the LM head: `model(..., rollouts=rollouts)` returns [`HiddenStates`].

    With `share_prompts=n` a prompt that several rows share is read once, and n completions at a time. Without
    `rollouts` the model behaves as before. Raises `ValueError` if it has no usable LM head.
    """
    base = unwrap_adapter(model)
    LMHead(base)  # raises if there is none that can be used
    original_forward = unbound_forward(base)

    @functools.wraps(original_forward)  # keeps the signature, which `generate` inspects
    def forward(
        self: PreTrainedModel,
        *args: Any,
        rollouts: Rollouts | None = None,
        share_prompts: int | None = None,
        **kwargs: Any,
    ) -> Any:
        if rollouts is None:
            return original_forward(self, *args, **kwargs)
        return scored(self, rollouts, share_prompts, *args, **kwargs)

    base.forward = types.MethodType(forward, base)


def scored(
    model: PreTrainedModel, rollouts: Rollouts, share_prompts: int | None, *args: Any, **kwargs: Any
) -> HiddenStates:
    """
    The signal of a model for rollouts.

    Args:
        model: the model.
        rollouts ([`~trl_distill.Rollouts`]): what is judged.
        share_prompts (`int`, *optional*): read each distinct prompt once, where the model allows it and it saves
            enough, and this many completions at a time. `None` reads whole rows.
        args, kwargs: of the model's forward pass.
    """
    given = {name: value for name, value in kwargs.items() if value is not None}
    states = None
    if share_prompts is not None and not args and set(given) - {"position_ids"} == {"input_ids", "attention_mask"}:
        states = _sharing_prompts(model, rollouts, given, share_prompts)
    if states is None:
        states = judged_states(last_hidden(model, *args, **kwargs), rollouts.mask)
    # a plain dataclass, because accelerate would cast the tensors of a `ModelOutput` to fp32
    return HiddenStates(states, LMHead(model))


def _sharing_prompts(
    model: PreTrainedModel, rollouts: Rollouts, inputs: dict[str, torch.Tensor], at_once: int
) -> torch.Tensor | None:
    """States `(N, H)` of rows whose prompts are read once; `None` if the model, or these rows, had better not."""
    if model.training or torch.is_grad_enabled() or not shared_prompts.can_share(model):
        return None
    columns = rollouts.input_ids.shape[1]
    length, distinct = columns - rollouts.mask.shape[1], rollouts.distinct_prompts
    if distinct is not None and not shared_prompts.pays(len(rollouts), distinct, length, columns):
        return None
    prompts = Prompts.among(inputs["input_ids"], inputs["attention_mask"], rollouts.mask.shape[1])
    if not prompts.pay(columns):
        return None
    if shared_prompts.is_exact(model, inputs, prompts):
        states = shared_prompts.completion_states(backbone_of(model), inputs, prompts, at_once)
        return None if states is None else take(states, rollouts.mask)
    pieces = [  # the rows came together for their prompt's sake; now they are too many for one pass
        judged_states(last_hidden(model, **{name: value[part] for name, value in inputs.items()}), rollouts.mask[part])
        for part in torch.arange(len(rollouts), device=rollouts.mask.device).split(at_once)
    ]
    return torch.cat(pieces)


def unbound_forward(model: nn.Module) -> Callable[..., Any]:
    """`model.forward` as a function of the model, so that a deep copy computes with its own weights."""
    forward = model.forward
    if hasattr(forward, "__func__"):
        return forward.__func__
    # the hook of a device map is a partial that contains the module
    return functools.wraps(forward)(lambda _self, *args, **kwargs: forward(*args, **kwargs))


def last_hidden(model: PreTrainedModel, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Last hidden state `(B, T, H)` of the backbone; 0 on padding if rows were packed into one sequence."""
    given = {name: value for name, value in kwargs.items() if value is not None}  # PEFT passes `None`s
    ids: Any = given.get("input_ids")
    attended: Any = given.get("attention_mask")
    plain = not args and set(given) == {"input_ids", "attention_mask"}
    if plain and packs(model) and is_exact(model, ids, attended) and pays(model, attended):
        return packed_hidden(backbone_of(model), ids, attended)
    return backbone_of(model)(*args, use_cache=False, **kwargs).last_hidden_state


def judged_states(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """From hidden states `(B, T, H)` those that predict the tokens marked by `mask` `(B, C)`: `(N, H)`."""
    columns = mask.shape[1]
    at = places(mask).at.to(hidden.device)
    # counted from the right, since the teacher's prompts may have another length, or the student's virtual tokens
    before = hidden.shape[1] - columns
    return hidden.flatten(0, 1).index_select(0, at + (at // columns if columns else 0) * before + before - 1)


def scatter(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`(N, ...)` back to `(B, C, ...)`, 0 elsewhere; it stays connected to the graph even if N is 0."""
    mask = mask.to(values.device).view(*mask.shape, *[1] * (values.dim() - 1)).expand(*mask.shape, *values.shape[1:])
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


@contextmanager
def last_hidden_state(backbone: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Capture the last hidden state of the call of `backbone` in this context."""
    captured: list[torch.Tensor] = []
    hook = backbone.register_forward_hook(lambda _module, _args, output: captured.append(output.last_hidden_state))
    try:
        yield captured
    finally:
        hook.remove()
