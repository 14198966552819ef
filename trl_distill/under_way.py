"""Requests that are under way: how many at each URL, and how many are left of those that were asked together."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any


class Countdown:
    """Sets `ended` when `left` futures are done."""

    def __init__(self, left: int):
        self.left, self.ended, self._lock = left, threading.Event(), threading.Lock()
        if not left:
            self.ended.set()

    def one_less(self, _: Future[Any]) -> None:
        with self._lock:
            self.left -= 1
            if not self.left:
                self.ended.set()


class UnderWay:
    """The requests that are under way at each URL, of all clients in this process."""

    def __init__(self) -> None:
        self._lock, self._counts = threading.Lock(), Counter[str]()
        self._waiting: list[tuple[Sequence[str], threading.Condition]] = []

    @contextmanager
    def at_one_of(self, urls: Sequence[str], most: int) -> Iterator[str]:
        """
        The URL with the fewest requests, of equals the first, for one more; waits while all have `most`.

        Args:
            urls (`list[str]`): to choose from.
            most (`int`): requests under way at one URL.
        """
        with self._lock:
            if all(self._counts[url] >= most for url in urls):
                self._wait(urls, most)
            url = min(urls, key=self._counts.__getitem__)
            self._counts[url] += 1
        try:
            yield url
        finally:
            with self._lock:
                self._counts[url] -= 1
                # one who waits for this URL: another would sleep on, and the place would stay empty
                if turn := next((turn for wanted, turn in self._waiting if url in wanted), None):
                    turn.notify()

    def _wait(self, urls: Sequence[str], most: int) -> None:
        """Wait for a place, with the lock held."""
        turn = threading.Condition(self._lock)
        self._waiting.append((urls, turn))
        try:
            turn.wait_for(lambda: any(self._counts[url] < most for url in urls))
        finally:
            self._waiting.remove((urls, turn))


UNDER_WAY = UnderWay()
