"""What each stage was given, kept and dropped, and for which reason.

`seen` is counted where rows come in, `kept` and `dropped` where they leave, so that a row lost between the two shows.
How the numbers are shown is left to `card.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any


@dataclass
class Stage:
    """
    Attributes:
        name (`str`): what was done.
        unit (`str`): what is counted: "rows", "prompts", "requests", "completions".
        seen (`int`): how many came in.
        kept (`int`): how many went on.
        dropped (`Counter[str]`): the others, by reason.
    """

    name: str
    unit: str
    seen: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def count(self, reason: str | None) -> bool:
        """Count one that came in; whether it goes on, which it does without a reason against it."""
        self.seen += 1
        if reason is None:
            self.kept += 1
        else:
            self.dropped[reason] += 1
        return reason is None

    @property
    def adds_up(self) -> bool:
        return self.seen == self.kept + self.dropped.total()

    def as_dict(self) -> dict[str, Any]:
        return {
            "stage": self.name,
            "unit": self.unit,
            "in": self.seen,
            "kept": self.kept,
            "dropped": dict(sorted(self.dropped.items())),
        }

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Stage:
        return cls(found["stage"], found["unit"], found["in"], found["kept"], Counter(found["dropped"]))


@dataclass(frozen=True)
class Skip:
    """
    Something that was given and cannot be used.

    Attributes:
        stage (`str`): which stage found it.
        where (`str`): a line or row of the input, or a prompt's number and teacher.
        why (`str`): what was found.
    """

    stage: str
    where: str
    why: str


class SkipFile:
    """
    A file of skips, one JSON object per line, open within a `with` block.

    Args:
        path (`Path`): made anew.
    """

    def __init__(self, path: Path):
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115  closed by the `with` block

    def __enter__(self) -> SkipFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def add(self, skip: Skip) -> None:
        """Append one."""
        self._file.write(json.dumps(asdict(skip), ensure_ascii=False) + "\n")
