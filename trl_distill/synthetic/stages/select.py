"""Which completions stay: filters of length, stop reason and repetition, then selection by score.

Pure functions of one prompt's completions; reasons are the words of the card. Scores come from `verify.py`, duplicates
are found in `dedup.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..records import Candidate
from ..text import as_completion, repetition


if TYPE_CHECKING:
    from ..config import GenerateConfig


def filter_fault(candidate: Candidate, config: GenerateConfig) -> str | None:
    """The first filter that a completion does not pass, or `None`."""
    text, most = candidate.text, config.max_characters
    if candidate.stop_reason not in ("stop", "length"):
        return f"ended by {candidate.stop_reason!r}"
    if not text.strip():
        return "empty"
    if candidate.stop_reason == "length" and not config.keep_truncated:
        return "cut off at the length limit"
    if len(text) < config.min_characters:
        return f"fewer than {config.min_characters} characters"
    if most is not None and len(text) > most:
        return f"more than {most} characters"
    if repetition(text) > config.max_repetition:
        return f"more than {config.max_repetition:.0%} repeated word 4-grams"
    return None


def selection_faults(candidates: list[Candidate], config: GenerateConfig) -> list[str | None]:
    """For each completion of one prompt, why it is not selected, or `None`."""
    if config.keep == "all":
        return [None] * len(candidates)
    if config.keep == "correct":
        return [None if is_correct(c, config) else f"score below {config.correct_from:g}" for c in candidates]
    best = max(range(len(candidates)), key=lambda i: candidates[i].score, default=None)  # type: ignore[arg-type,return-value]
    return [None if i == best else "not the best of its prompt" for i in range(len(candidates))]


def is_correct(candidate: Candidate, config: GenerateConfig) -> bool:
    return candidate.score is not None and candidate.score >= config.correct_from


def pair_of(candidates: list[Candidate], config: GenerateConfig) -> tuple[Candidate, Candidate] | str:
    """
    The best and the worst completion of one prompt, of equals the first each; or why there is no pair.

    With `keep="correct"` the chosen one must be correct and the rejected one must not.
    """
    if len(candidates) < 2:
        return "fewer than two completions left"
    chosen = max(candidates, key=lambda c: c.score)  # type: ignore[arg-type,return-value]
    rejected = min(candidates, key=lambda c: c.score)  # type: ignore[arg-type,return-value]
    if chosen.score == rejected.score:
        return "all scores are equal"
    if config.keep == "correct" and not is_correct(chosen, config):
        return f"no score of {config.correct_from:g} or more"
    if config.keep == "correct" and is_correct(rejected, config):
        return f"no score below {config.correct_from:g}"
    return chosen, rejected


def pair_row(chosen: Candidate, rejected: Candidate) -> dict[str, Any]:
    """The row of a preference dataset, as TRL's trainers read it."""
    return {
        "prompt": chosen.prompt,
        "chosen": as_completion(chosen.text, chosen.prompt),
        "rejected": as_completion(rejected.text, rejected.prompt),
        **chosen.columns,
        "chosen_teacher": chosen.teacher,
        "rejected_teacher": rejected.teacher,
        "chosen_score": chosen.score,
        "rejected_score": rejected.score,
        **chosen.aspect_columns("chosen_"),
        **rejected.aspect_columns("rejected_"),
        **{f"chosen_{name}": value for name, value in chosen.difficulty.items()},
        **{f"rejected_{name}": value for name, value in rejected.difficulty.items()},
    }


def difficulty_faults(ifds: Sequence[float | None], config: GenerateConfig) -> list[str | None]:
    """
    For each row, why it is not selected by its difficulty, or `None`; `ifds` has `None` where it was not measured.

    A share is one of all rows that are given, and has the highest values below 1; of equals the first stay.
    """
    low, high, share = config.difficulty_min, config.difficulty_max, config.difficulty_keep
    faults: list[str | None] = ["difficulty not measured" if value is None else None for value in ifds]
    known = [(value, i) for i, value in enumerate(ifds) if value is not None]
    if share is None:
        for value, i in known:
            if low is not None and value < low:
                faults[i] = f"IFD below {low:g}"
            elif high is not None and value >= high:
                faults[i] = f"IFD of {high:g} or more"
        return faults
    useful = sorted((-value, i) for value, i in known if value < 1)
    for value, i in known:
        faults[i] = "IFD of 1 or more" if value >= 1 else faults[i]
    for _, i in useful[round(share * len(ifds)) :]:
        faults[i] = f"not among the {share:.0%} with the highest IFD"
    return faults
