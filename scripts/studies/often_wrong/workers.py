"""Runs as processes, some at a time, none of which outlives the one that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path


def leave_with(parent: int) -> None:
    """End this process when `parent`, the id of the process that started it, has ended, however it ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_all(
    names: Sequence[str],
    command: Callable[[str], list[str]],
    logs: Path,
    workers: int,
    tell: Callable[[str], None] = print,
) -> list[str]:
    """
    Run commands, some at a time, each in a session of its own.

    They are killed if this process is interrupted or told to end; for the case that it is itself killed, they call
    [`leave_with`].

    Args:
        names (`list[str]`): of the runs.
        command (`Callable[[str], list[str]]`): the command of a run.
        logs (`Path`): gets a file with the output of each.
        workers (`int`): how many at a time.
        tell (`Callable[[str], None]`): is given a line for each that has ended.

    Returns:
        `list[str]`: those that failed.
    """
    logs.mkdir(parents=True, exist_ok=True)
    todo, failed = list(names), []
    active: dict[str, subprocess.Popen[bytes]] = {}
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while todo or active:
            while todo and len(active) < workers:
                name = todo.pop(0)
                with (logs / f"{name}.log").open("wb") as log:
                    active[name] = subprocess.Popen(command(name), stdout=log, stderr=log, start_new_session=True)
            time.sleep(0.2)
            for name in [name for name, process in active.items() if process.poll() is not None]:
                status = active.pop(name).returncode
                if status:
                    failed.append(name)
                what = f"failed, see {logs / name}.log" if status else "done"
                tell(f"{name}: {what}; {len(active)} running, {len(todo)} to start")
    finally:
        for process in active.values():
            process.kill()
        signal.signal(signal.SIGTERM, before)
    return failed
