"""The student's extended forward pass: one pass of the backbone serves both TRL's policy loss and the divergence.

It runs inside of `model.forward`, where DDP, ZeRO-3 and FSDP expect parameters to be used. Three steps: hidden states,
log-probabilities of sampled tokens if the policy loss needs them, and the estimator's measures against each teacher.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from .._trl import FusedCausalLMOutput
from ..estimators.base import Estimator
from ..heads.comparison import comparison_from_states
from ..heads.few_ids import log_probs_of
from ..heads.fused import ExpectedSlopes
from ..heads.lm_head import LMHead
from ..places import take
from ..rollouts import Rollouts
from ..signals import HiddenStates, TeacherScore
from .hidden_states import judged_states, last_hidden, last_hidden_state, scatter, scored, unbound_forward
from .properties import backbone_of, unwrap_adapter
from .quantised import keep_differentiable


@dataclass
class DistilledOutput(FusedCausalLMOutput):
    """
    Output of the student's forward pass with `rollouts`, teachers' `scores` and a `plan`.

    TRL's own fields are set if log-probabilities were requested, else `None`.

    Attributes:
        measured (`list` of [`~trl_distill.estimators.base.TokenMeasures`]): for each teacher's score, of shape
            `(B, C)` or `(B, C, K)`, and 0 where `TeacherScore.mask` is 0. Only the student gets a gradient.
    """

    measured: list[Any] | None = None


@dataclass(frozen=True)
class ForwardPlan:
    """
    What the student's forward pass computes with teachers' scores.

    Attributes:
        estimator ([`~trl_distill.estimators.base.Estimator`]): takes the measures for each score.
        log_probs (`str`): where log-probabilities come from, if requested: "trl", TRL's forward pass; "here", a
            projection of the judged tokens alone; "shared", the logits of the divergence, if one teacher scores all
            judged tokens.
        temperature (`float`): sampling temperature, for "here".
        policy_slope (`torch.Tensor` of shape `(B, C)`, *optional*): for "shared", the expected derivative of the
            policy loss by each token's log-probability.
        divergence_slopes (`list` of `torch.Tensor` of shape `(B, C)`): derivatives of the loss by the divergence from
            each teacher; empty if unknown.
        start (`int`, *optional*): decides at which tokens the models are compared for the log.
    """

    estimator: Estimator
    log_probs: str = "trl"
    temperature: float = 1.0
    policy_slope: torch.Tensor | None = None
    divergence_slopes: list[torch.Tensor] = field(default_factory=list)
    start: int | None = None

    def slopes(self, number: int, mask: torch.Tensor) -> ExpectedSlopes | None:
        """The slopes `(N,)` for teacher `number`, at the tokens marked by `mask` `(B, C)`."""
        of_policy = self.policy_slope if self.log_probs == "shared" else None
        if not self.divergence_slopes and of_policy is None:
            return None
        return ExpectedSlopes(
            take(self.divergence_slopes[number].to(mask.device), mask) if self.divergence_slopes else None,
            None if of_policy is None else take(of_policy.to(mask.device), mask),
        )


class Uncast:
    """
    An argument of a forward pass that engines leave as it is.

    FSDP2 casts all floating-point tensors in a module's arguments to the dtype of its parameters, in dataclasses too.

    Args:
        content (`Any`): the argument.
    """

    def __init__(self, content: Any):
        self.content = content


def keep_output_dtype(accelerator: Accelerator) -> None:
    """
    Let FSDP2 return what the student's forward pass computes in fp32 as it is, instead of casting it to 16 bits.

    Call it before the student is sharded. What the layers compute keeps its dtype, which follows from their parameters.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    policy: Any = getattr(plugin, "mixed_precision_policy", None)
    if plugin is not None and hasattr(policy, "output_dtype"):  # FSDP1's policy has none
        plugin.mixed_precision_policy = replace(policy, output_dtype=None)


