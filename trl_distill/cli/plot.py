"""One picture of how runs went: KL both ways, reward, objective, entropy, agreement, lengths.

    trl-distill plot out                                  # writes out/training.png
    trl-distill plot out-a out-b --labels "beta 0.1" "beta 1" --output both.png
    trl-distill plot out --evaluation evaluation.json --teacher_model_name_or_path Qwen/Qwen3-4B    # its level too

A run is a folder that training wrote into (its log is `trainer_state.json`, there or in the last checkpoint), or such a
file. Pictures of sweeps are made by `trl-distill sweep`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..reporting.curves import training_figure
from .arguments import CommandParser, finite


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(command="plot", text=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders, or trainer_state.json files")
    parser.add_argument("--labels", nargs="+", help="what to call the runs; their folders' names unless given")
    parser.add_argument("--teacher_reward", type=finite, help="the teacher's level of the reward")
    parser.add_argument("--evaluation", type=Path, help="what `trl-distill evaluate` wrote, with the run's one reward")
    parser.add_argument("--teacher_model_name_or_path", help="the teacher's name in there")
    parser.add_argument("--title", default="")
    parser.add_argument("--output", type=Path, help="training.png in the first run's folder unless given")
    options = parser.parse_args(words)
    if options.labels and len(options.labels) != len(options.runs):
        parser.error(f"{len(options.runs)} runs have {len(options.labels)} labels; give one for each")
    if (options.evaluation is None) != (options.teacher_model_name_or_path is None):
        parser.error(
            "--evaluation and --teacher_model_name_or_path go together: the file, and whose level to take from it"
        )
    return options


def log_of(run: Path) -> list[dict[str, Any]]:
    """The log that a run left behind: in the folder itself, or else in its newest checkpoint."""
    checkpoints = sorted(
        (path for path in run.glob("checkpoint-*/trainer_state.json") if path.parent.name[11:].isdigit()),
        key=lambda path: int(path.parent.name[11:]),
    )
    candidates = [run] if run.is_file() else [run / "trainer_state.json", *reversed(checkpoints)]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise ValueError(
            f"{run} holds no log. Name a folder with trainer_state.json or checkpoints in it; `trl-distill train` "
            "writes the first at the end, `trainer.save_state()` does so in Python."
        )
    state = json.loads(found.read_text())
    if "log_history" not in state:
        raise ValueError(f"{found} holds no log: name a trainer_state.json, or the folder that it is in.")
    return state["log_history"]


def teacher_levels(options: argparse.Namespace) -> dict[str, float]:
    """What is known of the teacher, by the log's key."""
    if options.teacher_reward is not None:
        return {"reward": options.teacher_reward}
    if options.evaluation is None:
        return {}
    models, teacher = json.loads(options.evaluation.read_text()).get("models", {}), options.teacher_model_name_or_path
    if teacher not in models:
        raise ValueError(f"{options.evaluation} has no model {teacher!r}, only {', '.join(models)}.")
    values = [one["value"] for name, one in models[teacher]["estimates"].items() if name.startswith("avg@")]
    known = [value for value in values if value is not None]
    return {"reward": known[0]} if known else {}


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    labels = options.labels or [run.name if run.is_dir() else run.parent.name for run in options.runs]
    try:
        logs = {label: log_of(run) for label, run in zip(labels, options.runs, strict=True)}
        if len(logs) < len(options.runs):
            raise ValueError("Two runs have the same name. Tell them apart with `--labels`.")
        figure = training_figure(logs, teacher_levels(options), options.title)
    except (ValueError, ImportError, FileNotFoundError) as error:
        sys.exit(f"{error}")
    first = options.runs[0]
    output = options.output or (first if first.is_dir() else first.parent) / "training.png"
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    print(f"The picture is in {output}")


def run(words: list[str]) -> None:
    """The command."""
    main(words)
