"""Checks of settings: completions, checkpoints, sampling, groups. Each returns a [`Finding`] for `preflight.py`."""

from __future__ import annotations

import logging
from typing import Any

from transformers import GenerationConfig

from ..resolved_checks import shaping
from .findings import Finding


logger = logging.getLogger(__name__)


def completions(cut: int, checked: int, limit: int, rows: int) -> Finding:
    """How many of the dataset's first completions, `checked` of `rows`, are longer than `limit` tokens and are cut."""
    which = f"all {rows}" if checked == rows else f"the first {checked} of {rows}"
    if not cut:
        return Finding("completions", "ok", f"Of {which} completions none is longer than {limit} tokens.")
    return Finding(
        "completions",
        "warning",
        f"{cut} of {which} completions are longer than {limit} tokens and are cut, so their "
        "end, stop token included, is not learnt.",
        "Raise `max_completion_length`, or filter the dataset.",
    )


def checkpoint_boundary(save_steps: float, accumulation: int, generate_every: int) -> Finding:
    """
    Whether a checkpoint falls inside a generation batch.

    A run resumed from there generates again in the middle of a batch, so it differs from an uninterrupted one.

    Args:
        save_steps (`float`): optimizer steps between checkpoints; a fraction of all steps (below 1) is not checked.
        accumulation (`int`): micro-steps per optimizer step.
        generate_every (`int`): micro-steps per generation batch, all iterations over it included.
    """
    if save_steps < 1 or int(save_steps) * accumulation % generate_every == 0:
        return Finding("checkpoints", "ok", "They fall at the end of a generation batch.")
    return Finding(
        "checkpoints",
        "warning",
        f"`save_steps={int(save_steps)}` does not fall at the end of a generation batch, which lasts "
        f"{generate_every / accumulation:g} optimizer steps. A run resumed from there generates again in the middle of "
        "a batch and will not repeat the uninterrupted run exactly.",
        "Set `save_steps` to a multiple to avoid it.",
    )


def left_aside(own: GenerationConfig | None) -> dict[str, Any]:
    """The settings of a student's own `generation_config` that would shape rollouts, and are not used for them."""
    return shaping(own.to_diff_dict()) if own is not None else {}


def sampling(biased: list[str], aside: dict[str, Any] | None = None) -> Finding:
    """
    Whether rollouts are plain samples of the student.

    Args:
        biased (`list[str]`): the run's settings that change the distribution, if the estimator minds.
        aside (`dict`, *optional*): settings of the student's own `generation_config` that are not used.
    """
    shown = ", ".join(f"`{name}={_short(value)}`" for name, value in (aside or {}).items())
    note = f" The student's own generation settings are left aside, and saved with it: {shown}." if shown else ""
    if not biased:
        found = f"Rollouts are samples of the student, as far as the estimator needs.{note}"
        return Finding("sampling", "ok", found, notify=bool((aside or {}).keys() - SET_BY_THE_RUN))
    return Finding(
        "sampling",
        "warning",
        f"{', '.join(biased)} changes the distribution that rollouts are sampled from, which biases the part of the "
        f"teacher's term that is learnt from sampled tokens.{note}",
        "Leave it out, or use kl_estimator='full' with kl_discount=0.",
    )


SET_BY_THE_RUN = {"temperature", "top_p", "top_k", "repetition_penalty"}  # nobody expects the student's own


def _short(value: Any, limit: int = 40) -> str:
    text = str(value)
    return text if len(text) <= limit else f"{text[:limit]} ..."


COMPARED = {
    "group": "rewards are compared among the completions of a prompt",
    "batch": "rewards are compared over the whole batch",
    "prompt": "rewards are compared with earlier ones of their prompt",
}


def groups(generations: int | None, prompts: int, baseline: str | None) -> Finding:
    """
    Without rewards, groups have no use. (With rewards that are compared in groups, `OPDConfig.resolved` has rejected
    groups of one.)

    Args:
        generations (`int`): completions of a prompt.
        prompts (`int`): in a generation batch.
        baseline (`str`, *optional*): with what rewards are compared; `None` without rewards.
    """
    batch = f"{prompts} prompts with {generations} completion{'s' * (generations != 1)} each in a generation batch"
    if baseline is not None or generations == 1:
        compared = "no rewards" if baseline is None else COMPARED[baseline]
        return Finding("groups", "ok", f"{batch}, {compared}.", notify=baseline == "batch")  # unlike GRPO
    return Finding(
        "groups",
        "warning",
        f"{batch}, but no rewards to compare them by.",
        "Set `num_generations=1`: more prompts teach more than more completions of one prompt.",
    )
