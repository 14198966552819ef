"""Off-policy batches: the dataset's completions in place of rollouts, and which generation batches use them.

Prompts are tokenised as for generation; completions continue them, and are cut, ended and masked like rollouts.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .._trl import prepare_multimodal_messages
from ..images import EncodedPrompt, columns_of
from .images import encode, prompt_of
from .rows import flat_parts, tools_of


def is_on_policy(generation: int, lmbda: float) -> bool:
    """
    Whether generation batch number `generation`, from 0, is written by the student.

    Evenly spaced: of the first n batches, ⌊n λ⌋ are on-policy for every n. This depends on the number alone, so all
    processes agree, and a resumed run continues as it would have.
    """
    written = [math.floor(n * lmbda + 1e-9) for n in (generation, generation + 1)]  # 10 · 0.3 is below 3 in floats
    return written[1] > written[0]


class Turns:
    """Counts generation batches, so that a resumed run continues with the right kind of batch."""

    FILE = "generations.json"  # in a checkpoint

    def __init__(self) -> None:
        self.done = 0

    def next_is_on_policy(self, lmbda: float) -> bool:
        """Count the next generation batch; returns whether the student writes it, see [`is_on_policy`]."""
        self.done += 1
        return is_on_policy(self.done - 1, lmbda)

    def save(self, folder: str, under_way: bool) -> None:
        """Write the number of finished batches; one that is under way is started again after a resume."""
        Path(folder, self.FILE).write_text(json.dumps({"generations": self.done - int(under_way)}))

    def load(self, folder: str | None) -> None:
        """Continue from a checkpoint, or start at 0; without the file it is from a run without off-policy batches."""
        path = Path(folder or "", self.FILE)
        self.done = json.loads(path.read_text())["generations"] if folder and path.is_file() else 0


def token_ids(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
    limit: int | None,
    template_kwargs: dict[str, Any] | None = None,
    processor: Any = None,
) -> tuple[list[int], list[int]]:
    """
    Ids of a row's prompt, and of its completion up to its first stop token, which is added if there is none.

    An image in the prompt is a placeholder here; see [`encoded_ids`].

    Args:
        row (`dict`): "prompt" and "completion", both text or both messages; optionally "tools", for the template.
        tokenizer: the student's.
        stops (`list[int]`): ids that end a completion; the tokenizer's `eos_token_id` is added if none occurs.
        limit (`int`, *optional*): maximum tokens of a completion, stop token included; longer ones are cut.
        template_kwargs (`dict`, *optional*): keyword arguments of the chat template.
        processor (`ProcessorMixin`, *optional*): of a vision-language model; then it renders messages.

    Raises:
        ValueError: the row has no completion, or its prompt has no tokens or ends with an assistant message.
    """
    if not row.get("completion"):
        raise ValueError(
            f"A row has the completion {row.get('completion')!r}, but `lmbda` below 1 trains on the dataset's "
            "completions. Drop such rows, or set `lmbda=1`."
        )
    prefix, answer, special = row["prompt"], row["completion"], True
    if not isinstance(prefix, str):
        tools = {"tools": tools_of(row["tools"])} if row.get("tools") else {}
        prefix, answer = _rendered(prompt_of(row), answer, tokenizer, {**(template_kwargs or {}), **tools}, processor)
        special = False  # the template has written special tokens
    prompt, whole = (tokenizer(text, add_special_tokens=special)["input_ids"] for text in (prefix, prefix + answer))
    if not prompt:
        raise ValueError(f"A row has the prompt {row['prompt']!r}, which has no tokens. Drop such rows.")
    if whole[: len(prompt)] == prompt:
        completion = whole[len(prompt) :]
    else:  # a token spans the boundary; a rollout would continue from the whole prompt
        completion = tokenizer(answer, add_special_tokens=False)["input_ids"]
    ends = [place for place, token in enumerate(completion) if token in stops]
    completion = completion[: ends[0] + 1] if ends else [*completion, tokenizer.eos_token_id]
    return prompt, completion[:limit]


def encoded_ids(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
    limit: int | None,
    template_kwargs: dict[str, Any] | None = None,
    processor: Any = None,
) -> tuple[EncodedPrompt, list[int]]:
    """As [`token_ids`], with the prompt as the model reads it, images included."""
    prompt, completion = token_ids(row, tokenizer, stops, limit, template_kwargs, processor)
    if processor is None or isinstance(row["prompt"], str):
        return EncodedPrompt(prompt), completion
    (encoded,) = encode(processor, [prompt_of(row)], template_kwargs, [row.get("tools")])
    return encoded, completion


def _rendered(
    prompt: list[dict[str, Any]],
    completion: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: dict[str, Any],
    processor: Any = None,
) -> tuple[str, str]:
    """
    Prompt and completion as text: the prompt as for generation, and what the template writes after it.

    Some templates render the prompt differently once it has an answer, such as those that open a thought for generation
    and drop it in finished turns. Then the completion is its text alone, as a rollout would be.
    """
    if prompt[-1]["role"] == "assistant":
        raise ValueError(
            "A row has a prompt that ends with an assistant message, after which a rollout would begin another turn. "
            "Let prompts end with the user's message, and put the beginning of the answer into the completion."
        )
    renderer: Any = processor or tokenizer
    prefix, whole = (
        str(
            renderer.apply_chat_template(
                messages if processor is None else prepare_multimodal_messages(messages),
                tokenize=False,
                add_generation_prompt=opens,
                **template_kwargs,
            )
        )
        for messages, opens in ((prompt, True), ([*prompt, *completion], False))
    )
    if whole.startswith(prefix):
        return prefix, whole[len(prefix) :]
    content = completion[0].get("content")
    content = flat_parts(content) if isinstance(content, list) else content
    if not isinstance(content, str):
        raise ValueError(
            "The chat template renders a prompt with an answer differently than for generation, and the answer "
            f"{completion[0]!r} has no text to use in its place. Use completions with text, or `lmbda=1`."
        )
    return prefix, content


def completion_batch(
    rows: list[dict[str, Any]],
    first: int,
    group: int,
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
    limit: int | None,
    template_kwargs: dict[str, Any] | None = None,
    mask_truncated: bool = False,
    processor: Any = None,
) -> dict[str, Any]:
    """
    A generation batch of the dataset's completions, in the form of TRL's rollouts.

    Args:
        rows (`list` of `dict`): rows of this process; over all processes, each prompt occurs `group` times in a row.
        first (`int`): index of the first of them among the rows of all processes.
        group (`int`): `num_generations`. Of equal rows only the first counts; the others are masked.
        tokenizer, stops, limit, template_kwargs, processor: as in [`token_ids`].
        mask_truncated (`bool`): whether cut completions are masked (TRL's `mask_truncated_completions`).

    Returns:
        `dict` of `torch.Tensor`: "prompt_ids" and "prompt_mask" `(B, P)`, left-padded; "completion_ids" and
        "completion_mask" `(B, C)`, right-padded; and "row_weight" `(B,)`, the weight of each row in a
        loss that is averaged over rows: `group` for rows that count, and 0 for others. With images also TRL's columns
        for these, see [`~trl_distill.images.columns_of`].
    """
    counts = [(first + i) % group == 0 for i in range(len(rows))]
    encoded: list[EncodedPrompt] = []
    completions, masks = [], []
    completion: list[int] = []
    for row, counted in zip(rows, counts, strict=True):
        if counted or not encoded:  # others are equal to the row before them
            prompt, completion = encoded_ids(row, tokenizer, stops, limit, template_kwargs, processor)
        cut = completion[-1] not in stops
        most = None if counted else 1  # one token is enough for a row that does not count
        # sharded engines run the same layers for all rows, so those with images keep them
        encoded.append(prompt if counted or prompt.images else EncodedPrompt([tokenizer.pad_token_id]))
        completions.append(torch.tensor(completion[:most], dtype=torch.long))
        masks.append(torch.full_like(completions[-1], counted and not (cut and mask_truncated)))
    pad, prompts = functools.partial(pad_sequence, batch_first=True), [torch.tensor(prompt.ids) for prompt in encoded]
    batch = {
        "prompt_ids": pad(prompts, padding_value=tokenizer.pad_token_id, padding_side="left"),
        "prompt_mask": pad([torch.ones_like(p) for p in prompts], padding_side="left"),
        "completion_ids": pad(completions, padding_value=tokenizer.pad_token_id),
        "completion_mask": pad(masks),
        "row_weight": torch.tensor([float(group) * counted for counted in counts]),
    }
    return batch | columns_of(encoded, batch["prompt_ids"].shape[1], batch["completion_ids"].shape[1])
