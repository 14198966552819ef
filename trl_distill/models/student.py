"""The forwards of student and teacher, extended: where hidden states are caught and heads are applied.

One backbone pass of the student serves everything: TRL's log-probabilities and entropy, where they are wanted, and
what an estimator measures. It happens inside the (re-)patched `model.forward`, where DDP, ZeRO-3 and FSDP expect
parameters to be used. The projections are in `heads.py`; what is done with what was measured is left to the trainer.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .._trl import FusedCausalLMOutput
from ..estimators.base import Estimator
from ..heads.comparison import compared
from ..heads.fused import ExpectedSlopes
from ..heads.lm_head import LMHead
from ..heads.projections import log_probs_of
from ..rollouts import Rollouts
from ..signals import HiddenStates, TeacherScore
from .hidden_states import _judged, _last_hidden, _scatter, _unbound_forward, last_hidden_state
from .properties import unwrap_adapter


@dataclass
class DistilledOutput(FusedCausalLMOutput):
    """
    Output of a student whose forward was given `rollouts` and a teacher's `signal`.

    Attributes:
        measured (`list` of `dict[str, torch.Tensor]`): what the estimator measured against each judgement, of shape
            `(B, C)` or `(B, C, K)`, 0 where `TeacherScore.mask` is. Only the student receives a gradient. TRL's own
            fields are filled where log-probabilities were asked for, and `None` otherwise.
        looked (`list` of `torch.Tensor`): how both models differ at a few of the tokens, see
            [`~trl_distill.heads.comparison.comparison`]; of judgements with hidden states.
    """

    measured: list[dict[str, torch.Tensor]] | None = None
    looked: list[torch.Tensor] | None = None


@dataclass(frozen=True)
class ForwardPlan:
    """
    What a student's forward is asked to do with the judgements.

    Attributes:
        estimator ([`~trl_distill.estimators.base.Estimator`]): what is measured against each judgement.
        log_probs (`str`): where log-probabilities come from, if they are wanted: "trl", from TRL's forward; "here", of
            the judged tokens alone; "shared", from the logits of the one judgement, which is of all tokens.
        temperature (`float`): of sampling, for "here".
        policy_slope (`torch.Tensor` of shape `(B, C)`, *optional*): derivative of the policy loss by each token's
            log-probability, as far as foreseen, for "shared".
    """

    estimator: Estimator
    log_probs: str = "trl"
    temperature: float = 1.0
    policy_slope: torch.Tensor | None = None


def add_student_forward(model: nn.Module, fp32_head: bool = False) -> None:
    """
    Teach a student's forward to answer with what an estimator measures against the judgements of teachers.

    `model(input_ids, attention_mask, rollouts=..., judgements=[...], asked=...)` returns a [`DistilledOutput`]. With
    TRL's `fused_lm_head=True` (and `labels`) it also carries log-probabilities and entropy, from the same backbone
    pass; without, none are computed. With `rollouts` alone it answers as a teacher would, with [`HiddenStates`];
    without, the model behaves as before.

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
        judgements: list[TeacherScore] | None = None,
        asked: ForwardPlan | None = None,
        fused_lm_head: bool = False,
        **kwargs: Any,
    ) -> Any:
        if rollouts is None:
            return fused_forward(self, *args, fused_lm_head=fused_lm_head, **kwargs)
        if judgements is None or asked is None:
            return HiddenStates(_judged(_last_hidden(self, *args, **kwargs), rollouts.mask), LMHead(self))
        device = self.get_output_embeddings().weight.device  # of a model that is split across devices, the last
        length, fields = rollouts.mask.shape[1], {}
        if fused_lm_head and asked.log_probs == "trl":
            with last_hidden_state(self.base_model) as caught:
                fields = dict(fused_forward(self, *args, fused_lm_head=True, **kwargs))
            if not caught:
                raise ValueError(
                    f"{type(self).__name__} did not call its backbone in TRL's forward, so its hidden states are not "
                    "known. Leave out what needs TRL's log-probabilities: `cast_lm_head_to_fp32`, an entropy bonus."
                )
            hidden = caught[0]
        else:
            kwargs.pop("labels", None)
            hidden = _last_hidden(self, *args, **kwargs)
        sampled = rollouts.input_ids[:, -length:].to(device)
        in_fp32: Any = torch.autocast(hidden.device.type, enabled=False) if fp32_head else nullcontext()
        measured, looked = [], []
        with in_fp32, LMHead(self).gathered() as head:
            if fused_lm_head and asked.log_probs == "here":
                states = _judged(hidden, rollouts.mask)
                found = log_probs_of(
                    *(states.float() if fp32_head else states, head, sampled[rollouts.mask.to(device)]),
                    *(head.vocab_size, asked.temperature, True),
                )
                fields = _as_trls(hidden, rollouts.mask, *found)
            log_q = fields["log_probs"][:, -length:].to(device) if fields else None
            for judgement in judgements:
                mask, states = judgement.mask.to(device), _judged(hidden, judgement.mask)
                signal = judgement.signal
                if fp32_head:
                    states, signal = states.float(), signal.float()
                with signal_on(signal, device) as signal:
                    found = asked.estimator.measure(
                        *(states, head, signal, sampled[mask], None if log_q is None else log_q[mask]),
                        slopes=_slopes(judgement, asked, mask),
                    )
                    if "looked" in found:
                        looked.append(found.pop("looked"))
                    elif isinstance(signal, HiddenStates):
                        how = (asked.estimator.temperature, sampled[mask], asked.estimator.stops)
                        looked.append(compared(states.detach(), head, signal, *how))
                if "own_log_q" in found:
                    fields = _as_trls(hidden, judgement.mask, found.pop("own_log_q"), found["entropy"])
                measured.append({name: _scatter(values, mask) for name, values in found.items()})
        return DistilledOutput(**fields, measured=measured, looked=looked)

    base.forward = types.MethodType(forward, base)


@contextmanager
def signal_on(signal: Any, device: torch.device) -> Iterator[Any]:
    """A signal where the student's head is, with the teacher's head whole."""
    if not isinstance(signal, HiddenStates):
        yield signal.map(lambda tensor: tensor.to(device))
        return
    with signal.head.gathered() as head:
        yield replace(signal, head=head)


def _slopes(judgement: TeacherScore, asked: ForwardPlan, mask: torch.Tensor) -> ExpectedSlopes | None:
    """What is known beforehand of the gradients of one judgement's tokens."""
    if judgement.slope is None:
        return None
    of_policy = asked.policy_slope if asked.log_probs == "shared" else None
    return ExpectedSlopes(
        judgement.slope.to(mask.device)[mask], None if of_policy is None else of_policy.to(mask.device)[mask]
    )


def _as_trls(
    hidden: torch.Tensor, mask: torch.Tensor, log_probs: torch.Tensor, entropy: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Log-probabilities and entropy of judged tokens, `(N,)`, as TRL gives them: `(B, T - 1)`, 0 elsewhere."""
    before = hidden.shape[1] - 1 - mask.shape[1]
    found = {"log_probs": log_probs, "entropy": entropy}
    return {name: nn.functional.pad(_scatter(values, mask), (before, 0)) for name, values in found.items()}


class RecordedStudent:
    """
    Calls the student with what teachers said added, once, and remembers the output.

    TRL's loss only ever calls its `model`, so this gives it its log-probabilities and us the divergence of the same
    forward.
    """

    def __init__(self, model: nn.Module, rollouts: Rollouts, judgements: list[TeacherScore], asked: ForwardPlan):
        self._model = functools.partial(model, rollouts=rollouts, judgements=judgements, asked=asked)
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
