"""Names of TRL that TRL does not document, each held by a test in `tests/contract/`.

The private methods and attributes of `GRPOTrainer` are not here but in `training/grpo_hooks.py`. This file imports
nothing else of this package.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import Any

import torch
from trl import GRPOConfig
from trl.data_utils import prepare_multimodal_messages
from trl.kernels import ChunkedLogProbFunction
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import _use_triton
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import (
    FusedCausalLMOutput,
    create_model_from_path,
    get_config_model_id,
    maybe_gather_lm_head_ctx,
    split_pixel_values_by_grid,
)


__all__ = [
    "DICT_FIELDS",
    "ChunkedDivergenceFunction",
    "ChunkedLogProbFunction",
    "FusedCausalLMOutput",
    "create_model_from_path",
    "gathered_head",
    "get_config_model_id",
    "has_triton",
    "post_init_without_group_check",
    "prepare_deepspeed",
    "prepare_fsdp",
    "prepare_multimodal_messages",
    "probe_environments",
    "split_pixel_values_by_grid",
]


# Fields of `GRPOConfig` that the command line gives as JSON; a subclass extends the list under the same private name
DICT_FIELDS: list[str] = GRPOConfig._VALID_DICT_FIELDS


def gathered_head(weight: torch.Tensor, bias: torch.Tensor | None) -> AbstractContextManager[Any]:
    """Context that gathers an LM head sharded by ZeRO-3; without ZeRO-3 it does nothing."""
    return maybe_gather_lm_head_ctx(weight, bias)  # type: ignore[arg-type]


def has_triton(device: torch.device) -> bool:
    """Whether TRL's kernels run in Triton on this device."""
    return _use_triton(device)


def probe_environments(factory: Any) -> tuple[bool, Any]:
    """
    Whether an `environment_factory` (one, or several by name) brings its own reward, and the factory to use.

    An instance that had to be made to find out is returned by the first call of that factory, so that none is wasted.
    """
    if factory is None:
        return False, None
    if isinstance(factory, dict):
        probed = {name: probe_environments(single) for name, single in factory.items()}
        return any(found for found, _ in probed.values()), {name: single for name, (_, single) in probed.items()}
    if inspect.isclass(factory):
        return _owns_reward(factory), factory
    spare = [factory()]
    return _owns_reward(type(spare[0])), lambda: spare.pop() if spare else factory()


def _owns_reward(environment_class: type) -> bool:
    return any(name == "get_reward" for name, _ in inspect.getmembers(environment_class, inspect.isfunction))


class _NeverBelow(int):
    """An integer for which `<` is always false, so that it passes `GRPOConfig`'s check of `num_generations`."""

    def __lt__(self, other: object) -> bool:
        return False


def post_init_without_group_check(config: GRPOConfig) -> None:
    """
    Run `GRPOConfig.__post_init__` on `config` without its check for at least two generations per prompt.

    A `num_generations` of `None` or 1 is accepted and kept. All other checks of TRL run.
    """
    given = config.num_generations
    if given is None or given == 1:
        config.num_generations = _NeverBelow(1)
    try:
        GRPOConfig.__post_init__(config)
    finally:
        config.num_generations = given


# Arguments that TRL passes to reward functions, besides the dataset's columns
REWARD_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
