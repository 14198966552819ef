"""Secrets in settings: read from environment variables where they are used, and left out of everything that is written.

A secret is recognised by the name of its setting (`token`, `api_key_1`, `signature` ...), as a login or a query's
parameter in a URL, as `name: value`, `name=value` or `--name value` in a text, or by the form of well-known keys
(`hf_...`, `sk-...`, `Bearer ...`). `$NAME` only points to a secret, so it is written as it is.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from typing import Any

from .server_urls import without_login


HIDDEN = "***"


_PASSWORDS = r"password|passwd|pwd|pass|passphrase|secret"


# parts of a name that make it a secret's wherever they stand
_ANYWHERE = re.compile(
    r"password|passwd|passphrase|secret|credential|authorization|api[_\-. ]?key|access[_\-]?key|private[_\-]?key|"
    r"(auth|access|refresh|bearer|hub|hf)token|session[_\-]?(id|key)",
    re.IGNORECASE,
)


_WORDS = {
    "token",
    "tokens",
    "jwt",
    "pat",
    "sig",
    "signature",
    "signatures",
    "auth",
    "bearer",
    "cookie",
    "cookies",
    "pwd",
}


_LAST_WORDS = {"key", "keys", "pass"}  # secrets at the end of a name; `key_value_heads` is none


# what makes tokens the model's own: how many there are, which part of a text, or which special one
_OF_TEXT = {
    *("max", "min", "num", "n", "total", "per", "count", "counts", "budget", "limit", "length", "average", "mean"),
    *("seen", "schedule", "across", "level", "report", "ids", "healing", "prompt", "completion", "input", "output"),
    *("generated", "reasoning", "thinking", "stop", "suppress", "forced", "skip", "add", "added", "decoder", "start"),
    *("bos", "eos", "pad", "unk", "sep", "cls", "mask", "image", "video", "audio", "special", "additional", "end"),
    *("weight", "weights", "weighting"),
}


_POINTERS = {"env", "file", "path", "type", "name"}  # `api_key_env` names a variable


_PROSE = {"key", "keys", "pass", "tokens", "pat", "signature", "signatures"}  # "Key: ..." begins many sentences


_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # `hubToken`, `HUB_TOKEN` and `hub-token2` have two


_KEYS = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_\-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|A[KS]IA[A-Z0-9]{12,}|"
    r"gsk_[A-Za-z0-9]{16,}|AIza[\w\-]{16,}|xox[a-z]-[A-Za-z0-9\-]{10,}|nvapi-[\w\-]{16,}|glpat-[\w\-]{16,}|"
    r"xai-[A-Za-z0-9]{16,}|eyJ[\w\-]{8,}\.eyJ[\w\-]{8,}\.[\w\-]*)"
    r"|(?<=Bearer )\S+|(?<=Basic )\S+"
)


_IN_QUERY = re.compile(r"(?<=[?&])([\w\-.%]+)=([^&#\s]+)")


_COOKIE = re.compile(r"\b((?:set-)?cookie:[^\S\n]*)[^\n\"']+", re.IGNORECASE)  # a header holds several


_SCHEME = r"(?:(?:bearer|basic|token)[^\S\n]+)?"


_VALUE = (
    r"(?P<quote>\\{0,3}[\"'])(?P<quoted>.+?)(?P=quote)|"
    rf"\\{{0,3}}[\"']?{_SCHEME}(?P<plain>(?!//)(?:(?!\\{{0,3}}[\"'])[^\s&])+)"
)


_NAMED = re.compile(
    r"(?<!\w)(?P<name>[A-Za-z][\w\-.]{0,60})(?P<mark>\\{0,3}[\"']?[^\S\n]*(?:[:=][^\S\n]*)(?=\S))" rf"(?:{_VALUE})",
    re.IGNORECASE,
)


_FLAG = re.compile(rf"(?<!\S)--(?P<name>[A-Za-z][\w\-.]{{0,60}})(?P<mark>[^\S\n]+(?!--))(?:{_VALUE})", re.IGNORECASE)


_PLACEHOLDER = re.compile(r"<[A-Z_]+>")  # transformers writes "<HUB_TOKEN>"


_REFERENCE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


_NO_VALUE = re.compile(r"(?i:none|null|true|false)[,;)\]}]*")


def redacted(value: Any, name: str = "") -> Any:
    """
    A copy of a setting without secrets.

    Args:
        value (`Any`): a setting. Dictionaries, lists, tuples, sets and dataclasses are copied and searched, and so is
            a text that holds JSON; other objects are returned as they are.
        name (`str`): its name.

    Returns:
        `Any`: the same with `***` in place of each secret.
    """
    if isinstance(value, dict):
        return {key: redacted(inner, key if isinstance(key, str) else name) for key, inner in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _redacted_fields(value)
    if isinstance(value, tuple) and (fields := getattr(value, "_fields", None)):
        return type(value)(*map(redacted, value, fields))
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(_redacted_items(value, name))
    if isinstance(value, bytes) and _is_secret(name):
        return HIDDEN
    if isinstance(value, bytes | int) and not isinstance(value, bool):  # `token=True` asks for the stored one
        return HIDDEN if re.search(rf"(?i:{_PASSWORDS})$", name) else value
    if not isinstance(value, str) or not value:
        return value
    if _is_secret(name):
        return value if _is_shown(value) else HIDDEN
    text = _redacted_text(value)
    return value if text == value else text  # a `str` that carries more, such as a divergence's function, stays whole


def _redacted_fields(value: Any) -> Any:
    """A copy of a dataclass without secrets, also in what it keeps beside its fields."""
    shown = copy.copy(value)
    for name in {*(field.name for field in dataclasses.fields(value)), *getattr(value, "__dict__", ())}:
        if hasattr(value, name):
            object.__setattr__(shown, name, redacted(getattr(value, name), name))
    return shown


def _redacted_items(values: Any, name: str) -> list[Any]:
    """The items of a list without secrets; an item after `"--api_key"` is one."""
    items: list[Any] = []
    flag = ""
    for value in values:
        is_flag = isinstance(value, str) and re.fullmatch(r"--?[A-Za-z][\w\-.]*", value) is not None
        items.append(value if is_flag and not _is_secret(name) else redacted(value, flag or name))
        flag = value.lstrip("-") if is_flag else ""
    return items


def _redacted_text(text: str) -> str:
    """A text without logins, keys and the values of secret names."""
    if text.lstrip()[:1] in ("{", "["):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        shown = redacted(found)
        if shown != found:
            return json.dumps(shown, ensure_ascii=False)
    text = _KEYS.sub(HIDDEN, without_login(text))
    text = _IN_QUERY.sub(lambda found: f"{found[1]}={HIDDEN if _is_secret(found[1]) else found[2]}", text)
    text = _COOKIE.sub(rf"\1{HIDDEN}", text)
    return _FLAG.sub(_without_value, _NAMED.sub(_without_value, text))


def _without_value(found: re.Match[str]) -> str:
    """What is written in place of `name: value`."""
    value = found["quoted"] or found["plain"]
    colon = ":" in found["mark"] and not re.search("[\"']", found["mark"])
    if not _is_secret(found["name"]) or (colon and found["name"].casefold() in _PROSE) or _is_shown(value):
        return found[0]
    quote = found["quote"] or ""
    return f"{'--' if found.re is _FLAG else ''}{found['name']}{found['mark']}{quote}{HIDDEN}{quote}"


def _is_shown(value: str) -> bool:
    """Whether the value of a secret's name is none itself."""
    return any(form.fullmatch(value) for form in (_REFERENCE, _PLACEHOLDER, _NO_VALUE)) or value == HIDDEN


def _is_secret(name: str) -> bool:
    parts = [part.casefold() for part in _PARTS.findall(name)]
    if not parts or parts[-1] in _POINTERS:
        return False
    if _ANYWHERE.search(name) or parts[-1] in _LAST_WORDS:
        return True
    found = _WORDS.intersection(parts)
    if found <= {"token", "tokens"} and (_OF_TEXT.intersection(parts) or "token_id" in name.casefold()):
        return False
    return bool(found)


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
