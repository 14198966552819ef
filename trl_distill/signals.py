"""What a teacher returns for rollouts: hidden states and a head, or log-probabilities of a few ids.

Small dataclasses that can be split by tokens and concatenated again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch


@dataclass
class _PerToken:
    """A signal whose tensors have one row per judged token; other fields are shared by all tokens."""

    def _tensors(self) -> dict[str, torch.Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """A copy with `change` applied to each tensor."""
        return replace(self, **{name: change(tensor) for name, tensor in self._tensors().items()})

    def float(self) -> Self:
        """A copy with floating-point tensors in fp32."""
        return self.map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)

    def split(self, counts: list[int]) -> list[Self]:
        """Split into pieces of `counts` judged tokens each."""
        pieces = {name: tensor.split(counts) for name, tensor in self._tensors().items()}
        return [replace(self, **{name: piece[i] for name, piece in pieces.items()}) for i in range(len(counts))]

    @classmethod
    def cat(cls, pieces: list[Self]) -> Self:
        """Concatenate pieces; non-tensor fields come from the first piece."""
        names = pieces[0]._tensors()
        return replace(pieces[0], **{name: torch.cat([getattr(piece, name) for piece in pieces]) for name in names})


@dataclass
class HiddenStates(_PerToken):
    """
    The exact signal: the inputs of the teacher's LM head, and that head. Never logits.

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
    What a served teacher gives: log-probabilities of the sampled tokens and of the teacher's most likely ids.

    At temperature 1, over the teacher's whole vocabulary. N tokens in the same order as in [`HiddenStates`].

    Attributes:
        log_p (`torch.Tensor` of shape `(N,)`, fp32): log-probability of each judged token, nats.
        top_ids (`torch.Tensor` of shape `(N, K)`, int64): the teacher's K most likely ids; K may be 0.
        top_log_p (`torch.Tensor` of shape `(N, K)`, fp32): their log-probabilities, nats.
    """

    log_p: torch.Tensor
    top_ids: torch.Tensor
    top_log_p: torch.Tensor


@dataclass(frozen=True)
class SharedIds:
    """
    Ids of two vocabularies that the exact part of a divergence between texts runs over, and both models' stop tokens.

    Attributes:
        student, teacher (`torch.Tensor` of shape `(K,)`, int64): the ids, pair by pair, without stop tokens.
        student_stops, teacher_stops (`tuple[int, ...]`): they count as one id.
    """

    student: torch.Tensor
    teacher: torch.Tensor
    student_stops: tuple[int, ...]
    teacher_stops: tuple[int, ...]


@dataclass
class AlignedStates(HiddenStates):
    """
    The signal of a teacher with another tokenizer: spans of a completion, and hidden states where both begin anew.

    One row for each of the student's judged tokens, as in [`HiddenStates`]; `hidden` is 0 but at the starts of spans,
    where it is the state that predicts the teacher's next token.

    Attributes:
        starts (`torch.Tensor` of shape `(N,)`, bool): whether a span begins with the token.
        log_p (`torch.Tensor` of shape `(N,)`, fp32): at starts, the log-probability of the teacher's tokens of the
            span, nats; else 0.
        whole (`torch.Tensor` of shape `(N,)`, bool): whether the token's span ends before the completion is cut.
        single (`torch.Tensor` of shape `(N,)`, bool): whether the span is one token of both.
        charged (`torch.Tensor` of shape `(N,)`, bool): whether the token left the student's canonical path.
        shared ([`SharedIds`]): ids that are summed exactly.
    """

    starts: torch.Tensor
    log_p: torch.Tensor
    whole: torch.Tensor
    single: torch.Tensor
    charged: torch.Tensor
    shared: SharedIds


@dataclass
class AlignedLogProbs(_PerToken):
    """
    What a served teacher with another tokenizer gives: log-probabilities of its own tokens, span by span.

    Attributes:
        starts, log_p, whole, single, charged: as in [`AlignedStates`].
    """

    starts: torch.Tensor
    log_p: torch.Tensor
    whole: torch.Tensor
    single: torch.Tensor
    charged: torch.Tensor


Signal = HiddenStates | TokenLogProbs


@dataclass
class TeacherScore:
    """
    One teacher's score of a micro-batch.

    Attributes:
        mask (`torch.Tensor` of shape `(B, C)`, bool): the tokens that it scored, without rows of other teachers.
        weight (`torch.Tensor` of shape `(B,)`): weight of its divergence in each row.
        signal ([`HiddenStates`], [`TokenLogProbs`] or [`AlignedLogProbs`]): the teacher's signal, in the row-major
            order of `mask`.
        rows (`dict` of `torch.Tensor` of shape `(B,)`, bool): with several teachers, the rows assigned to it, by each
            of its names.
    """

    mask: torch.Tensor
    weight: torch.Tensor
    signal: Any
    rows: dict[str, torch.Tensor] = field(default_factory=dict)

    def scores_all(self, judged: torch.Tensor) -> bool:
        """Whether it scored all tokens marked by `judged` `(B, C)`; the same tensor needs no look at its values."""
        return self.mask is judged or bool((self.mask == judged).all())
