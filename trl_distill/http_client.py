"""One HTTP client with retries, for the served teacher and for the endpoints of the data engine.

It sends a request to one of several servers that serve the same, again and with growing pauses while the fault may
pass, and several requests at once until one fails. Threads last as long as the client. How one request is sent, and
what of it may be shown, is in `http_requests.py`. What an answer means is left to the caller, who also says what its
users call the settings.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
    stop_when_event_set,
)

from .http_requests import PassingError, Requests, StatusError
from .server_urls import ServerURL
from .under_way import UNDER_WAY, Countdown


__all__ = ["GivenUpError", "HTTPClient", "NoAnswerError", "PassingError", "Settings", "StatusError", "given_up"]


logger = logging.getLogger(__name__)


T = TypeVar("T")


LONGEST_PAUSE = 30.0  # seconds between two attempts, whatever the server asks for


FAILED_RECENTLY_SECONDS = 30.0  # seconds during which a URL that failed comes after the others


LOOK_EVERY = 0.2  # seconds between two looks at whether the caller has given up


given_up: ContextVar[threading.Event | None] = ContextVar("given_up", default=None)
"""An event that ends [`HTTPClient.all`] in the context that sets it, for callers that work in several threads."""


class GivenUpError(Exception):
    """The caller's event [`given_up`] was set while answers were waited for."""


class NoAnswerError(Exception):
    """No answer after all attempts. The message names the addresses, what was tried, and the settings to change."""


@dataclass(frozen=True)
class Settings:
    """
    How requests are sent, and what to say where they fail.

    Attributes:
        timeout (`float`): seconds without a byte from the server after which a request has failed.
        retries (`int`): further attempts after a failed one.
        backoff (`float`): seconds of the first pause, about; doubled from each to the next, at most 30.
        concurrency (`int`): requests under way at once.
        who (`str`): what the servers are to the user, such as "the teacher".
        names (`dict[str, str]`): what the user calls "timeout", "retries" and "concurrency".
        key_advice (`str`): where to put a key, said where the server wants another one.
        last_words (`str`): the end of the message where no answer comes.
    """

    timeout: float
    retries: int
    backoff: float
    concurrency: int
    who: str
    names: dict[str, str]
    key_advice: str
    last_words: str = ""

    def advice(self) -> str:
        """Which settings to change where no answer comes."""
        names = self.names
        return (
            "See whether the server still runs there and what its log says; a busy one needs a longer "
            f"{names['timeout']} (now {self.timeout:g} s), a smaller {names['concurrency']} (now {self.concurrency}) "
            f"or more {names['retries']} (now {self.retries}). {self.last_words}"
        ).rstrip()


