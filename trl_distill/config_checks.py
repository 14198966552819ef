"""The rules of `OPDConfig`: which values are rejected, and what to write instead.

The fields are in `config.py`; rules that need to know whether there are rewards are in `resolved_checks.py`.
"""

from __future__ import annotations

from typing import Any

from .objective.custom import CustomDivergence
from .objective.divergences import DIVERGENCES
from .objective.weighting import make_weighting


KL_ESTIMATORS = ("full", "topk", "sampled")
DIVERGENCE_KERNELS = ("fused", "trl")
TOPK_DIVERGENCES = ("reverse_kl", "forward_kl")  # those of which the k likeliest ids are an estimate
SCHEDULES = ("constant", "linear", "cosine", "step")
REWARD_BASELINES = ("group", "batch", "prompt")


def check_values(config: Any) -> None:
    """
    Check values and their combinations; what depends on rewards is checked by
    [`~trl_distill.resolved_checks.check_resolved`].

    Args:
        config ([`~trl_distill.OPDConfig`]): before TRL's own checks.

    Raises:
        ValueError: a value or combination is invalid; the message says what to write instead.
    """
    _check_choices(config)
    _check_ranges(config)
    _check_off_policy(config)
    _check_divergence(config)
    _check_schedule(config)
    _check_one_teacher(config)
    if config.cross_tokenizer:
        _check_cross_tokenizer(config)
    check_weighting(config)
    if config.sync_ref_model and config.beta > 0:
        raise ValueError(
            "`sync_ref_model=True` would write the student's weights into the teacher, which takes the place of TRL's "
            "reference model. Set `sync_ref_model=False`."
        )


def _check_choices(config: Any) -> None:
    choices: tuple[tuple[str, Any], ...] = (
        ("divergence", DIVERGENCES),
        ("off_policy_divergence", DIVERGENCES),
        ("kl_estimator", KL_ESTIMATORS),
        ("divergence_kernel", DIVERGENCE_KERNELS),
        ("beta_schedule", SCHEDULES),
    )
    if config.reward_baseline is not None:  # else it is resolved once rewards are known
        choices += (("reward_baseline", REWARD_BASELINES),)
    for name, allowed in choices:
        value = getattr(config, name)
        if value not in allowed and not isinstance(value, CustomDivergence):
            own = ", or a function of your own by its import path `module.function`" if allowed is DIVERGENCES else ""
            raise ValueError(f"`{name}` is {value!r}; this version has {', '.join(allowed)}{own}.")


def _check_ranges(config: Any) -> None:
    if config.beta < 0:
        raise ValueError(
            f"`beta` is {config.beta}, but a negative weight would drive the student away from the teacher. Use a "
            "positive value, or 0 for plain GRPO."
        )
    if config.kl_temperature is not None and config.kl_temperature <= 0:
        raise ValueError(f"`kl_temperature` is {config.kl_temperature}; it divides the logits, so it must be > 0.")
    if config.temperature <= 0:
        raise ValueError(
            f"`temperature` is {config.temperature}; it divides the logits, so it must be > 0. For greedy rollouts "
            "set `top_k=1`."
        )
    if config.kl_top_k < 0:
        raise ValueError(
            f"`kl_top_k` is {config.kl_top_k}; it counts ids, so it must be >= 0. 0 uses the sampled token alone."
        )
    if not 0 <= config.kl_discount <= 1:
        raise ValueError(f"`kl_discount` is {config.kl_discount}; it is a discount, in [0, 1].")
    if not 0 <= config.lmbda <= 1:
        raise ValueError(f"`lmbda` is {config.lmbda}; it is a share, in [0, 1].")
    for name, least in (("beta_schedule_steps", 1), ("reward_start_step", 0)):
        if getattr(config, name) is not None and getattr(config, name) < least:
            raise ValueError(f"`{name}` is {getattr(config, name)}; it counts optimizer steps, from {least}.")
    if config.teacher_batch_size is not None and config.teacher_batch_size < 1:
        raise ValueError(f"`teacher_batch_size` is {config.teacher_batch_size}; it counts rows, from 1.")
    for name in ("stop_above_truncation", "stop_above_repetition"):
        if getattr(config, name) is not None and not 0 <= getattr(config, name) < 1:
            raise ValueError(f"`{name}` is {getattr(config, name)}; it is a share, in [0, 1).")
    if config.teacher_ema is not None and not 0 < config.teacher_ema < 1:
        raise ValueError(f"`teacher_ema` is {config.teacher_ema}; it is a decay, in (0, 1), such as 0.99.")
    if config.num_generations is not None and config.num_generations < 1:
        raise ValueError(f"`num_generations` is {config.num_generations}; at least one completion is needed.")


