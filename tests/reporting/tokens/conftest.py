"""A report with everything in it that could go wrong on a page, made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from trl_distill.reporting.tokens import Completion, Opinion, TokenTable, View


WORDS = {0: "the", 1: " cat", 2: " sat", 3: "</script><script>window.hurt=1</script>", 4: "\n", 5: "   ", 6: "<|end|>"}
EVIL = "<img src=x onerror='window.hurt=2'>\u2028\u202e&amp;"


def opinion(ids: tuple[int, ...], kls: tuple[float, ...], chance: float) -> dict[str, Any]:
    others = [token for token in WORDS if token not in ids[:1]][:4]
    top = tuple(((token, chance), *((other, (1 - chance) / 4) for other in others if other != token)) for token in ids)
    return {"log_probs": tuple(-0.5 - kl for kl in kls), "top": top}


def completion(
    prompt: str, ids: tuple[int, ...], kls: tuple[float, ...], reward: float | None, other: bool = False
) -> Completion:
    views = [View(**opinion(ids, kls, 0.6), kl=kls, forward_kl=kls)]
    if other:
        halves = tuple(kl / 2 for kl in kls)
        views.append(View(**opinion(ids, halves, 0.7), kl=halves, forward_kl=halves))
    return Completion(
        prompt=prompt,
        ids=ids,
        texts=tuple(WORDS[token] for token in ids),
        truncated=ids[-1] != 6,
        rewards={"right": reward},
        teacher=Opinion(**opinion(ids, kls, 0.9)),
        views=tuple(views),
    )


@pytest.fixture
def table():
    """Makes a report of three completions (mean KL 0.2, 1.0 and 0.5), or of many, for one student or two."""

    def make(two: bool = False, copies: int = 1, title: str = "A report") -> TokenTable:
        rows = [
            completion("first prompt", (0, 1, 2, 6), (0.1, 0.3, 0.3, 0.1), 1.0, two),
            completion(EVIL, (0, 3, 4, 5, 2), (0.0, 4.0, 0.5, 0.25, 0.25), 0.0, two),
            completion("user: third\nassistant: yes", (1, 2, 0, 1), (0.9, 0.05, 0.05, 1.0), 0.5, two),
        ]
        students = ("checkpoint-100", "checkpoint-500") if two else ("checkpoint-100",)
        return TokenTable(title, "the teacher", students, tuple(rows * copies), WORDS, settings={"seed": "0"})

    return make
