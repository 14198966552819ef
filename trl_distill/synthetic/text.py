"""Prompts and completions as text: words, normal forms, and the two shapes that TRL reads (text and messages).

Pure functions. What is done with them is left to the stages.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any


Text = str | list[dict[str, Any]]  # as TRL has it: plain text, or messages


_EAST_ASIAN = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # written without spaces: each sign counts as a word


_WORD = re.compile(rf"[{_EAST_ASIAN}]|[^\s{_EAST_ASIAN}]+")


def words(text: str) -> list[str]:
    """Lower-case words; punctuation stays with the word before it."""
    return _WORD.findall(unicodedata.normalize("NFC", text).casefold())


def numbers(text: str) -> tuple[str, ...]:
    """All numbers in their order: texts that name different numbers ask different things."""
    return tuple(re.findall(r"\d+(?:[.,]\d+)*", unicodedata.normalize("NFC", text)))


def normal(text: str, fold_case: bool = False) -> str:
    """
    Text in which only differences that count are left: runs of white space are one space, and characters that are
    composed in two ways are written in one (NFC). Signs of another meaning, such as the exponent of 5², stay.
    """
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return text.casefold() if fold_case else text


def flat(value: Text) -> str:
    """The words of a prompt or completion in one string; roles are left out where only the user speaks."""
    if isinstance(value, str):
        return value
    if len(value) == 1:
        return content(value[0])
    return "\n".join(f"{message['role']}: {content(message)}" for message in value)


def content(message: dict[str, Any]) -> str:
    """The text of one message; of a list of parts, that of the text parts."""
    found = message.get("content") or ""
    if isinstance(found, str):
        return found
    return "".join(part.get("text") or "" for part in found if isinstance(part, dict))


def as_completion(text: str, prompt: Text) -> Text:
    """A completion in the shape of its prompt."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def repetition(text: str, n: int = 4) -> float:
    """
    seq-rep-n (arXiv 1908.04319): the share of word n-grams that repeat an earlier one; 0 for a text of fewer than n
    words.
    """
    found = words(text)
    grams = [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