def add_student_forward(model: nn.Module, fp32_head: bool = False) -> None:
    """
    Extend a student's forward pass, so that it can return an estimator's measures against teachers' scores.

    `model(input_ids, attention_mask, rollouts=..., scores=..., plan=...)` returns a [`DistilledOutput`]; `scores`, a
    list, and `plan` are wrapped in [`Uncast`]. With TRL's `fused_lm_head=True` (and `labels`) the output also has
    log-probabilities and entropy, from the same backbone pass.
    With `rollouts` alone, or with `share_prompts`, it returns [`HiddenStates`], like a teacher; without `rollouts` the
    model behaves as before.

    Args:
        model: the student, after TRL has added its fused LM head; its forward is extended in place.
        fp32_head (`bool`): project in fp32, outside autocast (TRL's `cast_lm_head_to_fp32`).
    """
    base = unwrap_adapter(model)
    LMHead(base)  # raises if there is none that can be used
    keep_differentiable(model)
    fused_forward = unbound_forward(base)

    @functools.wraps(fused_forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        rollouts: Rollouts | None = None,
        scores: Uncast | None = None,
        plan: Uncast | None = None,
        share_prompts: int | None = None,
        fused_lm_head: bool = False,
        **kwargs: Any,
    ) -> Any:
        if rollouts is None:
            return fused_forward(self, *args, fused_lm_head=fused_lm_head, **kwargs)
        if scores is None or plan is None:
            return scored(self, rollouts, share_prompts, *args, **kwargs)
        how: ForwardPlan = plan.content
        if fused_lm_head and how.log_probs == "trl":
            hidden, fields = _trl_forward(fused_forward, self, *args, **kwargs)
        else:
            kwargs.pop("labels", None)
            attended = kwargs.get("attention_mask")
            if attended is not None and attended.shape == rollouts.attention_mask.shape:
                kwargs["attention_mask"] = rollouts.attention_mask  # TRL's is equal, but its places are not known
            hidden, fields = last_hidden(self, *args, **kwargs), {}
        with LMHead(self).gathered() as head:
            # FSDP2 has rounded the head itself; the teacher's is then rounded alike, or the two would differ by that
            exact = fp32_head and head.parameters()[0].dtype == torch.float32
            with torch.autocast(hidden.device.type, enabled=False) if exact else nullcontext():
                if fused_lm_head and how.log_probs == "here":
                    fields = _log_probs(hidden, head, rollouts, how.temperature, exact)
                return _measure(hidden, head, rollouts, scores.content, how, fields, exact)

    base.forward = types.MethodType(forward, base)


