"""The demo's task: four-digit additions with a verifier and a written-out chain of steps.

The questions read like those of reasoning-gym's `chain_sum`, so its verifier can take the place of `correct`; the
package itself is not used because one of its dependencies needs a C compiler to install. The chain of steps (one column
at a time, from the right, with the carry) is what the demo's teacher was taught to write.
"""

from __future__ import annotations

import random
import re
from typing import Any

from datasets import Dataset


MAX_COMPLETION_LENGTH = 64  # tokens; a complete solution has 43 or 44


def problems(size: int, seed: int) -> Dataset:
    """
    `size` problems, the same for the same `seed`; of 81 million, so two seeds have next to none in common.

    Columns: `prompt` (one user message), `solution` (the chain of steps) and `answer` (digits).
    """
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(size):
        left, right = draw.randint(1000, 9999), draw.randint(1000, 9999)
        question = f"State the final answer to the following arithmetic problem: {left} + {right} ="
        rows.append(
            {
                "prompt": [{"role": "user", "content": question}],
                "solution": solution(str(left), str(right)),
                "answer": str(left + right),
            }
        )
    return Dataset.from_list(rows)


def solution(left: str, right: str) -> str:
    """'2390', '6915' -> '0+5+0=05 9+1+0=10 3+9+1=13 2+6+1=09 answer 9305'; the carry is the third term."""
    carry, steps = 0, []
    for a, b in zip(reversed(left), reversed(right), strict=True):
        total = int(a) + int(b) + carry
        steps.append(f"{a}+{b}+{carry}={total:02d}")
        carry = total // 10
    return " ".join(steps) + f" answer {int(left) + int(right)}"


def correct(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Reward function: 1.0 where the completion ends with the right answer, else 0.0. The steps are not judged."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    found = [re.search(r"answer (\d+)$", text.strip()) for text in texts]
    return [float(match is not None and match[1] == gold) for match, gold in zip(found, answer, strict=True)]


def brief(completions: list[Any], **_: Any) -> list[float]:
    """Reward function at odds with the teacher: 1.0 for an empty answer, less for each of its characters."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [1 - len(text) / 60 for text in texts]
