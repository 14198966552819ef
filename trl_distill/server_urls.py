"""URLs of servers and their keys: checked, taken apart, and shown without what is secret in them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import httpx2 as httpx


@dataclass(frozen=True)
class ServerURL:
    """
    A URL taken apart.

    Attributes:
        base (`str`): without a login, and without a slash at the end.
        login (`tuple[str, str]`, *optional*): user and password that stood in it.
    """

    base: str
    login: tuple[str, str] | None = None

    def __repr__(self) -> str:
        return f"ServerURL({self.base!r})"


def read_url(url: str, setting: str) -> ServerURL:
    """
    Check a URL and take the login out of it.

    Args:
        url (`str`): such as "http://localhost:8000/v1" or "https://user:password@host".
        setting (`str`): what the user calls it, for messages.

    Raises:
        ValueError: it is not a full http URL, has a query or a fragment, to which no path can be appended, or an `@`
            in its path, which is probably part of a login.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:  # its message may quote a password
        raise ValueError(
            f"{setting} holds a URL that cannot be read. Write it as 'http://localhost:8000', and the signs #, / and @ "
            "of a password as %23, %2F and %40."
        ) from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"{setting} holds {without_login(url)!r}; write it in full, such as 'http://localhost:8000'.")
    if "@" in parsed.path:
        raise ValueError(
            f"{setting} holds a URL with `@` after the host, which may be the end of a login. Write the signs #, / "
            "and @ of a password as %23, %2F and %40."
        )
    if parsed.query or parsed.fragment or "?" in url or "#" in url:
        raise ValueError(
            f"{setting} holds a URL of {parsed.host} with something after `?` or `#`, but paths such as "
            "`/chat/completions` are appended to it. Leave that out; a key has a setting of its own."
        )
    login = (parsed.username, parsed.password) if parsed.userinfo else None
    return ServerURL(str(parsed.copy_with(userinfo=b"")).rstrip("/"), login)


def without_login(text: str) -> str:
    """A text in which users and passwords of URLs are replaced by asterisks, also where they break the URL."""
    return _LOGIN.sub(r"\1***@", text)


_LOGIN = re.compile(
    r"\b([a-z][a-z0-9+.\-]{0,15}://)"  # bounded: each word of a long text might begin a scheme
    r"(?:[^/?#\s]*|[^/?#\s:@]*:(?!\d*(?:[/?#\s]|$))[^\s\"'<>]*)@",  # after a colon that no port follows, any sign
    re.IGNORECASE,
)


def clean_key(key: str | None, advice: str) -> str | None:
    """
    A key as it is sent: without white space at its ends, which often comes with a file or a paste; `None` for none.

    Raises:
        ValueError: it holds something that cannot stand in a header. The key itself is not shown.
    """
    key = (key or "").strip()
    bad = next((place for place, sign in enumerate(key) if not 33 <= ord(sign) <= 126), None)
    if bad is not None:
        raise ValueError(
            f"The API key holds U+{ord(key[bad]):04X} as character {bad + 1} of {len(key)}; a header takes only "
            f"printable ASCII without spaces. Copy the key again. {advice}"
        )
    return key or None
