"""Teachers with another tokenizer: they read the student's completions as text, in their own tokens.

A model in this process gives hidden states where both tokenizations begin anew; a served one the log-probabilities of
its own tokens, from which spans are added up. What is read and how it is added up is in `readings.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..alignment.vocabularies import Vocabularies
from ..heads.few_ids import log_probs_of
from ..rollouts import Rollouts
from ..signals import AlignedLogProbs, AlignedStates, HiddenStates, SharedIds
from .base import Teacher, is_sharded, kind_of
from .local import LocalTeacher
from .readings import Found, ReadSequence, Row, aligned_rows, batched, spans
from .server import ServedTeacher


def shared_ids(
    pair: Vocabularies, stops: list[int], teacher_stops: list[int], student_size: int, teacher_size: int
) -> SharedIds:
    """
    The ids that are summed exactly: closed ones, without stop tokens, for which both models have rows.

    Args:
        pair ([`~trl_distill.alignment.vocabularies.Vocabularies`]): the tokenizers.
        stops, teacher_stops (`list[int]`): ids that end a turn, of student and teacher.
        student_size, teacher_size (`int`): rows of the models' LM heads.
    """
    both = [
        (v, w)
        for v, w in pair.closed.items()
        if v < student_size and w < teacher_size and v not in stops and w not in teacher_stops
    ]
    ids = torch.tensor(both, dtype=torch.long).view(-1, 2)
    return SharedIds(ids[:, 0].contiguous(), ids[:, 1].contiguous(), tuple(stops), tuple(teacher_stops))


class _Reader(Teacher):
    """
    Base of both kinds. What is not about texts is left to the teacher that is asked.

    Attributes:
        prompts (`str`): the columns of a batch that hold its own prompts.
    """

    reads_text = True

    def __init__(self, teacher: Teacher, pair: Vocabularies, shared: SharedIds, prompts: str):
        self.teacher, self.pair, self.shared, self.prompts = teacher, pair, shared, prompts
        self.per_generation, self.module = teacher.per_generation, teacher.module
        self.moves, self.prompts_once = teacher.moves, teacher.prompts_once
        self.bytes_per_token = teacher.bytes_per_token

    def check(self) -> None:
        self.teacher.check()

    def call_it(self, name: str) -> None:
        self.teacher.call_it(name)

    def callbacks(self) -> list[TrainerCallback]:
        return self.teacher.callbacks()

    @contextmanager
    def on_device(self) -> Iterator[nn.Module | None]:
        with self.teacher.on_device() as model:
            yield model


class CrossTokenizerTeacher(_Reader):
    """
    Scores completions of a student with another tokenizer, by a model in this process.

    `score` expects rollouts in which the prompts are the teacher's, in its own tokens and template, and the completions
    the student's. The teacher reads the text of each completion, and, where its tokens for a beginning of that text are
    other ones than those for the whole, that beginning too. Where an engine shards its weights, all processes read as
    many sequences as the one with the most.

    Args:
        teacher ([`~trl_distill.teachers.local.LocalTeacher`]): the model: resident, parked or sharded.
        pair ([`~trl_distill.alignment.vocabularies.Vocabularies`]): the tokenizers.
        shared ([`~trl_distill.signals.SharedIds`]): ids that are summed exactly, and both models' stop tokens.
        temperature (`float`): softmax temperature of the divergence.
        prompts (`str`): the columns of a batch that hold its own prompts.
    """

    gives = AlignedStates
    teacher: LocalTeacher

    def __init__(
        self,
        teacher: LocalTeacher,
        pair: Vocabularies,
        shared: SharedIds,
        temperature: float,
        prompts: str = "teacher_prompt",
    ):
        super().__init__(teacher, pair, shared, prompts)
        self.temperature_of_divergence = temperature

    @torch.no_grad()
    def score(self, rollouts: Rollouts) -> AlignedStates:
        """
        Align the completions, and run the teacher on their texts.

        Raises:
            ValueError: some of a completion's tokens are not judged, such as the output of tools.
        """
        accelerator = self.teacher.accelerator
        rows = aligned_rows(self.pair, self.shared.student_stops, rollouts)
        sequences = self._sequences(rows)
        read = batched(sequences, accelerator.device)
        states = self.teacher.score(read)
        with accelerator.autocast():
            log_p, stop_log_p = self._log_probs(states, read)
        found = Found(sequences, log_p)
        stops = {row.first: stop_log_p[found.offsets[row.paths[0] + 1] - 1] for row in rows}
        return self._signal(rows, found, stops, states, int(rollouts.mask.sum()))

    def _sequences(self, rows: list[Row]) -> list[ReadSequence]:
        """All texts that the teacher reads, with a stop token behind each, whose state says what may come there."""
        sequences: list[ReadSequence] = []
        end = self.shared.teacher_stops[0]
        for row in rows:
            for path, common in zip(row.aligned.paths, row.aligned.common, strict=True):
                first = common if row.paths else 0  # the first path counts from its beginning
                row.paths.append(len(sequences))
                sequences.append(ReadSequence(row.prompt, [*path, end], first))
        accelerator, needed = self.teacher.accelerator, max(len(sequences), 1)
        if is_sharded(accelerator):  # every forward pass takes all processes
            of_all = accelerator.gather(torch.tensor([needed], device=accelerator.device))
            needed = int(of_all.max())
        nothing = ReadSequence(torch.tensor([end]), [end], 1)
        return sequences + [nothing] * (needed - len(sequences))

    def _log_probs(self, states: HiddenStates, read: Rollouts) -> tuple[list[float], list[float]]:
        """The teacher's log-probabilities of its tokens and of stopping, at each of its positions, nats."""
        ids = read.input_ids[:, -read.mask.shape[1] :][read.mask]
        stops = torch.tensor(self.shared.teacher_stops, device=ids.device).expand(len(ids), -1)
        asked = torch.cat([ids[:, None], stops], dim=1)
        head = states.head
        log_p, _ = log_probs_of(states.hidden, head, asked, head.vocab_size, self.temperature_of_divergence)
        log_p = log_p.double()
        return log_p[:, 0].tolist(), log_p[:, 1:].logsumexp(-1).tolist()

    def _signal(
        self, rows: list[Row], found: Found, stops: dict[int, float], states: HiddenStates, count: int
    ) -> AlignedStates:
        device = states.hidden.device
        columns = spans(rows, found, stops, count, device)
        places = [
            (row.first + start, found.state(row, place))
            for row in rows
            for start, place in zip(row.aligned.starts, row.aligned.places, strict=False)
        ]
        at, source = torch.tensor(places, dtype=torch.long, device=device).view(-1, 2).unbind(1)
        hidden = states.hidden.new_zeros(count, states.hidden.shape[-1])
        hidden.index_copy_(0, at, states.hidden[source])
        return AlignedStates(hidden, states.head, shared=self.shared, **columns)


