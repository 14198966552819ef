"""Run a sweep's YAML here, without an account: one run after another, a table, and the Pareto picture.

    trl-distill sweep --sweep scripts/sweeps/beta.yaml --output_dir sweeps/beta
    trl-distill sweep --sweep scripts/sweeps/learning_rate.yaml --output_dir sweeps/lr --runs 12 -- --use_peft

Run it from the repository's root. Arguments after `--` go to the program and win over the YAML. If interrupted, rerun
the command to resume: finished runs stay, a half-finished one goes on from its last checkpoint, failed ones are tried
again, and the points are those of an uninterrupted sweep. Each run has a folder: `parameters.json`, `log.txt`,
`result.json`, and `out/`, the program's own. Status 1: a run failed; 130: interrupted.

Left out: runs at the same time; `wandb agent` on several machines does that.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..sweeps.results import SWEEP


if TYPE_CHECKING:
    from ..sweeps.runner import Sweep

from .arguments import CommandParser


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(command="sweep", text=__doc__)
    parser.add_argument("--sweep", type=Path, help="the YAML, as `wandb sweep` takes it")
    parser.add_argument("--output_dir", type=Path, required=True, help="where runs and results go")
    parser.add_argument("--runs", type=int, help="how many; all of a grid unless given")
    parser.add_argument("--seed", type=int, default=0, help="of the draws, not of the runs")
    parser.add_argument("--last", type=int, default=5, help="logged steps that a run's metrics are the mean of")
    parser.add_argument("--report_only", action="store_true", help="make the table and the picture again, run nothing")
    parser.add_argument("overrides", nargs="*", help="after `--`: further arguments of the program")
    return parser.parse_args(arguments)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def report_again(folder: Path) -> int:
    """Table and picture of a sweep's folder."""
    from ..sweeps.report import report
    from ..sweeps.runner import console

    if not (folder / SWEEP).is_file():
        console.print(f"{folder} is not a sweep's folder: it holds no {SWEEP}.", markup=False)
        return 2
    report(folder, console)
    return 0


def sweep_of(options: argparse.Namespace) -> tuple[Sweep, int]:
    """
    The sweep that was asked for, and how many runs it has.

    Raises:
        ValueError: something is missing or wrong; nothing has been written yet.
    """
    from ..sweeps.commands import check_overrides
    from ..sweeps.runner import Sweep
    from ..sweeps.schema import read_sweep
    from ..sweeps.space import size_of

    if options.sweep is None:
        raise ValueError("Name the sweep's YAML with `--sweep`.")
    config = read_sweep(options.sweep)
    if not Path(config["program"]).is_file():
        raise ValueError(f"There is no {config['program']} here. Start from the folder that the sweep means.")
    check_overrides(config, options.overrides)
    total = size_of(config, options.runs)
    if options.last < 1 or options.seed < 0:
        raise ValueError(f"`--last` is {options.last} and `--seed` {options.seed}; from 1 and from 0.")
    if importlib.util.find_spec("matplotlib") is None:  # better now than after the last run
        raise ValueError("The picture needs matplotlib: pip install 'trl_distill[sweeps]'.")
    return Sweep(config, options.output_dir, options.seed, options.last, tuple(options.overrides)), total


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        from ..sweeps.runner import console, keep_identity, locked, run_all
    except ImportError as error:  # of Optuna
        print(error)
        return 2
    if options.report_only:
        return report_again(options.output_dir)
    try:
        sweep, total = sweep_of(options)
        sweep.folder.mkdir(parents=True, exist_ok=True)
        with locked(sweep.folder) as lock:
            keep_identity(sweep)
            run_all(sweep, total, lock)
            from ..sweeps.report import report  # here, since it imports PyTorch

            rows = report(sweep.folder, console)
    except ValueError as error:
        console.print(str(error), markup=False)
        return 2
    except KeyboardInterrupt:
        console.print(f"Interrupted. What is finished is in {options.output_dir}; the same command goes on from there.")
        return 130
    return int(any(row.failure for row in rows))


def run(words: list[str]) -> int:
    """The command. SIGTERM acts as Ctrl-C: the current run is ended, finished ones stay."""
    signal.signal(signal.SIGTERM, interrupt)
    return main(words)
