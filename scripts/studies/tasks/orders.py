"""Orders: a task with several right answers."""

from __future__ import annotations

import random
from typing import Any

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
