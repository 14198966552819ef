"""The metrics of one micro-batch, computed from the parts of its loss."""

from __future__ import annotations

from typing import Any

import torch

from ..estimators.cross_tokenizer import SpanMeasures
from ..reporting.metrics import by_reward, divergence_profile, reward_and_teacher
from .loss import LossParts


Quantities = dict[str, tuple[torch.Tensor, torch.Tensor]]  # by name: values, and a mask of those that count


def step_quantities(
    parts: LossParts, name: str, has_rewards: bool, entropy_key: str | None, profile: bool, texts: bool = False
) -> Quantities:
    """
    Metrics of rollouts of the student.

    Args:
        parts ([`~trl_distill.training.loss.LossParts`]): the loss.
        name (`str`): the divergence, such as "reverse_kl".
        has_rewards (`bool`): whether there are rewards.
        entropy_key (`str`, *optional*): name of the entropy metric; `None` if TRL has logged it.
        profile (`bool`): whether to log [`~trl_distill.reporting.metrics.divergence_profile`].
        texts (`bool`): whether some teacher has another tokenizer.
    """
    mask, key = parts.batch.mask, f"distill/{name}"
    of_tokens, of_rows = reward_and_teacher(parts.output, parts.scores, parts.per_token, parts.batch, parts.beta)
    quantities: Quantities = (
        divergence_profile(parts.output, parts.scores, parts.per_token, mask, key) if profile else {}
    )
    quantities |= {name: (values, mask) for name, values in {**of_tokens, key: parts.per_token}.items()}
    # rows that no reward function could score have no objective
    quantities |= {name: (values, ~values.isnan()) for name, values in of_rows.items()}
    quantities |= {f"{key}/{teacher}": found for teacher, found in parts.by_teacher.items()}
    if has_rewards:
        assert parts.batch.advantages is not None
        by_sign = by_reward(parts.per_token, mask, parts.batch.advantages)
        quantities |= {f"{key}/{name}": found for name, found in by_sign.items()}
    quantities |= weight_quantities(parts, "distill")
    if texts:
        quantities |= span_quantities(parts)
    return _renamed(quantities, entropy_key)


def off_policy_quantities(parts: LossParts, name: str) -> Quantities:
    """Metrics of the dataset's completions; arguments as in [`step_quantities`]."""
    mask, key = parts.batch.mask, f"distill/off_policy/{name}"
    of_tokens, _ = reward_and_teacher(parts.output, parts.scores, parts.per_token, parts.batch, parts.beta)
    quantities: Quantities = {key: (parts.per_token, mask)}
    quantities |= {f"{key}/{teacher}": found for teacher, found in parts.by_teacher.items()}
    quantities["distill/off_policy/entropy"] = (of_tokens["entropy"], mask)
    return quantities | weight_quantities(parts, "distill/off_policy")


def weight_quantities(parts: LossParts, prefix: str) -> Quantities:
    """The mean token weight, and the share of tokens with a weight below 1."""
    weights, mask = parts.token_weights, parts.batch.mask
    if weights is None:
        return {}
    below = (weights < 1).float()
    return {f"{prefix}/token_weight": (weights, mask), f"{prefix}/token_weight/below_1": (below, mask)}


def span_quantities(parts: LossParts) -> Quantities:
    """With a teacher that has another tokenizer: shares of tokens that left the canonical path, and that were exact."""
    device, none = parts.batch.mask.device, torch.zeros(1, device=parts.batch.mask.device)
    # a process may have no row of such a teacher, and needs the same names as the others
    found = {f"distill/{name}": [(none, none.bool())] for name in ("non_canonical", "exact_tokens")}
    for score, measures in zip(parts.scores, parts.output.measured or [], strict=True):
        if not isinstance(measures, SpanMeasures) or measures.charged is None or measures.exact is None:
            continue
        for name, values in (("non_canonical", measures.charged), ("exact_tokens", measures.exact)):
            judged = values.to(device).float()[score.mask]
            found[f"distill/{name}"].append((judged, torch.ones_like(judged, dtype=torch.bool)))
    # a token counts once for each teacher that reads it as text
    return {name: (torch.cat([v for v, _ in of]), torch.cat([m for _, m in of])) for name, of in found.items()}


def loss_quantities(terms: dict[str, torch.Tensor], accumulation: int) -> Quantities:
    """The parts of the loss, with the division by accumulation steps undone."""
    return {name: (loss * accumulation, torch.ones_like(loss)) for name, loss in terms.items()}


def _renamed(quantities: Quantities, entropy_key: str | None) -> Quantities:
    entropy: Any = quantities.pop("entropy", None)
    if entropy is not None and entropy_key is not None:
        quantities[entropy_key] = entropy
    return quantities