class HTTPClient:
    """
    Connections to servers that serve the same.

    Args:
        settings ([`Settings`]): time-outs, attempts, and names for messages.
        servers (`list[ServerURL]`): all that will be asked, for their logins. One in a URL counts before `api_key`.
        api_key (`str`, *optional*): sent as a bearer token. White space at its ends is taken off.
        secrets (`Sequence[str]`, *optional*): what else no message may show, such as keys in the bodies of requests.
        balanced (`bool`, *optional*, defaults to `False`): ask the server with the fewest requests under way, instead
            of the first; `concurrency` is then the limit at each of them, over all clients in this process.

    Raises:
        ValueError: the key cannot be sent in a header.
    """

    def __init__(
        self,
        settings: Settings,
        servers: Sequence[ServerURL],
        api_key: str | None = None,
        secrets: Sequence[str] = (),
        balanced: bool = False,
    ):
        self.settings, self.balanced = settings, balanced
        self._requests = Requests(servers, settings.timeout, settings.key_advice, api_key, secrets)
        self._failed: dict[str, float] = {}  # URL: when it failed last, by time.monotonic()
        self._threads = ThreadPoolExecutor(
            settings.concurrency * (len(servers) if balanced else 1), thread_name_prefix="requests"
        )
        self._closed = threading.Event()
        self._halts: set[threading.Event] = set()  # of all calls under way

    def ask(
        self,
        urls: Sequence[str],
        path: str,
        body: dict[str, Any] | None,
        read: Callable[[str, bytes], T],
        halt: threading.Event | None = None,
    ) -> T:
        """
        Put one question to one server after the other until an answer comes.

        Without a pause until all of them were asked once; then pauses grow, and are as long as the server's
        `Retry-After` asks for, up to 30 seconds.

        Args:
            urls (`list[str]`): bases of the servers. Those that failed lately are asked last.
            path (`str`): appended to a base.
            body (`dict`, *optional*): posted as JSON; without one the request is a GET.
            read (`Callable[[str, bytes], T]`): what becomes of an answer, given its URL and content. It may raise
                [`PassingError`] where another attempt may succeed. Secrets in its errors are hidden, and texts cut.
            halt (`threading.Event`, *optional*): ends pauses and further attempts when it is set.

        Raises:
            NoAnswerError: all attempts failed.
            StatusError: the server refuses the request.
        """
        start, halt = time.monotonic(), halt or threading.Event()
        urls = self.in_turn(urls)
        untried: list[str] = []

        def attempt() -> T:
            untried[:] = untried or urls
            if halt.is_set():
                raise PassingError(f"{untried[0]}: given up, because another request failed")
            return self._ask_one(untried, path, body, read)

        try:
            return attempt()  # most requests need no more, and making what follows takes longer than sending
        except PassingError as error:
            failed: list[PassingError] = [error]

        def first_or_next() -> T:
            if failed:
                raise failed.pop()
            return attempt()

        attempts = self._attempts(len(urls), halt)
        try:
            return attempts(first_or_next)
        except PassingError as error:
            tried = attempts.statistics["attempt_number"]
            raise NoAnswerError(
                f"No answer from {self.settings.who} at {', '.join(urls)}, tried {tried} times in "
                f"{time.monotonic() - start:.1f} s. The last error: {error}. {self.settings.advice()}"
            ) from error

    def _ask_one(
        self, untried: list[str], path: str, body: dict[str, Any] | None, read: Callable[[str, bytes], T]
    ) -> T:
        """Ask one of the servers that were not asked in this round, and take it out of them."""
        with self._chosen(untried) as url:
            untried.remove(url)
            try:
                content = self._requests.send(url, path, body)
            except PassingError:
                self._failed[url] = time.monotonic()
                raise
            self._failed.pop(url, None)
        try:
            return read(url + path, content)
        except Exception as error:
            error.args = tuple(self._requests.hidden(arg) if isinstance(arg, str) else arg for arg in error.args)
            raise

    def _attempts(self, servers: int, halt: threading.Event) -> Retrying:
        """The pauses between attempts, and when they end."""
        return Retrying(
            stop=stop_after_attempt(self.settings.retries + 1) | stop_when_event_set(halt),
            retry=retry_if_exception_type(PassingError),
            wait=lambda state: self._pause(state, servers),
            sleep=sleep_using_event(halt),
            before_sleep=self._warn,
            reraise=True,
        )

    def all(self, calls: Sequence[Callable[[threading.Event], T]]) -> list[T]:
        """
        The results of all calls, made in threads, in their order.

        Each call is given an event and passes it to [`ask`]. The first error sets it, which ends the pauses of the
        others and lets no further call begin, and is raised without waiting for requests under way.

        Raises:
            GivenUpError: the event in [`given_up`] was set.
            RuntimeError: the client was closed.
        """
        halt, errors, left = threading.Event(), list[BaseException](), Countdown(len(calls))

        def guarded(call: Callable[[threading.Event], T]) -> T:
            try:
                return call(halt)
            except BaseException as error:
                errors.append(error)  # before the event is set: later errors may follow from it
                halt.set()
                left.ended.set()
                raise

        if self._closed.is_set():
            raise RuntimeError("This client was closed, so nothing can be asked any more.")
        outer = given_up.get()
        self._halts.add(halt)
        futures = [self._threads.submit(guarded, call) for call in calls]
        for future in futures:
            future.add_done_callback(left.one_less)  # `concurrent.futures.wait` would look at all of them each time
        try:
            while not left.ended.wait(LOOK_EVERY if outer else None):
                if outer and outer.is_set():
                    raise GivenUpError("Given up, because work beside it failed.")
            if errors:
                raise errors[0]
            return [future.result() for future in futures]
        finally:
            halt.set()
            self._halts.discard(halt)
            for future in futures:
                future.cancel()

    @contextmanager
    def _chosen(self, urls: list[str]) -> Iterator[str]:
        """The URL to ask next, of those that were not asked in this round."""
        if not self.balanced:
            yield urls[0]
            return
        healthy = [url for url in urls if not self._failed_recently(url)]
        with UNDER_WAY.at_one_of(healthy or urls[:1], self.settings.concurrency) as url:
            yield url

    def in_turn(self, urls: Sequence[str]) -> list[str]:
        """The URLs in their order, those that failed lately last."""
        return sorted(urls, key=self._failed_recently)

    def _failed_recently(self, url: str) -> bool:
        return time.monotonic() - self._failed.get(url, -math.inf) < FAILED_RECENTLY_SECONDS

    def close(self) -> None:
        """
        Close the connections. Nothing can be asked afterwards, and requests under way fail: the process could not end
        before their threads have.
        """
        self._closed.set()
        for halt in list(self._halts):
            halt.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._requests.close()

    def _warn(self, state: RetryCallState) -> None:
        error = state.outcome and state.outcome.exception()
        logger.warning(f"{error}. Attempt {state.attempt_number + 1} of {self.settings.retries + 1} follows.")

    def _pause(self, state: RetryCallState, servers: int) -> float:
        """Seconds before the next attempt."""
        if state.attempt_number < servers:
            return 0.0  # another server has not been asked yet
        longest = self.settings.backoff * 2.0 ** min(state.attempt_number - servers, 99)
        error: Any = state.outcome and state.outcome.exception()
        return min(max(longest * random.uniform(0.5, 1.0), error.retry_after), LONGEST_PAUSE)
