"""The rules of a resolved `OPDConfig`: what depends on whether there are rewards, and settings of generation.

Whether there are rewards is known to the trainer alone, so these rules come after those of `config_checks.py`.
"""

from __future__ import annotations

import logging
import re
from typing import Any


logger = logging.getLogger(__name__)


REFERENCE_BETA = 0.05  # GRPO's usual weights of a reference model are below it


NEUTRAL = {  # settings of generation that have no effect at these values; None, False, 0 and "" have none anyway
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "n", "guidance_scale"), 1),
    **dict.fromkeys(("temperature", "top_p", "typical_p", "top_h", "repetition_penalty"), 1.0),
    **dict.fromkeys(("length_penalty", "encoder_repetition_penalty"), 1.0),
    "top_k": -1,
}
TECHNICAL = re.compile(  # settings of generation that decide neither which tokens come out nor how many
    r"_|output_|cache_|max_cache|use_cache|use_mtp|prefill|compile|disable_compile|continuous_batching|transformers_ver"
    r"|assistant_|num_assistant|is_assistant|speculation|prompt_lookup|max_matching|target_lookbehind|low_memory"
    r"|(pad|bos|eos|decoder_start)_token_id|max_length|max_new_tokens|max_tokens|do_sample|early_stopping|return_dict"
    r"|seed|detokenize|skip_special|spaces_between|stop_token_ids|logprobs|prompt_logprobs|include_stop_str"
)


def shaping(settings: dict[str, Any]) -> dict[str, Any]:
    """Those settings of generation that change which tokens are sampled or how many sequences there are."""
    return {
        name: value
        for name, value in settings.items()
        if value and not TECHNICAL.match(name) and (name not in NEUTRAL or value != NEUTRAL[name])
    }


def check_group(config: Any, group: int) -> None:
    """Check that whole groups (the completions of one prompt) fill the generation batch."""
    if config.generation_batch_size % group != 0:
        raise ValueError(
            f"The generation batch holds {config.generation_batch_size} completions, which `num_generations` "
            f"({group}) does not divide. Change `num_generations`, or `per_device_train_batch_size`, "
            "`gradient_accumulation_steps` or `generation_batch_size`."
        )


def check_resolved(config: Any, has_rewards: bool) -> None:
    """
    Check the settings that depend on whether there are rewards.

    Args:
        config ([`~trl_distill.OPDConfig`]): resolved.
        has_rewards (`bool`): whether there are rewards.

    Raises:
        ValueError: rewards have nothing to be compared with, or groups do not fill the batches.
    """
    if 0 < config.beta <= REFERENCE_BETA and config.beta_schedule == "constant":
        _warn_of_reference_beta(config, has_rewards)
    if has_rewards and config.beta > 0:
        _check_units(config)
    if not has_rewards and config.beta > 0:
        _check_ignored(config)
    _check_generation(config)
    group = config.num_generations
    if has_rewards:
        _check_baseline(config)
    check_group(config, group)
    group_eval = config.num_generations_eval or group
    eval_batch = config.per_device_eval_batch_size * config.world_size
    if config.do_eval and config.eval_strategy != "no" and eval_batch % group_eval != 0:
        raise ValueError(
            f"The global evaluation batch holds {eval_batch} completions, which the number of generations used "
            f"for evaluation ({group_eval}) does not divide. Change `per_device_eval_batch_size` or "
            "`num_generations_eval`."
        )


