"""What a teacher gives for rollouts: hidden states and a head, or log-probabilities of a few ids.

Small dataclasses that can be cut into rows and put together again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch


@dataclass
class _PerToken:
    """A signal whose tensors have one row for each judged token; other fields hold for all of them."""

    def _tensors(self) -> dict[str, torch.Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """With each tensor changed in the same way."""
        return replace(self, **{name: change(tensor) for name, tensor in self._tensors().items()})

    def float(self) -> Self:
        """With floating-point tensors in fp32."""
        return self.map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)

    def split(self, counts: list[int]) -> list[Self]:
        """Cut into pieces of so many judged tokens each."""
        pieces = {name: tensor.split(counts) for name, tensor in self._tensors().items()}
        return [replace(self, **{name: piece[i] for name, piece in pieces.items()}) for i in range(len(counts))]

    @classmethod
    def cat(cls, pieces: list[Self]) -> Self:
        """The pieces one after another; what is no tensor is the first one's."""
        names = pieces[0]._tensors()
        return replace(pieces[0], **{name: torch.cat([getattr(piece, name) for piece in pieces]) for name in names})


@dataclass
class HiddenStates(_PerToken):
    """
    The exact signal: what the teacher's LM head would be applied to, and that head. Never logits.

    Attributes:
        hidden (`torch.Tensor` of shape `(N, H)`): the teacher's last hidden state at each position that predicts a
            judged token, in the row-major order of `Rollouts.mask`.
        head ([`~trl_distill.heads.lm_head.LMHead`]): turns them into log-probabilities over the teacher's vocabulary.
    """

    hidden: torch.Tensor
    head: Any


@dataclass
class TokenLogProbs(_PerToken):
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


Signal = HiddenStates | TokenLogProbs


@dataclass
class TeacherScore:
    """
    What one teacher said about a micro-batch.

    Attributes:
        mask (`torch.Tensor` of shape `(B, C)`, bool): the tokens that it judged; rows of other teachers are left out.
        weight (`torch.Tensor` of shape `(B,)`): what its divergence is multiplied by in each row.
        signal ([`HiddenStates`] or [`TokenLogProbs`]): in the row-major order of `mask`.
        rows (`dict` of `torch.Tensor` of shape `(B,)`, bool): with several teachers, the rows that name it, by each of
            its names.
    """

    mask: torch.Tensor
    weight: torch.Tensor
    signal: Signal
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
