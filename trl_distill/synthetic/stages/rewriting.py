"""What the stages that rewrite prompts and completions share: reading what a source wrote."""

from __future__ import annotations

import re

from ..records import Answer, Refusal


def answer_text(answer: Answer, ends: list[str]) -> tuple[str, str | None]:
    """
    The text of an answer without thoughts, and why it cannot be used (or `None`).

    Args:
        answer (`list[Completion]` or `Refusal`): with one completion.
        ends (`list[str]`): patterns of lines with which a model that continues text would begin something else. What
            stands before the first is whole, whether or not the length limit was reached after it.
    """
    if isinstance(answer, Refusal):
        return "", answer.kind
    text, reason = answer[0].text, answer[0].stop_reason
    if "</think>" not in text and "<think>" in text:
        return "", "cut off at the length limit" if reason == "length" else "empty"
    text = text.rpartition("</think>")[2].strip()
    after = re.search(rf"\n\s*({'|'.join(ends)})", text, re.IGNORECASE) if ends else None
    if after:
        return text[: after.start()].strip(), None
    if reason == "length":
        return text, "cut off at the length limit"
    if reason != "stop":
        return text, f"ended by {reason!r}"
    return text, None if text else "empty"


def last_words(text: str, patterns: dict[str, str]) -> str | None:
    """
    Which of some answers a text gives last.

    Args:
        text (`str`): an answer.
        patterns (`dict[str, str]`): regular expressions, by the value that is returned for them.
    """
    found = [(match.start(), value) for value, p in patterns.items() for match in re.finditer(p, text, re.IGNORECASE)]
    return max(found)[1] if found else None
