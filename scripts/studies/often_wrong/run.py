"""The student above its teacher: teachers that are often wrong, a reward for right answers, a weight between them.

    python -m scripts.studies.often_wrong.run --teachers      # make the three teachers
    python -m scripts.studies.often_wrong.run --list          # the names of all runs
    python -m scripts.studies.often_wrong.run --workers 2     # all runs, two at a time, each on one core
    python -m scripts.studies.often_wrong.run --runs 70-both-0.3-0 70-both-0.3-1
    python -m scripts.studies.often_wrong.run --report        # table and pictures in docs/, from finished runs

Every finished run leaves a file in docs/results/often_wrong/ and is not made again; if interrupted, rerun the command
to resume. The task is the demo's; arms and settings are in `arms.py`, teachers in `teachers.py`. It is no claim of
`scripts/reproduce.py`, since its teachers and its starting points are others.
"""

from __future__ import annotations

from scripts.studies.startup import ONE_THREAD, prepare_environment  # before the libraries


prepare_environment(HF_HUB_OFFLINE="1", OMP_NUM_THREADS=ONE_THREAD, TOKENIZERS_PARALLELISM="false")

import argparse
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from datasets.utils.logging import disable_progress_bar
from transformers.utils import logging as transformers_logging

from scripts.studies.often_wrong import report
from scripts.studies.often_wrong.arms import runs
from scripts.studies.often_wrong.teachers import make_teachers
from scripts.studies.often_wrong.train import run
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


def leave_with(parent: int) -> None:
    """End this process when the one that started it has ended, however it ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def start(name: str, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """A run in a process and session of its own; what it prints is kept beside the teachers."""
    logs = options.output_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "scripts.studies.often_wrong.run", "--alone", "--runs", name]
    command += ["--parent", str(os.getpid())]
    command += ["--output_dir", str(options.output_dir.resolve()), "--results", str(options.results.resolve())]
    with (logs / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


def run_all(names: list[str], options: argparse.Namespace) -> int:
    """Make the runs, some at a time; the number of those that failed."""
    todo = [name for name in names if not (options.results / f"{name}.json").exists()]
    active: dict[str, subprocess.Popen[bytes]] = {}
    failed = 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        while todo or active:
            while todo and len(active) < options.workers:
                name = todo.pop(0)
                active[name] = start(name, options)
            time.sleep(0.5)
            for name in [name for name, process in active.items() if process.poll() is not None]:
                status = active.pop(name).returncode
                failed += status != 0
                where = options.output_dir / "logs" / f"{name}.log"
                console.print(f"{name}: {'done' if status == 0 else f'failed, see {where}'}; {len(todo)} to start")
    finally:
        for process in active.values():
            process.kill()
    return failed


def be_quiet() -> None:
    logging.getLogger("trl_distill").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    disable_progress_bar()


def main(words: list[str] | None = None) -> int:
    options = parse(words)
    be_quiet()
    names: list[Any] = options.runs or list(runs())
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
    return 0 if options.teachers else min(run_all(names, options), 1)


if __name__ == "__main__":
    sys.exit(main())
