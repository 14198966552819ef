"""The forwards of student and teacher, extended: where hidden states are caught and heads are applied.

One backbone pass of the student serves everything: TRL's log-probabilities and entropy, where they are wanted, and
what an estimator measures. It happens inside the (re-)patched `model.forward`, where DDP, ZeRO-3 and FSDP expect
parameters to be used. The projections are in `heads.py`; what is done with what was measured is left to the trainer.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedModel

from ._compat import FusedCausalLMOutput
from .heads import LMHead
from .signals import HiddenStates, Judgement, Rollouts


@dataclass
class DistilledOutput(FusedCausalLMOutput):
    """
    Output of a student whose forward was given `rollouts` and a teacher's `signal`.

    Attributes:
        measured (`list` of `dict[str, torch.Tensor]`): what the estimator measured against each judgement, of shape
            `(B, C)` or `(B, C, K)`, 0 where `Judgement.mask` is. Only the student receives a gradient. TRL's own
            fields are filled where log-probabilities were asked for, and `None` otherwise.
    """

    measured: list[dict[str, torch.Tensor]] | None = None


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


def add_student_forward(model: nn.Module, fp32_head: bool = False) -> None:
    """
    Teach a student's forward to answer with what an estimator measures against the judgements of teachers.

    `model(input_ids, attention_mask, rollouts=..., judgements=[...], measure=...)` returns a [`DistilledOutput`];
    `measure` is an estimator's, see [`~trl_distill.estimators.Estimator`]. With TRL's
    `fused_lm_head=True` (and `labels`) it also carries what TRL's forward computes, from the same backbone pass;
    without, no log-probabilities are computed. With `rollouts` alone it answers as a teacher would, with
    [`HiddenStates`]; without, the model behaves as before.

    Args:
        model: the student, on top of TRL's fused LM head; its forward is extended in place.
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
        judgements: list[Judgement] | None = None,
        measure: Callable[..., dict[str, torch.Tensor]] | None = None,
        fused_lm_head: bool = False,
        **kwargs: Any,
    ) -> Any:
        if rollouts is None:
            return fused_forward(self, *args, fused_lm_head=fused_lm_head, **kwargs)
        if judgements is None or measure is None:
            output = self.base_model(*args, use_cache=False, **kwargs)
            return HiddenStates(_judged(output.last_hidden_state, rollouts.mask), LMHead(self))
        device = self.get_output_embeddings().weight.device  # of a model that is split across devices, the last
        length, log_q = rollouts.mask.shape[1], None
        if fused_lm_head:
            with last_hidden_state(self.base_model) as caught:
                fields = dict(fused_forward(self, *args, fused_lm_head=True, **kwargs))
            hidden, log_q = caught[0], fields["log_probs"][:, -length:].to(device)
        else:
            fields = {}
            hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        sampled = rollouts.input_ids[:, -length:].to(device)
        context: Any = torch.autocast(hidden.device.type, enabled=False) if fp32_head else nullcontext()
        measured = []
        for judgement in judgements:
            mask, signal, states = judgement.mask.to(device), judgement.signal, _judged(hidden, judgement.mask)
            if fp32_head:
                states, signal = states.float(), signal.float()
            with ExitStack() as stack:
                stack.enter_context(context)
                head = stack.enter_context(LMHead(self).whole())
                if isinstance(signal, HiddenStates):
                    signal = replace(signal, head=stack.enter_context(signal.head.whole()))
                else:
                    signal = signal.map(lambda tensor: tensor.to(device))
                found = measure(states, head, signal, sampled[mask], None if log_q is None else log_q[mask])
            measured.append({name: _scatter(values, mask) for name, values in found.items()})
        return DistilledOutput(**fields, measured=measured)

    base.forward = types.MethodType(forward, base)


class JudgedModel:
    """
    Calls the student with what teachers said added, once, and remembers the output.

    TRL's loss only ever calls its `model`, so this gives it its log-probabilities and us the divergence of the same
    forward.
    """

    def __init__(self, model: nn.Module, rollouts: Rollouts, judgements: list[Judgement], measure: Callable[..., Any]):
        self._model = functools.partial(model, rollouts=rollouts, judgements=judgements, measure=measure)
        self._output: DistilledOutput | None = None

    def __call__(self, **inputs: Any) -> DistilledOutput:
        if self._output is not None:
            raise RuntimeError("TRL called the student twice for one micro-batch; the divergence would be ambiguous.")
        self._output = self._model(**inputs)
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
