"""How a run on several processes ends: all processes exit, and the reason is printed once.

Some ends reach all processes at the same point (training is finished, SIGTERM, a loss that is NaN): each exits by
itself. Others reach only one (its reward function raises, its disk is full), while the rest wait for it in a
collective. That process tells the others through the launcher's key-value store, over a connection of its own, which
works even while the process group hangs.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist
from accelerate import PartialState
from torch.nn.parallel import DistributedDataParallel

from ..errors import StoppedBySignal
from .interrupts import EXIT_STOPPED


logger = logging.getLogger(__name__)


POLL = 1.0  # seconds between checks whether another process has failed


PATIENCE = 15.0  # seconds that a process has to exit by itself once another one has failed


CONNECT = 300.0  # seconds to wait for the main process to open its store


def end_process_group() -> None:
    """
    End the process group, once nothing in this process refers to it any more.

    `DistributedDataParallel` holds the group from C++. If a wrapper is destroyed after the group has ended, it can
    deadlock: it holds the GIL and joins a thread of the group that waits for the GIL. So unused wrappers are
    collected first, those still referenced drop the group, and only then is the group destroyed.
    """
    gc.collect()
    # by type: `isinstance` reads `__class__` of each object, which raises for a dead weak reference
    for wrapper in [found for found in gc.get_objects() if issubclass(type(found), DistributedDataParallel)]:
        for name in ("reducer", "logger", "process_group"):  # a trainer in a global variable may still refer to it
            setattr(wrapper, name, None)
    gc.collect()
    if dist.is_available() and dist.is_initialized():
        PartialState().destroy_process_group()


def distributed_main(main: Callable[..., Any]) -> Callable[..., None]:
    """
    Decorator for a script's main function: however it ends, the run ends on all processes.

    - It returns: the process group is ended, in the right order.
    - It raises an error that all processes raise at the same point (`error.on_all_processes`, set by this package's
      errors): all wait for each other and exit, so that a launcher does not kill one that still writes a checkpoint.
    - It raises anything else: the other processes are notified. One that has not exited by itself after 15 s is killed.

    The message is printed once; `SystemExit`, `StoppedBySignal` and Ctrl-C without a traceback. The exit status is 75
    after SIGTERM, that of `SystemExit`, 130 after Ctrl-C, and otherwise 1. With one process nothing changes.

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
        end = _called(main, args, kwargs)  # its frames, and all they referred to, are gone
        if end is None:
            others.forget()
            end_process_group()
            return
        _leave(end, others)

    return run


class _End:
    """How a process ended early. It does not keep the error, whose frames would keep every object alive."""

    def __init__(self, error: BaseException):
        self.text, self.status = _text_and_status(error)
        causes = list(_causes(error))
        self.on_all_processes = _first(causes, "on_all_processes")
        self.is_of_another = _first(causes, "is_of_another_process")
        for cause in causes:  # so that a reference to the error does not keep the trainer alive
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


def _first(causes: list[BaseException], name: str) -> bool:
    """The attribute of the latest error that has it: a full disk while stopping concerns one process alone."""
    return next((getattr(cause, name) for cause in causes if hasattr(cause, name)), False)


def _text_and_status(error: BaseException) -> tuple[str, int]:
    """The text to print for an error, and the exit status."""
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
        try:
            PartialState().wait_for_everyone()  # still listening: another one may fail on its way here
        except RuntimeError:
            logger.debug("Another process left without waiting.")
        others.forget()
    else:
        # if anything hangs from here on, exit from C: the GIL may be held
        faulthandler.dump_traceback_later(2 * PATIENCE, exit=True)
        others.tell()
    end_process_group()
    sys.exit(end.status)


def _wait_for_port(address: str, port: int) -> None:
    limit = time.monotonic() + CONNECT
    while True:
        try:
            socket.create_connection((address, port), timeout=POLL).close()
            return
        except OSError:
            if time.monotonic() > limit:
                raise ValueError(f"{address}:{port} does not answer") from None
            time.sleep(POLL / 10)


class _OtherProcesses:
    """A connection to the other processes of this run besides the process group: the launcher's key-value store."""

    def __init__(self) -> None:
        run = (os.environ.get("TORCHELASTIC_RUN_ID", ""), os.environ.get("TORCHELASTIC_RESTART_COUNT", ""))
        self._prefix = f"trl_distill/{'/'.join(run)}"
        # the launcher may restart workers with the same store: entries older than this process are ignored
        self._born = psutil.Process().create_time()
        self._store: Any = None
        self._connected, self._leaving = threading.Event(), threading.Event()
        threading.Thread(target=self._listen, name="end-of-run", daemon=True).start()

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def _listen(self) -> None:
        """End this process if another one has failed and this one does not exit by itself."""
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
            _wait_for_port(str(address), int(port or 0))  # the store's own client pauses for up to 30 s between tries
            self._store = dist.TCPStore(
                str(address),
                int(port or 0),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=CONNECT),
            )
        except (RuntimeError, ValueError):
            logger.warning(
                f"No key-value store answers at {address}:{port}: a process that fails alone cannot notify the others, "
                "which may hang. Start the run with `accelerate launch` or `torchrun`."
            )
            return False
        self._connected.set()
        return True

    def _have_failed(self) -> bool:
        try:
            failed = self._is_new(self._store.compare_set(self._key("failed"), "", ""))
            if failed:
                self._store.add(self._key("heard"), 1)
        except RuntimeError:  # the process that hosts the store is gone, and the run with it
            return True
        return failed

    def _is_new(self, written: bytes) -> bool:
        """Whether a time in the store is one of this run, not of one before a restart."""
        return bool(written) and float(written) > self._born

    def claim(self) -> bool:
        """Whether this process is the first to report why the run ends."""
        if not self._connected.wait(5 * POLL):
            return True
        key, mine = self._key("said"), f"{time.time():.6f}"
        try:
            found = self._store.compare_set(key, "", mine)
            if found != mine.encode() and not self._is_new(found):
                found = self._store.compare_set(key, found.decode(), mine)
        except RuntimeError:
            return True
        return found == mine.encode()

    def tell(self) -> None:
        """Notify the others that this process failed, and wait until they have noticed."""
        self.forget()
        if not self._connected.is_set():
            return
        try:
            self._store.set(self._key("failed"), f"{time.time():.6f}")
            self._store.add(self._key("heard"), 1)  # itself, so that those who all fail do not wait for each other
            limit, everyone = time.monotonic() + 5 * POLL, int(os.environ["WORLD_SIZE"])
            while self._store.add(self._key("heard"), 0) < everyone and time.monotonic() < limit:
                time.sleep(POLL / 10)
        except RuntimeError:
            logger.debug("The key-value store of the run is gone.")

    def forget(self) -> None:
        """Stop listening: this process exits by itself."""
        self._leaving.set()
