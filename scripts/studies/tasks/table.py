"""Tasks of `reproduce.py`: the demo's additions, with one right answer each, orders, with many, and GSM8K.

An order is any arrangement of five given digits: "74219" may be answered with "19742" and 119 others. What was written
already must not come again, and what was not given must not come at all, so a teacher has much to choose from and still
knows exactly what is wrong. GSM8K (https://arxiv.org/abs/2110.14168) is for models from the hub. Training is left to
`reproduce_runs.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from scripts.studies.tasks import additions as demo_task
from scripts.studies.tasks.gsm8k import ends_with, gsm8k
from scripts.studies.tasks.orders import in_any_order, orders


SHIPPED = Path(__file__).parent / "models"


@dataclass(frozen=True)
class Task:
    """
    Problems with a verifier.

    Attributes:
        name (`str`): of the task.
        problems (`Callable`): `(size, seed)` to rows with "prompt", "solution" and "answer"; see the seeds above.
        verifier (`Callable`): reward function, 1.0 for a right answer.
        limit (`int`): tokens of an answer.
        student, teacher (`str`, *optional*): folders or names; made on the spot where there are none.
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
        demo_task.problems,
        demo_task.correct,
        demo_task.MAX_COMPLETION_LENGTH,
        str(SHIPPED / "student"),
        str(SHIPPED / "teacher"),
    ),
    "orders": Task("orders", orders, in_any_order, 8),
    "gsm8k": Task("gsm8k", gsm8k, ends_with, 512, "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-3B-Instruct"),
}
