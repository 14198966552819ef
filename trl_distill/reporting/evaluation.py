"""Evaluates a model's own answers: scores, KL to a teacher, length and diversity, each with an interval.

An [`Answer`] describes one completion; [`summarise`] turns the answers of a model into estimates. Intervals are
bootstrapped over prompts, since answers to one prompt are similar. Answers are sampled by `data/sampling.py`; tables
and files are made by `evaluation_table.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from ..data.readers import PromptReader, continued, encoder_of
from ..data.rewards import RewardFunction, scores
from ..data.sampling import (
    SampledCompletion,
    Sampling,
    answer_texts,
    preserving_state,
    rollouts_of,
    sample_completions,
    scorer_of,
)
from ..heads.fused import DivergenceSpec, fused_divergence
from ..images import EncodedPrompt
from .tokens.spans import Reading, span_values


DRAWS = 2000  # bootstrap samples


DISTINCT = (1, 2, 4)  # lengths of the n-grams of distinct-n


@dataclass(frozen=True)
class Answer:
    """
    One completion.

    Attributes:
        prompt (`int`): index of its prompt in the dataset.
        ids (`tuple[int, ...]`): its token ids, stop token included.
        score (`float`, *optional*): the verifiers' score; `None` if they gave none.
        truncated (`bool`): whether it was cut before a stop token.
        kl (`float`, *optional*): KL(model ‖ teacher) summed over its tokens, nats; `None` without a teacher.
        text (`str`): what it says, without the stop token.
        judged (`float`, *optional*): a judge's score beside that of the verifiers.
    """

    prompt: int
    ids: tuple[int, ...]
    score: float | None
    truncated: bool
    kl: float | None = None
    text: str = ""
    judged: float | None = None


class Estimate(NamedTuple):
    """
    A mean over prompts, and its bootstrapped 95 % interval.

    If all prompts have the same value, or there is only one, the interval has width 0 and means nothing.
    """

    value: float
    low: float
    high: float


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """
    Unbiased estimate of the probability that at least one of `k` answers is right.

    1 − C(samples − correct, k) / C(samples, k), Chen et al. 2021, https://arxiv.org/abs/2107.03374.

    Args:
        samples (`int`): number of answers.
        correct (`int`): how many of them are right.
        k (`int`): from 1 to `samples`.

    Raises:
        ValueError: `k` is out of range.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be estimated from {samples} answers; `k` must lie between 1 and that.")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def distinct(sequences: Iterable[Sequence[int]], n: int) -> float:
    """Distinct-n: the share of different n-grams among all n-grams of the sequences; `nan` if there are none."""
    grams = [tuple(ids[i : i + n]) for ids in sequences for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def estimate(totals: Sequence[float], counts: Sequence[float] | None = None, seed: int = 0) -> Estimate:
    """
    Σ totals / Σ counts over prompts, with a bootstrapped 95 % interval; prompts with NaN or infinity are left out.

    Args:
        totals (`Sequence[float]`): a sum, or a mean, for each prompt.
        counts (`Sequence[float]`, *optional*): number of terms of each sum. Defaults to 1.
        seed (`int`): random seed of the bootstrap.
    """
    both = np.array([totals, counts if counts is not None else [1.0] * len(totals)], dtype=float)  # (2, P)
    both = both[:, np.isfinite(both).all(axis=0)]
    if both.shape[1] == 0 or both[1].sum() == 0:
        return Estimate(math.nan, math.nan, math.nan)
    drawn = np.random.default_rng(seed).integers(both.shape[1], size=(DRAWS, both.shape[1]))
    sums = both[:, drawn].sum(axis=-1)  # (2, DRAWS)
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = np.nanpercentile(sums[0] / sums[1], [2.5, 97.5])
    return Estimate(float(both[0].sum() / both[1].sum()), float(low), float(high))


def summarise(answers: Sequence[Answer], ks: Sequence[int] = (), correct_from: float = 1.0) -> dict[str, Estimate]:
    """
    Estimates from the answers of one model.

    Args:
        answers (`Sequence[Answer]`): the same number for each prompt.
        ks (`Sequence[int]`): values of k for pass@k. Defaults to powers of two.
        correct_from (`float`): lowest score of a right answer.

    Returns:
        `dict` by name: "avg@k", the mean score, "pass@k" and "pass@k − avg@k" if there are scores; "kl", nats per
        token, if there is a teacher; "length" in tokens; the share "truncated"; "distinct-n" per prompt.
    """
    groups: dict[int, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.prompt, []).append(answer)
    rows = list(groups.values())
    most = max((len(group) for group in rows), default=0)
    found: dict[str, Estimate] = {}
    known = [[answer.score for answer in group if answer.score is not None] for group in rows]
    if any(known):
        means = [float(np.mean(group)) if group else math.nan for group in known]
        found[f"avg@{most}"] = estimate(means)
        right = [sum(score >= correct_from for score in group) for group in known]
        for k in ks or [2**i for i in range(most.bit_length()) if 2**i <= most]:
            passed = [
                pass_at_k(len(group), n, k) if len(group) >= k else math.nan
                for group, n in zip(known, right, strict=True)
            ]
            found[f"pass@{k}"] = estimate(passed)
            if k == most > 1:
                found[f"pass@{k} − avg@{k}"] = estimate([a - b for a, b in zip(passed, means, strict=True)])
    if any(answer.judged is not None for answer in answers):
        found |= _judged(rows, most, correct_from)
    tokens = [float(sum(len(answer.ids) for answer in group)) for group in rows]
    sizes = [float(len(group)) for group in rows]
    if any(answer.kl is not None for answer in answers):
        sums = [sum(math.nan if answer.kl is None else answer.kl for answer in group) for group in rows]
        found["kl"] = estimate(sums, tokens)
    found["length"] = estimate(tokens, sizes)
    found["truncated"] = estimate([float(sum(answer.truncated for answer in group)) for group in rows], sizes)
    for n in DISTINCT:
        found[f"distinct-{n}"] = estimate([distinct((answer.ids for answer in group), n) for group in rows])
    return found


def _judged(rows: Sequence[Sequence[Answer]], most: int, correct_from: float) -> dict[str, Estimate]:
    """A judge's mean score, and the share of answers that it finds right where the verifiers do, or neither does."""
    means, same = list[float](), list[float]()
    for group in rows:
        scores = [answer.judged for answer in group if answer.judged is not None]
        both = [(one.judged, one.score) for one in group if one.judged is not None and one.score is not None]
        means.append(float(np.mean(scores)) if scores else math.nan)
        agree = [(judged >= correct_from) == (score >= correct_from) for judged, score in both]
        same.append(float(np.mean(agree)) if agree else math.nan)
    return {f"judge avg@{most}": estimate(means), "judge agrees": estimate(same)}


def answer_all(
    model: Any,
    rows: Sequence[dict[str, Any]],
    tokenizer: Any,
    how: Sampling,
    verifiers: Sequence[RewardFunction] = (),
    teacher: Any = None,
    merged: Sequence[int] = (),
    batch_size: int = 64,
    prefixes: Sequence[Sequence[int]] | None = None,
    template_kwargs: dict[str, Any] | None = None,
    reading: Reading | None = None,
    reader: PromptReader | None = None,
) -> Iterator[list[Answer]]:
    """
    Sample and score answers of a model, batch by batch.

    Args:
        model: a transformers model. For the KL, model and teacher must be extended by
            [`~trl_distill.models.hidden_states.add_teacher_forward`].
        rows (`Sequence[dict]`): rows with a "prompt" and the columns that the verifiers need.
        tokenizer: the model's tokenizer.
        how ([`~trl_distill.data.sampling.Sampling`]): length, temperature, answers per prompt, seed.
        verifiers: reward functions; an answer's score is the sum of theirs.
        teacher (*optional*): the teacher, for the KL. It reads the row's "teacher_prompt", if there is one.
        merged (`Sequence[int]`): stop ids that count as one in the KL.
        batch_size (`int`): number of answers at a time.
        prefixes (*optional*): for each row, ids with which its answers begin; they count as the model's own.
        template_kwargs (`dict`, *optional*): for the chat template, such as `{"enable_thinking": False}`.
        reading ([`~trl_distill.reporting.tokens.spans.Reading`], *optional*): in place of `teacher`, one that has
            another tokenizer; the KL is then that between texts, in part from the sampled tokens.
        reader ([`~trl_distill.data.readers.PromptReader`], *optional*): how both read prompts, for vision-language
            models. Defaults to the tokenizer, with `template_kwargs`.

    Yields:
        `list[Answer]`: the answers of a batch.
    """
    size, device = max(1, batch_size // how.generations), next(model.parameters()).device
    reader = reader or PromptReader(encoder_of(tokenizer, template_kwargs=template_kwargs))
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        begun: Sequence[Sequence[int]] = prefixes[start : start + size] if prefixes is not None else [[]] * len(part)
        prompts = [reader.prompt(row) for row in part]
        whole = _written(model, part, prompts, begun, tokenizer.pad_token_id, replace(how, seed=how.seed + start))
        read = [reader.teacher_prompt(one.row, one.read) for one in whole] if teacher is not None else []
        if reading is None:
            kl = _sequence_kl(model, teacher, whole, read, tokenizer.pad_token_id, how.kl_temperature, merged, device)
        else:
            kl = _text_kl(model, reading, whole, tokenizer.pad_token_id, how.kl_temperature, device)
        places = [start + i // how.generations for i in range(len(whole))]
        yield _scored(whole, places, kl, verifiers, tokenizer)


def _scored(
    written: Sequence[SampledCompletion],
    prompts: Sequence[int],
    kl: Sequence[float | None],
    verifiers: Sequence[RewardFunction],
    tokenizer: Any,
) -> list[Answer]:
    """Answers to the prompts with these numbers, with their texts and scores."""
    by_name = scores(written, verifiers, tokenizer)
    ends = {token for one in written if not one.truncated for token in one.completion[-1:]}
    texts = answer_texts(tokenizer, [one.completion for one in written], ends)
    return [
        Answer(
            prompts[i],
            tuple(one.completion),
            _total(given_scores[i] for given_scores in by_name.values()),
            one.truncated,
            kl[i],
            texts[i],
        )
        for i, one in enumerate(written)
    ]


def _written(
    model: Any,
    rows: Sequence[dict[str, Any]],
    prompts: Sequence[EncodedPrompt],
    begun: Sequence[Sequence[int]],
    pad: int,
    how: Sampling,
) -> list[SampledCompletion]:
    """Sampled answers, `how.generations` to each row in turn, with the ids that they begin with."""
    given = [continued(prompt, prefix) for prompt, prefix in zip(prompts, begun, strict=True)]
    written = sample_completions(model, rows, given, pad, how)
    places = [i // how.generations for i in range(len(written))]
    return [
        replace(
            one,
            prompt=prompts[place].ids,
            completion=[*begun[place], *one.completion],
            encoded=prompts[place] if one.encoded else None,
        )
        for place, one in zip(places, written, strict=True)
    ]


def _total(found: Iterable[float | None]) -> float | None:
    known = [score for score in found if score is not None]
    return sum(known) if known else None


@torch.no_grad()
def _sequence_kl(
    model: Any,
    teacher: Any,
    written: Sequence[SampledCompletion],
    read: Sequence[EncodedPrompt],
    pad: int,
    temperature: float,
    merged: Sequence[int],
    device: torch.device,
) -> Sequence[float | None]:
    """KL of each completion to the teacher, which reads the prompts `read`, nats, summed over tokens; or `None`."""
    if teacher is None:
        return [None] * len(written)
    completions = [one.completion for one in written]
    rollouts = rollouts_of([one.read for one in written], completions, pad, device)
    with preserving_state(model, teacher):
        ours, theirs = scorer_of(model)(rollouts), scorer_of(teacher)(rollouts_of(read, completions, pad, device))
        form = DivergenceSpec(temperature=temperature, stops=tuple(merged))
        found = fused_divergence(ours.hidden, ours.head, theirs.hidden, theirs.head, form).divergence
    return [part.sum().item() for part in found.split([len(one.completion) for one in written])]


@torch.no_grad()
def _text_kl(
    model: Any,
    reading: Reading,
    written: Sequence[SampledCompletion],
    pad: int,
    temperature: float,
    device: torch.device,
) -> Sequence[float | None]:
    """The same to a teacher with another tokenizer, between texts: an unbiased estimate, as in training."""
    rollouts = rollouts_of([one.read for one in written], [one.completion for one in written], pad, device)
    with preserving_state(model):
        states, signal = scorer_of(model)(rollouts), reading.signal(written, pad, device)
        values, _ = span_values(states, signal, written, reading.stops, temperature)
    return [value.sum().item() for value in values]


def difference(answers: Sequence[Answer], others: Sequence[Answer]) -> Estimate:
    """Mean score minus that of other answers to the same prompts, with a paired interval."""
    means: list[dict[int, list[float]]] = [{}, {}]
    for found, which in zip(means, (answers, others), strict=True):
        for answer in which:
            found.setdefault(answer.prompt, [])
            if answer.score is not None:
                found[answer.prompt].append(answer.score)
    both = [(means[0][prompt], means[1].get(prompt, [])) for prompt in means[0]]
    return estimate([float(np.mean(a) - np.mean(b)) if a and b else math.nan for a, b in both])
