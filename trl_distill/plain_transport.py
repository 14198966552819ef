"""A transport for httpx that does little: one connection to each server, one request at a time, for one thread.

httpx's own keeps a pool, looks at all of its connections before each request, and sends a request in parts. With 64
threads that takes most of the time that there is between two answers. Proxies, HTTP/2 and streaming are left to it.
"""

from __future__ import annotations

import contextlib
import http.client
import select
import socket
import ssl
import threading
import time

import httpx2 as httpx


IDLE = 0.02  # seconds after which a look shows whether the server has closed the connection


Origin = tuple[str, str, int]  # scheme, host, port


class _GoneError(Exception):
    """The server closed a connection before it answered."""


class PlainTransport(httpx.BaseTransport):
    """
    Args:
        timeout (`float`): seconds without a byte after which a request has failed.
        connect (`float`): seconds that a connection may take.
        certificates (`ssl.SSLContext`, *optional*): for https.
    """

    def __init__(self, timeout: float, connect: float, certificates: ssl.SSLContext | None):
        self.timeout, self.connect, self.certificates = timeout, connect, certificates
        self._idle: dict[Origin, tuple[socket.socket, float]] = {}  # with its last use
        self._busy: socket.socket | None = None
        self._closed, self._lock = False, threading.Lock()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and read the whole answer; once more if a connection that was used before is gone."""
        url = request.url
        origin = (url.scheme, url.raw_host.decode("ascii"), url.port or (443 if url.scheme == "https" else 80))
        data = _written(request)
        try:
            if used := self._reusable(origin):
                with contextlib.suppress(_GoneError):
                    return self._exchange(used, origin, request.method, data)
            return self._exchange(self._connected(origin), origin, request.method, data)
        except _GoneError:
            raise httpx.RemoteProtocolError("Server disconnected without sending a response.") from None

    def close(self) -> None:
        """Close all connections. A request that is under way in another thread fails."""
        with self._lock:
            self._closed = True
            if self._busy is not None:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(self._busy, socket.SHUT_RDWR)  # wakes the thread; that of TLS would not
            for used, _ in self._idle.values():
                used.close()
            self._idle.clear()

    def _exchange(self, used: socket.socket, origin: Origin, method: str, data: bytes) -> httpx.Response:
        """
        One request and its answer, over one connection.

        Raises:
            _GoneError: nothing came back.
        """
        answer, whole = http.client.HTTPResponse(used, method=method), False
        try:
            self._begin(used)
            try:
                used.sendall(data)
                whole = True
            except (BrokenPipeError, ConnectionResetError):
                pass  # a server may refuse what it has not read to its end: see what it says
            try:
                answer.begin()
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError) as error:
                raise _GoneError from error
            content = answer.read()
        except BaseException as error:
            self._end(used, None)
            if (translated := _translated(error, reading=True)) is error:
                raise
            raise translated from error
        finally:
            answer.close()
        self._end(used, None if answer.will_close or not whole else origin)
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in answer.getheaders()]
        return httpx.Response(answer.status, headers=headers, content=content)

    def _begin(self, used: socket.socket) -> None:
        with self._lock:
            self._busy = used
            if self._closed:
                raise httpx.ReadError("The client was closed.")

    def _end(self, used: socket.socket, origin: Origin | None) -> None:
        """Keep a connection for the next request to `origin`, or close it."""
        with self._lock:
            self._busy = None
            if origin is None or self._closed:
                used.close()
            else:
                self._idle[origin] = (used, time.monotonic())

    def _reusable(self, origin: Origin) -> socket.socket | None:
        """The open connection to a server, unless the server has closed it."""
        with self._lock:
            used, last = self._idle.pop(origin, (None, 0.0))
        if used is not None and time.monotonic() - last > IDLE and _has_input(used):
            used.close()
            return None
        return used

    def _connected(self, origin: Origin) -> socket.socket:
        scheme, host, port = origin
        try:
            made = socket.create_connection((host, port), self.connect)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if scheme == "https":
                made = (self.certificates or ssl.create_default_context()).wrap_socket(made, server_hostname=host)
        except OSError as error:
            raise _translated(error, reading=False) from error
        made.settimeout(self.timeout)
        return made


def _has_input(used: socket.socket) -> bool:
    """Whether something can be read, or the other end has closed the connection."""
    if not hasattr(select, "poll"):
        return bool(select.select([used], [], [], 0)[0])
    poll = select.poll()  # `select` takes no file descriptor above 1023
    poll.register(used, select.POLLIN)
    return bool(poll.poll(0))


def _written(request: httpx.Request) -> bytes:
    """A request as it goes over the wire."""
    lines = [b"%s %s HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
    lines += [b"%s: %s" % header for header in request.headers.raw]
    return b"\r\n".join([*lines, b"", request.read()])


def _translated(error: BaseException, reading: bool) -> BaseException:
    """An error as httpx raises it."""
    if isinstance(error, TimeoutError):
        return (httpx.ReadTimeout if reading else httpx.ConnectTimeout)("timed out")
    if isinstance(error, http.client.HTTPException):
        return httpx.RemoteProtocolError(str(error) or type(error).__name__)
    if isinstance(error, OSError):
        return (httpx.ReadError if reading else httpx.ConnectError)(str(error))
    return error
