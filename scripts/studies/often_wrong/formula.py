"""What theory promises: how often the optimum is right, and how near to the teacher that is possible.

    python -m scripts.studies.often_wrong.formula      # the table of docs/recipes.md

The reward is 1 for a right answer and 0 otherwise. `p` is the teacher's share of right answers when it samples at the
temperature of the training, `beta` its weight in reward per nat.
"""

from __future__ import annotations

import math


def promised(p: float, beta: float) -> float:
    """Share of right answers at the optimum of the whole objective (`kl_discount=1`), π ∝ teacher · e^{r/β}."""
    return p / (p + (1 - p) * math.exp(-1 / beta))


def promised_per_token(p: float, beta: float, places: int = 13) -> float:
    """
    The same where each token is credited with its own KL alone (`kl_discount=0`), for a task like the demo's.

    An answer has some places at which a digit can be wrong, all equally hard for the teacher, and one wrong digit makes
    the answer wrong. At each place the optimum is teacher · e^{Q/β}, with Q the student's own chance to end right from
    there; so places are solved from the last to the first.

    Args:
        p (`float`): the teacher's share of right answers.
        beta (`float`): its weight.
        places (`int`): digits that can be wrong; 13 are those of two four-digit numbers with carries: 8 of the sums,
            5 of the answer.
    """
    right = p ** (1 / places)
    whole = 1.0
    for _ in range(places):
        odds = right / (1 - right) * math.exp(whole / beta)
        whole *= odds / (1 + odds)
    return whole


def frontier(p: float, accuracy: float) -> float:
    """
    The least KL to the teacher, nats per answer, at which a model can be right this often.

    The reward distinguishes right and wrong only, so this is the KL between two coins. The optimum of the objective
    lies on this curve, for every beta.

    Args:
        p (`float`): the teacher's share of right answers.
        accuracy (`float`): the model's, at least `p` and below 1.
    """
    right = accuracy * math.log(accuracy / p)
    return right + (1 - accuracy) * math.log((1 - accuracy) / (1 - p))


def table(teachers: tuple[float, ...] = (0.6, 0.7, 0.85), betas: tuple[float, ...] = (1.0, 0.5, 0.3, 0.1)) -> str:
    """Promises by teacher and beta, as Markdown; behind each, in brackets, that of one token at a time."""
    rows = [["teacher right", *(f"`beta` {beta:g}" for beta in betas)], ["---", *("---:" for _ in betas)]]
    for p in teachers:
        pairs = [(promised(p, beta), promised_per_token(p, beta)) for beta in betas]
        rows.append([f"{p:.0%}", *(f"{whole:.1%} ({own:.1%})" for whole, own in pairs)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(table())
