"""Which teacher judges which row with what weight, and when it is asked.

A resident teacher judges each micro-batch as it comes. One that is offloaded or served, or whose answer is used more
than once, judges the whole generation batch at once; its signals wait in CPU memory, by row id, until their last use.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from ..errors import TeacherUnavailable
from ..rollouts import MicroBatch, Rollouts
from ..signals import Signal, TeacherScore
from .base import Teacher, as_teacher


_row_ids = itertools.count()  # never the same twice, so that a stale entry cannot be taken for another row's


class TeacherPool:
    """
    One or several teachers.

    Args:
        teachers (`dict[str, Teacher]`): by the name that the `teacher` column uses. Names may share a teacher.
        accelerator ([`~accelerate.Accelerator`]): the trainer's.
        uses (`int`): how often each generation batch is trained on.
        together (`bool`): whether every process must take part in every teacher's forward (ZeRO-3, FSDP).
    """

    def __init__(self, teachers: dict[str, Teacher], accelerator: Any, uses: int = 1, together: bool = False):
        self.teachers, self.names = {name: as_teacher(given) for name, given in teachers.items()}, list(teachers)
        self.accelerator, self.uses, self.together = accelerator, uses, together
        self.failed_everywhere = False  # whether all processes know that a teacher failed
        # names of the same teacher share one forward
        self.members: list[tuple[Teacher, list[int]]] = []
        for column, teacher in enumerate(self.teachers.values()):
            columns = next((columns for known, columns in self.members if known is teacher), None)
            if columns is None:
                self.members.append((teacher, [column]))
            else:
                columns.append(column)
        self._waiting: list[dict[int, tuple[Signal, int]]] = [{} for _ in self.members]  # row id: signal, uses left
        self._nothing: list[Signal | None] = [None for _ in self.members]  # a signal for no token, where one is needed

    @property
    def several(self) -> bool:
        return len(self.names) > 1

    def assign(self, rows: list[dict[str, Any]], device: torch.device) -> dict[str, torch.Tensor]:
        """
        What travels with each row through shuffling and splitting.

        Args:
            rows (`list` of `dict`): examples of the dataset, one per rollout.
            device: of the rollouts.

        Returns:
            `dict`: "row_id" of shape `(B,)`, and with several teachers "teacher_weights" of shape `(B, teachers)`.

        Raises:
            ValueError: a row names no teacher, or one that is not known.
        """
        seats = {"row_id": torch.tensor([next(_row_ids) for _ in rows], device=device)}
        if self.several:
            weights = [weights_of(row.get("teacher"), self.names, f"Row {i} of a batch") for i, row in enumerate(rows)]
            seats["teacher_weights"] = torch.tensor(weights, device=device)
        return seats

    def score_ahead(self, batch: MicroBatch, training: bool) -> None:
        """
        Ask those teachers that judge whole generation batches.

        Raises:
            TeacherUnavailable: on all processes, where a teacher did not answer one of them.
        """
        rollouts, weights = batch.for_teachers, self._weights(batch)
        for member, (teacher, columns) in enumerate(self.members):
            if not self._at_once(teacher, training):
                continue
            chosen = weights[:, columns].sum(1) > 0
            failure: Exception | None = None
            signal: Any = None
            try:
                signal = self._ask(teacher, rollouts, chosen)
            except Exception as error:  # whatever it is, the other processes must not wait for this one
                failure = error
            self._agree(failure)
            if training:  # whatever is left of the last generation batch is not asked for any more
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
        """What the teachers say about a micro-batch; those without a row in it are left out."""
        rollouts, weights = batch.for_teachers, self._weights(batch)
        scores = []
        for member, (teacher, columns) in enumerate(self.members):
            weight = weights[:, columns].sum(1)
            chosen = weight > 0
            if self._at_once(teacher, training):
                signal = self._take(member, self._ids(batch, chosen))
            else:
                signal = self._ask(teacher, rollouts, chosen)
            if signal is not None:
                rows = {self.names[i]: weights[:, i] > 0 for i in columns} if self.several else {}
                scores.append(TeacherScore(rollouts.mask & chosen[:, None], weight, signal, rows))
        return scores

    @staticmethod
    def _ids(batch: MicroBatch, chosen: torch.Tensor) -> list[int]:
        assert batch.row_ids is not None  # `assign` has given them
        return batch.row_ids[chosen].tolist()

    def _weights(self, batch: MicroBatch) -> torch.Tensor:
        """`(B, teachers)`."""
        if self.several:
            assert batch.teacher_weights is not None
            return batch.teacher_weights
        return torch.ones(len(batch.rollouts), 1, device=batch.mask.device)

    def _ask(self, teacher: Teacher, rollouts: Rollouts, chosen: torch.Tensor) -> Signal | None:
        if self.together:  # every row on every process, so that all run the same number of forwards; those are kept
            asked = Rollouts(rollouts.input_ids, rollouts.attention_mask, rollouts.mask & chosen[:, None])
        elif not chosen.any():
            return None
        else:
            asked = rollouts if chosen.all() else rollouts.rows(chosen)
        return checked(teacher, teacher.score(asked), int(rollouts.mask[chosen].sum()))

    def _at_once(self, teacher: Teacher, training: bool) -> bool:
        """Whether a teacher judges whole generation batches."""
        return teacher.per_generation or (training and self.uses > 1)

    def _take(self, member: int, row_ids: list[int]) -> Signal | None:
        """The signals of these rows, put together; forgotten after their last use."""
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
        """Raise on all processes where one of them failed, so that none waits for the others."""
        kinds = [failure is not None, failure is not None and not isinstance(failure, TeacherUnavailable)]
        failed = torch.tensor([float(kind) for kind in kinds], device=self.accelerator.device)
        some, for_good = (self.accelerator.reduce(failed, reduction="sum") > 0).tolist()
        self.failed_everywhere = some
        if not some:
            return
        if failure is None or (for_good and isinstance(failure, TeacherUnavailable)):
            kind = RuntimeError if for_good else TeacherUnavailable
            failure = kind("A teacher failed on another process; its message is there.")
            vars(failure)["is_of_another_process"] = True
        vars(failure)["on_all_processes"] = True
        raise failure


def checked(teacher: Teacher, signal: Any, tokens: int) -> Signal:
    """
    A signal that a teacher has given, if it is what the teacher should give.

    Args:
        teacher ([`~trl_distill.Teacher`]): who gave it.
        signal: what its `score` returned.
        tokens (`int`): how many tokens are judged.

    Raises:
        TypeError: it is of another type.
        ValueError: it is for another number of tokens.
    """
    if not isinstance(signal, teacher.gives):
        raise TypeError(
            f"The teacher's `score` returned a {type(signal).__name__}; it must return "
            f"`trl_distill.{teacher.gives.__name__}` (see docs/teachers.md)."
        )
    found = len(next(iter(vars(signal).values())))
    if tokens != found:
        raise ValueError(
            f"The teacher's `score` returned a signal for {found} tokens, but {tokens} are judged: one for each "
            "`True` of `rollouts.mask`, row by row."
        )
    return signal  # type: ignore[return-value]


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """To CPU memory, pinned where that speeds up the way back."""
    if tensor.device.type != "cuda":
        return tensor.to("cpu")
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def weights_of(value: Any, names: list[str], where: str) -> list[float]:
    """
    Weights by teacher of one row's `teacher`: a name, or weights by name.

    Args:
        value: what the row has in its `teacher` column.
        names (`list[str]`): of the teachers.
        where (`str`): begins the message of an error.
    """
    known = ", ".join(repr(name) for name in names)
    given = {value: 1.0} if isinstance(value, str) else value
    if not isinstance(given, dict):
        raise ValueError(f"{where} has the `teacher` {value!r}. Name one of {known}, or give weights by name.")
    given = {name: weight for name, weight in given.items() if weight is not None}  # what Arrow fills structs with
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(f"{where} names the teacher {unknown[0]!r}, which is not known. Known are: {known}.")
    if not all(math.isfinite(weight) and weight >= 0 for weight in given.values()) or sum(given.values()) <= 0:
        raise ValueError(f"{where} has the teachers {given}; weights must not be negative, nor all of them 0.")
    return [float(given.get(name, 0.0)) for name in names]
