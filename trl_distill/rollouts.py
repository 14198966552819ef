"""What the student wrote, as teachers and losses see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


def teacher_rollouts(inputs: dict[str, Any]) -> Rollouts:
    """Rollouts as teachers see them: after their own prompts, where there are any."""
    return Rollouts.from_inputs(inputs, "teacher_prompt" if "teacher_prompt_ids" in inputs else "prompt")


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
