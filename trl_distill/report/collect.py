"""Models and prompts in, [`Completion`]s out: sampling, what student and teacher think of each token, rewards.

Works with anything that answers `Rollouts` with `HiddenStates`, in training and outside of it, and leaves models and
random numbers as it found them. Heads are applied to a few positions at a time; means and HTML are left to others.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase, set_seed

from ..objective import as_one_class, summands
from ..off_policy import token_ids
from ..signals import HiddenStates, Rollouts
from .rows import TOP, Completion, Opinion, View
from .texts import label, token_texts


Signals = Callable[[Rollouts], HiddenStates]
RewardFunction = Callable[..., list[float | None]]
LOGITS_TILE = 2**24  # elements of whole logits at a time and model: 64 MiB in fp32


@dataclass(frozen=True)
class Sampling:
    """
    How completions are written.

    Attributes:
        limit (`int`): tokens of a completion, with its stop token.
        stops (`tuple[int, ...]`): ids that end one.
        temperature (`float`): of sampling, from the whole vocabulary.
        generations (`int`): completions per prompt.
        seed (`int`): of everything that is drawn.
        suppressed (`tuple[int, ...]`): ids that are never drawn.
    """

    limit: int
    stops: tuple[int, ...]
    temperature: float = 1.0
    generations: int = 1
    seed: int = 0
    suppressed: tuple[int, ...] = ()


@dataclass(frozen=True)
class Written:
    """
    A completion that is not judged yet.

    Attributes:
        row (`dict`): of the dataset: "prompt", perhaps "teacher_prompt", and what rewards ask for.
        prompt (`list[int]`): ids of the prompt.
        completion (`list[int]`): ids of the completion, up to and with its first stop token.
        truncated (`bool`): whether it has none.
    """

    row: dict[str, Any]
    prompt: list[int]
    completion: list[int]
    truncated: bool


@contextmanager
def undisturbed(*models: Any) -> Iterator[None]:
    """Eval mode and random numbers of one's own; every module's mode and every generator's state come back after."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            for model in models:
                model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        random.setstate(python)
        np.random.set_state(numpy)
        torch.clear_autocast_cache()  # casts made without a graph must not reach a forward that needs one


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, template_kwargs: dict[str, Any] | None = None
) -> list[int]:
    """Ids of a prompt: messages through the chat template, with the turn handed over; text as it is."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    encoded: Any = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_dict=True, **(template_kwargs or {})
    )
    return encoded["input_ids"]


def sampled(
    model: Any, rows: Sequence[dict[str, Any]], prompts: Sequence[list[int]], pad: int, how: Sampling
) -> list[Written]:
    """
    Let a model write `how.generations` completions of each prompt, in one batch.

    Args:
        model: with transformers' `generate`.
        rows (`list` of `dict`), prompts (`list[list[int]]`): of equal length.
        pad (`int`): id of padding.
        how ([`Sampling`]): temperature, length, seed.
    """
    device = next(model.parameters()).device
    ids = [torch.tensor(prompt) for prompt in prompts for _ in range(how.generations)]
    padded = pad_sequence(ids, batch_first=True, padding_value=pad, padding_side="left").to(device)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side="left").to(device)
    config = GenerationConfig(  # all that a checkpoint's own settings would otherwise add is switched off
        do_sample=True,
        temperature=how.temperature,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        max_new_tokens=how.limit,
        eos_token_id=list(how.stops),
        pad_token_id=pad,
        suppress_tokens=list(how.suppressed) or None,
    )
    with undisturbed(model):
        set_seed(how.seed)
        output = model.generate(input_ids=padded, attention_mask=mask, generation_config=config)
    written = []
    repeated = [pair for pair in zip(rows, prompts, strict=True) for _ in range(how.generations)]
    for (row, prompt), completion in zip(repeated, output[:, padded.shape[1] :].tolist(), strict=True):
        end = next((place for place, token in enumerate(completion) if token in how.stops), None)
        written.append(Written(row, prompt, completion[: None if end is None else end + 1], end is None))
    return written


def given(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, how: Sampling) -> Written:
    """The dataset's own completion of a row, tokenised as for off-policy batches."""
    if not row.get("completion"):
        raise ValueError(
            f"A row has the completion {row.get('completion')!r}, but the dataset's own were asked for. Drop "
            "such rows, or let the student write (`--completions sample`)."
        )
    prompt, completion = token_ids(row, tokenizer, how.stops, how.limit)
    return Written(row, prompt, completion, completion[-1] not in how.stops)


def rollouts_of(prompts: Sequence[list[int]], completions: Sequence[list[int]], pad: int, device: Any) -> Rollouts:
    """A batch in the form that students and teachers judge: `(B, P + C)`, padded on both sides."""
    tensors = [[torch.tensor(row) for row in rows] for rows in (prompts, completions)]
    padded, masks = [], []
    for rows, side in zip(tensors, ("left", "right"), strict=True):
        padded.append(pad_sequence(rows, batch_first=True, padding_value=pad, padding_side=side))
        masks.append(pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side))
    ids, attention = torch.cat(padded, dim=1).to(device), torch.cat(masks, dim=1).to(device)
    return Rollouts(ids, attention, masks[1].bool().to(device))