def _check_off_policy(config: Any) -> None:
    """On text that the student did not write, only estimators that do not rely on sampled tokens are right."""
    if config.lmbda == 1:
        return
    if config.beta == 0:
        raise ValueError(
            f"`lmbda` is {config.lmbda}, but `beta` is 0: there is no teacher to learn from on the dataset's "
            "completions. Set `beta`, or `lmbda=1`."
        )
    if config.kl_estimator != "full" or config.kl_discount != 0:
        raise ValueError(
            f"`lmbda` is {config.lmbda}, so some batches are not written by the student, but "
            f"kl_estimator={config.kl_estimator!r} with kl_discount={config.kl_discount:g} relies on its samples. "
            "Use kl_estimator='full' with kl_discount=0, or `lmbda=1`."
        )


def divergences_of(config: Any) -> list[str]:
    """The divergences that a run minimises: `divergence`, and `off_policy_divergence` where there is a share of it."""
    return [config.divergence, *([config.off_policy_divergence] if config.lmbda < 1 else [])]


def _check_divergence(config: Any) -> None:
    """Divergence, its parameter and the estimator must fit together."""
    used = divergences_of(config)
    if config.divergence_alpha is not None:
        used = [name for name in used if DIVERGENCES.get(name) is not None]
        if not used:
            raise ValueError(
                f"`divergence_alpha` is {config.divergence_alpha}, but divergence={config.divergence!r} has no "
                "parameter. Leave it out, or use 'jsd', 'skewed_forward_kl', 'skewed_reverse_kl' or 'mixed'."
            )
        skewed = any(name.startswith("skewed") for name in used)
        if not 0 <= config.divergence_alpha <= 1 or (skewed and config.divergence_alpha == 1):
            bounds = "[0, 1), since at 1 both sides are the same" if skewed else "[0, 1]"
            raise ValueError(f"`divergence_alpha` is {config.divergence_alpha}; it must lie in {bounds}.")
    if config.kl_estimator == "topk" and config.divergence not in TOPK_DIVERGENCES:
        raise ValueError(
            f"kl_estimator='topk' cannot estimate divergence={config.divergence!r}. Use kl_estimator='full', or "
            "divergence 'reverse_kl' or 'forward_kl'."
        )
    if config.kl_estimator == "sampled" and config.divergence != "reverse_kl":
        raise ValueError(
            f"kl_estimator='sampled' estimates the reverse KL alone; divergence={config.divergence!r} averages "
            "over the teacher's tokens too, and none of those are sampled. Use kl_estimator='full', or leave "
            "`divergence` out."
        )
    if config.kl_estimator != "full" and config.kl_temperature not in (None, config.temperature):
        raise ValueError(
            f"`kl_temperature` is {config.kl_temperature}, but tokens are sampled at `temperature` "
            f"{config.temperature}, and kl_estimator={config.kl_estimator!r} learns from the sampled token. Leave "
            "`kl_temperature` out, or use kl_estimator='full'."
        )


