"""What a teacher with another tokenizer reads: the texts of completions in its own tokens, and their log-probabilities.

`cross_tokenizer.py` has the teachers; how a completion is aligned is in `trl_distill.alignment`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence

from ..alignment.completions import AlignedCompletion, Place, align
from ..alignment.vocabularies import Vocabularies
from ..rollouts import Rollouts


@dataclass
class Row:
    """
    One completion of the student.

    Attributes:
        aligned ([`~trl_distill.alignment.completions.AlignedCompletion`]): its tokens and the teacher's.
        stopped (`bool`): whether a stop token ends it.
        prompt (`torch.Tensor` of shape `(P,)`): the teacher's prompt.
        first, count (`int`): its place among the judged tokens of all rows, and their number.
        paths (`list[int]`): numbers of the sequences that the teacher reads, one for each of `aligned.paths`.
        ends (`list[int]`): numbers of the sequences whose last tokens are the teacher's stop tokens.
    """

    aligned: AlignedCompletion
    stopped: bool
    prompt: torch.Tensor
    first: int
    count: int
    paths: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)


@dataclass
class ReadSequence:
    """
    A sequence that the teacher reads.

    Attributes:
        prompt (`torch.Tensor` of shape `(P,)`): its prompt.
        ids (`list[int]`): the tokens behind it.
        first (`int`): index of the first of them that counts; the ones before are those of another sequence.
    """

    prompt: torch.Tensor
    ids: list[int]
    first: int


def aligned_rows(pair: Vocabularies, stops: Sequence[int], rollouts: Rollouts) -> list[Row]:
    """
    The rows with judged tokens, aligned.

    Args:
        pair ([`~trl_distill.alignment.vocabularies.Vocabularies`]): the tokenizers.
        stops (`Sequence[int]`): the student's stop tokens.
        rollouts ([`~trl_distill.Rollouts`]): the teacher's prompts, the student's completions.

    Raises:
        ValueError: some of a completion's tokens are not judged, such as the output of tools.
    """
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
        stopped = completion[-1] in stops
        aligned = align(pair, completion[: judged - stopped], stopped)
        prompt = ids[row, :-length][attended[row, :-length]]
        rows.append(Row(aligned, stopped, prompt, first, judged))
        first += judged
    return rows


def batched(sequences: Sequence[ReadSequence], device: torch.device) -> Rollouts:
    """Sequences as rollouts, in which the tokens that count are the judged ones."""
    prompts = [one.prompt for one in sequences]
    texts = [torch.tensor(one.ids, dtype=torch.long) for one in sequences]
    place = torch.arange(max(len(text) for text in texts))
    lengths = torch.tensor([len(text) for text in texts])[:, None]
    mask = (place < lengths) & (place >= torch.tensor([one.first for one in sequences])[:, None])
    attended = [torch.ones_like(prompt) for prompt in prompts]
    ids = [pad_sequence(prompts, batch_first=True, padding_side="left"), pad_sequence(texts, batch_first=True)]
    masks = [pad_sequence(attended, batch_first=True, padding_side="left"), (place < lengths).long()]
    return Rollouts(torch.cat(ids, 1).to(device), torch.cat(masks, 1).to(device), mask.to(device))


class Found:
    """
    The teacher's log-probabilities on all sequences.

    Args:
        sequences (`list` of [`ReadSequence`]): what it read.
        log_p (`list[float]`): of all their tokens that count, one sequence after the other, nats.

    Attributes:
        offsets (`list[int]`): index of each sequence's first token that counts.
    """

    def __init__(self, sequences: Sequence[ReadSequence], log_p: Sequence[float]):
        counts = [len(one.ids) - one.first for one in sequences]
        self.offsets = [0, *itertools.accumulate(counts)]
        self.common = [one.first for one in sequences]
        self.log_p = [log_p[start:stop] for start, stop in itertools.pairwise(self.offsets)]
        self.sums = [[0.0, *itertools.accumulate(values)] for values in self.log_p]

    def log_prob_before(self, row: Row, place: Place) -> float:
        """The log-probability of the teacher's tokens before a place of a completion, nats."""
        sequence = row.paths[place.path]
        common = self.common[sequence]
        before = self.sums[row.paths[0]][common] if place.path else 0.0
        return before + self.sums[sequence][place.count - common]

    def state(self, row: Row, place: Place) -> int:
        """Index of the token that counts at a place."""
        sequence = row.paths[place.path]
        return self.offsets[sequence] + place.count - self.common[sequence]


def spans(
    rows: Sequence[Row], found: Found, stop_log_p: dict[int, float], count: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """
    The columns of [`~trl_distill.signals.AlignedLogProbs`] for `count` judged tokens.

    Args:
        rows (`list` of [`Row`]): the completions.
        found ([`Found`]): the log-probabilities of their texts.
        stop_log_p (`dict[int, float]`): by `Row.first` of those that stopped, the log-probability of stopping, nats.
        count (`int`): judged tokens of all rows.
        device (`torch.device`): of the columns.
    """
    log_p = [0.0] * count
    starts, whole, single, charged = ([False] * count for _ in range(4))
    for row in rows:
        aligned = row.aligned
        sums = [found.log_prob_before(row, place) for place in aligned.places]
        sums[-1] += stop_log_p[row.first] if row.stopped else 0.0
        for number, start in enumerate(aligned.starts):
            here = row.first + start
            starts[here], single[here] = True, aligned.single[number]
            log_p[here] = sums[number + 1] - sums[number] if start < aligned.end else 0.0
        for token in range(row.count):
            whole[row.first + token] = token < aligned.end
        charged[row.first : row.first + len(aligned.charged)] = aligned.charged
    flags = {"starts": starts, "whole": whole, "single": single, "charged": charged}
    columns = {name: torch.tensor(values, dtype=torch.bool, device=device) for name, values in flags.items()}
    return columns | {"log_p": torch.tensor(log_p, dtype=torch.float32, device=device)}
