"""The runs of a sweep, one after another, each in a folder of its own. An interrupted sweep can be resumed.

How points are drawn is in `space.py`, which runs are ended early in `early_stopping.py`, the table in `report.py`.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from .. import foreign_text
from .commands import command_line, label, logged_name, shown
from .early_stopping import BEGINS, EarlyStop, RunLog, early_stop
from .results import FAILURE, LOG, PARAMETERS, RESULT, SWEEP, last_means, write
from .space import Drawn, draw


LAST_LINES = 15  # of a failed run's log, for the record


GRACE_SECONDS = 30  # for a run to end after an interruption


LOOK_SECONDS = 0.2  # between two looks at a run


console = foreign_text.console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140)


@dataclass(frozen=True)
class Sweep:
    """
    A sweep to run.

    Attributes:
        config (`dict[str, Any]`): as [`~schema.read_sweep`] returns it.
        folder (`Path`): where runs and results go.
        seed (`int`): of the draws.
        last (`int`): logged steps that a run's metrics are the mean of.
        overrides (`tuple[str, ...]`): further arguments of the program.
    """

    config: dict[str, Any]
    folder: Path
    seed: int = 0
    last: int = 5
    overrides: tuple[str, ...] = ()

    @property
    def metric(self) -> str:
        """The sweep's metric as the trainer logs it."""
        return logged_name(self.config["metric"]["name"])

    def identity(self) -> dict[str, Any]:
        """What must not change between two calls."""
        return {"sweep": self.config, "seed": self.seed, "last": self.last, "overrides": list(self.overrides)}


@dataclass(frozen=True)
class Job:
    """
    One run of a sweep.

    Attributes:
        folder (`Path`): of this run.
        parameters (`dict[str, Any]`): of the program, as drawn.
        settings (`dict[str, Any]`): of the parameters, those that the sweep varies.
        command (`list[str]`): that is run.
        environment (`dict[str, str]`): what wandb calls the run, where it is told to report there.
    """

    folder: Path
    parameters: dict[str, Any]
    settings: dict[str, Any]
    command: list[str]
    environment: dict[str, str]

    @property
    def state(self) -> Path:
        """The trainer's state with its log, which the program leaves when it is done."""
        return self.folder / "out" / "trainer_state.json"


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """
    The folder for this call alone. Runs inherit the lock: one that outlives its sweep (killed, say) is waited for, and
    not started a second time beside itself.
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


def keep_identity(sweep: Sweep) -> None:
    """
    Note which sweep the folder holds, or check that it is this one.

    Raises:
        ValueError: it is another.
    """
    path, identity = sweep.folder / SWEEP, sweep.identity()
    if path.is_file():
        known = json.loads(path.read_text())
        differing = [name for name in identity if known.get(name) != identity[name]]
        if differing:
            raise ValueError(
                f"{sweep.folder} holds a sweep with other settings ({', '.join(differing)} differ; see {path.name} "
                "there). Its runs and those of this one would not be comparable: give another `--output_dir`."
            )
    write(path, identity)


def job_of(sweep: Sweep, index: int, earlier: Sequence[Drawn]) -> Job:
    """The run with this number: as an earlier call drew it, or drawn now and noted."""
    folder = sweep.folder / f"{index:03d}"
    folder.mkdir(exist_ok=True)
    noted = folder / PARAMETERS
    if not noted.is_file():
        drawn = draw(sweep.config, index, earlier, sweep.seed)
        assert drawn is not None  # `size_of` has counted
        write(noted, drawn)
    parameters = json.loads(noted.read_text())
    command = [
        *command_line(sweep.config, parameters),
        *(f"--output_dir={folder / 'out'}", "--report_to=none", "--resume_from_checkpoint=auto"),
        *sweep.overrides,
    ]
    settings = shown(sweep.config, parameters)
    environment = {
        "WANDB_PROJECT": os.environ.get("WANDB_PROJECT", sweep.config.get("project", "trl_distill")),
        "WANDB_RUN_GROUP": str(sweep.folder),
        "WANDB_NAME": label(settings),
    }
    return Job(folder, parameters, settings, command, environment)


def run(job: Job, lock: int, is_over: Callable[[], bool]) -> int:
    """
    Run the program to its end, its output in the run's log.

    Args:
        job (`Job`): the run.
        lock (`int`): the file that it inherits.
        is_over (`Callable[[], bool]`): called several times a second; where it returns `True` the program is ended.

    Returns:
        `int`: the program's status. An interruption ends the program first.
    """
    with (job.folder / LOG).open("a") as log:
        log.write(f"{BEGINS}{' '.join(job.command)}\n")
        log.flush()
        process = subprocess.Popen(
            job.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[lock],
            env={**os.environ, **job.environment},
            start_new_session=True,  # a terminal's Ctrl-C shall reach it once, from here: the second ends it at once
        )
        try:
            while process.poll() is None:
                time.sleep(LOOK_SECONDS)
                if is_over():
                    end(process)
        except KeyboardInterrupt:
            end(process)
            raise
        return process.returncode


def end(process: subprocess.Popen[Any]) -> None:
    """End a program as Ctrl-C does, so that it may leave a checkpoint; by force after a while, or when asked again."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def settle(sweep: Sweep, job: Job, status: int, stop: EarlyStop | None) -> dict[str, Any]:
    """Write down how a run has ended: its metrics, or the last lines of its log."""
    result: dict[str, Any] = {"settings": job.settings, "command": job.command}
    entries = RunLog(job.folder / LOG).read()
    if stop is not None:
        entries = entries[: stop.entries]
        result |= {"metrics": last_means(entries, sweep.last), "stopped": stop.reason}
    elif status == 0 and job.state.is_file():
        log_history = json.loads(job.state.read_text())["log_history"]
        result["metrics"] = last_means(log_history, sweep.last)
    else:
        with (job.folder / LOG).open(errors="replace") as log:
            lines = deque(log, LAST_LINES)
        why = f"status {status}" if status else f"it ended well, but left no {job.state}"
        failure = {"settings": job.settings, "failure": f"{why}\n{''.join(lines)}".rstrip()}
        write(job.folder / FAILURE, failure)
        return failure
    if "early_terminate" in sweep.config:  # later runs are held against it
        result["history"] = [entry[sweep.metric] for entry in entries if sweep.metric in entry]
    (job.folder / FAILURE).unlink(missing_ok=True)
    write(job.folder / RESULT, result)
    return result


