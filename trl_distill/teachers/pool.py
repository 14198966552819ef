"""Which teacher scores which row with what weight, and when.

A resident teacher scores each micro-batch during its step. One that is offloaded or served, or whose signals are used
more than once, scores the whole generation batch at once; its signals are kept in CPU memory, by row id, until their
last use. So does one that can read a shared prompt once, where that saves enough: rows with the same prompt are then
still together, which micro-batches may not have.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import TeacherUnavailable
from ..models.shared_prompts import Prompts
from ..objective.weights import check_teacher_weights
from ..rollouts import MicroBatch, Rollouts
from ..signals import Signal, TeacherScore
from .base import Teacher, as_teacher


_row_ids = itertools.count()  # unique, so that a stale signal is never used for another row


KEPT_AHEAD = 4 * 2**30  # bytes of hidden states that a process keeps only for the sake of shared prompts


class TeacherPool:
    """
    One or several teachers.

    Args:
        teachers (`dict[str, Teacher]`): by name, as in the dataset's `teacher` column. Names may share a teacher.
        accelerator ([`~accelerate.Accelerator`]): the trainer's.
        uses (`int`): number of times that each generation batch is trained on.
        one_step (`bool`): whether a generation batch is used up within one optimizer step.
        together (`bool`): whether every process must take part in every forward pass of a teacher (ZeRO-3, FSDP).
        weights (`dict[str, float]`, *optional*): of the teachers, for rows that do not give any.
        divergences (`list[str]`): those that are minimised, which decide whether a weight may be negative.
    """

    def __init__(
        self,
        teachers: dict[str, Teacher],
        accelerator: Any,
        uses: int = 1,
        one_step: bool = False,
        together: bool = False,
        weights: dict[str, float] | None = None,
        divergences: Sequence[str] = ("reverse_kl",),
    ):
        adapted = {id(given): as_teacher(given) for given in teachers.values()}  # one for each, whatever its names
        self.teachers, self.names = {name: adapted[id(given)] for name, given in teachers.items()}, list(teachers)
        self.accelerator, self.uses, self.one_step, self.together = accelerator, uses, one_step, together
        self.weights, self.divergences = weights, divergences
        self.failed_everywhere = False  # whether all processes have raised the failure of a teacher
        # names of the same teacher share a forward pass
        self.members: list[tuple[Teacher, list[int]]] = []
        for column, teacher in enumerate(self.teachers.values()):
            columns = next((columns for known, columns in self.members if known is teacher), None)
            if columns is None:
                self.members.append((teacher, [column]))
            else:
                columns.append(column)
        self._waiting: list[dict[int, tuple[Signal, int]]] = [{} for _ in self.members]  # row id: signal, uses left
        self._early = [False for _ in self.members]  # whether prompts are shared, so that signals are waiting
        self._nothing: list[Signal | None] = [None for _ in self.members]  # a signal for no tokens

    @property
    def several(self) -> bool:
        return len(self.names) > 1

    def assign(self, rows: list[dict[str, Any]], device: torch.device) -> dict[str, torch.Tensor]:
        """
        Columns for a generation batch, which are shuffled and split with its rows.

        Args:
            rows (`list` of `dict`): examples of the dataset, one per rollout.
            device (`torch.device`): device of the columns.

        Returns:
            `dict`: "row_id" of shape `(B,)`, and with several teachers "teacher_weights" of shape `(B, teachers)`.

        Raises:
            ValueError: a row names no teacher, or an unknown one.
        """
        added = {"row_id": torch.tensor([next(_row_ids) for _ in rows], device=device)}
        if self.several:
            weights = [
                weights_of(self.weights if own is None else own, self.names, f"Row {i} of a batch", self.divergences)
                for i, own in enumerate(row.get("teacher") for row in rows)
            ]
            readers = {name for name, teacher in self.teachers.items() if teacher.reads_text}
            for i, own in enumerate(weights):
                check_readers(dict(zip(self.names, own, strict=True)), readers, f"Row {i} of a batch has")
            added["teacher_weights"] = torch.tensor(weights, device=device)
        return added

    def score_ahead(self, batch: MicroBatch, training: bool) -> None:
        """
        Run the teachers that score whole generation batches, and keep their signals.

        Raises:
            TeacherUnavailable: on all processes, if a teacher did not answer one of them.
        """
        weights = self._weights(batch)
        for member, (teacher, columns) in enumerate(self.members):
            rollouts = batch.read_by(teacher.prompts)
            chosen = weights[:, columns].sum(1) != 0
            may_share = training and self._may_share(teacher)  # the same on all processes
            if not (may_share or self._at_once(member, training)):
                continue
            failure: Exception | None = None
            signal: Any = None
            try:
                if may_share:
                    fits = int(rollouts.mask[chosen].sum()) * teacher.bytes_per_token <= KEPT_AHEAD
                    self._early[member] = fits and bool(chosen.any()) and _prompts_pay(rollouts.rows(chosen))
                signal = self._ask(teacher, rollouts, chosen) if self._at_once(member, training) else None
            except Exception as error:  # of any kind: the other processes must not wait for this one
                failure = error
            self._agree(failure)
            if training:  # signals left from the last generation batch are not needed any more
                self._waiting[member].clear()
            if signal is None:
                continue
            signal = signal.map(_to_host)
            self._nothing[member] = signal.map(lambda tensor: tensor[:0].clone())
            counts, ids = rollouts.mask[chosen].sum(1).tolist(), self._ids(batch, chosen)
            uses = self.uses if training else 1
            self._waiting[member] |= {
                row_id: (piece, uses) for row_id, piece in zip(ids, signal.split(counts), strict=True)
            }

    def score(self, batch: MicroBatch, training: bool) -> list[TeacherScore]:
        """The scores of a micro-batch by all teachers that have a row in it."""
        weights = self._weights(batch)
        scores = []
        for member, (teacher, columns) in enumerate(self.members):
            rollouts = batch.read_by(teacher.prompts)
            weight = weights[:, columns].sum(1)
            chosen = weight != 0 if self.several else None
            if self._at_once(member, training):
                signal = self._take(member, self._ids(batch, chosen))
            else:
                signal = self._ask(teacher, rollouts, chosen)
            if signal is None:
                continue
            if chosen is None:  # the same tensor, whose places are known
                scores.append(TeacherScore(rollouts.mask, weight, signal))
            else:
                rows = {self.names[i]: chosen & (weights[:, i] != 0) for i in columns}
                scores.append(TeacherScore(rollouts.mask & chosen[:, None], weight, signal, rows))
        return scores

    @staticmethod
    def _ids(batch: MicroBatch, chosen: torch.Tensor | None) -> list[int]:
        """Ids of the chosen rows, by default of all."""
        assert batch.row_ids is not None  # set by `assign`
        ids = batch.row_ids if isinstance(batch.row_ids, list) else batch.row_ids.tolist()
        return ids if chosen is None else [row for row, is_mine in zip(ids, chosen.tolist(), strict=True) if is_mine]

    def _weights(self, batch: MicroBatch) -> torch.Tensor:
        """Weight of each teacher in each row, `(B, teachers)`."""
        if self.several:
            assert batch.teacher_weights is not None
            return batch.teacher_weights
        return torch.ones(len(batch.rollouts), 1, device=batch.mask.device)

    def _ask(self, teacher: Teacher, rollouts: Rollouts, chosen: torch.Tensor | None) -> Signal | None:
        """The signal for the chosen rows, by default for all."""
        if chosen is None:
            return checked(teacher, teacher.score(rollouts), rollouts.tokens)
        if self.together:  # all rows, so that every process runs the same number of forward passes
            chosen_rollouts = replace(rollouts, mask=rollouts.mask & chosen[:, None])
        elif not chosen.any():
            return None
        else:
            chosen_rollouts = rollouts if chosen.all() else rollouts.rows(chosen)
        return checked(teacher, teacher.score(chosen_rollouts), int(rollouts.mask[chosen].sum()))

    def _at_once(self, member: int, training: bool) -> bool:
        """Whether a teacher scores whole generation batches, or has scored the last one."""
        teacher, _ = self.members[member]
        return teacher.per_generation or (training and (self.uses > 1 or self._early[member]))

    def _may_share(self, teacher: Teacher) -> bool:
        """Whether a teacher that need not score a whole generation batch may, for the sake of shared prompts."""
        if teacher.per_generation or self.uses > 1 or self.together or (teacher.moves and not self.one_step):
            return False
        return teacher.prompts_once

    def _take(self, member: int, row_ids: list[int]) -> Signal | None:
        """The stored signals of these rows, concatenated; they are dropped after their last use."""
        waiting = self._waiting[member]
        pieces: list[Any] = []
        for row_id in row_ids:
            signal, uses = waiting.pop(row_id)
            if uses > 1:
                waiting[row_id] = (signal, uses - 1)
            pieces.append(signal)
        if not pieces and self.together:
            pieces = [self._nothing[member]]
        if not pieces:
            return None
        device = self.accelerator.device
        arrived = [piece.map(lambda tensor: tensor.to(device, non_blocking=True)) for piece in pieces]
        return type(arrived[0]).cat(arrived)

    def _agree(self, failure: Exception | None) -> None:
        """Raise on all processes if one of them failed, so that none waits for the others."""
        kinds = [failure is not None, failure is not None and not isinstance(failure, TeacherUnavailable)]
        failed = torch.tensor([float(kind) for kind in kinds], device=self.accelerator.device)
        failed_anywhere, for_good = (self.accelerator.reduce(failed, reduction="sum") > 0).tolist()
        self.failed_everywhere = failed_anywhere
        if not failed_anywhere:
            return
        if failure is None or (for_good and isinstance(failure, TeacherUnavailable)):
            kind = RuntimeError if for_good else TeacherUnavailable
            failure = kind("A teacher failed on another process, which shows the reason.")
            vars(failure)["is_of_another_process"] = True
        vars(failure)["on_all_processes"] = True
        raise failure


def checked(teacher: Teacher, signal: Any, tokens: int) -> Signal:
    """
    Check the signal that a teacher returned.

    Args:
        teacher ([`~trl_distill.Teacher`]): the teacher.
        signal: what its `score` returned.
        tokens (`int`): number of judged tokens.

    Raises:
        TypeError: it has another type than `teacher.gives`.
        ValueError: it is for another number of tokens.
    """
    if not isinstance(signal, teacher.gives):
        raise TypeError(
            f"The teacher's `score` returned a {type(signal).__name__}; it must return "
            f"`trl_distill.{teacher.gives.__name__}`, or say with the class attribute `gives` what it returns (see "
            "docs/teachers.md)."
        )
    found = len(next(iter(vars(signal).values())))
    if tokens != found:
        raise ValueError(
            f"The teacher's `score` returned a signal for {found} tokens, but {tokens} are judged. Return one "
            "for each `True` of `rollouts.mask`, row by row."
        )
    return signal  # type: ignore[return-value]


def check_readers(weights: Mapping[str, float], readers: Collection[str], where: str) -> None:
    """
    Check that no teacher with another tokenizer has a negative weight.

    Args:
        weights (`dict[str, float]`): of all teachers, by name.
        readers (`set[str]`): names of those with another tokenizer.
        where (`str`): what has the weights, at the start of error messages, with its verb.

    Raises:
        ValueError: one of them has.
    """
    negative = [name for name in readers if weights.get(name, 0.0) < 0]
    if negative:
        raise ValueError(
            f"{where} a negative weight for the teacher {negative[0]!r}, which has another tokenizer. What the student "
            "is charged for leaving its canonical tokens would be paid to it. Give negative weights only to teachers "
            "with the student's tokenizer."
        )


def _prompts_pay(rollouts: Rollouts) -> bool:
    """Whether it saves enough to read each prompt of these rollouts once."""
    prompts = Prompts.among(rollouts.input_ids, rollouts.attention_mask, rollouts.mask.shape[1])
    return prompts.pay(rollouts.input_ids.shape[1])


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Copy to CPU memory, pinned if from a GPU, which makes the copy back faster."""
    if tensor.device.type != "cuda":
        return tensor.to("cpu")
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def weights_of(value: Any, names: list[str], where: str, divergences: Sequence[str] = ("reverse_kl",)) -> list[float]:
    """
    The weight of each teacher, from one row's `teacher` column: a name, or weights by name.

    Args:
        value (`str` or `dict[str, float]`): the row's `teacher`.
        names (`list[str]`): names of all teachers.
        where (`str`): the row, at the start of error messages.
        divergences (`list[str]`): those that are minimised.

    Returns:
        `list[float]`: in the order of `names`.

    Raises:
        ValueError: it names no teacher or an unknown one, or
            [`~trl_distill.objective.weights.check_teacher_weights`] refuses the weights.
    """
    known = ", ".join(repr(name) for name in names)
    given = {value: 1.0} if isinstance(value, str) else value
    if not isinstance(given, dict):
        raise ValueError(f"{where} has the `teacher` {value!r}. Name one of {known}, or give weights by name.")
    given = {name: weight for name, weight in given.items() if weight is not None}  # Arrow's for a missing field
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(f"{where} names the teacher {unknown[0]!r}, which does not exist. Name one of {known}.")
    check_teacher_weights(given, f"{where} has", divergences)
    return [float(given.get(name, 0.0)) for name in names]
