"""Worker processes: each makes every n-th chunk, in the same work folder, by the same plan.

The process that a user starts reads prompts, starts workers, makes what they left undone, and builds the dataset. So a
worker may end at any moment; one that was killed is started again. With the process that started it a worker ends, too.
Which chunk falls to which worker has no effect on its file. Slurm and Ray are left to `engines.py`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from ..errors import TeacherAnswerError, TeacherUnavailable
from .config import GenerateConfig
from .make_chunks import ChunkMaker, work_folder
from .sources.load import load_source
from .stages.verify import load_scorer


logger = logging.getLogger(__name__)


RESTARTS = 3  # of each worker, after it was killed


EVERY = 0.2  # seconds between two looks at the workers


SHOW_EVERY = 2.0  # seconds between two looks at what they have made, for which folders are listed


START = "from trl_distill.synthetic.workers import main; main()"  # the program of a worker


FAILED = 3  # exit code of a worker whose error the process that started it will meet, too


class Workers:
    """
    The worker processes of one run on this machine.

    Args:
        config (`GenerateConfig`): all settings. They are passed through a pipe, since there may be secrets in them.
        show (`Callable[[], None]`): called now and then while they work.
        ranks (`Sequence[int]`, *optional*): of the workers to start here; all by default.
        world (`int`, *optional*): how many workers there are, here and elsewhere; as many as the settings say.
    """

    def __init__(
        self,
        config: GenerateConfig,
        show: Callable[[], None],
        ranks: Sequence[int] | None = None,
        world: int | None = None,
    ):
        self.config, self.show, self.world = config, show, world or config.workers
        self.ranks = range(self.world) if ranks is None else ranks
        self.processes: dict[int, subprocess.Popen[str]] = {}

    def run(self) -> None:
        """Start them, and wait until all have ended. What they left undone is left to the caller."""
        left = dict.fromkeys(self.ranks, RESTARTS)
        shown = -math.inf
        try:
            for rank in left:
                self._start(rank)
            while self.processes:
                time.sleep(EVERY)
                if time.monotonic() - shown > SHOW_EVERY:
                    self.show()
                    shown = time.monotonic()
                for rank, process in list(self.processes.items()):
                    if process.poll() is None:
                        continue
                    _close(self.processes.pop(rank))
                    if process.returncode < 0 and left[rank]:
                        left[rank] -= 1
                        logger.warning(f"Worker {rank} was ended by signal {-process.returncode} and starts again.")
                        self._start(rank)
                    elif process.returncode:
                        logger.warning(f"Worker {rank} has failed; this process makes what it left undone.")
        finally:
            for process in self.processes.values():
                process.kill()
                process.wait()
                _close(process)

    def _start(self, rank: int) -> None:
        words = [sys.executable, "-c", START, str(rank), str(self.world)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        # in a session of its own: Ctrl-C is for this process, which then ends the workers
        process = subprocess.Popen(words, stdin=subprocess.PIPE, env=env, text=True, start_new_session=True)
        self.processes[rank] = process
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already, which shows at the next look
            process.stdin.write(json.dumps(asdict(self.config)) + "\n")
            process.stdin.flush()  # and left open: its end tells the worker that this process is gone


def _close(process: subprocess.Popen[str]) -> None:
    """Close the pipe to a worker that has ended."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()


def work(settings: dict[str, Any], rank: int, world: int) -> None:
    """
    Make a worker's chunks.

    Args:
        settings (`dict`): of [`GenerateConfig`].
        rank (`int`): which worker this is, from 0.
        world (`int`): how many there are.
    """
    config = GenerateConfig(**settings)
    maker = ChunkMaker(config, work_folder(config), load_scorer(config), load_source)
    maker.make(range(rank, len(maker.prompts), world))


def main() -> None:
    """The process of one worker. It does not wait for requests under way when it fails."""
    settings = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(settings, int(sys.argv[1]), int(sys.argv[2]))
    except (TeacherAnswerError, TeacherUnavailable, ValueError) as error:
        logger.warning(f"Worker {sys.argv[1]}: {error}")
        os._exit(FAILED)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _end_with_parent() -> None:
    while os.read(0, 1):  # not `sys.stdin`, whose lock the end of the process needs
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
