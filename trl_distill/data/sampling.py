"""Sampling completions outside of training steps, for reports, evaluations and the data engine's local teachers.

Models and random number generators are restored afterwards, and a model's own generation settings are ignored.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase, set_seed

from ..images import EncodedPrompt, Images
from ..models.modes import in_eval_mode
from ..models.properties import backbone_of, has_relative_positions, unwrap_adapter
from ..rollouts import Rollouts
from ..signals import HiddenStates
from .completions import encoded_ids
from .rows import tools_of


Signals = Callable[[Rollouts], HiddenStates]


Prompt = list[int] | EncodedPrompt  # token ids alone, or with images


@dataclass(frozen=True)
class Sampling:
    """
    How completions are sampled.

    Attributes:
        limit (`int`): maximum tokens of a completion, stop token included.
        stops (`tuple[int, ...]`): ids that end one.
        temperature (`float`): softmax temperature; 0 is greedy.
        generations (`int`): completions per prompt.
        seed (`int`): random seed.
        suppressed (`tuple[int, ...]`): ids that are never sampled.
        top_p (`float`): nucleus sampling; 1 is the whole vocabulary.
    """

    limit: int
    stops: tuple[int, ...]
    temperature: float = 1.0
    generations: int = 1
    seed: int = 0
    suppressed: tuple[int, ...] = ()
    top_p: float = 1.0

    @property
    def kl_temperature(self) -> float:
        """Softmax temperature of a KL on these completions: theirs, and 1 on greedy ones, which leave none."""
        return self.temperature or 1.0


@dataclass(frozen=True)
class SampledCompletion:
    """
    A completion with its prompt and row, without scores.

    Attributes:
        row (`dict`): the row of the dataset: "prompt", optionally "teacher_prompt", and columns for rewards.
        prompt (`list[int]`): ids of the prompt.
        completion (`list[int]`): ids of the completion, up to and including its first stop token.
        truncated (`bool`): whether it was cut before a stop token.
        encoded ([`~trl_distill.images.EncodedPrompt`], *optional*): the prompt with its images.
    """

    row: dict[str, Any]
    prompt: list[int]
    completion: list[int]
    truncated: bool
    encoded: EncodedPrompt | None = None

    @property
    def read(self) -> EncodedPrompt:
        """The prompt as a model reads it."""
        return self.encoded or EncodedPrompt(self.prompt)


@contextmanager
def preserving_state(*models: Any) -> Iterator[None]:
    """Context in eval mode; every module's mode and every random generator's state are restored afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with in_eval_mode(*models), torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.clear_autocast_cache()  # casts made without a graph must not be used in training


@contextmanager
def without_own_settings(model: Any) -> Iterator[None]:
    """Context without the model's generation settings, which `generate` would use as defaults for those not given."""
    base = unwrap_adapter(model)  # PEFT writes its settings into the base model too
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Any,
    template_kwargs: dict[str, Any] | None = None,
    tools: Any = None,
) -> list[int]:
    """
    Token ids of a prompt.

    Args:
        tokenizer: of the model that continues it.
        prompt (`str` or messages): messages go through the chat template, with a generation prompt; text does not.
        template_kwargs (`dict`, *optional*): keyword arguments of the chat template.
        tools (`list` or `str`, *optional*): a row's column `tools`: JSON schemas for the template, or their JSON text.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    encoded: Any = tokenizer.apply_chat_template(
        prompt, tools=tools_of(tools), add_generation_prompt=True, return_dict=True, **(template_kwargs or {})
    )
    return encoded["input_ids"]


def prompts_ids(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any] | None, tools: list[Any], prompts: list[Any]
) -> list[list[int]]:
    """[`prompt_ids`] of several prompts, each with its row's `tools`."""
    return [prompt_ids(tokenizer, prompt, template_kwargs, own) for prompt, own in zip(prompts, tools, strict=True)]


def teacher_prompt_ids(row: dict[str, Any], prompt: list[int], ids_of: Callable[..., list[int]]) -> list[int]:
    """
    Token ids of the prompt that the teacher reads.

    Args:
        row (`dict`): a row of a dataset.
        prompt (`list[int]`): ids of its prompt, which the teacher reads unless the row has a "teacher_prompt".
        ids_of (`Callable`): ids of a prompt and of the row's `tools=`, as [`prompt_ids`] gives them.
    """
    own = row.get("teacher_prompt")
    return ids_of(own, tools=row.get("tools")) if own else prompt


def answer_texts(
    tokenizer: PreTrainedTokenizerBase, completions: Sequence[Sequence[int]], stops: Collection[int]
) -> list[str]:
    """
    The text of completions, as reward functions and datasets get it: without stop and padding tokens.

    All other special tokens stay, such as those of thoughts and tool calls. A stop token that is not special is text.

    Args:
        tokenizer: of the model that wrote them.
        completions (`list[list[int]]`): their ids.
        stops (`Collection[int]`): ids that end a completion.
    """
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(token for token, text in added if text.special)}
    dropped = {*stops, tokenizer.pad_token_id} & special
    kept = [[token for token in ids if token not in dropped] for ids in completions]
    exact = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}  # Llama 3 asks for the clean-up
    return [str(tokenizer.decode(ids, **exact)) for ids in kept]


def read(prompt: Prompt) -> EncodedPrompt:
    """A prompt with its images, of which token ids alone have none."""
    return prompt if isinstance(prompt, EncodedPrompt) else EncodedPrompt(prompt)


