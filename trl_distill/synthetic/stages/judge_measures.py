"""What verdicts show about the judge: ties, contradictions, a bias to a place or to length. Pure functions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .compare import Comparison


def wilson(right: float, total: int) -> dict[str, float | int | None]:
    """
    A share with its 95 % interval after Wilson, which does not shrink to a point at 0 or 1.

    Args:
        right (`float`): how many; halves count.
        total (`int`): of how many, independent of each other.

    Returns:
        `dict` of "value", "low" and "high" (`None` where `total` is 0) and "of".
    """
    if not total:
        return {"value": None, "low": None, "high": None, "of": 0}
    share, z = right / total, 1.959964
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return {"value": share, "low": max(0.0, middle - half), "high": min(1.0, middle + half), "of": total}


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation; `None` where all values of one side are equal, or there are none."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks, of equal values their mean."""
    _, place, count = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def longer_wins(outcomes: Iterable[tuple[float | None, int, int]]) -> dict[str, float | int | None]:
    """
    How often the longer of two answers wins, where one wins and their lengths differ.

    Args:
        outcomes (`Iterable[tuple[float | None, int, int]]`): what a gets (1, 0.5 or 0, or `None`), and the characters
            of a and b.
    """
    decided = [
        (won > 0.5) == (a > b) for won, a, b in outcomes if won not in (None, 0.5) and a != b and won is not None
    ]
    return wilson(sum(decided), len(decided))


def comparison_measures(found: Iterable[tuple[Comparison, int, int]]) -> dict[str, Any]:
    """
    Counts of comparisons, and two biases.

    Args:
        found (`Iterable[tuple[Comparison, int, int]]`): comparisons of a and b, and their characters.

    Returns:
        `dict`: "comparisons"; of these "decided", "ties" (both orders say so), "equal_texts" (not asked, a tie),
        "contradictions" (the orders differ, a tie) and "no_verdict" by reason; "first_place": of the single verdicts
        that name a winner, the share that names the answer in the first place, .5 for a judge without a bias;
        "follows_place": of the comparisons read, the share in which the same place wins in both orders; "longer_wins",
        see [`longer_wins`].
    """
    counts: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    first = named = follows = read = longer = differ = 0
    for one, a, b in found:
        counts["comparisons"] += 1
        if one.outcome in (0.0, 1.0) and a != b:
            differ += 1
            longer += (one.outcome == 1.0) == (a > b)
        if one.refusal is not None:
            unread[one.refusal.kind] += 1
        elif one.equal:
            counts["equal_texts"] += 1
        else:
            read += 1
            follows += one.there == one.back != 0
            kind = "contradictions" if one.contradicts else "ties" if one.outcome == 0.5 else "decided"
            counts[kind] += 1
            first += [one.there, one.back].count(1)
            named += sum(choice != 0 for choice in (one.there, one.back))
    names = ("comparisons", "decided", "ties", "equal_texts", "contradictions")
    return {
        **{name: counts[name] for name in names},
        "no_verdict": dict(sorted(unread.items())),
        "first_place": {"value": first / named if named else None, "of": named},
        "follows_place": wilson(follows, read),
        "longer_wins": wilson(longer, differ),
    }


def described(found: dict[str, Any]) -> list[str]:
    """What [`comparison_measures`] returns, in sentences."""
    unread = ", ".join(f"{reason}: {count}" for reason, count in found["no_verdict"].items())
    ties = f"{found['ties']} ties, {found['contradictions']} contradictions (ties, too)"
    ties += f", {found['equal_texts']} pairs of equal texts (not asked)" if found["equal_texts"] else ""
    lines = [f"{found['comparisons']} comparisons: {found['decided']} with a winner, {ties}."]
    lines += [f"Without a verdict: {unread}."] if unread else []
    if found["first_place"]["of"]:
        lines.append(
            f"Position: {found['first_place']['value']:.1%} of the single verdicts name the first answer (50 % without "
            f"a bias); in {percent(found['follows_place'])} of the comparisons the same place wins in both orders."
        )
    if found["longer_wins"]["of"]:
        lines.append(f"Length: the longer answer wins {percent(found['longer_wins'])} of the decided comparisons.")
    return lines


def percent(share: dict[str, Any]) -> str:
    """A share with its interval, as text."""
    if share["value"] is None:
        return "–"
    return f"{share['value']:.1%} ({100 * share['low']:.1f}–{100 * share['high']:.1f}, of {share['of']})"
