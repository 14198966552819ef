"""HTTP requests that are sent once: connections for each thread, logins and keys, and errors that show neither.

Passwords and keys stand in no message, whatever a server repeats; headers are never printed. Further attempts, and
several requests at once, are left to `http_client.py`.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Sequence
from typing import Any
from urllib.request import getproxies

import httpx2 as httpx

from .http_messages import forms_of, may_pass, retry_after, server_message
from .plain_transport import PlainTransport
from .server_urls import ServerURL, clean_key


LONGEST_CONNECT = 5.0  # seconds


LONGEST_MESSAGE = 1000  # characters of what a server says


PROXIES = {"http", "https", "all"}  # kinds of proxy with which httpx's own transport is used


class PassingError(Exception):
    """A failure after which another attempt may succeed; `retry_after` is what the server asks to wait, in seconds."""

    def __init__(self, message: str, retry_after: float = 0.0):
        super().__init__(message)
        self.retry_after = retry_after


class StatusError(Exception):
    """The server refuses the request, and would refuse it again; `status` is its HTTP status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Requests:
    """
    Connections to servers, for each thread its own.

    Args:
        servers (`list[ServerURL]`): all that will be asked, for their logins. One in a URL counts before `api_key`.
        timeout (`float`): seconds without a byte from the server after which a request has failed.
        key_advice (`str`): where to put a key, said where the server wants another one.
        api_key (`str`, *optional*): sent as a bearer token. White space at its ends is taken off.
        secrets (`Sequence[str]`, *optional*): what else no message may show, such as keys in the bodies of requests.

    Raises:
        ValueError: the key cannot be sent in a header.
    """

    def __init__(
        self,
        servers: Sequence[ServerURL],
        timeout: float,
        key_advice: str,
        api_key: str | None = None,
        secrets: Sequence[str] = (),
    ):
        self.timeout, self.key_advice = timeout, key_advice
        key = clean_key(api_key, key_advice)
        logins = [server.login for server in servers if server.login]
        self._logins = {server.base: httpx.BasicAuth(*server.login) for server in servers if server.login}
        sent = [base64.b64encode(":".join(login).encode()).decode().rstrip("=") for login in logins]
        hidden = {
            form for secret in (key, *(login[1] for login in logins), *sent, *secrets) for form in forms_of(secret)
        }
        self._secrets = sorted(hidden, key=len, reverse=True)  # one may be the beginning of another
        self._own = threading.local()  # a client for each thread: one that is shared costs more with each connection
        self._opened: list[httpx.Client] = []
        self._closed = threading.Event()
        secure = any(server.base.startswith("https") for server in servers)
        self._certificates = httpx.create_ssl_context() if secure else None  # made once: it takes some milliseconds
        self._templates: dict[str, tuple[httpx.URL, list[tuple[bytes, bytes]], Any]] = {}  # by URL
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def send(self, base: str, path: str, body: dict[str, Any] | None) -> bytes:
        """
        Send one request once.

        Args:
            base (`str`): of the server.
            path (`str`): appended to it.
            body (`dict`, *optional*): posted as JSON; without one the request is a GET.

        Returns:
            `bytes`: the content of an answer with HTTP 200.

        Raises:
            PassingError: no answer, or one after which another attempt may succeed.
            StatusError: the server refuses the request.
        """
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
            refusal = f"{refusal}. {self.key_advice}"
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

    def close(self) -> None:
        """Close the connections: requests under way fail."""
        self._closed.set()
        for client in list(self._opened):
            client.close()

    @property
    def _client(self) -> httpx.Client:
        """This thread's connections."""
        if not hasattr(self._own, "client"):
            timeout, certificates = self.timeout, self._certificates
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
