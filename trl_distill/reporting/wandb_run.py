"""What wandb's run lacks beside what transformers and TRL put there: who teaches, which rewards, and a picture.

A callback that [`OPDTrainer`] adds where `report_to` names wandb. Settings, metrics and the table of completions
(`log_completions=True`) are left to theirs.
"""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .curves import training_figure


logger = logging.getLogger(__name__)


def as_image(figure: Any) -> Any:
    """A figure as a picture of Pillow's; wandb takes figures of pyplot alone."""
    from PIL import Image

    memory = io.BytesIO()
    figure.savefig(memory, format="png")
    return Image.open(memory)


class WandbExtras(TrainerCallback):
    """
    Adds to the active wandb run: "student", "teachers" and "reward_funcs" in the configuration, and at the end
    "plots/training", how it went over the steps.

    Args:
        facts (`dict`): what is added to the configuration.
    """

    def __init__(self, facts: dict[str, Any]):
        self.facts = facts

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        import wandb

        if wandb.run is not None:  # in the main process; transformers' own callback has begun it
            wandb.config.update(self.facts, allow_val_change=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        import wandb

        if wandb.run is None:
            return
        try:
            picture = as_image(training_figure({"": state.log_history}))
        except (ImportError, ValueError) as error:
            logger.warning(f"No picture of the training is sent to wandb. {error}")
            return
        wandb.log({"plots/training": wandb.Image(picture), "train/global_step": state.global_step})


def log_to_wandb(path: Path, name: str, beside: dict[str, Any]) -> None:
    """Log a report to the active wandb run as it is; nothing where there is no run."""
    import wandb

    if wandb.run is not None:
        wandb.log({name: wandb.Html(path.read_text("utf-8"), inject=False), **beside})
