"""Principles by which completions are revised (constitutional AI, arXiv 2212.08073), read from a text file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


DEFAULT = Path(__file__).parent.parent / "principles" / "default.txt"


_LABEL = re.compile(r"\s*(critique|revision)( request)?\s*:\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Principle:
    """
    Attributes:
        text (`str`): as the column `principle` shows it; of a pair, its request for a critique.
        critique (`str`): asks for the critique.
        revision (`str`): asks for the revision.
    """

    text: str
    critique: str
    revision: str


def load_principles(name: str) -> list[Principle]:
    """
    The principles in a file.

    One per line, or per paragraph if there are empty lines between them. A line `critique: ...` with a line
    `revision: ...` after it is one principle, with requests of its own. Lines that begin with `#` are comments.

    Args:
        name (`str`): path of the file, or "default" for that of the package.

    Raises:
        ValueError: the file is not there, holds no principle, or half a pair.
    """
    path = DEFAULT if name == "default" else Path(name)
    if not path.is_file():
        raise ValueError(
            f"`revise` names {name!r}, which is not a file. Write one principle per line into it, or use `--revise "
            "default`."
        )
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    text = "\n".join(lines).strip()
    if not text:
        raise ValueError(f"{name!r}, which `revise` names, holds no principle. Write one per line.")
    found = []
    blocks = re.split(r"\n\n+", text)
    for block in blocks if len(blocks) > 1 else _lines(text):
        found += _pairs(block, name) if _LABEL.match(block) else [_principle(" ".join(block.split()))]
    return found


def _lines(text: str) -> list[str]:
    """The lines of a text; those of pairs in one piece each."""
    found: list[str] = []
    for line in text.split("\n"):
        label = _LABEL.match(line)
        if label and label[1].casefold() == "revision" and found:
            found[-1] += f"\n{line}"
        else:
            found.append(line)
    return found


def _pairs(block: str, name: str) -> list[Principle]:
    """The principles of a block of labelled lines; a line without a label goes on with the one before."""
    parts: list[tuple[str, str]] = []
    for line in block.split("\n"):
        if label := _LABEL.match(line):
            parts.append((label[1].casefold(), line[label.end() :]))
        else:
            parts[-1] = parts[-1][0], f"{parts[-1][1]} {line}"
    labels = [label for label, _ in parts]
    if labels != ["critique", "revision"] * (len(parts) // 2) or not all(text.strip() for _, text in parts):
        raise ValueError(
            f"A principle in {name!r} is not whole: {block[:200]!r}. Write `critique: ...`, and `revision: ...` on the "
            "line after it; or the principle alone, without these words."
        )
    texts = [text.strip() for _, text in parts]
    return [Principle(c, c, r) for c, r in zip(texts[::2], texts[1::2], strict=True)]


def _principle(text: str) -> Principle:
    return Principle(
        text,
        f"Identify specific ways in which your last answer does not follow this principle: {text}",
        f"Rewrite the answer so that it follows this principle: {text}",
    )
