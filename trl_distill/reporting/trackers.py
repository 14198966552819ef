"""Additions to a run on wandb or Trackio: names of student, teachers and rewards, a figure, HTML pages.

Settings, metrics and the table of completions (`log_completions=True`) are logged by transformers and TRL. Both
trackers have the same interface for the rest, so each function here takes either.
"""

from __future__ import annotations

import importlib
import io
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers.integrations import TrackioCallback, WandbCallback

from ..redaction import redacted
from .curves import training_figure


logger = logging.getLogger(__name__)


TRACKERS = ("wandb", "trackio")


PROJECT = "huggingface"  # transformers' default, so that pages lie beside training runs


def open_run(tracker: str) -> Any:
    """
    A tracker's module, if a run is open in this process.

    Args:
        tracker (`str`): one of `TRACKERS`; its package is imported.

    Returns:
        module, *optional*: it has `log`, `Image`, `Html` and the run's `config`; `None` if no run is open, as on all
        processes but the main one.
    """
    module = importlib.import_module(tracker)
    run = module.run if tracker == "wandb" else module.context_vars.current_run.get()
    return None if run is None else module


def describe(tracker: str, facts: dict[str, Any]) -> None:
    """
    Add entries to the configuration of the open run, with secrets masked.

    Trackio stores the configuration with the first log, so later entries would be lost.
    """
    module = open_run(tracker)
    if module is not None:
        options = {"allow_val_change": True} if tracker == "wandb" else {}
        module.config.update(redacted(facts), **options)


def log_page(trackers: Collection[str], path: Path, name: str, beside: dict[str, Any]) -> None:
    """
    Log an HTML file to every open run.

    Args:
        trackers (`Collection[str]`): as in `report_to`; names of other trackers are passed over.
        path (`Path`): the file.
        name (`str`): its key in the run.
        beside (`dict`): values that are logged with it, such as the step.
    """
    for tracker in TRACKERS:
        module = open_run(tracker) if tracker in trackers else None
        if module is not None:
            module.log({name: module.Html(path.read_text("utf-8"), inject=False), **beside})


def log_page_alone(tracker: str, path: Path, name: str, config: dict[str, Any]) -> None:
    """Log an HTML file as a run of its own, with this configuration."""
    module = importlib.import_module(tracker)
    module.init(**({} if tracker == "wandb" else {"project": PROJECT}), config=redacted(config))
    log_page([tracker], path, name, {})
    module.finish()


def log_figure(tracker: str, history: list[dict[str, Any]], step: int) -> None:
    """Log the figure "plots/training" of a run's log to the open run; a warning if it cannot be drawn."""
    module = open_run(tracker)
    if module is None:
        return
    try:
        picture = _as_image(training_figure({"": history}))
    except (ImportError, ValueError) as error:
        logger.warning(f"The figure of the training is not sent to {tracker}. {error}")
        return
    module.log({"plots/training": module.Image(picture), "train/global_step": step})


def _as_image(figure: Any) -> Any:
    """A figure as a Pillow image, since wandb accepts figures of pyplot only."""
    from PIL import Image

    memory = io.BytesIO()
    figure.savefig(memory, format="png")
    return Image.open(memory)


class _DescribedRun:
    """
    Adds facts when transformers' callback has started a run, and the figure before that callback ends it.

    Args:
        facts (`dict`): entries for the run's configuration.
    """

    tracker = ""

    def __init__(self, facts: dict[str, Any]):
        super().__init__()
        self.facts = facts

    def setup(self, *args: Any, **kwargs: Any) -> None:
        super().setup(*args, **kwargs)  # type: ignore[misc]  # transformers' callback
        describe(self.tracker, self.facts)

    def on_train_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        log_figure(self.tracker, state.log_history, state.global_step)
        super().on_train_end(args, state, *rest, **kwargs)  # type: ignore[misc]


class WandbRun(_DescribedRun, WandbCallback):
    """transformers' callback for wandb; the run also has facts and figure."""

    tracker = "wandb"


class TrackioRun(_DescribedRun, TrackioCallback):
    """transformers' callback for Trackio; the run also has facts and figure."""

    tracker = "trackio"


def add_trackers(trainer: Any, facts: dict[str, Any]) -> None:
    """
    Put our callbacks in the place of transformers' for the trackers in `report_to`.

    Args:
        trainer ([`~transformers.Trainer`]): its callbacks are changed.
        facts (`dict`): entries for the run's configuration.
    """
    for base, ours in ((WandbCallback, WandbRun), (TrackioCallback, TrackioRun)):
        if ours.tracker in trainer.args.report_to:
            trainer.remove_callback(base)
            trainer.add_callback(ours(facts))


def close_last(trainer: Any) -> None:
    """Move Trackio's callback behind all others: it closes the run when training ends, and nothing can follow."""
    callback = trainer.pop_callback(TrackioCallback)
    if callback is not None:
        trainer.add_callback(callback)
