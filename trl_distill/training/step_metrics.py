"""What is logged of one micro-batch, computed from the parts of its loss in one place."""

from __future__ import annotations

from typing import Any

import torch

from ..reporting.metrics import by_reward, divergence_profile, reward_and_teacher
from .loss import LossParts


Quantities = dict[str, tuple[torch.Tensor, torch.Tensor]]  # by name: values, and a mask of what counts


def step_quantities(
    parts: LossParts, name: str, has_rewards: bool, entropy_key: str | None, profile: bool
) -> Quantities:
    """
    Of rollouts of the student.

    Args:
        parts ([`~trl_distill.training.loss.LossParts`]): of the loss.
        name (`str`): of the divergence.
        has_rewards (`bool`): whether there are rewards.
        entropy_key (`str`, *optional*): where to log the entropy; `None` where TRL has done so.
        profile (`bool`): whether to log where the divergence is and how student and teacher differ.
    """
    mask, key = parts.batch.mask, f"distill/{name}"
    of_tokens, of_rows = reward_and_teacher(parts.output, parts.scores, parts.per_token, parts.batch, parts.beta)
    quantities: Quantities = divergence_profile(parts.output, parts.per_token, mask, key) if profile else {}
    quantities |= {name: (values, mask) for name, values in {**of_tokens, key: parts.per_token}.items()}
    # rows that no reward function could score have no objective
    quantities |= {name: (values, ~values.isnan()) for name, values in of_rows.items()}
    quantities |= {f"{key}/{teacher}": found for teacher, found in parts.by_teacher.items()}
    if has_rewards:
        assert parts.batch.advantages is not None
        by_sign = by_reward(parts.per_token, mask, parts.batch.advantages)
        quantities |= {f"{key}/{name}": found for name, found in by_sign.items()}
    return _renamed(quantities, entropy_key)


def off_policy_quantities(parts: LossParts, name: str) -> Quantities:
    """Of completions of the dataset; arguments as in [`step_quantities`]."""
    mask, key = parts.batch.mask, f"distill/off_policy/{name}"
    of_tokens, _ = reward_and_teacher(parts.output, parts.scores, parts.per_token, parts.batch, parts.beta)
    quantities: Quantities = {key: (parts.per_token, mask)}
    quantities |= {f"{key}/{teacher}": found for teacher, found in parts.by_teacher.items()}
    quantities["distill/off_policy/entropy"] = (of_tokens["entropy"], mask)
    return quantities


def loss_quantities(terms: dict[str, torch.Tensor], accumulation: int) -> Quantities:
    """Parts of the loss as they would be without gradient accumulation."""
    return {name: (loss * accumulation, torch.ones_like(loss)) for name, loss in terms.items()}


def _renamed(quantities: Quantities, entropy_key: str | None) -> Quantities:
    entropy: Any = quantities.pop("entropy", None)
    if entropy is not None and entropy_key is not None:
        quantities[entropy_key] = entropy
    return quantities
