"""Tasks of `reproduce.py`: the demo's additions, with one right answer each, and orders, with many.

An order is any arrangement of five given digits: "74219" may be answered with "19742" and 119 others. What was written
already must not come again, and what was not given must not come at all, so a teacher has much to choose from and still
knows exactly what is wrong. Models and training are left to `reproduce_runs.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import demo_task
from datasets import Dataset


def orders(size: int, seed: int) -> Dataset:
    """`size` problems, the same for the same `seed`; columns "prompt", "solution" (one of 120) and "answer"."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(size):
        digits = draw.sample("0123456789", 5)
        question = f"State the arithmetic problem: {''.join(digits)}"
        solution = "".join(draw.sample(digits, 5))
        rows.append(
            {"prompt": [{"role": "user", "content": question}], "solution": solution, "answer": "".join(digits)}
        )
    return Dataset.from_list(rows)


def in_any_order(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Reward function: 1.0 where the completion holds each of the given digits once and nothing else, else 0.0."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(sorted(text) == sorted(digits)) for text, digits in zip(texts, answer, strict=True)]


@dataclass(frozen=True)
class Task:
    """Problems with a verifier; `limit` is the length of an answer, in tokens."""

    name: str
    problems: Callable[[int, int], Dataset]
    verifier: Any
    limit: int


TASKS = {
    "additions": Task("additions", demo_task.problems, demo_task.correct, demo_task.MAX_COMPLETION_LENGTH),
    "orders": Task("orders", orders, in_any_order, 8),
}
