"""Requests to a server, with retries: shared by the served teacher and the endpoints of the data engine."""

from __future__ import annotations

import json


LONGEST_PAUSE = 30.0  # seconds between two attempts, whatever the server asks for


LONGEST_CONNECT = 5.0  # seconds


class PassingError(Exception):
    """A failure that another attempt may mend; `retry_after` is what the server asks to wait, in seconds."""

    def __init__(self, message: str, retry_after: float = 0.0):
        super().__init__(message)
        self.retry_after = retry_after


def server_message(content: bytes) -> str:
    """What a server says about an error: vLLM's `{"error": {"message": ...}}`, or the beginning of anything else."""
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, RecursionError, LookupError, TypeError):
        return content[:300].decode(errors="replace").strip() or "(nothing)"


def retry_after(header: str | None) -> float:
    """A `Retry-After` header in seconds; 0 for none, and for a date."""
    try:
        return float(header or 0)
    except ValueError:
        return 0.0