def check_weighting(config: Any) -> None:
    """The weighting must be known, and what it needs must be measured; its parameters are checked once parsed."""
    name, given = config.token_weighting, config.token_weighting_kwargs
    if name is None:
        if given:
            raise ValueError(
                f"`token_weighting_kwargs` are {given}, but there is no `token_weighting`. Set both, or leave both out."
            )
        return
    if config.beta == 0:
        raise ValueError(
            f"`token_weighting` is {name!r}, but `beta` is 0: there is no teacher whose term could be weighted. Set "
            "`beta`, or leave `token_weighting` out."
        )
    if isinstance(given, str):  # not parsed yet; checked again afterwards
        return
    needs = make_weighting(name, given).needs
    if "divergence" in needs and config.kl_estimator != "full":
        raise ValueError(
            f"The token weighting {name!r} needs the divergence at each token, but kl_estimator="
            f"{config.kl_estimator!r} knows it only up to a part that depends on the sampled token, with which the "
            "weight would no longer be a function of the prefix. Use kl_estimator='full', or a weighting by "
            "`student_entropy`, `teacher_entropy` or `position`."
        )
    of_teacher = sorted(needs & {"teacher_entropy", "agreement"})
    if of_teacher and config.teacher_server_urls:
        raise ValueError(
            f"The token weighting {name!r} needs `{of_teacher[0]}`, which takes the teacher's whole distribution, but "
            "the servers at `teacher_server_urls` give log-probabilities of a few ids only. Use a local teacher, or a "
            "weighting by `student_entropy` or `position`."
        )


def _check_schedule(config: Any) -> None:
    if (config.beta_schedule == "constant") != (config.beta_end is None):
        raise ValueError(
            f"`beta_schedule` is {config.beta_schedule!r} and `beta_end` is {config.beta_end}: a schedule needs an "
            "end value, and a constant weight has none. Set both or neither."
        )
    if config.beta_end is not None and (config.beta_end < 0 or config.beta == 0):
        raise ValueError(
            f"`beta` goes from {config.beta} to {config.beta_end}. The end must not be negative, and the start must "
            "not be 0, since no teacher is loaded then: start from a small value instead."
        )
    if config.beta_schedule == "step" and config.beta_schedule_steps is None:
        raise ValueError("`beta_schedule='step'` jumps at `beta_schedule_steps`, which is not set. Set it to a step.")
    if config.beta_schedule == "constant" and config.beta_schedule_steps is not None:
        raise ValueError("`beta_schedule_steps` is given, but `beta_schedule` is 'constant'. Set both or neither.")
    if config.beta == 0 and config.reward_start_step > 0:
        raise ValueError(
            f"`reward_start_step` is {config.reward_start_step}, but `beta` is 0: nothing would be learnt before it. "
            "Set `beta` above 0, or `reward_start_step=0`."
        )


def _check_one_teacher(config: Any) -> None:
    """The ways to name a teacher exclude each other."""
    ways = ("teacher_model_name_or_path", "teacher_models", "teacher_ema")
    named = [name for name in ways if getattr(config, name) is not None]
    if len(named) > 1:
        raise ValueError(f"Both `{named[0]}` and `{named[1]}` name a teacher. Keep one.")
    if config.teacher_server_urls and config.teacher_model_name_or_path is None:
        raise ValueError(
            "`teacher_server_urls` are given, but not which model they serve. Name it with "
            "`teacher_model_name_or_path`, as the server's `/v1/models` lists it."
        )
    if config.teacher_offload and (config.teacher_server_urls or config.teacher_ema is not None):
        raise ValueError(
            "`teacher_offload=True` keeps the teacher's weights in CPU memory, but this teacher has no weights of its "
            "own here. Leave it out."
        )


def _check_cross_tokenizer(config: Any) -> None:
    """What a teacher with another tokenizer does not have, or not yet."""
    if config.beta == 0:
        raise ValueError(
            "`cross_tokenizer` is True, but `beta` is 0: there is no teacher. Set `beta`, or leave it out."
        )
    needed = {
        "kl_estimator": "full",
        "lmbda": 1.0,
        "assume_same_tokenizer": False,
        "token_weighting": None,
        "teacher_ema": None,
    }
    for name, value in needed.items():
        if getattr(config, name) != value and (getattr(config, name) or value):
            raise ValueError(
                "With `cross_tokenizer=True` a teacher reads the student's own completions as text, which does not go "
                f"with {name}={getattr(config, name)!r}. Leave `{name}` out, or use a teacher with the student's "
                "tokenizer."
            )
    if config.kl_temperature not in (None, config.temperature):
        raise ValueError(
            f"`kl_temperature` is {config.kl_temperature}, but with `cross_tokenizer=True` parts of the divergence "
            f"come from sampled tokens, at `temperature` {config.temperature}. Leave `kl_temperature` out."
        )
