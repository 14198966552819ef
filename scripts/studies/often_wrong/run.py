"""The student above its teacher: teachers that are often wrong, a reward for right answers, a weight between them.

    python -m scripts.studies.often_wrong.run --teachers      # make the three teachers
    python -m scripts.studies.often_wrong.run --list          # the names of all runs
    python -m scripts.studies.often_wrong.run --workers 2     # all runs, two at a time, each on one core
    python -m scripts.studies.often_wrong.run --runs 70-both-0.3-0 70-both-0.3-1
    python -m scripts.studies.often_wrong.run --report        # table and pictures in docs/, from finished runs

Every finished run leaves a file in docs/results/often_wrong/ and is not made again; if interrupted, rerun the command
to resume. The task is the demo's; arms and settings are in `arms.py`, teachers in `teachers.py`. It is also
`python scripts/reproduce.py often-wrong`, with the same arguments: teachers and starting points are others than those
of the other claims.
"""

from __future__ import annotations

from scripts.studies.startup import ONE_THREAD, prepare_environment  # before the libraries


prepare_environment(HF_HUB_OFFLINE="1", OMP_NUM_THREADS=ONE_THREAD, TOKENIZERS_PARALLELISM="false")

import argparse
import logging
import os
import sys
from pathlib import Path

from datasets.utils.logging import disable_progress_bar
from transformers.utils import logging as transformers_logging

from scripts.studies.often_wrong import report
from scripts.studies.often_wrong.arms import runs
from scripts.studies.often_wrong.teachers import make_teachers, write_facts
from scripts.studies.often_wrong.train import run
from scripts.studies.often_wrong.workers import leave_with, run_all
from trl_distill import foreign_text


ROOT = Path(__file__).parents[3]

RESULTS = ROOT / "docs" / "results" / "often_wrong"

console = foreign_text.console()


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("often_wrong_output"), help="for the teachers")
    parser.add_argument("--results", type=Path, default=RESULTS, help="a file for each finished run")
    parser.add_argument("--runs", nargs="+", metavar="NAME", help="these; all unless given")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--teachers", action="store_true", help="make the teachers, and stop")
    parser.add_argument("--list", action="store_true", help="print the names of the runs, and stop")
    parser.add_argument("--report", action="store_true", help="run nothing; write table and pictures")
    parser.add_argument("--alone", action="store_true", help="make the one run of --runs in this process")
    parser.add_argument("--parent", type=int, help="with --alone: end when this process, the parent, has ended")
    options = parser.parse_args(words)
    unknown = [name for name in options.runs or () if name not in runs()]
    if unknown:
        parser.error(f"there is no run {unknown[0]!r}; --list prints the names of all")
    if options.workers < 1:
        parser.error("--workers must be 1 or more")
    if options.alone and len(options.runs or ()) != 1:
        parser.error("--alone needs the name of one run: --runs NAME")
    return options


def command(name: str, options: argparse.Namespace) -> list[str]:
    """The command of one run, as a process of its own."""
    words = [sys.executable, "-m", "scripts.studies.often_wrong.run", "--alone", "--parent", str(os.getpid())]
    return [*words, "--runs", name, "--output_dir", str(options.output_dir), "--results", str(options.results)]


def be_quiet() -> None:
    logging.getLogger("trl_distill").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    disable_progress_bar()


def main(words: list[str] | None = None) -> int:
    options = parse(words)
    be_quiet()
    names: list[str] = options.runs or list(runs())
    if options.list:
        print("\n".join(names))
        return 0
    if options.report:
        report.write(options.results, ROOT / "docs")
        return 0
    if options.alone:
        if options.parent:
            leave_with(options.parent)
        path = options.results / f"{names[0]}.json"
        if not path.exists():
            run(names[0], runs()[names[0]], options.output_dir / "teachers", path)
        return 0
    make_teachers(options.output_dir / "teachers")
    write_facts(options.output_dir / "teachers", options.results)
    if options.teachers:
        return 0
    todo = [name for name in names if not (options.results / f"{name}.json").exists()]
    logs = options.output_dir / "logs"
    failed = run_all(todo, lambda name: command(name, options), logs, options.workers, console.print)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
