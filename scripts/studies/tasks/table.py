"""Tasks of `scripts/reproduce.py`: the demo's additions, with one right answer each, orders, with many, and GSM8K.

An order is any arrangement of five given digits: "74219" may be answered with "19742" and 119 others. A digit must not
come twice, and no other digit must come, so many answers are right and every mistake is certain. GSM8K
(https://arxiv.org/abs/2110.14168) is for models from the hub.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from scripts.studies.tasks import additions
from scripts.studies.tasks.gsm8k import ends_with, gsm8k
from scripts.studies.tasks.orders import in_any_order, orders


SHIPPED = Path(__file__).parent / "models"


@dataclass(frozen=True)
class Task:
    """
    Problems with a verifier.

    Attributes:
        name (`str`): of the task.
        problems (`Callable`): `(size, seed)` to rows with "prompt", "solution" and "answer"; see `seeds.py`.
        verifier (`Callable`): reward function, 1.0 for a right answer.
        limit (`int`): tokens of an answer.
        student, teacher (`str`, *optional*): folders or names; `None` where they are made on the spot.
    """

    name: str
    problems: Callable[[int, int], Dataset]
    verifier: Any
    limit: int
    student: str | None = None
    teacher: str | None = None


TASKS = {
    "additions": Task(
        "additions",
        additions.problems,
        additions.correct,
        additions.MAX_COMPLETION_LENGTH,
        str(SHIPPED / "student"),
        str(SHIPPED / "teacher"),
    ),
    "orders": Task("orders", orders, in_any_order, 8),
    "gsm8k": Task("gsm8k", gsm8k, ends_with, 512, "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-3B-Instruct"),
}
