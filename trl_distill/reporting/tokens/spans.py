"""Completions that a teacher with another tokenizer has read as text: spans in both spellings, and what they cost.

The same numbers as in training: a span's cost stands at its first token, exact where it is one closed id of both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ...alignment.completions import align
from ...alignment.spellings import spellings
from ...data.sampling import SampledCompletion, Signals, prompt_ids, rollouts_of, teacher_prompt_ids
from ...estimators.cross_tokenizer import CrossTokenizer, SpanMeasures
from ...heads.few_ids import top_ids
from ...signals import AlignedStates, HiddenStates
from .collect import completions_of, ids_in
from .table import TOP, Completion, Opinion, Span, View
from .texts import label


@dataclass(frozen=True)
class Reading:
    """
    How a teacher reads completions as text.

    Attributes:
        score (`Callable`): the teacher's, from rollouts with its own prompts to
            [`~trl_distill.signals.AlignedStates`] or [`~trl_distill.signals.AlignedLogProbs`].
        pair ([`~trl_distill.alignment.vocabularies.Vocabularies`]): both tokenizers.
        tokenizer (`PreTrainedTokenizerBase`): the teacher's.
        stops (`Sequence[int]`): the student's stop tokens.
        template_kwargs (`dict`, *optional*): of the chat template.
    """

    score: Callable[..., Any]
    pair: Any
    tokenizer: PreTrainedTokenizerBase
    stops: Sequence[int]
    template_kwargs: dict[str, Any] | None = None

    def signal(self, written: Sequence[SampledCompletion], pad: int, device: Any) -> Any:
        """The teacher's signal for completions, after its own prompts."""
        ids_of = functools.partial(prompt_ids, self.tokenizer, template_kwargs=self.template_kwargs)
        prompts = [
            teacher_prompt_ids(row.row, ids_of(row.row["prompt"], tools=row.row.get("tools")), ids_of)
            for row in written
        ]
        return self.score(rollouts_of(prompts, [row.completion for row in written], pad, device))


@torch.no_grad()
def span_values(
    states: HiddenStates, signal: Any, written: Sequence[SampledCompletion], stops: Sequence[int], temperature: float
) -> tuple[list[torch.Tensor], SpanMeasures]:
    """
    What each token's span costs: of each completion a tensor `(n,)`, nats, at the first tokens of spans; and measures.

    Args:
        states ([`~trl_distill.signals.HiddenStates`]): the student's.
        signal: the teacher's, as `Reading.signal` returns it.
        written (`list` of [`~trl_distill.data.sampling.SampledCompletion`]): the completions.
        stops (`Sequence[int]`): the student's stop tokens.
        temperature (`float`): of both models.
    """
    estimator = CrossTokenizer(temperature, sorted(stops))
    device = states.hidden.device
    sampled = torch.tensor([token for row in written for token in row.completion], device=device)
    with states.head.gathered() as head:
        measures = estimator.measure(states.hidden, head, signal, sampled, None)
    counts, values, start = [len(row.completion) for row in written], [], 0
    for count in counts:
        part = slice(start, start + count)
        own = SpanMeasures(**{name: found[None, part] for name, found in measures.tensors().items()})
        ones = torch.ones(1, count, device=device)
        values.append(estimator.term(own, own.log_q, ones, ones)[0])
        start += count
    return values, measures


@torch.no_grad()
def scored_texts(
    written: Sequence[SampledCompletion],
    students: Sequence[Signals],
    reading: Reading,
    tokenizer: PreTrainedTokenizerBase,
    device: Any,
    temperature: float = 1.0,
) -> list[Completion]:
    """As [`~trl_distill.reporting.tokens.collect.scored`], for a teacher with another tokenizer."""
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int)
    signal = reading.signal(written, pad, device)
    rollouts = rollouts_of([row.read for row in written], [row.completion for row in written], pad, device)
    views: list[View] = []
    log_p: list[float] = []
    for student in students:
        states = student(rollouts)
        values, measures = span_values(states, signal, written, reading.stops, temperature)
        assert measures.policy_log_q is not None
        assert measures.span_log_p is not None
        log_q, top = measures.policy_log_q.tolist(), _top(states, temperature)
        views.append(View(tuple(log_q), tuple(top), tuple(torch.cat(values).tolist()), (math.nan,) * len(log_q)))
        log_p = torch.where(measures.starts, measures.span_log_p, math.nan).tolist()  # type: ignore[arg-type]
    of_teacher = Opinion(tuple(log_p), tuple(_of_teacher(signal, temperature)))
    return completions_of(written, tokenizer, of_teacher, views, [_spans(reading, row) for row in written])


def _spans(reading: Reading, row: SampledCompletion) -> tuple[Span, ...]:
    ids = row.completion[: len(row.completion) - (not row.truncated)]
    pair = reading.pair
    return tuple(
        Span(
            one.start,
            one.stop,
            pair.student.shown(list(one.student)),
            pair.teacher.shown(list(one.teacher)),
            one.exact,
            one.charged,
        )
        for one in spellings(pair, ids, align(pair, ids, not row.truncated))
    )


def _top(states: HiddenStates, temperature: float) -> list[tuple[tuple[int, float], ...]]:
    """The most likely ids at each position and their probabilities."""
    with states.head.gathered() as head:
        ids = top_ids(states.hidden, head, min(TOP, head.vocab_size))
        found = []
        for part in range(len(ids)):
            logits = head.logits(states.hidden[part : part + 1].to(head.parameters()[0])).float()[0] / temperature
            p = logits.softmax(-1)
            found.append(tuple((int(i), float(p[i])) for i in ids[part]))
    return found


def _of_teacher(signal: Any, temperature: float) -> list[tuple[tuple[int, float], ...]]:
    """The teacher's most likely ids where spans begin, as labels of their own (see [`teacher_label`]); else none."""
    empty: list[tuple[tuple[int, float], ...]] = [()] * len(signal.starts)
    if not isinstance(signal, AlignedStates):
        return empty
    at = signal.starts.nonzero()[:, 0]
    for place, top in zip(at.tolist(), _top(HiddenStates(signal.hidden[at], signal.head), temperature), strict=True):
        empty[place] = tuple((teacher_label(i), p) for i, p in top)
    return empty


def teacher_label(i: int) -> int:
    """The number under which a teacher's id is labelled, apart from the student's ids."""
    return -1 - i


def labels_of_both(
    completions: Sequence[Completion], own: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase
) -> dict[int, str]:
    """The text of every id that occurs, of the student and (with negative numbers) of the teacher."""
    return {i: label(own, i) if i >= 0 else label(other, -1 - i) for i in ids_in(completions)}
