"""What a run minimises, noted in its checkpoints, and a warning where a resumed run minimises something else.

transformers keeps the record in `trainer_state.json`, as the state of a callback. Older checkpoints have none, and are
resumed without a comparison. Learning rate, batch sizes and the like are left to transformers.
"""

from __future__ import annotations

import logging
from pathlib import PurePath
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..config import OPDConfig
from ..redaction import redacted


logger = logging.getLogger(__name__)


SETTINGS = (
    *("beta", "beta_schedule", "beta_end", "beta_schedule_steps", "divergence", "divergence_alpha"),
    *("kl_estimator", "kl_top_k", "kl_discount", "kl_temperature", "lmbda", "off_policy_divergence"),
    *("token_weighting", "token_weighting_kwargs", "teacher_weights", "reward_baseline", "num_generations"),
    "reward_start_step",
)


def objective_of(args: OPDConfig, teachers: dict[str, str], rewards: list[str]) -> dict[str, str]:
    """
    The settings of the objective by name, as text, with the teachers and rewards.

    Args:
        args ([`OPDConfig`]): resolved.
        teachers (`dict[str, str]`): names of the models by the teachers' names. Of a path its last part counts, since
            folders may lie elsewhere on another machine.
        rewards (`list[str]`): names of the reward functions.
    """
    of_rewards = ("reward_baseline", "num_generations", "reward_start_step")
    found = {name: _text(getattr(args, name)) for name in SETTINGS if rewards or name not in of_rewards}
    models = {name: PurePath(model).name for name, model in redacted(teachers).items()}
    return {**found, "teachers": _text(models), "reward_funcs": _text(rewards)}


def _text(value: Any) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:g}" if number else str(redacted(value))


class ObjectiveRecord(TrainerCallback, ExportableState):
    """
    Puts the objective into checkpoints, and compares it when a run is resumed.

    Args:
        objective (`dict[str, str]`): as [`objective_of`] gives it.
    """

    def __init__(self, objective: dict[str, str]):
        self.objective = objective

    def state(self) -> dict[str, Any]:
        return {"args": {"objective": self.objective}, "attributes": {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called with the state of the checkpoint, if there is one."""
        name = type(self).__name__
        before = state.stateful_callbacks.get(name, self.state())["args"]["objective"]
        changed = [
            f"`{key}` was {before[key]}, now {value}"
            for key, value in self.objective.items()
            if key in before and before[key] != value
        ]
        if changed and state.is_world_process_zero:
            logger.warning(
                f"The run goes on from step {state.global_step} with another objective than its checkpoint: "
                f"{'; '.join(changed)}. Optimizer state and learning rate are those of before. If this is not meant, "
                "stop, and resume with the settings of before."
            )
        state.stateful_callbacks[name] = self.state()