def run_to_its_end(sweep: Sweep, job: Job, earlier: Sequence[Drawn], lock: int, show: Callable[[str], None]) -> Any:
    """
    Run a job that has no result yet, or take up one that ended after its sweep; end it early where the sweep says so.

    Args:
        show (`Callable[[str], None]`): is told the metric's last value now and then.

    Returns:
        `dict[str, Any]`: what [`settle`] has written.
    """
    log, rule = RunLog(job.folder / LOG), sweep.config.get("early_terminate")
    histories = [one.history for one in earlier if one.history]

    def stop() -> EarlyStop | None:
        if rule is None:
            return None
        return early_stop(log.read(), sweep.metric, histories, rule, sweep.config["metric"]["goal"])

    def is_over() -> bool:
        values = [entry[sweep.metric] for entry in log.read() if sweep.metric in entry]
        show(f"{sweep.metric} {values[-1]:.4g}" if values else "")
        return stop() is not None

    status = 0
    if stop() is None and not job.state.is_file():
        status = run(job, lock, is_over)
    return settle(sweep, job, status, stop())


def run_all(sweep: Sweep, total: int, lock: int) -> None:
    """
    All runs that have no result yet, in order.

    Args:
        sweep (`Sweep`): to run.
        total (`int`): how many runs.
        lock (`int`): the file that runs inherit, from [`locked`].
    """
    columns = (BarColumn(), MofNCompleteColumn(), foreign_text.description_column(), TimeElapsedColumn())
    earlier: list[Drawn] = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        for index in range(total):
            job = job_of(sweep, index, earlier)
            name = f"{job.folder.name}  {label(job.settings)}"
            if (job.folder / RESULT).is_file():
                ended = json.loads((job.folder / RESULT).read_text())
            else:

                def show(value: str, name: str = name) -> None:
                    progress.update(task, description=f"{name}  {value}")

                ended = run_to_its_end(sweep, job, earlier, lock, show)
                progress.console.print(f"{name}: {outcome(ended, sweep.metric)}", markup=False, highlight=False)
            value = ended.get("metrics", {}).get(sweep.metric)
            history = tuple(ended.get("history", ()))
            earlier.append(Drawn(job.parameters, value, history, stopped="stopped" in ended))
            progress.update(task, completed=index + 1, description=name)


def outcome(ended: dict[str, Any], metric: str) -> str:
    """How a run has ended, in few words."""
    if "failure" in ended:
        return "failed"
    if "stopped" in ended:
        return f"ended early, {ended['stopped']}"
    value = ended["metrics"].get(metric)
    return f"{metric} not logged" if value is None else f"{metric} {value:.4g}"
