"""The one way in which tests start processes: in a session of their own, none of which outlives the test.

A launcher's workers have sessions of their own again, and outlive a launcher that is killed. So each process that a
test starts, and whatever that starts, carries a mark in its environment, by which all of them are found and killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil


MARK = "TRL_DISTILL_TEST_RUN"
LONG = 1800.0  # seconds; what is slow on an idle machine takes many times as long on a busy one


def run(
    words: Sequence[str | Path], *, limit: float = LONG, env: dict[str, str] | None = None, **how: Any
) -> subprocess.CompletedProcess[str]:
    """
    Run a command to its end, its output as text.

    Args:
        limit (`float`): seconds after which all that it started is killed.
        how: further arguments of `subprocess.Popen`.

    Raises:
        TimeoutError: with the last of its output.
    """
    with started(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how) as process:
        try:
            out, err = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired as error:
            kill_all(process)
            out, err = process.communicate()
            raise TimeoutError(f"Not done after {limit} s: {words}\n{out[-2000:]}\n{err[-3000:]}") from error
    return subprocess.CompletedProcess([*words], process.returncode, out, err)


def succeeds(words: Sequence[str | Path], **how: Any) -> str:
    """The standard output of a command that must end well."""
    done = run(words, **how)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@contextmanager
def started(
    words: Sequence[str | Path], *, env: dict[str, str] | None = None, **how: Any
) -> Iterator[subprocess.Popen[str]]:
    """
    A process, killed at the end of the block with all that it has started.

    Ctrl-C reaches it also where whoever runs the tests ignores it (`nohup ... &`).
    """
    mark = uuid.uuid4().hex  # not read from the process: until it has begun, its environment is empty
    process = subprocess.Popen(
        [*map(str, words)],
        env={**(os.environ if env is None else env), MARK: mark},
        start_new_session=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **how,
    )
    process.mark = mark  # type: ignore[attr-defined]
    try:
        yield process
    finally:
        kill_all(process)
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def kill_all(process: subprocess.Popen[str]) -> list[int]:
    """Kill what a process of [`started`] and its descendants have left running; returns their ids."""
    left = running(process)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return left


def running(process: subprocess.Popen[str]) -> list[int]:
    """Ids of the processes that belong to one of [`started`], itself included, and have not ended."""
    mark = process.mark  # type: ignore[attr-defined]
    assert mark, "without a mark, every process of this machine would be taken for one of the test's"
    return [found.pid for found in psutil.process_iter() if _alive(found) and _mark_of(found.pid) == mark]


def wait_until_gone(process: subprocess.Popen[str], limit: float) -> list[int]:
    """Wait for the end of all processes that belong to one of [`started`]; returns the ids of those that are left."""
    end = time.monotonic() + limit
    while (left := running(process)) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def wait_for(path: Path | str, process: subprocess.Popen[str], limit: float = LONG) -> None:
    """Wait until a file exists, or the process that shall write it has ended."""
    end = time.monotonic() + limit
    while not Path(path).exists():
        assert process.poll() is None, f"{path} did not appear before the process ended with {process.returncode}"
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _mark_of(pid: int) -> str | None:
    try:
        return psutil.Process(pid).environ().get(MARK)
    except (psutil.Error, OSError):
        return None
