"""Additions to a wandb run: the names of student, teachers and rewards, and a figure of the training.

[`OPDTrainer`] adds this callback if `report_to` includes wandb. Settings, metrics and the table of completions
(`log_completions=True`) are logged by transformers and TRL.
"""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..redaction import redacted
from .curves import training_figure


logger = logging.getLogger(__name__)


def as_image(figure: Any) -> Any:
    """A figure as a Pillow image, since wandb accepts figures of pyplot only."""
    from PIL import Image

    memory = io.BytesIO()
    figure.savefig(memory, format="png")
    return Image.open(memory)


class WandbExtras(TrainerCallback):
    """
    Adds "student", "teachers" and "reward_funcs" to the configuration of the active wandb run, and at the end the
    figure "plots/training".

    Args:
        facts (`dict`): entries for the configuration.
    """

    def __init__(self, facts: dict[str, Any]):
        self.facts = facts

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        import wandb

        if wandb.run is not None:  # on the main process, where transformers' callback has started the run
            wandb.config.update(redacted(self.facts), allow_val_change=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        import wandb

        if wandb.run is None:
            return
        try:
            picture = as_image(training_figure({"": state.log_history}))
        except (ImportError, ValueError) as error:
            logger.warning(f"The figure of the training is not sent to wandb. {error}")
            return
        wandb.log({"plots/training": wandb.Image(picture), "train/global_step": state.global_step})


def log_to_wandb(path: Path, name: str, beside: dict[str, Any]) -> None:
    """Log an HTML file to the active wandb run, if there is one."""
    import wandb

    if wandb.run is not None:
        wandb.log({name: wandb.Html(path.read_text("utf-8"), inject=False), **beside})
