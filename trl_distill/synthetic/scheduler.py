"""Runs the tasks of a plan: each is one chunk of one stage, done when the same chunk of all earlier layers is.

There is no barrier between chunks. Stages that wait for servers work on several chunks at once, in threads, and pass
each chunk on when it is finished. Stages that work in this process, such as a model in its memory, take turns in the
main thread, one after the other in the plan's order, so that two models never lie in memory together.
"""

from __future__ import annotations

import gc
import heapq
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from ..http_client import given_up
from .stages.chunks import ChunkStage


AHEAD = 8  # requests of chunks that are begun, for each that is under way
FROZEN_AT_START = 1000  # objects or fewer: Python 3.12 begins with 375, other versions with none


@contextmanager
def _imports_left_alone() -> Iterator[None]:
    """Keep the garbage collector from what is there already: to go through all of PyTorch stops every thread."""
    if gc.get_freeze_count() > FROZEN_AT_START:  # by the caller, who wants to keep it so
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _Tasks:
    """
    The chunks of one stage.

    Attributes:
        ready (`list[int]`): a heap of the chunks that can be worked on.
        left (`int`): chunks that are not finished.
        running (`int`): chunks that are worked on.
        worker: who does it; loaded for the first chunk.
    """

    def __init__(self, stage: ChunkStage[Any], layer: int, total: int):
        self.stage, self.layer, self.total, self.left = stage, layer, total, total
        self.ready: list[int] = []
        self.running = 0
        self.proven = False  # one chunk is finished by this worker
        self.worker: Any = None

    def make(self, number: int) -> None:
        """Write a chunk's file."""
        if self.worker is None:
            self.worker = self.stage.load()
        self.stage.make(self.worker, number)

    def close(self) -> None:
        """Let the worker go."""
        if self.worker is not None:
            self.worker.close()
            self.worker = None


class Scheduler:
    """
    One run of a plan.

    Args:
        layers (`list[list[ChunkStage]]`): see [`make_plan`].
        chunks (`Sequence[int]`): the chunks to work on.
        at_once (`int`): chunks of a stage that wait for servers at the same time.
        done (`Callable`): told the stage and how many of its chunks are finished, after each.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[ChunkStage[Any]]],
        chunks: Sequence[int],
        at_once: int,
        done: Callable[[ChunkStage[Any], int], None],
    ):
        self.layers = [[_Tasks(stage, i, len(chunks)) for stage in layer] for i, layer in enumerate(layers)]
        self.chunks, self.at_once, self.done = chunks, at_once, done
        self._missing = [dict.fromkeys(chunks, len(layer)) for layer in self.layers]  # stages, by layer and chunk
        self._changed, self._stop = threading.Condition(), threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        """
        Make all files that are missing.

        Raises:
            Exception: the first error of any task. No other task goes on when it is raised.
        """
        with _imports_left_alone():
            self._run([stage for layer in self.layers for stage in layer])

    def _run(self, tasks: Sequence[_Tasks]) -> None:
        remote = sum(stage.stage.remote for stage in tasks)
        self._threads = ThreadPoolExecutor(max(1, remote * self.at_once), thread_name_prefix="chunks")
        try:
            with self._changed:
                self._begin(tasks)
            for stage in tasks:
                if not stage.stage.remote:
                    self._run_here(stage)
            with self._changed:
                self._changed.wait_for(lambda: self._error or not any(stage.left for stage in tasks))
            if self._error:
                raise self._error
        finally:
            self._stop.set()
            self._threads.shutdown(wait=True, cancel_futures=True)
            for stage in tasks:
                stage.close()

    def _begin(self, tasks: Iterable[_Tasks]) -> None:
        """Find out what is finished already, and start the rest."""
        finished = {stage: stage.stage.finished() for stage in tasks}
        for layer in self.layers:
            for stage in layer:
                there = [number for number in self.chunks if number in finished[stage]]
                stage.left -= len(there)
                for number in there:
                    self._missing[stage.layer][number] -= 1
                self.done(stage.stage, stage.total - stage.left)
        self._finished = finished
        for number in self.chunks:
            self._open(0, number)
        for stage in finished:
            self._submit(stage)

    def _open(self, layer: int, number: int) -> None:
        """A chunk has come as far as to a layer, where what is not finished can be worked on."""
        while layer < len(self.layers):
            for stage in self.layers[layer]:
                if number not in self._finished[stage]:
                    heapq.heappush(stage.ready, number)
            if self._missing[layer][number]:
                return
            layer += 1

    def _submit(self, stage: _Tasks) -> None:
        """Start chunks of a stage, as many as may be. The first goes alone: it shows whether the settings are right."""
        most = self.at_once if stage.proven else 1
        while stage.stage.remote and stage.ready and stage.running < most and not self._stop.is_set():
            stage.running += 1
            self._threads.submit(self._run_remote, stage, heapq.heappop(stage.ready))

    def _run_remote(self, stage: _Tasks, number: int) -> None:
        given_up.set(self._stop)
        try:
            if not self._stop.is_set():
                stage.make(number)
                self._finish(stage, number)
        except BaseException as error:
            self._fail(error)

    def _run_here(self, stage: _Tasks) -> None:
        """All chunks of a stage, in this thread, as they become ready."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._error or stage.ready or not stage.left)
                if self._error or not stage.left:
                    break
                stage.running += 1
                number = heapq.heappop(stage.ready)
            stage.make(number)
            self._finish(stage, number)
        stage.close()

    def _finish(self, stage: _Tasks, number: int) -> None:
        with self._changed:
            stage.left, stage.running, stage.proven = stage.left - 1, stage.running - 1, True
            self._finished[stage].add(number)
            missing = self._missing[stage.layer]
            missing[number] -= 1
            if not missing[number]:
                self._open(stage.layer + 1, number)
            for other in self._finished:
                self._submit(other)
            self.done(stage.stage, stage.total - stage.left)
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._stop.set()
            self._changed.notify_all()


def chunks_at_once(requests: int, chunk_size: int) -> int:
    """
    Chunks of a stage under way at once.

    A chunk is done when its slowest answer is there, which may take many times as long as the mean; meanwhile requests
    of other chunks must keep the endpoint busy.

    Args:
        requests (`int`): under way at once, at all endpoints of a model.
        chunk_size (`int`): requests of a chunk.
    """
    return math.ceil(AHEAD * requests / chunk_size) + 2
