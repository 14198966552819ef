"""What the student wrote, as teachers and losses see it: sequences, and the columns that travel with each row."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence


@dataclass
class Rollouts:
    """
    A batch of sequences of which some completion tokens are judged. N is the number of judged tokens, `mask.sum()`.

    Attributes:
        input_ids (`torch.Tensor` of shape `(B, P + C)`): left-padded prompts, right-padded completions.
        attention_mask (`torch.Tensor` of shape `(B, P + C)`): 0 on padding.
        mask (`torch.Tensor` of shape `(B, C)`, bool): completion tokens that count: no padding, no tool output, no
            truncated completion where those are masked.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def from_inputs(cls, inputs: dict[str, Any], prompt: str = "prompt") -> Rollouts:
        """Build from a batch of `GRPOTrainer`, with its prompts ("prompt") or the teacher's own ("teacher_prompt")."""
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        return cls(
            input_ids=torch.cat([inputs[f"{prompt}_ids"], inputs["completion_ids"]], dim=1),
            attention_mask=torch.cat([inputs[f"{prompt}_mask"], inputs["completion_mask"]], dim=1),
            mask=mask.bool(),
        )

    def __len__(self) -> int:
        return self.mask.shape[0]

    def rows(self, index: Any) -> Rollouts:
        """Some of the rows: a slice, a mask `(B,)` or indices."""
        return Rollouts(self.input_ids[index], self.attention_mask[index], self.mask[index])

    def trimmed(self, prompts: bool = True) -> Rollouts:
        """Without the columns that are padding in every row; on the left only where `prompts` may be cut."""
        attended, completion = self.attention_mask.any(0), self.mask.shape[1]
        length = max(int(attended[-completion:].sum()), 1)
        first = int(attended.int().argmax()) if prompts else 0
        first, last = min(first, len(attended) - completion - 1), len(attended) - completion + length
        return Rollouts(self.input_ids[:, first:last], self.attention_mask[:, first:last], self.mask[:, :length])


@dataclass(frozen=True)
class MicroBatch:
    """
    A batch of `GRPOTrainer`, its columns by name. B rows, completions of C tokens.

    Attributes:
        inputs (`dict[str, Any]`): as TRL's loss takes it.
        rollouts ([`Rollouts`]): what the student read and wrote.
        for_teachers ([`Rollouts`]): the same completions after the teachers' own prompts, where there are any.
        row_ids (`torch.Tensor` of shape `(B,)`, *optional*): by which teachers' signals are kept.
        teacher_weights (`torch.Tensor` of shape `(B, teachers)`, *optional*): with several teachers.
        advantages (`torch.Tensor` of shape `(B,)` or `(B, C)`, *optional*): TRL's.
        rewards (`torch.Tensor` of shape `(B,)`, *optional*): NaN where no reward function had an opinion.
        old_log_q (`torch.Tensor` of shape `(B, C)`, *optional*): of the policy that wrote the rollouts, where it is not
            the present one.
        sampler_ratio (`torch.Tensor` of shape `(B, C)` or `(B, 1)`, *optional*): from vLLM's sampler to that policy,
            truncated by TRL.
        row_weight (`torch.Tensor` of shape `(B,)`, *optional*): of completions from the dataset, of which equal rows
            count once.
    """

    inputs: dict[str, Any]
    rollouts: Rollouts
    for_teachers: Rollouts
    row_ids: torch.Tensor | None = None
    teacher_weights: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    rewards: torch.Tensor | None = None
    old_log_q: torch.Tensor | None = None
    sampler_ratio: torch.Tensor | None = None
    row_weight: torch.Tensor | None = None

    @classmethod
    def from_inputs(cls, inputs: dict[str, Any]) -> MicroBatch:
        """From what `GRPOTrainer` passes to its loss, with the columns that this package has added."""
        return cls(
            inputs=inputs,
            rollouts=Rollouts.from_inputs(inputs),
            for_teachers=Rollouts.from_inputs(inputs, "teacher_prompt" if "teacher_prompt_ids" in inputs else "prompt"),
            row_ids=inputs.get("row_id"),
            teacher_weights=inputs.get("teacher_weights"),
            advantages=inputs.get("advantages"),
            rewards=inputs.get("rewards"),
            old_log_q=inputs.get("old_per_token_logps"),
            sampler_ratio=inputs.get("importance_sampling_ratio"),
            row_weight=inputs.get("row_weight"),
        )

    @property
    def mask(self) -> torch.Tensor:
        """Judged tokens, `(B, C)`, bool."""
        return self.rollouts.mask

    @property
    def is_off_policy(self) -> bool:
        """Whether the completions are the dataset's."""
        return self.row_weight is not None

    @property
    def needs_trl_log_probs(self) -> bool:
        """Whether the policy loss compares with log-probabilities that TRL computed, or leaves tool output out."""
        return self.old_log_q is not None or self.sampler_ratio is not None or "tool_mask" in self.inputs

    def without_advantages(self) -> MicroBatch:
        """With a reward that has no weight yet."""
        assert self.advantages is not None
        silent = torch.zeros_like(self.advantages)
        return replace(self, inputs={**self.inputs, "advantages": silent}, advantages=silent)


def teacher_prompts(
    prompts: list[Any], batch: dict[str, Any], tokenize: Callable[[list[Any]], list[list[int]]], pad: int
) -> dict[str, torch.Tensor]:
    """
    Prompts of the teacher's own for a batch of `GRPOTrainer`, left-padded; rows without one keep the student's.

    Args:
        prompts (`list`): one per row, text or messages; `None` where a row has none.
        batch (`dict`): with "prompt_ids" and "prompt_mask" of shape `(B, P)`.
        tokenize (`Callable`): prompts to token ids, as in training.
        pad (`int`): id of padding.

    Returns:
        `dict`: "teacher_prompt_ids" and "teacher_prompt_mask" of shape `(B, P')`; nothing where no row has one.
    """
    some = next((prompt for prompt in prompts if prompt), None)
    if some is None:
        return {}
    rendered = tokenize([prompt or some for prompt in prompts])
    ids = [
        torch.tensor(theirs, device=kept.device) if prompt else kept[mask.bool()]
        for prompt, theirs, kept, mask in zip(prompts, rendered, batch["prompt_ids"], batch["prompt_mask"], strict=True)
    ]
    left_padded = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    return {
        "teacher_prompt_ids": left_padded(ids, padding_value=pad),
        "teacher_prompt_mask": left_padded([torch.ones_like(row) for row in ids], padding_value=0),
    }