class ServedReader(_Reader):
    """
    Scores completions of a student with another tokenizer, by a served model.

    It gives log-probabilities of its own tokens, so nothing is summed exactly: every span comes from sampled tokens.
    A completion that stopped is sent once for each of the teacher's stop tokens, since they count as one.

    Args:
        teacher ([`~trl_distill.ServedTeacher`]): the served model.
        pair, shared, prompts: as in [`CrossTokenizerTeacher`].
    """

    gives = AlignedLogProbs
    teacher: ServedTeacher

    def __init__(self, teacher: ServedTeacher, pair: Vocabularies, shared: SharedIds, prompts: str = "teacher_prompt"):
        super().__init__(teacher, pair, shared, prompts)
        self.temperature = teacher.temperature

    def score(self, rollouts: Rollouts) -> AlignedLogProbs:  # type: ignore[override]
        """
        Align the completions, and ask for the log-probabilities of their texts.

        Raises:
            TeacherUnavailable: there was no answer within the timeouts and retries.
            TeacherAnswerError: the server rejected the request, or its answer does not match it.
            ValueError: some of a completion's tokens are not judged, such as the output of tools.
        """
        rows = aligned_rows(self.pair, self.shared.student_stops, rollouts)
        sequences = self._sequences(rows)
        device, log_p = rollouts.input_ids.device, list[float]()
        if sequences:
            log_p = self.teacher.score(batched(sequences, torch.device("cpu"))).log_p.double().tolist()
        found = Found(sequences, log_p)
        stops = {row.first: _log_sum([found.log_p[i][-1] for i in row.ends]) for row in rows if row.stopped}
        return AlignedLogProbs(**spans(rows, found, stops, int(rollouts.mask.sum()), device))

    def _sequences(self, rows: list[Row]) -> list[ReadSequence]:
        """All texts that the teacher reads; those that stopped with each of its stop tokens."""
        sequences: list[ReadSequence] = []
        for row in rows:
            endings = list(self.shared.teacher_stops) if row.stopped else []
            text = row.aligned.paths[0]
            row.paths.append(len(sequences))
            row.ends += range(len(sequences), len(sequences) + len(endings))
            sequences.append(ReadSequence(row.prompt, [*text, *endings[:1]], 0))
            sequences += [ReadSequence(row.prompt, [*text, end], len(text)) for end in endings[1:]]
            for path, common in zip(row.aligned.paths[1:], row.aligned.common[1:], strict=True):
                row.paths.append(len(sequences))
                sequences.append(ReadSequence(row.prompt, path, common))
        return sequences


def _log_sum(values: list[float]) -> float:
    most = max(values)
    return most + math.log(sum(math.exp(value - most) for value in values))


def reader_of(teacher: Any, pair: Vocabularies, shared: SharedIds, temperature: float, prompts: str) -> _Reader:
    """
    A teacher that reads the student's completions as text.

    Raises:
        ValueError: it is of a kind that cannot.
    """
    if isinstance(teacher, LocalTeacher):
        return CrossTokenizerTeacher(teacher, pair, shared, temperature, prompts)
    if isinstance(teacher, ServedTeacher):
        return ServedReader(teacher, pair, shared, prompts)
    raise ValueError(
        f"`cross_tokenizer=True` asks a model in this process or a served one to read texts; a {kind_of(teacher)} "
        "scores the student's ids. Give a model or its name as the teacher."
    )