def compared(
    student: HiddenStates,
    teacher: HiddenStates,
    tokens: torch.Tensor,
    merged: Sequence[int] = (),
    temperature: float = 1.0,
) -> tuple[View, Opinion]:
    """
    What a student and its teacher think of N tokens, one after another.

    Args:
        student, teacher ([`HiddenStates`]): at the positions that predict the tokens.
        tokens (`torch.Tensor` of shape `(N,)`): what was sampled there.
        merged (`list[int]`): stop tokens that count as one in the KL, as in training.
        temperature (`float`): softmax temperature of both.

    Returns:
        The student's view and the teacher's opinion, over the ids that both have.
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
            found[name] += value.clamp(min=0).tolist()  # rounding may leave less than nothing
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
def judged(
    written: Sequence[Written],
    students: Sequence[Signals],
    teacher: Signals,
    tokenizer: PreTrainedTokenizerBase,
    device: Any,
    merged: Sequence[int] = (),
    temperature: float = 1.0,
) -> list[Completion]:
    """
    Completions with what one student or several, and the teacher, think of their tokens. One batch; no rewards yet.

    A row's own `teacher_prompt` is what the teacher reads in the place of `prompt`.

    Args:
        written (`list` of [`Written`]): the batch.
        students, teacher: forwards of models in eval mode.
        tokenizer: of all of them.
        device: where batches are made.
        merged, temperature: as in [`compared`].
    """
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int)
    completions = [row.completion for row in written]
    theirs = [
        prompt_ids(tokenizer, row.row["teacher_prompt"]) if row.row.get("teacher_prompt") else row.prompt
        for row in written
    ]
    signal = teacher(rollouts_of(theirs, completions, pad, device))
    rollouts = rollouts_of([row.prompt for row in written], completions, pad, device)
    tokens = torch.tensor([token for completion in completions for token in completion], device=device)
    of_all = [compared(student(rollouts), signal, tokens, merged, temperature) for student in students]
    found, end = [], 0
    for row in written:
        start, end = end, end + len(row.completion)
        views = tuple(_cut(view, start, end) for view, _ in of_all)
        found.append(
            Completion(
                prompt=readable(row.row["prompt"]),
                ids=tuple(row.completion),
                texts=token_texts(tokenizer, row.completion),
                truncated=row.truncated,
                rewards={},
                teacher=_cut(of_all[0][1], start, end),
                views=views,
            )
        )
    return found


def _cut(opinion: Any, start: int, end: int) -> Any:
    return replace(opinion, **{name: values[start:end] for name, values in vars(opinion).items()})


def readable(prompt: Any) -> str:
    """A prompt as a person reads it: text as it is, messages with who says them."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def with_rewards(
    completions: Sequence[Completion],
    written: Sequence[Written],
    functions: Sequence[RewardFunction],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Completion]:
    """
    Completions with the rewards of functions that are called as TRL calls them: prompts, completions, columns.

    Raises:
        ValueError: a function does not give a score, or `None`, for each completion.
    """
    if not functions or not written:
        return list(completions)
    rows = [row.row for row in written]
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name not in ("prompt", "completion")}
    texts = [tokenizer.decode(row.completion, skip_special_tokens=True) for row in written]
    answers = [
        text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
        for row, text in zip(rows, texts, strict=True)
    ]
    by_name: dict[str, list[float | None]] = {}
    for function in functions:
        name = getattr(function, "__name__", type(function).__name__)
        given_ids = [row.completion for row in written]
        scores = function(
            prompts=[row["prompt"] for row in rows], completions=answers, completion_ids=given_ids, **columns
        )
        if not isinstance(scores, Sequence) or len(scores) != len(written):
            raise ValueError(
                f"The reward function {name!r} returned {scores!r:.100} for {len(written)} completions. It must return "
                "a list with a number, or `None`, for each of them."
            )
        by_name[name] = [None if score is None else float(score) for score in scores]
    return [
        replace(completion, rewards={name: scores[i] for name, scores in by_name.items()})
        for i, completion in enumerate(completions)
    ]


def labels_of(completions: Sequence[Completion], tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The text of every id that a report mentions."""
    ids = {token for completion in completions for token in completion.ids}
    for completion in completions:
        for opinion in (completion.teacher, *completion.views):
            ids |= {token for top in opinion.top for token, _ in top}
    return {token: label(tokenizer, token) for token in sorted(ids)}


def answers_with(model: nn.Module) -> Signals:
    """How a model whose forward is extended is asked for its hidden states."""
    return lambda rollouts: model(
        input_ids=rollouts.input_ids, attention_mask=rollouts.attention_mask, rollouts=rollouts
    )
