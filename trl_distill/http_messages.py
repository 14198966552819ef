"""What a server's answer says: whether a failure may pass, what the error is, and how a secret may stand in it."""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote


PASSING = (408, 409, 425, 429)  # statuses after which another attempt may succeed, beside 5xx


def forms_of(secret: str | None) -> Iterator[str]:
    """How a secret may stand in a server's message."""
    if secret:
        yield from (secret, quote(secret, safe=""), json.dumps(secret)[1:-1])


def may_pass(status: int) -> bool:
    """Whether another attempt may succeed after an answer with this HTTP status."""
    return status in PASSING or status >= 500


def error_inside(answer: Any) -> tuple[str, int | None] | None:
    """
    The error in a parsed answer that came with HTTP 200.

    Returns:
        `tuple[str, int | None]`, *optional*: what the server says, and the HTTP status that it names; `None` without
            an error.
    """
    if not isinstance(answer, dict):
        return None
    found = answer.get("error") or (answer if answer.get("object") == "error" else None)
    if not found:
        return None
    fields = {**answer, **(found if isinstance(found, dict) else {})}
    codes = [str(fields.get(name)) for name in ("code", "status", "status_code")]
    status = next((int(code) for code in codes if re.fullmatch("[45][0-9]{2}", code)), None)
    return server_message(json.dumps(answer).encode()), status


def server_message(content: bytes) -> str:
    """What a server says about an error: vLLM's `{"error": {"message": ...}}`, or the beginning of anything else."""
    try:
        answer = json.loads(content)
        found = answer.get("error") or answer
        return str(found if isinstance(found, str) else found["message"])
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return content[:100_000].decode(errors="replace").strip() or "(nothing)"


def retry_after(header: str | None) -> float:
    """A `Retry-After` header, a number or a date, as seconds from now; 0 for none, and for anything else."""
    try:
        seconds = float(header or 0)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header or "").timestamp() - time.time()
        except ValueError:
            return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0
