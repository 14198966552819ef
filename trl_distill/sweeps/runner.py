"""The runs of a sweep, one after another, each with a folder of its own; interrupted, they go on.

What is drawn is in `space.py`, what came of it in `report.py`.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .results import FAILURE, PARAMETERS, RESULT, SWEEP, last_means, write
from .space import Drawn, command_line, draw, label, logged_name, shown


LAST_LINES = 15  # of a failed run's log, for the record


GRACE = 30  # seconds for a run to end after an interruption


console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140)


@dataclass(frozen=True)
class Job:
    """One run of a sweep: its folder, what was drawn for it, and the command."""

    folder: Path
    parameters: dict[str, Any]
    settings: dict[str, Any]  # of the parameters, what the sweep varies
    command: list[str]
    names: dict[str, str]  # environment: what wandb calls the run, where it is told to report there

    @property
    def state(self) -> Path:
        """What the program leaves when it has come to its end: the trainer's state, with the log."""
        return self.folder / "out" / "trainer_state.json"


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """
    The folder for this call alone. Runs inherit the lock, so a run that outlives its `sweep.py` (killed, say) is waited
    for instead of started a second time beside it.
    """
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(f"Another call, or a run that it left behind, is at work in {folder}; waiting for its end.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file
    finally:
        os.close(file)


def keep_identity(folder: Path, identity: dict[str, Any]) -> None:
    """
    Note which sweep the folder holds, or see that it is this one.

    Raises:
        ValueError: it is another.
    """
    path = folder / SWEEP
    if path.is_file():
        known = json.loads(path.read_text())
        differing = [name for name in identity if known.get(name) != identity[name]]
        if differing:
            raise ValueError(
                f"{folder} holds a sweep with other settings ({', '.join(differing)} differ; see {path.name} there). "
                "Its runs and those of this one would not be comparable: give another `--output_dir`."
            )
    write(path, identity)


def job_of(options: argparse.Namespace, sweep: dict[str, Any], index: int, earlier: list[Drawn]) -> Job:
    """The run with this number: as it was drawn by an earlier call, or drawn now and noted."""
    folder = options.output_dir / f"{index:03d}"
    folder.mkdir(exist_ok=True)
    noted = folder / PARAMETERS
    if not noted.is_file():
        drawn = draw(sweep, index, earlier, options.seed)
        assert drawn is not None  # `size_of` has counted
        write(noted, drawn)
    parameters = json.loads(noted.read_text())
    command = [
        *command_line(sweep, parameters),
        *(f"--output_dir={folder / 'out'}", "--report_to=none", "--resume_from_checkpoint=auto"),
        *options.overrides,
    ]
    settings = shown(sweep, parameters)
    names = {
        "WANDB_PROJECT": os.environ.get("WANDB_PROJECT", sweep.get("project", "trl_distill")),
        "WANDB_RUN_GROUP": str(options.output_dir),
        "WANDB_NAME": label(settings),
    }
    return Job(folder, parameters, settings, command, names)


def run(job: Job, lock: int, look: Callable[[], None]) -> int:
    """Run the program to its end, its output in `log.txt`; returns its status. An interruption ends it first."""
    with (job.folder / "log.txt").open("a") as log:
        log.write(f"==> {' '.join(job.command)}\n")
        log.flush()
        process = subprocess.Popen(
            job.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[lock],
            env={**os.environ, **job.names},
            start_new_session=True,  # a terminal's Ctrl-C shall reach it once, from here: the second ends it at once
        )
        try:
            while process.poll() is None:
                time.sleep(0.2)
                look()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                process.kill()
                process.wait()
            raise
        return process.returncode


def settle(job: Job, status: int, last: int) -> dict[str, Any]:
    """Write down how a run has ended: its metrics, or the last lines of its log."""
    if status == 0 and job.state.is_file():
        log_history = json.loads(job.state.read_text())["log_history"]
        result = {"settings": job.settings, "command": job.command, "metrics": last_means(log_history, last)}
        (job.folder / FAILURE).unlink(missing_ok=True)
        write(job.folder / RESULT, result)
        return result
    with (job.folder / "log.txt").open(errors="replace") as log:
        lines = deque(log, LAST_LINES)
    why = f"status {status}" if status else f"it ended well, but left no {job.state}"
    failure = {"settings": job.settings, "failure": f"{why}\n{''.join(lines)}".rstrip()}
    write(job.folder / FAILURE, failure)
    return failure


def latest(log: Path, metric: str) -> str:
    """The metric's last value in a program's output, as the trainer prints it; nothing before the first."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 20_000))
        found = re.findall(rf"'{re.escape(metric)}': '?([-+.\w]+)", file.read().decode(errors="replace"))
    return f"{metric} {found[-1]}" if found else ""


def run_all(options: argparse.Namespace, sweep: dict[str, Any], total: int, lock: int) -> None:
    """All runs that have not ended well yet, in order."""
    metric = logged_name(sweep["metric"]["name"])
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    earlier: list[Drawn] = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        for index in range(total):
            job = job_of(options, sweep, index, earlier)
            name = f"{job.folder.name}  {label(job.settings)}"
            if (job.folder / RESULT).is_file():
                ended = json.loads((job.folder / RESULT).read_text())
            else:

                def look(job: Job = job, name: str = name) -> None:
                    progress.update(task, description=f"{name}  {latest(job.folder / 'log.txt', metric)}")

                status = 0 if job.state.is_file() else run(job, lock, look)  # it may have ended after its sweep.py
                ended = settle(job, status, options.last)
                value = ended.get("metrics", {}).get(metric)
                said = f"{metric} not logged" if value is None else f"{metric} {value:.4g}"
                said = "failed" if "failure" in ended else said
                progress.console.print(f"{name}: {said}", markup=False, highlight=False)
            earlier.append(Drawn(job.parameters, ended.get("metrics", {}).get(metric)))
            progress.update(task, completed=index + 1, description=name)
