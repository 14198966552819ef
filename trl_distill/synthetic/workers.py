"""Worker processes: each makes every n-th chunk, in the same work folder, by the same plan.

The process that a user starts reads prompts, starts workers, makes what they left undone, and builds the dataset. So a
worker may end at any moment; one that was killed is started again. With the process that started it a worker ends, too.
Which chunk falls to which worker has no effect on its file. Slurm and Ray are left to `engines.py`.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
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


START = "from trl_distill.synthetic.workers import main; main()"  # the program of a worker


FAILED = 3  # exit code of a worker whose error the process that started it will meet, too


class Workers:
    """
    The worker processes of one run on this machine.

    Args:
        config (`GenerateConfig`): all settings. They are passed through a pipe, since there may be secrets in them.
        show (`Callable[[], None]`): called now and then while they work.
    """

    def __init__(self, config: GenerateConfig, show: Callable[[], None]):
        self.config, self.show = config, show
        self.processes: dict[int, subprocess.Popen[str]] = {}

    def run(self) -> None:
        """Start them, and wait until all have ended. What they left undone is left to the caller."""
        left = dict.fromkeys(range(self.config.workers), RESTARTS)
        try:
            for rank in left:
                self._start(rank)
            while self.processes:
                time.sleep(EVERY)
                self.show()
                for rank, process in list(self.processes.items()):
                    if process.poll() is None:
                        continue
                    del self.processes[rank]
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

    def _start(self, rank: int) -> None:
        words = [sys.executable, "-c", START, str(rank), str(self.config.workers)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        process = subprocess.Popen(words, stdin=subprocess.PIPE, env=env, text=True)
        self.processes[rank] = process
        assert process.stdin is not None
        process.stdin.write(json.dumps(asdict(self.config)) + "\n")
        process.stdin.flush()  # and left open: its end tells the worker that this process is gone


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
    """The process of one worker."""
    settings = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(settings, int(sys.argv[1]), int(sys.argv[2]))
    except (TeacherAnswerError, TeacherUnavailable, ValueError) as error:
        logger.warning(f"Worker {sys.argv[1]}: {error}")
        os._exit(FAILED)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