def sample_ids(model: Any, prompts: Sequence[Prompt], pad: int, how: Sampling) -> list[list[tuple[list[int], bool]]]:
    """
    Sample completions of prompts, in one batch.

    The model's own `generation_config` is ignored: settings that are not in `how`, such as `num_beams`, have
    transformers' defaults.

    Args:
        model: a model with transformers' `generate`.
        prompts (`list` of `list[int]` or [`~trl_distill.images.EncodedPrompt`]): at least one id per prompt.
        pad (`int`): id of the padding token.
        how ([`Sampling`]): how to sample.

    Returns:
        `list`: for each prompt `how.generations` completions, as pairs of ids up to and including the first stop id and
        of whether the completion was cut before one.
    """
    device = next(model.parameters()).device
    rows = [read(prompt) for prompt in prompts for _ in range(how.generations)]
    ids = [torch.tensor(row.ids) for row in rows]
    padded = pad_sequence(ids, batch_first=True, padding_value=pad, padding_side="left").to(device)  # (B · n, P)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side="left").to(device)
    images = Images.of_prompts(rows, padded.shape[1], 0, device)
    config = GenerationConfig(
        **_drawing(how),
        max_new_tokens=how.limit,
        eos_token_id=list(how.stops) or None,
        pad_token_id=pad,
        suppress_tokens=list(how.suppressed) or None,
    )
    with preserving_state(model), without_own_settings(model):
        set_seed(how.seed)
        inputs = {"input_ids": padded, "attention_mask": mask, **(images.arguments if images else {})}
        output = model.generate(**inputs, generation_config=config)  # (B · n, P + C)
    found = [until_stop(row, how.stops) for row in output[:, padded.shape[1] :].tolist()]
    return [found[start : start + how.generations] for start in range(0, len(found), how.generations)]


def _drawing(how: Sampling) -> dict[str, Any]:
    """Arguments of `generate` for sampling; filters that transformers applies by default are off."""
    if how.temperature == 0:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": how.temperature,
        "top_p": how.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }


def until_stop(ids: list[int], stops: Sequence[int]) -> tuple[list[int], bool]:
    """Ids up to and including the first stop id, and whether there was none, that is, the completion was cut."""
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    return ids[: None if end is None else end + 1], end is None


def sample_completions(
    model: Any, rows: Sequence[dict[str, Any]], prompts: Sequence[Prompt], pad: int, how: Sampling
) -> list[SampledCompletion]:
    """
    Sample `how.generations` completions of each prompt, in one batch.

    Args:
        model: with transformers' `generate`.
        rows (`list` of `dict`), prompts (as in [`sample_ids`]): of equal length.
        pad (`int`): id of the padding token.
        how ([`Sampling`]): how to sample.

    Raises:
        ValueError: a prompt has no tokens.
    """
    encoded = [read(prompt) for prompt in prompts]
    empty = next((row for row, prompt in zip(rows, encoded, strict=True) if not prompt.ids), None)
    if empty is not None:
        raise ValueError(f"The prompt {empty['prompt']!r} has no tokens, so nothing can be sampled. Drop such rows.")
    return [
        SampledCompletion(row, prompt.ids, ids, truncated, prompt if prompt.images else None)
        for row, prompt, found in zip(rows, encoded, sample_ids(model, encoded, pad, how), strict=True)
        for ids, truncated in found
    ]


def dataset_completion(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    how: Sampling,
    template_kwargs: dict[str, Any] | None = None,
    processor: Any = None,
) -> SampledCompletion:
    """The dataset's completion of a row, tokenised as for off-policy batches. Raises `ValueError` if it has none."""
    if not row.get("completion"):
        raise ValueError(
            f"A row has the completion {row.get('completion')!r} (its columns: {', '.join(row)}), but the dataset's "
            "completions were requested. Drop such rows, or sample from the student (`--completions sample`)."
        )
    prompt, completion = encoded_ids(row, tokenizer, how.stops, how.limit, template_kwargs, processor)
    cut = completion[-1] not in how.stops
    return SampledCompletion(row, prompt.ids, completion, cut, prompt if prompt.images else None)


def rollouts_of(prompts: Sequence[Prompt], completions: Sequence[list[int]], pad: int, device: Any) -> Rollouts:
    """A batch of [`Rollouts`] for students and teachers: `(B, P + C)`, padded on both sides."""
    encoded = [read(prompt) for prompt in prompts]
    tensors = [[torch.tensor(row) for row in rows] for rows in ([prompt.ids for prompt in encoded], completions)]
    padded, masks = [], []
    for rows, side in zip(tensors, ("left", "right"), strict=True):
        padded.append(pad_sequence(rows, batch_first=True, padding_value=pad, padding_side=side))
        masks.append(pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side))
    ids, attention = torch.cat(padded, dim=1).to(device), torch.cat(masks, dim=1).to(device)
    images = Images.of_prompts(encoded, padded[0].shape[1], padded[1].shape[1], device)
    return Rollouts(ids, attention, masks[1].bool().to(device), images)


def scorer_of(model: nn.Module, as_in_training: bool = False) -> Signals:
    """
    A function from rollouts to a model's hidden states; a prompt that rows share is read once.

    Args:
        model (`torch.nn.Module`): extended by [`~trl_distill.models.hidden_states.add_teacher_forward`].
        as_in_training (`bool`): count positions as in training, padding on the left included. Otherwise models with
            absolute positions get position ids, so that padding does not matter.
    """
    base = unwrap_adapter(model)
    takes = inspect.signature(backbone_of(base).forward).parameters
    given = not as_in_training and not has_relative_positions(base.config) and "position_ids" in takes

    def answer(rollouts: Rollouts) -> HiddenStates:
        attended = rollouts.attention_mask
        places = {"position_ids": (attended.cumsum(1) - 1).clamp(min=0)} if given else {}
        return model(**rollouts.arguments, **places, rollouts=rollouts, share_prompts=len(rollouts))

    return answer
