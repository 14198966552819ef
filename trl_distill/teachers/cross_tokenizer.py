"""A teacher with another tokenizer: it reads the student's completions as text, in its own tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..alignment.completions import AlignedCompletion, Place, align
from ..alignment.vocabularies import Vocabularies
from ..heads.few_ids import log_probs_of
from ..rollouts import Rollouts
from ..signals import AlignedStates, HiddenStates, SharedIds
from .base import Teacher, is_sharded
from .local import LocalTeacher


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


@dataclass
class _Row:
    """One completion, and where its tokens are among the judged ones of all."""

    aligned: AlignedCompletion
    stopped: bool
    prompt: torch.Tensor
    first: int
    count: int
    paths: list[int] = field(default_factory=list)  # numbers of the sequences that the teacher reads


class CrossTokenizerTeacher(Teacher):
    """
    Scores completions of a student with another tokenizer.

    `score` expects rollouts in which the prompts are the teacher's, in its own tokens and template, and the completions
    the student's. The teacher reads the text of each completion, and, where its tokens for a beginning of that text are
    other ones than those for the whole, that beginning too.

    Args:
        teacher ([`~trl_distill.teachers.local.LocalTeacher`]): the model, resident or parked.
        pair ([`~trl_distill.alignment.vocabularies.Vocabularies`]): the tokenizers.
        shared ([`~trl_distill.signals.SharedIds`]): ids that are summed exactly, and both models' stop tokens.
        temperature (`float`): softmax temperature of the divergence.

    Raises:
        ValueError: the teacher is of another kind, or its weights are sharded.
    """

    gives = AlignedStates

    def __init__(self, teacher: Teacher, pair: Vocabularies, shared: SharedIds, temperature: float):
        if not isinstance(teacher, LocalTeacher):
            raise ValueError(
                f"`cross_tokenizer=True` reads hidden states of a teacher in this process; a {type(teacher).__name__} "
                "is not supported yet. Give a model or its name as the teacher."
            )
        if is_sharded(teacher.accelerator):
            raise ValueError(
                "`cross_tokenizer=True` with ZeRO-3 or FSDP is not supported yet: processes would run different "
                "numbers of forward passes. Use plain data parallelism or ZeRO-2, with `teacher_offload=True` if the "
                "teacher does not fit beside the student."
            )
        self.teacher, self.pair, self.shared, self.temperature_of_divergence = teacher, pair, shared, temperature
        self.per_generation, self.module = teacher.per_generation, teacher.module

    @contextmanager
    def on_device(self) -> Iterator[nn.Module | None]:
        with self.teacher.on_device() as model:
            yield model

    @torch.no_grad()
    def score(self, rollouts: Rollouts) -> AlignedStates:
        """
        Align the completions, and run the teacher on their texts.

        Raises:
            ValueError: some of a completion's tokens are not judged, such as the output of tools.
        """
        rows = self._aligned(rollouts)
        count, device = int(rollouts.mask.sum()), self.teacher.accelerator.device
        if not rows:
            return self._nothing(count, device)
        read, common = self._sequences(rows)
        states = self.teacher.score(read)
        with self.teacher.accelerator.autocast():
            log_p, stop_log_p = self._log_probs(states, read)
        counts = read.mask.sum(1).tolist()
        offsets = [0, *itertools.accumulate(counts)]
        found = _Found(
            [log_p[start:stop] for start, stop in itertools.pairwise(offsets)],
            [stop_log_p[stop - 1] for stop in offsets[1:]],
            offsets,
            common,
        )
        return self._signal(rows, found, states, count)

    def _aligned(self, rollouts: Rollouts) -> list[_Row]:
        """The rows with judged tokens."""
        length = rollouts.mask.shape[1]
        attended, first = rollouts.attention_mask.bool().cpu(), 0
        ids, mask, rows = rollouts.input_ids.cpu(), rollouts.mask.cpu(), []
        for row in range(len(rollouts)):
            judged = int(mask[row].sum())
            if not judged:
                continue
            if not torch.equal(mask[row], attended[row, -length:]):
                raise ValueError(
                    "Some tokens of a completion are not the student's, such as a tool's output, which the teacher "
                    "would read in the student's template. `cross_tokenizer=True` has no tools yet: leave them out."
                )
            completion = ids[row, -length:][mask[row]].tolist()
            stopped = completion[-1] in self.shared.student_stops
            aligned = align(self.pair, completion[: judged - stopped], stopped)
            prompt = ids[row, :-length][attended[row, :-length]]
            rows.append(_Row(aligned, stopped, prompt, first, judged))
            first += judged
        return rows

    def _sequences(self, rows: list[_Row]) -> tuple[Rollouts, list[int]]:
        """All texts that the teacher reads, with a stop token behind each; and the first token of each that counts."""
        prompts: list[torch.Tensor] = []
        texts: list[torch.Tensor] = []
        common: list[int] = []
        end = self.shared.teacher_stops[0]
        for row in rows:
            for number, path in enumerate(row.aligned.paths):
                row.paths.append(len(texts))
                prompts.append(row.prompt)
                texts.append(torch.tensor([*path, end]))
                common.append(row.aligned.common[number] if number else 0)
        place = torch.arange(max(len(text) for text in texts))
        lengths = torch.tensor([len(text) for text in texts])[:, None]
        mask = (place < lengths) & (place >= torch.tensor(common)[:, None])
        attended = [torch.ones_like(prompt) for prompt in prompts]
        ids = [
            pad_sequence(prompts, batch_first=True, padding_side="left"),
            pad_sequence(texts, batch_first=True),
        ]
        masks = [pad_sequence(attended, batch_first=True, padding_side="left"), (place < lengths).long()]
        device = self.teacher.accelerator.device
        read = Rollouts(torch.cat(ids, 1).to(device), torch.cat(masks, 1).to(device), mask.to(device))
        return read, common

    def _log_probs(self, states: HiddenStates, read: Rollouts) -> tuple[list[float], list[float]]:
        """The teacher's log-probabilities of its tokens and of stopping, at each of its positions, nats."""
        ids = read.input_ids[:, -read.mask.shape[1] :][read.mask]
        stops = torch.tensor(self.shared.teacher_stops, device=ids.device).expand(len(ids), -1)
        asked = torch.cat([ids[:, None], stops], dim=1)
        head = states.head
        log_p, _ = log_probs_of(states.hidden, head, asked, head.vocab_size, self.temperature_of_divergence)
        log_p = log_p.double()
        return log_p[:, 0].tolist(), log_p[:, 1:].logsumexp(-1).tolist()

    def _signal(self, rows: list[_Row], found: _Found, states: HiddenStates, count: int) -> AlignedStates:
        signal = self._nothing(count, states.hidden.device, states)
        at: list[int] = []
        source: list[int] = []
        log_p = [0.0] * count
        starts, whole, single, charged = ([False] * count for _ in range(4))
        for row in rows:
            aligned = row.aligned
            sums = [found.log_prob_before(row.paths, place) for place in aligned.places]
            sums[-1] += found.stop(row.paths) if row.stopped else 0.0
            for number, start in enumerate(aligned.starts):
                here = row.first + start
                at.append(here)
                source.append(found.state(row.paths, aligned.places[number]))
                starts[here], single[here] = True, aligned.single[number]
                log_p[here] = sums[number + 1] - sums[number] if start < aligned.end else 0.0
            for token in range(row.count):
                whole[row.first + token] = token < aligned.end
            charged[row.first : row.first + len(aligned.charged)] = aligned.charged
        device = states.hidden.device
        index = torch.tensor(at, device=device)
        signal.hidden.index_copy_(0, index, states.hidden[torch.tensor(source, device=device)])
        signal.log_p = torch.tensor(log_p, dtype=torch.float32, device=device)
        signal.starts, signal.whole, signal.single, signal.charged = (
            torch.tensor(values, device=device) for values in (starts, whole, single, charged)
        )
        return signal

    def _nothing(self, count: int, device: torch.device, states: HiddenStates | None = None) -> AlignedStates:
        """A signal without spans, for `count` tokens."""
        if states is None:  # a forward pass of one token, for the width and the head
            one = torch.tensor([[self.shared.teacher_stops[0]] * 2], device=device)
            states = self.teacher.score(Rollouts(one, torch.ones_like(one), torch.ones_like(one[:, :1]).bool()))
        hidden = states.hidden.new_zeros(count, states.hidden.shape[-1])
        flags = [torch.zeros(count, dtype=torch.bool, device=device) for _ in range(4)]
        log_p = torch.zeros(count, device=device)
        starts, whole, single, charged = flags
        return AlignedStates(hidden, states.head, starts, log_p, whole, single, charged, self.shared)


@dataclass
class _Found:
    """
    The teacher's log-probabilities on all sequences, and where their states are.

    Attributes:
        log_p (`list` of `list[float]`): of each sequence's tokens that count, nats; the last is the token behind it.
        stops (`list[float]`): of stopping after each sequence.
        offsets (`list[int]`): index of each sequence's first state.
        common (`list[int]`): each sequence's first token that counts.
    """

    log_p: list[list[float]]
    stops: list[float]
    offsets: list[int]
    common: list[int]

    def __post_init__(self) -> None:
        self.sums = [[0.0, *itertools.accumulate(values)] for values in self.log_p]

    def log_prob_before(self, paths: list[int], place: Place) -> float:
        """The log-probability of the tokens before a place, nats."""
        sequence = paths[place.path]
        common = self.common[sequence]
        before = self.sums[paths[0]][common] if place.path else 0.0
        return before + self.sums[sequence][place.count - common]

    def state(self, paths: list[int], place: Place) -> int:
        """Index of the state that predicts the token at a place."""
        sequence = paths[place.path]
        return self.offsets[sequence] + place.count - self.common[sequence]

    def stop(self, paths: list[int]) -> float:
        return self.stops[paths[0]]
