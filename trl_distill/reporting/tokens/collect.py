"""Collects the data of a report: how student and teacher score each token of a completion, and rewards.

Works with any function from `Rollouts` to `HiddenStates`, in training and outside of it. Heads are applied to a few
positions at a time. Completions are sampled by `data/sampling.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ...data.images import prompt_of
from ...data.readers import PromptReader, encoder_of
from ...data.rewards import RewardFunction, scores
from ...data.sampling import SampledCompletion, Signals, rollouts_of
from ...objective.divergences import as_one_class, summands
from ...signals import HiddenStates
from .pictures import pictures_of
from .table import TOP, Completion, Opinion, Span, View
from .texts import label, token_texts


LOGITS_TILE = 2**24  # elements of a model's logits at a time: 64 MiB in fp32


def compare(
    student: HiddenStates,
    teacher: HiddenStates,
    tokens: torch.Tensor,
    merged: Sequence[int] = (),
    temperature: float = 1.0,
) -> tuple[View, Opinion]:
    """
    Compare a student and its teacher at N tokens.

    Args:
        student, teacher ([`HiddenStates`]): at the positions that predict the tokens.
        tokens (`torch.Tensor` of shape `(N,)`): the ids that were sampled.
        merged (`list[int]`): stop tokens that count as one in the KL, as in training.
        temperature (`float`): softmax temperature of both.

    Returns:
        The student's [`View`] and the teacher's [`Opinion`], over the ids that both have.
    """
    shared = min(student.head.vocab_size, teacher.head.vocab_size)
    found: dict[str, list[Any]] = {name: [] for name in ("kl", "forward_kl", "log_q", "log_p", "top_q", "top_p")}
    size = max(1, LOGITS_TILE // shared)
    for start in range(0, len(tokens), size):
        part = slice(start, start + size)
        log_q, log_p = (_log_probs(signal, part, shared, temperature) for signal in (student, teacher))
        log_p = log_p.to(log_q.device)
        for name, divergence in (("kl", "reverse_kl"), ("forward_kl", "forward_kl")):
            value = summands(divergence, log_q, log_p).sum(-1)
            if merged:
                value = as_one_class(value, log_q[:, list(merged)], log_p[:, list(merged)], divergence)
            found[name] += value.clamp(min=0).tolist()  # rounding can make it negative
        for name, log in (("q", log_q), ("p", log_p)):
            found[f"log_{name}"] += log.gather(1, tokens[part, None].to(log.device))[:, 0].tolist()
            values, ids = log.topk(min(TOP, shared))
            pairs = zip(ids.tolist(), values.exp().tolist(), strict=True)
            found[f"top_{name}"] += [tuple(zip(of_ids, of_values, strict=True)) for of_ids, of_values in pairs]
    columns = {name: tuple(values) for name, values in found.items()}
    view = View(columns["log_q"], columns["top_q"], columns["kl"], columns["forward_kl"])
    return view, Opinion(columns["log_p"], columns["top_p"])


def _log_probs(signal: HiddenStates, part: slice, shared: int, temperature: float) -> torch.Tensor:
    """Log-probabilities `(n, V)` in fp32 over the shared ids."""
    weight, _ = signal.head.parameters()
    logits = signal.head.logits(signal.hidden[part].to(weight))
    return torch.log_softmax(logits[:, :shared].float() / temperature, dim=-1)


@torch.no_grad()
def scored(
    written: Sequence[SampledCompletion],
    students: Sequence[Signals],
    teacher: Signals,
    tokenizer: PreTrainedTokenizerBase,
    device: Any,
    merged: Sequence[int] = (),
    temperature: float = 1.0,
    reader: PromptReader | None = None,
) -> list[Completion]:
    """
    Score one batch of completions with one or several students and the teacher; rewards are left empty.

    If a row has a `teacher_prompt`, the teacher gets it in place of `prompt`.

    Args:
        written (`list` of [`~trl_distill.data.sampling.SampledCompletion`]): the batch.
        students, teacher (`Callable`): from rollouts to hidden states, of models in eval mode.
        tokenizer: the tokenizer of all models.
        device: device of the batches.
        merged, temperature: as in [`compare`].
        reader ([`~trl_distill.data.readers.PromptReader`], *optional*): how the teacher reads prompts. Defaults to the
            tokenizer.
    """
    pad, reader = tokenizer.pad_token_id, reader or PromptReader(encoder_of(tokenizer))
    assert isinstance(pad, int)
    completions = [row.completion for row in written]
    theirs = [reader.teacher_prompt(row.row, row.read) for row in written]
    signal = teacher(rollouts_of(theirs, completions, pad, device))
    rollouts = rollouts_of([row.read for row in written], completions, pad, device)
    tokens = torch.tensor([token for completion in completions for token in completion], device=device)
    of_all = [compare(student(rollouts), signal, tokens, merged, temperature) for student in students]
    return completions_of(written, tokenizer, of_all[0][1], [view for view, _ in of_all])


def completions_of(
    written: Sequence[SampledCompletion],
    tokenizer: PreTrainedTokenizerBase,
    teacher: Opinion,
    views: Sequence[View],
    spans: Sequence[tuple[Span, ...]] | None = None,
) -> list[Completion]:
    """
    A batch of completions with what was said of their tokens; rewards are left empty.

    Args:
        written (`list` of [`~trl_distill.data.sampling.SampledCompletion`]): the batch.
        tokenizer: the student's.
        teacher ([`Opinion`]): on the tokens of all completions, one completion after the other.
        views (`list` of [`View`]): of each student, on the same tokens.
        spans (`list`, *optional*): of each completion, with a teacher that has another tokenizer.
    """
    found, end = [], 0
    for number, row in enumerate(written):
        start, end = end, end + len(row.completion)
        found.append(
            Completion(
                prompt=readable(prompt_of(row.row)),
                pictures=pictures_of(row.row),
                ids=tuple(row.completion),
                texts=token_texts(tokenizer, row.completion),
                truncated=row.truncated,
                rewards={},
                teacher=_cut(teacher, start, end),
                views=tuple(_cut(view, start, end) for view in views),
                spans=spans[number] if spans is not None else (),
            )
        )
    return found


def _cut(opinion: Any, start: int, end: int) -> Any:
    return replace(opinion, **{name: values[start:end] for name, values in vars(opinion).items()})


def readable(prompt: Any) -> str:
    """A prompt as readable text: text unchanged, messages with their roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {_content(message.get('content'))}" for message in prompt)


def _content(content: Any) -> str:
    """A message's content as text, with "[image]" in the place of images."""
    if not isinstance(content, list):
        return content or ""
    texts = ["[image]" if part.get("type") == "image" else part.get("text") or "" for part in content]
    return " ".join(texts)


def with_rewards(
    completions: Sequence[Completion],
    written: Sequence[SampledCompletion],
    functions: Sequence[RewardFunction],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Completion]:
    """Completions with their rewards, see [`~trl_distill.data.rewards.scores`]."""
    by_name = scores(written, functions, tokenizer)
    return [
        replace(completion, rewards={name: scores[i] for name, scores in by_name.items()})
        for i, completion in enumerate(completions)
    ]


def labels_of(completions: Sequence[Completion], tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The text of every id that occurs in a report."""
    return {token: label(tokenizer, token) for token in ids_in(completions)}


def ids_in(completions: Sequence[Completion]) -> list[int]:
    """Every id that occurs in a report, sampled or among the most likely ones."""
    ids = {token for completion in completions for token in completion.ids}
    for completion in completions:
        for opinion in (completion.teacher, *completion.views):
            ids |= {token for top in opinion.top for token, _ in top}
    return sorted(ids)
