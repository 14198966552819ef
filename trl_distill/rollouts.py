"""Batches of completions as teachers and losses take them: token sequences, and further columns for each row."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from .images import EncodedPrompt, Images
from .places import count, places


READ, ROW_IDS = "rollouts", "row_ids"  # of a batch: what is read, by the columns of its prompts; its row ids, a list


@dataclass
class Rollouts:
    """
    Prompts with completions. The tokens marked by `mask` are the judged ones; N is their number, `mask.sum()`.

    Attributes:
        input_ids (`torch.Tensor` of shape `(B, P + C)`): left-padded prompts, right-padded completions.
        attention_mask (`torch.Tensor` of shape `(B, P + C)`): 0 on padding.
        mask (`torch.Tensor` of shape `(B, C)`, bool): completion tokens that count: without padding, tool output,
            and truncated completions if those are masked.
        images ([`~trl_distill.images.Images`], *optional*): what vision-language models read besides.
        distinct_prompts (`int`, *optional*): how many different prompts there are, if known.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    mask: torch.Tensor
    images: Images | None = None
    distinct_prompts: int | None = None

    @classmethod
    def from_inputs(cls, inputs: dict[str, Any], prompt: str = "prompt") -> Rollouts:
        """
        From a batch of `GRPOTrainer`, with its prompts ("prompt") or the teacher's own ("teacher_prompt").

        They are made once for a batch that [`counted`] has seen, with masks whose places are known.
        """
        if prompt in inputs.get(READ, ()):
            return inputs[READ][prompt]
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        if prompt == "prompt":
            images = Images.from_inputs(inputs)
        else:
            ids, encoded = inputs[f"{prompt}_ids"], inputs.get(f"{prompt}_encoded")
            images = encoded and Images.of_prompts(encoded, ids.shape[1], mask.shape[1], ids.device)
        return cls(
            input_ids=torch.cat([inputs[f"{prompt}_ids"], inputs["completion_ids"]], dim=1),
            attention_mask=torch.cat([inputs[f"{prompt}_mask"], inputs["completion_mask"]], dim=1),
            mask=mask.bool(),
            images=images,
        )

    def __len__(self) -> int:
        return self.mask.shape[0]

    @property
    def tokens(self) -> int:
        """Number of judged tokens, N."""
        return places(self.mask).total

    def rows(self, index: Any) -> Rollouts:
        """Some of the rows, by a slice, a mask `(B,)` or indices."""
        images = self.images and self.images.of_rows(index)
        return Rollouts(self.input_ids[index], self.attention_mask[index], self.mask[index], images)

    def trimmed(self, prompts: bool = True) -> Rollouts:
        """Without the columns that are padding in every row, on the left only if `prompts` may be cut."""
        attended, columns, completion = places(self.attention_mask), self.attention_mask.shape[1], self.mask.shape[1]
        before = columns - completion
        first, last = min(attended.first if prompts else 0, before - 1), max(attended.end, before + 1)
        if (first, last) == (0, columns):
            return self
        images = self.images and self.images.of_columns(first, last)
        ids, attention_mask = self.input_ids[:, first:last], self.attention_mask[:, first:last]
        mask = self.mask[:, : last - before]
        count([attention_mask, mask])
        return Rollouts(ids, attention_mask, mask, images)

    @property
    def arguments(self) -> dict[str, torch.Tensor]:
        """What a model takes to read them: token ids, attention mask, images."""
        images = {} if self.images is None else self.images.arguments
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, **images}