def _trl_forward(fused_forward: Any, model: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """TRL's forward pass with log-probabilities, and its hidden states, which TRL does not return."""
    with last_hidden_state(backbone_of(model)) as captured:
        fields = dict(fused_forward(model, *args, fused_lm_head=True, **kwargs))
    if not captured:
        raise ValueError(
            f"{type(model).__name__} did not call its backbone in TRL's forward, so its hidden states, from which the "
            "divergence is computed, are not known. Leave out what needs TRL's log-probabilities: "
            "`cast_lm_head_to_fp32`, an entropy bonus."
        )
    return captured[0], fields


def _log_probs(
    hidden: torch.Tensor, head: LMHead, rollouts: Rollouts, temperature: float, in_fp32: bool
) -> dict[str, torch.Tensor]:
    """Log-probabilities and entropy of the judged tokens alone, in TRL's form."""
    mask = rollouts.mask.to(hidden.device)
    sampled = rollouts.input_ids[:, -mask.shape[1] :].to(hidden.device)
    sampled = take(sampled, mask)
    states = judged_states(hidden, rollouts.mask)
    states = states.float() if in_fp32 else states
    log_probs, entropy = log_probs_of(states, head, sampled[:, None], head.vocab_size, temperature)
    return _as_trls(hidden, rollouts.mask, log_probs[:, 0], entropy)


def _measure(
    hidden: torch.Tensor,
    head: LMHead,
    rollouts: Rollouts,
    scores: list[TeacherScore],
    plan: ForwardPlan,
    fields: dict[str, torch.Tensor],
    in_fp32: bool,
) -> DistilledOutput:
    """The estimator's measures for each teacher's score; `fields` are TRL's outputs, set here if logits are shared."""
    device = head.parameters()[0].device  # the last device, if the model is split across several
    length = rollouts.mask.shape[1]
    sampled = rollouts.input_ids[:, -length:].to(device)
    log_q = fields["log_probs"][:, -length:].to(device) if fields else None
    measured: list[dict[str, torch.Tensor]] = []
    for number, score in enumerate(scores):
        written = take(sampled, score.mask)
        mask, states, signal = score.mask.to(device), judged_states(hidden, score.mask), score.signal
        if in_fp32:
            states, signal = states.float(), signal.float()
        with signal_on(signal, device, in_fp32) as signal:
            found = plan.estimator.measure(
                *(states, head, signal, written, None if log_q is None else take(log_q, score.mask)),
                slopes=plan.slopes(number, mask),
                start=plan.start,
            )
            if found.comparison is None and plan.estimator.profiles and isinstance(signal, HiddenStates):
                how = (plan.estimator.temperature, written, plan.estimator.stops, plan.start)
                found = replace(found, comparison=comparison_from_states(states.detach(), head, signal, *how))
        if plan.log_probs == "shared" and found.policy_log_q is not None and found.entropy is not None:
            fields = _as_trls(hidden, score.mask, found.policy_log_q, found.entropy)
        spread = replace(found, policy_log_q=None).map(functools.partial(_spread, mask=mask))
        measured.append(spread.tensors())
    return DistilledOutput(**fields, measured=measured)


def _spread(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Measures of judged tokens `(N, ...)` as `(B, C, ...)`, floating point in fp32."""
    return scatter(values.float() if values.is_floating_point() else values, mask)


@contextmanager
def signal_on(signal: Any, device: torch.device, in_fp32: bool = False) -> Iterator[Any]:
    """A signal on the device of the student's head, with the teacher's head gathered, and optionally in fp32."""
    if not isinstance(signal, HiddenStates):
        yield signal.map(lambda tensor: tensor.to(device))
        return
    with signal.head.gathered() as head:
        yield replace(signal, head=head.in_fp32() if in_fp32 else head)


def _as_trls(
    hidden: torch.Tensor, mask: torch.Tensor, log_probs: torch.Tensor, entropy: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Log-probabilities and entropy of judged tokens, `(N,)`, as TRL gives them: `(B, T - 1)`, 0 elsewhere."""
    before = hidden.shape[1] - 1 - mask.shape[1]
    found = {"log_probs": log_probs, "entropy": entropy}
    return {name: nn.functional.pad(scatter(values, mask), (before, 0)) for name, values in found.items()}


class RecordedStudent:
    """
    Calls the student once, with teachers' scores as extra arguments, and keeps the output.

    TRL's loss only calls its `model`, so one forward pass gives TRL its log-probabilities and us the measures.
    """

    def __init__(self, model: nn.Module, rollouts: Rollouts, scores: list[TeacherScore], plan: ForwardPlan):
        self._model = functools.partial(model, rollouts=rollouts, scores=Uncast(scores), plan=Uncast(plan))
        self._measures = plan.estimator.measures
        self._output: DistilledOutput | None = None

    def __call__(self, **inputs: Any) -> DistilledOutput:
        if self._output is not None:
            raise RuntimeError("TRL called the student twice for one micro-batch; the divergence would be ambiguous.")
        output: DistilledOutput = self._model(**inputs)
        output.measured = [self._measures(**found) for found in output.measured or []]
        self._output = output
        return output

    @property
    def output(self) -> Any:
        if self._output is None:
            raise RuntimeError("TRL's policy loss did not call the student, so there is no divergence to add.")
        return self._output