def _check_baseline(config: Any) -> None:
    """Rewards must have something to be compared with, and be left as they are where groups are not the measure."""
    baseline = config.reward_baseline
    if baseline == "group":
        if config.num_generations < 2:
            raise ValueError(
                "`num_generations` is 1, but with reward_baseline='group' rewards are compared among the completions "
                "of one prompt. Set `reward_baseline='batch'` to compare them over the whole generation batch, or "
                "'prompt' to compare them with earlier ones of the same prompt, and leave out `scale_rewards` and "
                "`multi_objective_aggregation`; or set `num_generations` to 2 or more."
            )
        return
    if config.scale_rewards != "none":
        raise ValueError(
            f"`scale_rewards` is {config.scale_rewards!r}, but reward_baseline={baseline!r} compares rewards as they "
            "are: dividing them by a standard deviation changes the optimum, and a group of one completion has none. "
            "Set `scale_rewards='none'`, or `reward_baseline='group'`."
        )
    if config.multi_objective_aggregation != "sum_then_normalize":
        raise ValueError(
            f"`multi_objective_aggregation` is {config.multi_objective_aggregation!r}, which divides each reward by "
            f"its standard deviation in the group, but reward_baseline={baseline!r} compares their weighted sum as it "
            "is. Set it to 'sum_then_normalize', or `reward_baseline='group'`."
        )
    if config.generation_batch_size < 2:
        raise ValueError(
            f"Rewards are compared over the generation batch (`reward_baseline` is {baseline!r}), but it holds one "
            "completion, which has nothing to be compared with. Raise `per_device_train_batch_size`, "
            "`gradient_accumulation_steps` or `generation_batch_size`."
        )


def _check_generation(config: Any) -> None:
    """Some settings of `generate` do not give one sequence of ids per prompt, which is what a rollout is."""
    given = shaping(config.generation_kwargs or {})
    for name in ("num_return_sequences", "n"):
        if name in given:
            raise ValueError(
                f"`generation_kwargs` has {name}={given[name]}, but each row of a batch is one completion. Leave it "
                "out and set `num_generations`."
            )
    if (config.generation_kwargs or {}).get("return_dict_in_generate"):
        raise ValueError("`generation_kwargs` has `return_dict_in_generate`, but token ids are needed. Leave it out.")
    if "stop_strings" in given:
        raise ValueError(
            "`generation_kwargs` has `stop_strings`, for which `generate` needs a tokenizer that TRL does not pass. "
            "Use stop tokens: `model.generation_config.eos_token_id` may be a list."
        )


def _warn_of_reference_beta(config: Any, has_rewards: bool) -> None:
    """A small `beta` may be left over from a GRPO script, where it holds the student near its own start."""
    effect = "beside the rewards the teacher counts little" if has_rewards else "the whole loss is scaled by it"
    logger.warning(
        f"`beta` is {config.beta:g}. In GRPO scripts such a value (0.04, 0.001) is the weight of a reference model; "
        f"here it is the teacher's, in reward per nat, and {effect}. Leave `beta` out (1.0) unless it is meant."
    )


def _check_units(config: Any) -> None:
    """`beta` is in reward per nat only if rewards are not rescaled."""
    if config.scale_rewards != "none":
        logger.warning(
            f"`scale_rewards={config.scale_rewards!r}` divides rewards by their standard deviation, so `beta` is "
            "no longer a weight in reward per nat and the optimum changes. Use 'none' to optimise the stated "
            "objective."
        )
    if config.multi_objective_aggregation != "sum_then_normalize":
        logger.warning(
            f"`multi_objective_aggregation={config.multi_objective_aggregation!r}` divides rewards by their "
            "standard deviations, so `beta` is no longer a weight in reward per nat. Use 'sum_then_normalize' to "
            "optimise the stated objective."
        )
    ceiling = config.epsilon if config.epsilon_high is None else config.epsilon_high
    if config.loss_type == "cispo" and ceiling < 1:
        raise ValueError(
            f"loss_type='cispo' clips the ratio at `epsilon_high` ({ceiling}), below its value on fresh rollouts, "
            f"so rewards would count only {ceiling} times and `beta` would not be in reward per nat. Set "
            "`epsilon_high` to more than 1 (5.0 in the ScaleRL recipe)."
        )


def _check_ignored(config: Any) -> None:
    """Settings of the policy loss have no effect without rewards."""
    if config.reward_weights is not None:
        raise ValueError("`reward_weights` are given, but no `reward_funcs`. Give both or neither.")
    ignored = {
        "reward_baseline": None,
        "delta": None,
        "off_policy_mask_threshold": None,
        "top_entropy_quantile": 1.0,
        "reward_start_step": 0,
    }
    for name, default in ignored.items():
        if getattr(config, name) != default:
            logger.warning(f"`{name}` belongs to the policy loss, and without rewards there is none: it has no effect.")
