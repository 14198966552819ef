"""Tasks of `reproduce.py`: the demo's additions, with one right answer each, orders, with many, and GSM8K.

An order is any arrangement of five given digits: "74219" may be answered with "19742" and 119 others. What was written
already must not come again, and what was not given must not come at all, so a teacher has much to choose from and still
knows exactly what is wrong. GSM8K (https://arxiv.org/abs/2110.14168) is for models from the hub. Training is left to
`reproduce_runs.py`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo_task
from datasets import Dataset, load_dataset


HELD_OUT, GLANCE_AT, TRAIN, HUMAN = 10_000, 20_000, 30_000, 50_000  # seeds of problems begin here
SHIPPED = Path(__file__).parent / "demo_models"


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


def gsm8k(size: int, seed: int) -> Dataset:
    """`size` problems in an order of their own, again from the first where there are too few; tests below `TRAIN`."""
    rows = load_dataset("openai/gsm8k", "main", split="train" if seed >= TRAIN else "test").shuffle(seed)
    found: list[dict[str, Any]] = []
    for i in range(size):
        row = rows[i % len(rows)]
        question = f"{row['question']}\nEnd with the answer as a number after ####."
        answer = row["answer"].rsplit("####", 1)[1].strip().replace(",", "")
        found.append({"prompt": [{"role": "user", "content": question}], "solution": row["answer"], "answer": answer})
    return Dataset.from_list(found)


def ends_with(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Reward function: 1.0 where the last number of the completion is the answer, else 0.0."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    numbers = [re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", "")) for text in texts]
    return [float(found != [] and float(found[-1]) == float(gold)) for found, gold in zip(numbers, answer, strict=True)]


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
