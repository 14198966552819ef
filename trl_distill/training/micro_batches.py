"""Less padding: micro-batches of rows of similar length, cut to the longest of them.

Functions on TRL's batches, which are `dict`s of tensors. `GRPOHooks.micro_batches_alike` says when rows may be
exchanged without changing the update.
"""

from __future__ import annotations

from typing import Any

import torch

from ..images import KINDS


PROMPT = ("prompt", "teacher_prompt")  # and "text_prompt_0", ... of teachers with other tokenizers


COMPLETION = (  # tensors with a column per completion token; (B, 1) where one value holds for the sequence
    "completion_ids",
    "completion_mask",
    "tool_mask",
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
    "importance_sampling_ratio",
)


def trimmed(batch: dict[str, Any], prompts: bool = True) -> dict[str, Any]:
    """
    A batch without the columns that are padding in every row.

    Args:
        batch (`dict`): "prompt_ids" `(B, P)`, left-padded, "completion_ids" `(B, C)`, right-padded, their masks, kinds
            of tokens `(B, P + C)`, and any other columns.
        prompts (`bool`): cut prompts too. Not for models with absolute positions, which start at the left padding.
    """
    shorter = dict(batch)
    length = max(int(batch["completion_mask"].any(0).sum()), 1)
    for name in COMPLETION:
        if name in batch:
            shorter[name] = batch[name][:, :length]
    others = [name.removesuffix("_ids") for name in batch if name.startswith("text_prompt_") and name.endswith("_ids")]
    for name in (*PROMPT, *others) if prompts else ():
        if f"{name}_mask" in batch:
            kept = max(int(batch[f"{name}_mask"].any(0).sum()), 1)
            for what in ("ids", "mask"):
                shorter[f"{name}_{what}"] = batch[f"{name}_{what}"][:, -kept:]
    cut, end = batch["prompt_ids"].shape[1] - shorter["prompt_ids"].shape[1], batch["prompt_ids"].shape[1] + length
    return shorter | {name: batch[name][:, cut:end] for name in KINDS if batch.get(name) is not None}


def by_length(batches: list[dict[str, Any]], alike: int) -> list[dict[str, Any]]:
    """
    The same rows, sorted by length into micro-batches of similar length, the longest first.

    Args:
        batches (`list` of `dict`): micro-batches with the same number of rows.
        alike (`int`): number of consecutive micro-batches among which rows may be exchanged.
    """
    tensors = all(isinstance(value, torch.Tensor) for batch in batches for value in batch.values())
    if alike == 1 or not tensors:
        return batches
    arranged = []
    for start in range(0, len(batches), alike):
        some = batches[start : start + alike]
        together = {
            name: torch.cat([batch[name] for batch in some]) if value.dim() else value
            for name, value in some[0].items()
        }
        lengths = together["prompt_mask"].sum(1) + together["completion_mask"].sum(1)
        pieces = lengths.argsort(descending=True, stable=True).split(len(some[0]["prompt_ids"]))
        arranged += [
            {name: value[rows] if value.dim() else value for name, value in together.items()} for rows in pieces
        ]
    return arranged
