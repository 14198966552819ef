"""Grade-school problems in words, for models of a usual size."""

from __future__ import annotations

import re
from typing import Any

from datasets import Dataset, load_dataset

from scripts.studies.tasks.seeds import TRAIN


def gsm8k(size: int, seed: int) -> Dataset:
    """`size` problems shuffled by the seed, repeated if there are too few; seeds below `TRAIN` are tests."""
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
