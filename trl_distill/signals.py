"""What passes between student and teacher: the rollouts that are judged, and the signal that a teacher gives for them.

Small dataclasses without behaviour of their own. How a signal is obtained is `teachers.py`'s business, what is computed
from it that of `heads.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Rollouts:
    """
    A batch of sequences of which some completion tokens are judged. N is the number of judged tokens, `mask.sum()`.

    Attributes:
        input_ids (`torch.Tensor` of shape `(B, P + C)`): left-padded prompts, right-padded completions.
        attention_mask (`torch.Tensor` of shape `(B, P + C)`): 0 on padding.
        mask (`torch.Tensor` of shape `(B, C)`, bool): completion tokens that count: no padding, no tool output, no
            truncated completion where those are masked.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def from_inputs(cls, inputs: dict[str, Any]) -> Rollouts:
        """Build from a micro-batch of `GRPOTrainer`."""
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        return cls(
            input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            mask=mask.bool(),
        )


@dataclass
class HiddenStates:
    """
    The exact signal: what the teacher's LM head would be applied to, and that head. Never logits.

    Attributes:
        hidden (`torch.Tensor` of shape `(N, H)`): the teacher's last hidden state at each position that predicts a
            judged token, in the row-major order of `Rollouts.mask`.
        head ([`~trl_distill.heads.LMHead`]): turns them into log-probabilities over the teacher's vocabulary.
    """

    hidden: torch.Tensor
    head: Any


@dataclass
class TokenLogProbs:
    """
    What a teacher behind a server gives: log-probabilities of the sampled tokens, and of its own likeliest ids.

    At temperature 1, over the teacher's whole vocabulary. N as in [`HiddenStates`], in the same order.

    Attributes:
        log_p (`torch.Tensor` of shape `(N,)`, fp32): of each judged token, nats.
        top_ids (`torch.Tensor` of shape `(N, K)`, int64): the teacher's K likeliest ids; K may be 0.
        top_log_p (`torch.Tensor` of shape `(N, K)`, fp32): theirs, nats.
    """

    log_p: torch.Tensor
    top_ids: torch.Tensor
    top_log_p: torch.Tensor


class TeacherUnavailable(RuntimeError):
    """The teacher did not answer within its time-outs and retries."""


class TeacherAnswerError(RuntimeError):
    """The teacher answered something that cannot be taken as its judgement of the tokens that it was asked about."""
