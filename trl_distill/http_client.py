"""One HTTP client with retries, for the served teacher and for the endpoints of the data engine.

It sends a request to one of several servers that serve the same, again and with growing pauses while the fault may
pass, and several requests at once until one fails. Threads and connections last as long as the client. What an answer
means is left to the caller, who also says what its users call the settings. Passwords and keys stand in no message,
whatever a server repeats; headers are never printed.
"""

from __future__ import annotations

import base64
import json
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
from urllib.request import getproxies

import httpx2 as httpx
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
    stop_when_event_set,
)

from .http_messages import forms_of, may_pass, retry_after, server_message
from .plain_transport import PlainTransport
from .server_urls import ServerURL, clean_key
from .under_way import UNDER_WAY, Countdown


logger = logging.getLogger(__name__)


T = TypeVar("T")


LONGEST_PAUSE = 30.0  # seconds between two attempts, whatever the server asks for


LONGEST_CONNECT = 5.0  # seconds


FAILED_RECENTLY_SECONDS = 30.0  # seconds during which a URL that failed comes after the others


LONGEST_MESSAGE = 1000  # characters of what a server says


PROXIES = {"http", "https", "all"}  # kinds of proxy with which httpx's own transport is used


LOOK_EVERY = 0.2  # seconds between two looks at whether the caller has given up


given_up: ContextVar[threading.Event | None] = ContextVar("given_up", default=None)
"""An event that ends [`HTTPClient.all`] in the context that sets it, for callers that work in several threads."""


class PassingError(Exception):
    """A failure after which another attempt may succeed; `retry_after` is what the server asks to wait, in seconds."""

    def __init__(self, message: str, retry_after: float = 0.0):
        super().__init__(message)
        self.retry_after = retry_after


class GivenUpError(Exception):
    """The caller's event [`given_up`] was set while answers were waited for."""


class NoAnswerError(Exception):
    """No answer after all attempts. The message names the addresses, what was tried, and the settings to change."""


class StatusError(Exception):
    """The server refuses the request, and would refuse it again; `status` is its HTTP status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


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
        key = clean_key(api_key, settings.key_advice)
        logins = [server.login for server in servers if server.login]
        self._logins = {server.base: httpx.BasicAuth(*server.login) for server in servers if server.login}
        sent = [base64.b64encode(":".join(login).encode()).decode().rstrip("=") for login in logins]
        hidden = {
            form for secret in (key, *(login[1] for login in logins), *sent, *secrets) for form in forms_of(secret)
        }
        self._secrets = sorted(hidden, key=len, reverse=True)  # one may be the beginning of another
        self._failed: dict[str, float] = {}  # URL: when it failed last, by time.monotonic()
        self._threads = ThreadPoolExecutor(
            settings.concurrency * (len(servers) if balanced else 1), thread_name_prefix="requests"
        )
        self._own = threading.local()  # a client for each thread: one that is shared costs more with each connection
        self._opened: list[httpx.Client] = []
        self._closed = threading.Event()
        self._halts: set[threading.Event] = set()  # of all calls under way
        secure = any(server.base.startswith("https") for server in servers)
        self._certificates = httpx.create_ssl_context() if secure else None  # made once: it takes some milliseconds
        self._templates: dict[str, tuple[httpx.URL, list[tuple[bytes, bytes]], Any]] = {}  # by URL
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

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
        settings, untried = self.settings, list[str]()

        def attempt() -> T:
            untried[:] = untried or urls
            if halt.is_set():
                raise PassingError(f"{untried[0]}: given up, because another request failed")
            with self._chosen(untried) as url:
                untried.remove(url)
                try:
                    content = self._send(url, path, body)
                except PassingError:
                    self._failed[url] = time.monotonic()
                    raise
                self._failed.pop(url, None)
            try:
                return read(url + path, content)
            except Exception as error:
                error.args = tuple(self.hidden(arg) if isinstance(arg, str) else arg for arg in error.args)
                raise

        try:
            return attempt()  # most requests need no more, and making what follows takes longer than sending
        except PassingError as error:
            failed: list[PassingError] = [error]

        def first_or_next() -> T:
            if failed:
                raise failed.pop()
            return attempt()

        attempts = Retrying(
            stop=stop_after_attempt(settings.retries + 1) | stop_when_event_set(halt),
            retry=retry_if_exception_type(PassingError),
            wait=lambda state: self._pause(state, len(urls)),
            sleep=sleep_using_event(halt),
            before_sleep=self._warn,
            reraise=True,
        )
        try:
            return attempts(first_or_next)
        except PassingError as error:
            raise NoAnswerError(
                f"No answer from {settings.who} at {', '.join(urls)}, tried {attempts.statistics['attempt_number']} "
                f"times in {time.monotonic() - start:.1f} s. The last error: {error}. {settings.advice()}"
            ) from error

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
        for client in list(self._opened):
            client.close()

    @property
    def _client(self) -> httpx.Client:
        """This thread's connections."""
        if not hasattr(self._own, "client"):
            timeout, certificates = self.settings.timeout, self._certificates
            connect = min(timeout, LONGEST_CONNECT)
            plain = PlainTransport(timeout, connect, certificates)
            self._own.client = httpx.Client(
                timeout=httpx.Timeout(timeout, connect=connect),
                headers=self._headers,
                verify=certificates or True,
                transport=None if set(getproxies()) & PROXIES else plain,
            )
            self._opened.append(self._own.client)
            if self._closed.is_set():  # meanwhile
                self._own.client.close()
        return self._own.client

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

    def _send(self, base: str, path: str, body: dict[str, Any] | None) -> bytes:
        url, auth = base + path, self._logins.get(base, httpx.USE_CLIENT_DEFAULT)
        client = self._client
        try:
            response = client.send(self._request(client, url, body), auth=auth)
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise PassingError(self.hidden(f"{url}: {type(error).__name__} {error}".rstrip())) from error
        status = response.status_code
        if status == 200:
            return response.content
        refusal = self.hidden(f"{url} answered HTTP {status}: {server_message(response.content)}").rstrip(".")
        if may_pass(status):
            raise PassingError(refusal, retry_after(response.headers.get("Retry-After")))
        if status in (401, 403):
            refusal = f"{refusal}. {self.settings.key_advice}"
        elif 300 <= status < 400:
            refusal = f"{refusal}. Redirects are not followed: name the server's final URL"
        raise StatusError(f"{refusal.rstrip('.')}.", status)

    def _request(self, client: httpx.Client, url: str, body: dict[str, Any] | None) -> httpx.Request:
        """A request with the headers that the client gives the first to a URL: to merge them anew each time is slow."""
        method = "GET" if body is None else "POST"
        if url not in self._templates:
            built = client.build_request(method, url, json={})
            headers = [(name, value) for name, value in built.headers.raw if name.lower() != b"content-length"]
            self._templates[url] = (built.url, headers, built.extensions)
        where, headers, extensions = self._templates[url]
        content = None if body is None else json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        return httpx.Request(method, where, headers=headers, content=content, extensions=extensions)

    def hidden(self, text: str) -> str:
        """A text without secrets, since some servers repeat what they refuse, and cut: whole, half a key would stay."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]} ..."
