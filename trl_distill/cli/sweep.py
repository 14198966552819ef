"""Run a sweep's YAML here, without an account: one run after another, a table, and the Pareto picture.

    python scripts/sweep.py --sweep scripts/sweeps/beta.yaml --output_dir sweeps/beta
    python scripts/sweep.py --sweep scripts/sweeps/learning_rate.yaml --output_dir sweeps/lr --runs 12 -- --use_peft

From the repository's root. Arguments after `--` go to the program and win over the YAML. Interrupted in any way, the
same command goes on: finished runs stay, a half-finished one resumes from its last checkpoint, failed ones are tried
again, and what is drawn is what would have been drawn. Each run has a folder: `parameters.json`, `log.txt`,
`result.json`, and `out/`, the program's own. Status 1: a run failed; 130: interrupted.

Left out: runs at the same time (`wandb agent` on several machines does that) and stopping bad runs early.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
from pathlib import Path
from typing import Any

from ..sweeps.results import SWEEP
from ..sweeps.runner import console, keep_identity, locked, run_all
from ..sweeps.space import check_overrides, read_sweep, size_of


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", type=Path, help="the YAML, as `wandb sweep` takes it")
    parser.add_argument("--output_dir", type=Path, required=True, help="where runs and results go")
    parser.add_argument("--runs", type=int, help="how many; all of a grid unless given")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn, not of the runs")
    parser.add_argument("--last", type=int, default=5, help="logged steps of which a run's metrics are the mean")
    parser.add_argument("--report_only", action="store_true", help="make table and picture of what was run again")
    parser.add_argument("overrides", nargs="*", help="after `--`: further arguments of the program")
    return parser.parse_args(arguments)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def report_again(folder: Path) -> int:
    """Table and picture of a sweep's folder."""
    if not (folder / SWEEP).is_file():
        console.print(f"{folder} is no sweep's folder: it holds no {SWEEP}.", markup=False)
        return 2
    from ..sweeps.report import report

    report(folder, console)
    return 0


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.report_only:
        return report_again(options.output_dir)
    try:
        if options.sweep is None:
            raise ValueError("Name the sweep's YAML with `--sweep`.")
        sweep = read_sweep(options.sweep)
        check_overrides(sweep, options.overrides)
        total = size_of(sweep, options.runs)
        if options.last < 1 or options.seed < 0:
            raise ValueError(f"`--last` is {options.last} and `--seed` {options.seed}; from 1 and from 0.")
        if importlib.util.find_spec("matplotlib") is None:  # better now than after the last run
            raise ValueError("The picture needs matplotlib: pip install 'trl_distill[sweeps]'.")
        if not Path(sweep["program"]).is_file():
            raise ValueError(f"There is no {sweep['program']} here. Start from the folder that the sweep means.")
    except ValueError as error:
        console.print(str(error), markup=False)
        return 2
    options.output_dir.mkdir(parents=True, exist_ok=True)
    identity = {"sweep": sweep, "seed": options.seed, "last": options.last, "overrides": options.overrides}
    try:
        with locked(options.output_dir) as lock:
            keep_identity(options.output_dir, identity)
            run_all(options, sweep, total, lock)
            from ..sweeps.report import report  # here, since it imports PyTorch

            rows = report(options.output_dir, console)
    except ValueError as error:
        console.print(str(error), markup=False)
        return 2
    except KeyboardInterrupt:
        console.print(f"Interrupted. What is finished is in {options.output_dir}; the same command goes on from there.")
        return 130
    return int(any(row.failure for row in rows))


def run(words: list[str]) -> int:
    """The command. SIGTERM is as Ctrl-C: what runs is ended, what is finished stays."""
    signal.signal(signal.SIGTERM, interrupt)
    return main(words)