@dataclass(frozen=True)
class MicroBatch:
    """
    A batch of `GRPOTrainer` with named columns: B rows, completions of C tokens.

    Attributes:
        inputs (`dict[str, Any]`): the batch as TRL's loss takes it.
        rollouts ([`Rollouts`]): the student's prompts and completions.
        for_teachers ([`Rollouts`]): the same completions, after the teachers' own prompts where there are any.
        row_ids (`torch.Tensor` of shape `(B,)` or `list[int]`, *optional*): the keys under which teachers' signals are
            stored.
        teacher_weights (`torch.Tensor` of shape `(B, teachers)`, *optional*): for several teachers.
        advantages (`torch.Tensor` of shape `(B,)` or `(B, C)`, *optional*): as TRL computes them.
        rewards (`torch.Tensor` of shape `(B,)`, *optional*): NaN where no reward function gave a score.
        old_log_q (`torch.Tensor` of shape `(B, C)`, *optional*): log-probabilities under the policy that wrote the
            rollouts, nats; `None` if that is the current one.
        sampler_ratio (`torch.Tensor` of shape `(B, C)` or `(B, 1)`, *optional*): TRL's truncated importance
            ratio between that policy and vLLM's sampler.
        row_weight (`torch.Tensor` of shape `(B,)`, *optional*): for completions from the dataset: the group size
            for rows that count, 0 for their duplicates.
    """

    inputs: dict[str, Any]
    rollouts: Rollouts
    for_teachers: Rollouts
    row_ids: torch.Tensor | list[int] | None = None
    teacher_weights: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    rewards: torch.Tensor | None = None
    old_log_q: torch.Tensor | None = None
    sampler_ratio: torch.Tensor | None = None
    row_weight: torch.Tensor | None = None

    @classmethod
    def from_inputs(cls, inputs: dict[str, Any]) -> MicroBatch:
        """From the batch that `GRPOTrainer` passes to its loss, with the columns that this package adds."""
        rollouts = Rollouts.from_inputs(inputs)
        own = "teacher_prompt_ids" in inputs
        return cls(
            inputs=inputs,
            rollouts=rollouts,
            for_teachers=Rollouts.from_inputs(inputs, "teacher_prompt") if own else rollouts,
            row_ids=inputs.get(ROW_IDS, inputs.get("row_id")),
            teacher_weights=inputs.get("teacher_weights"),
            advantages=inputs.get("advantages"),
            rewards=inputs.get("rewards"),
            old_log_q=inputs.get("old_per_token_logps"),
            sampler_ratio=inputs.get("importance_sampling_ratio"),
            row_weight=inputs.get("row_weight"),
        )

    def read_by(self, prompts: str) -> Rollouts:
        """What a teacher reads whose own prompts stand in these columns ([`~trl_distill.Teacher`]`.prompts`)."""
        if prompts == "prompt":
            return self.rollouts
        return self.for_teachers if prompts == "teacher_prompt" else Rollouts.from_inputs(self.inputs, prompts)

    @property
    def mask(self) -> torch.Tensor:
        """The judged tokens, `(B, C)`, bool."""
        return self.rollouts.mask

    @property
    def is_off_policy(self) -> bool:
        """Whether the completions are from the dataset."""
        return self.row_weight is not None

    @property
    def needs_trl_log_probs(self) -> bool:
        """Whether the policy loss has ratios to log-probabilities that TRL computed, or masks tool output."""
        return self.old_log_q is not None or self.sampler_ratio is not None or "tool_mask" in self.inputs

    def without_advantages(self) -> MicroBatch:
        """With advantages of 0, while the reward has no weight."""
        assert self.advantages is not None
        silent = torch.zeros_like(self.advantages)
        return replace(self, inputs={**self.inputs, "advantages": silent}, advantages=silent)


def _distinct(rollouts: Rollouts) -> int:
    prompt = slice(rollouts.input_ids.shape[1] - rollouts.mask.shape[1])
    seen = rollouts.input_ids[:, prompt].masked_fill(rollouts.attention_mask[:, prompt] == 0, -1)
    return len({tuple(row) for row in seen.tolist()})


def counted(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Micro-batches with their rollouts, and with what Python has to know of them, so that it need not wait for a GPU.

    All masks are copied to the CPU together. Call it once for each generation batch, when rows and columns are final.

    Args:
        batches (`list` of `dict`): as for [`Rollouts.from_inputs`].
    """
    found = []
    for batch in batches:
        prompts = [name.removesuffix("_ids") for name in batch if name.endswith("_ids") and name != "completion_ids"]
        read = {name: Rollouts.from_inputs(batch, name) for name in prompts if f"{name}_mask" in batch}
        for one in read.values():
            one.mask = read["prompt"].mask  # the same tokens are judged, whatever was read before
            one.distinct_prompts = _distinct(one)
        listed = {ROW_IDS: batch["row_id"].tolist()} if "row_id" in batch else {}
        found.append({**batch, **listed, READ: read})
    every = [one for batch in found for one in batch[READ].values()]
    count([one.mask for one in every] + [one.attention_mask for one in every])
    return found


def teacher_prompts(
    prompts: list[Any],
    batch: dict[str, Any],
    encode: Callable[[list[Any]], list[EncodedPrompt]],
    pad: int,
    name: str = "teacher_prompt",
) -> dict[str, Any]:
    """
    The teacher's own prompts for a batch of `GRPOTrainer`, left-padded; rows without one keep the student's.

    Args:
        prompts (`list`): text or messages for each row, or `None`.
        batch (`dict`): with "prompt_ids" and "prompt_mask" of shape `(B, P)`.
        encode (`Callable`): turns prompts into [`~trl_distill.images.EncodedPrompt`], as in training.
        pad (`int`): id of the padding token.
        name (`str`): beginning of the columns' names.

    Returns:
        `dict`: "teacher_prompt_ids" and "teacher_prompt_mask" of shape `(B, P')`, and "teacher_prompt_encoded", a list,
        if a row has images; empty if no row has a prompt of the teacher's own.
    """
    some = next((prompt for prompt in prompts if prompt), None)
    if some is None:
        return {}
    device, images = batch["prompt_ids"].device, Images.from_inputs(batch)
    images = images or Images(tuple({} for _ in prompts), {})
    if any(kind[:, batch["prompt_ids"].shape[1] :].any() for kind in images.kinds.values()):
        raise ValueError(
            "Tools have returned images, and a teacher has prompts of its own (a `teacher_prompt`, or another "
            "processor), after which these cannot be placed. Leave one of the two out."
        )
    kept = images.prompts(batch["prompt_ids"], batch["prompt_mask"])
    found = [
        own if prompt else student
        for prompt, own, student in zip(prompts, encode([prompt or some for prompt in prompts]), kept, strict=True)
    ]
    ids = [torch.tensor(row.ids, device=device) for row in found]
    left_padded = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    return {
        f"{name}_ids": left_padded(ids, padding_value=pad),
        f"{name}_mask": left_padded([torch.ones_like(row) for row in ids], padding_value=0),
        **({f"{name}_encoded": found} if any(row.pixels or row.kinds for row in found) else {}),
    }
