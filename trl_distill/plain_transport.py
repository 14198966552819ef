"""A transport for httpx that does little: one connection to each server, one request at a time, for one thread.

httpx's own keeps a pool, looks at all of its connections before each request, and sends a request in parts. With 64
threads that takes most of the time that there is between two answers. Proxies, HTTP/2 and streaming are left to it.
"""

from __future__ import annotations

import http.client
import select
import socket
import ssl
import time

import httpx2 as httpx


IDLE = 0.02  # seconds after which a look shows whether the server has closed the connection


class PlainTransport(httpx.BaseTransport):
    """
    Args:
        timeout (`float`): seconds without a byte after which a request has failed.
        connect (`float`): seconds that a connection may take.
        certificates (`ssl.SSLContext`, *optional*): for https.
    """

    def __init__(self, timeout: float, connect: float, certificates: ssl.SSLContext | None):
        self.timeout, self.connect, self.certificates = timeout, connect, certificates
        self._sockets: dict[tuple[str, str, int], tuple[socket.socket, float]] = {}  # by origin, with its last use

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and read the whole answer."""
        url = request.url
        origin = (url.scheme, url.host, url.port or (443 if url.scheme == "https" else 80))
        used = self._reusable(origin) or self._connected(origin)
        try:
            used.sendall(_written(request))
            answer = http.client.HTTPResponse(used, method=request.method)
            answer.begin()
            content = answer.read()
        except BaseException as error:
            used.close()
            raise _translated(error, reading=True) from error
        if answer.will_close:
            used.close()
        else:
            self._sockets[origin] = (used, time.monotonic())
        answer.close()
        return httpx.Response(answer.status, headers=answer.getheaders(), content=content)

    def close(self) -> None:
        for used, _ in self._sockets.values():
            used.close()
        self._sockets.clear()

    def _reusable(self, origin: tuple[str, str, int]) -> socket.socket | None:
        """The open connection to a server, unless the server has closed it."""
        used, last = self._sockets.pop(origin, (None, 0.0))
        if used is not None and time.monotonic() - last > IDLE and select.select([used], [], [], 0)[0]:
            used.close()
            return None
        return used

    def _connected(self, origin: tuple[str, str, int]) -> socket.socket:
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


def _written(request: httpx.Request) -> bytes:
    """A request as it goes over the wire."""
    lines = [b"%s %s HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
    lines += [b"%s: %s" % header for header in request.headers.raw]
    return b"\r\n".join([*lines, b"", request.read()])


def _translated(error: BaseException, reading: bool) -> BaseException:
    """An error as httpx raises it."""
    if isinstance(error, TimeoutError):
        return (httpx.ReadTimeout if reading else httpx.ConnectTimeout)("timed out")
    if isinstance(error, http.client.RemoteDisconnected):
        return httpx.RemoteProtocolError("Server disconnected without sending a response.")
    if isinstance(error, http.client.HTTPException):
        return httpx.RemoteProtocolError(str(error) or type(error).__name__)
    if isinstance(error, OSError):
        return (httpx.ReadError if reading else httpx.ConnectError)(str(error))
    return error
