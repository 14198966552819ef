"""Secrets in settings: read from environment variables where they are used, and left out of everything that is written.

A secret is recognised by the name of its setting (`token`, `api_key`, `password` ...), as a login in a URL, or by the
form of well-known keys (`hf_...`, `sk-...`, `Bearer ...`). `$NAME` only points to a secret, so it is written as it is.
"""

from __future__ import annotations

import os
import re
from typing import Any

from .server_urls import without_login


HIDDEN = "***"


_PASSWORDS = r"password|passwd|pwd|pass|passphrase|secret"


_NAMES = re.compile(
    rf"(?i:(^|[_\-.])(token|api[_\-]?keys?|access[_\-]?key(id)?|key|{_PASSWORDS}|secrets|"
    r"auth|authorization|bearer|credentials?|cookies?|session[_\-]?id)$)|[a-z](Token|Key|Password|Secret)$"
)


_SPECIAL_TOKENS = re.compile(
    r"^(bos|eos|pad|unk|sep|cls|mask|stop|image|video|audio|special|additional_special)_tokens?$"
)


_KEYS = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_\-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|AKIA[A-Z0-9]{12,})"
    r"|(?<=Bearer )\S+|(?<=Basic )\S+"
)


_IN_QUERY = re.compile(r"(?<=[?&])([\w\-.]+)=([^&#\s]+)")


_PLACEHOLDER = re.compile(r"<[A-Z_]+>")  # transformers writes "<HUB_TOKEN>"


_REFERENCE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def redacted(value: Any, name: str = "") -> Any:
    """
    A copy of a setting without secrets.

    Args:
        value (`Any`): a setting. Dictionaries, lists and tuples are copied and searched; other objects are returned
            as they are.
        name (`str`): its name.

    Returns:
        `Any`: the same with `***` in place of each secret.
    """
    if isinstance(value, dict):
        return {key: redacted(inner, key if isinstance(key, str) else name) for key, inner in value.items()}
    if isinstance(value, list | tuple | set) and not hasattr(value, "_fields"):
        return type(value)(redacted(inner, name) for inner in value)
    if isinstance(value, bytes | int) and not isinstance(value, bool):  # `token=True` asks for the stored one
        return HIDDEN if re.search(rf"(?i:{_PASSWORDS})$", name) else value
    if not isinstance(value, str) or not value:
        return value
    if _is_secret(name):
        return value if _REFERENCE.fullmatch(value) or _PLACEHOLDER.fullmatch(value) else HIDDEN
    text = _KEYS.sub(HIDDEN, without_login(value))
    text = _IN_QUERY.sub(lambda found: f"{found[1]}={HIDDEN if _is_secret(found[1]) else found[2]}", text)
    return value if text == value else text  # a `str` that carries more, such as a divergence's function, stays whole


def _is_secret(name: str) -> bool:
    return bool(_NAMES.search(name)) and not _SPECIAL_TOKENS.match(name)


def from_environment(value: Any, setting: str) -> Any:
    """
    A copy of a setting in which `$NAME` and `${NAME}` are replaced by environment variables.

    `$NAME` must be the whole text; `${NAME}` may also stand inside it, as in `https://me:${PASSWORD}@host`.

    Args:
        value (`Any`): a setting; dictionaries and lists are searched.
        setting (`str`): its name, for messages.

    Raises:
        ValueError: the variable is not set.
    """
    if isinstance(value, dict):
        return {name: from_environment(inner, setting) for name, inner in value.items()}
    if isinstance(value, list):
        return [from_environment(inner, setting) for inner in value]
    if not isinstance(value, str):
        return value
    pattern = _REFERENCE if _REFERENCE.fullmatch(value) else re.compile(r"\$\{(\w+)\}")

    def variable(found: re.Match[str]) -> str:
        name = next(filter(None, found.groups()))
        if name not in os.environ:
            raise ValueError(f"`{setting}` reads the environment variable {name}, which is not set. Set it.")
        return os.environ[name].strip()

    return pattern.sub(variable, value)
