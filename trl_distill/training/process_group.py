"""How a run on several processes ends: all of them leave, with one message, whoever met the reason for it.

Some ends all processes meet at the same place (training is finished, SIGTERM, a loss that is NaN): each leaves by
itself. Others only one of them meets (its reward function raises, its disk is full), while the rest wait for it in a
collective. That one tells the others over a connection of its own to the launcher's store, which answers also while the
process group hangs.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from accelerate import PartialState
from torch.nn.parallel import DistributedDataParallel

from ..errors import StoppedBySignal
from .interrupts import EXIT_STOPPED


logger = logging.getLogger(__name__)


POLL = 1.0  # seconds between two looks at whether another process has failed


PATIENCE = 15.0  # seconds that a process has to leave by itself once another one has failed


CONNECT = 300.0  # seconds until the first process must have opened its store


def end_process_group() -> None:
    """
    End the process group, after whatever in this process still holds it.

    `DistributedDataParallel` holds the group from C++. A wrapper that is destroyed after the group has ended can wait
    for ever for a thread of the group's that waits for Python's lock, which the wrapper's destruction holds. So what
    nobody uses any more is collected, what somebody still holds gives up the group, and only then the group ends.
    """
    gc.collect()
    for wrapper in [found for found in gc.get_objects() if isinstance(found, DistributedDataParallel)]:
        for name in ("reducer", "logger", "process_group"):  # it is held by a trainer in a global variable, say
            setattr(wrapper, name, None)
    gc.collect()
    if dist.is_available() and dist.is_initialized():
        PartialState().destroy_process_group()


def distributed_main(main: Callable[..., Any]) -> Callable[..., None]:
    """
    Decorator for the function that is a script's whole work: however it ends, the run ends on all processes.

    - It returns: the process group is ended, in the right order.
    - It raises what all processes raise at the same place (`error.on_all_processes`, as this package's errors say): all
      wait for each other and leave, so that a launcher does not kill one that still writes a checkpoint.
    - It raises anything else: the other processes are told. One that has not left 15 s later by itself is ended.

    The message is printed once, and without a traceback where it says all (`SystemExit`). The status is 75 after
    SIGTERM, what `SystemExit` says, 130 after Ctrl-C, otherwise 1. On one process nothing is changed.

    Example:

    ```python
    >>> @distributed_main
    ... def main():
    ...     trainer = OPDTrainer(...)
    ...     trainer.train()
    ...     trainer.save_model("out")
    ```
    """

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            main(*args, **kwargs)
            return
        others = _OtherProcesses()
        end = _called(main, args, kwargs)  # frames, and what they held, are gone
        if end is None:
            others.forget()
            end_process_group()
            return
        _leave(end, others)

    return run


class _End:
    """How a process ends before its time, without the error itself, whose frames would keep all of its objects."""

    def __init__(self, error: BaseException):
        self.text, self.status = _told(error)
        causes = list(_causes(error))
        self.on_all_processes = any(getattr(cause, "on_all_processes", False) for cause in causes)
        self.is_of_another = any(getattr(cause, "is_of_another_process", False) for cause in causes)
        for cause in causes:  # whoever holds the error shall not hold the trainer
            traceback.clear_frames(cause.__traceback__)


def _called(main: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _End | None:
    try:
        main(*args, **kwargs)
    except SystemExit as error:
        return None if error.code in (None, 0) else _End(error)
    except BaseException as error:
        return _End(error)
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _told(error: BaseException) -> tuple[str, int]:
    """What is printed of an error, and the process's status."""
    if isinstance(error, SystemExit):
        return ("", error.code) if isinstance(error.code, int) else (str(error.code), 1)
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted.", 130
    if isinstance(error, StoppedBySignal):
        return str(error), EXIT_STOPPED
    return "".join(traceback.format_exception(error)).rstrip(), 1


def _leave(end: _End, others: _OtherProcesses) -> None:
    rank = os.environ.get("RANK", "0")
    if not end.is_of_another and end.text and others.claim():
        who = "" if end.on_all_processes else f"Process {rank} of {os.environ['WORLD_SIZE']}: "
        print(f"{who}{end.text}", file=sys.stderr, flush=True)
    if end.on_all_processes:
        others.forget()
        PartialState().wait_for_everyone()
    else:
        # what hangs from here on is ended without asking Python, whose lock it may hold
        faulthandler.dump_traceback_later(2 * PATIENCE, exit=True)
        others.tell(rank)
    end_process_group()
    sys.exit(end.status)


class _OtherProcesses:
    """A line to the other processes of this run, beside the process group: the launcher's key-value store."""

    def __init__(self) -> None:
        run = (os.environ.get("TORCHELASTIC_RUN_ID", ""), os.environ.get("TORCHELASTIC_RESTART_COUNT", ""))
        self._prefix = f"trl_distill/{'/'.join(run)}"
        self._store: Any = None
        self._connected, self._leaving = threading.Event(), threading.Event()
        threading.Thread(target=self._listen, name="end-of-run", daemon=True).start()

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def _listen(self) -> None:
        """End this process where another one has failed, and this one does not leave by itself."""
        if self._connect():
            while not self._leaving.wait(POLL):
                if self._have_failed():
                    break
            if not self._leaving.wait(PATIENCE):
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(1)

    def _connect(self) -> bool:
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        try:
            self._store = dist.TCPStore(
                str(address),
                int(port or 0),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=CONNECT),
            )
        except (RuntimeError, ValueError):
            logger.warning(f"There is no store at {address}:{port}: a process that fails alone cannot tell the others.")
            return False
        self._connected.set()
        return True

    def _have_failed(self) -> bool:
        try:
            failed = self._store.check([self._key("failed")])
            if failed:
                self._store.add(self._key("heard"), 1)
        except RuntimeError:  # whoever kept the store has gone, and with it the run
            return True
        return failed

    def claim(self) -> bool:
        """Whether this process is the first that has something to say about the end."""
        try:
            return not self._connected.wait(2 * POLL) or self._store.add(self._key("said"), 1) == 1
        except RuntimeError:
            return True

    def tell(self, rank: str) -> None:
        """Tell the others that this process has failed alone, and give them the time to hear it."""
        self.forget()
        if not self._connected.is_set():
            return
        try:
            self._store.set(self._key("failed"), rank)
            limit, rest = time.monotonic() + 5 * POLL, int(os.environ["WORLD_SIZE"]) - 1
            while self._store.add(self._key("heard"), 0) < rest and time.monotonic() < limit:
                time.sleep(POLL / 10)
        except RuntimeError:
            logger.debug("The store of the process group has gone.")

    def forget(self) -> None:
        """Do not listen any more: this process leaves by itself."""
        self._leaving.set()
