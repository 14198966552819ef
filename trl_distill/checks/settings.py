"""What is checked before the first step: everything here would otherwise fail late, or train on a wrong number.

Functions of configurations, tokenizers, datasets and numbers. Those that a run cannot get past raise at once; the
others return a [`Finding`], and `preflight.py` decides what becomes of them. Training is left to the trainer.
"""

from __future__ import annotations

import logging

from .findings import Finding


logger = logging.getLogger(__name__)


def completions(cut: int, looked_at: int, limit: int) -> Finding:
    """How many of the dataset's completions are longer than rollouts may be, and lose their end."""
    if not cut:
        return Finding("completions", "ok", f"{looked_at} looked at; none is longer than {limit} tokens.")
    return Finding(
        "completions",
        "warning",
        f"{cut} of {looked_at} completions that were looked at are longer than {limit} tokens and are cut, so that "
        "their end is not learnt.",
        "Raise `max_completion_length`, or filter the dataset.",
    )


def checkpoint_boundary(save_steps: float, accumulation: int, generate_every: int) -> Finding:
    """
    Whether a checkpoint falls inside a generation batch.

    Resuming from such a checkpoint generates anew in the middle, so the run is not the uninterrupted one.

    Args:
        save_steps (`float`): optimizer steps between checkpoints; a share of all steps (below 1) is not checked.
        accumulation (`int`): micro-steps per optimizer step.
        generate_every (`int`): micro-steps per generation batch, all iterations over it included.
    """
    if save_steps < 1 or int(save_steps) * accumulation % generate_every == 0:
        return Finding("checkpoints", "ok", "They fall on the end of a generation batch.")
    return Finding(
        "checkpoints",
        "warning",
        f"`save_steps={int(save_steps)}` does not fall on the end of a generation batch, which lasts "
        f"{generate_every / accumulation:g} optimizer steps. A run resumed from there generates anew in the middle of "
        "one and will not repeat the uninterrupted run exactly.",
        "Choose a multiple to avoid it.",
    )


def sampling(biased: list[str]) -> Finding:
    """Score functions take the rollouts for samples of the student's whole distribution; `biased` says what is not."""
    if not biased:
        return Finding("sampling", "ok", "Rollouts are samples of the student, as far as the estimator asks.")
    return Finding(
        "sampling",
        "warning",
        f"{', '.join(biased)} changes the distribution that rollouts are sampled from, which biases the part of the "
        "teacher's term that is learnt from sampled tokens.",
        "Leave it out, or use kl_estimator='full' with kl_discount=0.",
    )


def groups(generations: int | None, prompts: int, rewarded: bool) -> Finding:
    """Rewards are compared within the completions of one prompt; `OPDConfig.resolved` has refused groups of one."""
    batch = f"{prompts} prompts with {generations} completions each in a generation batch"
    if rewarded or generations == 1:
        return Finding("groups", "ok", f"{batch}, {'with' if rewarded else 'without'} rewards.")
    return Finding(
        "groups",
        "warning",
        f"{batch}, but no rewards to compare them by.",
        "Set `num_generations=1`: more prompts teach more than more answers to one.",
    )
