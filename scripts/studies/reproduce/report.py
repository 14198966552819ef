"""Tables of `scripts/reproduce.py`, from the records of its runs; nothing is trained or measured here.

A number is the mean over the seeds, with the least and the greatest. The page docs/results.md is written by hand around
marked places for tables and pictures; the numbers behind them are in docs/results/. Pictures are in `figures.py`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from scripts.studies.reproduce.figures import Runs, alt_text, by_arm, cost_of, figure
from scripts.studies.reproduce.records import RunRecord


Read = Callable[[RunRecord], float]


def spread(values: Sequence[float], form: str) -> str:
    """'0.94 (0.92-0.95)': mean, least and greatest; a level that was never reached is infinite."""
    reached = [value for value in values if math.isfinite(value)]
    if len(reached) < len(values):
        return f"{spread(reached, form)} on {len(reached)} of {len(values)} seeds" if reached else "not reached"
    if len(values) == 1:
        return format(values[0], form)
    low, high = (format(end, form) for end in (min(values), max(values)))
    return f"{format(statistics.mean(values), form)} ({low}–{high})"


def _final(name: str) -> Read:
    return lambda run: run.result.final[name]


def _tokens_to(level: float) -> Read:
    """Thousands of generated tokens until the accuracy was first reached; infinite where it never was."""

    def found(run: RunRecord) -> float:
        return next((made / 1000 for made, _, right in cost_of(run).curve if right >= level), float("inf"))

    return found


Column = tuple[str, Read, str]  # heading, number, format


TOKENS: list[Column] = [
    ("generated, k tokens", lambda run: cost_of(run).generated / 1000, ".0f"),
    ("trained, k tokens", lambda run: cost_of(run).trained / 1000, ".0f"),
]


ACCURACY: list[Column] = [("accuracy", _final("avg@4"), ".1%"), ("KL to the teacher", _final("kl"), ".3f")]


SPREAD: list[Column] = [
    ("avg@16", _final("avg@16"), ".1%"),
    ("pass@4", _final("pass@4"), ".1%"),
    ("pass@16", _final("pass@16"), ".1%"),
    ("different right answers of 16", _final("different right"), ".1f"),
    ("different among right", _final("different of right"), ".0%"),
    ("KL to the teacher", _final("kl"), ".3f"),
]


SECONDS: Column = ("seconds, one core", lambda run: run.seconds, ".0f")


def _own(place: int) -> Read:
    return lambda run: run.result.own[place][1]


def _round(place: int, name: str) -> Read:
    return lambda run: run.result.rounds[place][name]


def columns(claim: str, runs: Runs) -> list[Column]:
    """The columns of a claim's table."""
    if claim == "mismatch":
        shown: list[Column] = [(f"{own} of its own", _own(i), ".1%") for i, (own, _) in enumerate(runs[0].result.own)]
        return [
            *shown,
            ("lost from first to last", lambda run: 1 - run.result.own[-1][1] / run.result.own[0][1], ".1%"),
        ]
    if claim == "collapse":
        last = len(runs[0].result.rounds) - 1
        return [
            (f"{label}, {'before' if place == 0 else f'round {place}'}", _round(place, name), form)
            for label, name, form in (("avg@16", "avg@16", ".1%"), ("different right", "different right", ".1f"))
            for place in (0, last)
        ]
    if claim in ("diversity", "small student"):
        return [*SPREAD, SECONDS]
    if claim == "rewards":
        return [*ACCURACY, ("k tokens generated to 60 %", _tokens_to(0.6), ".0f"), SECONDS]
    return [*ACCURACY, *TOKENS, SECONDS]


def cells(claim: str, runs: Runs) -> list[list[str]]:
    """The rows of a table, the heading first."""
    chosen = columns(claim, runs)
    rows = [["", *(label for label, _, _ in chosen)]]
    for arm, its_runs in by_arm(runs).items():
        rows.append([arm, *(spread([read(one) for one in its_runs], form) for _, read, form in chosen)])
    return rows


def table(claim: str, sentence: str, runs: Runs) -> Table:
    """For a terminal."""
    head, *rows = cells(claim, runs)
    made = Table(title=f"{claim}: {sentence}")
    for label in head:
        made.add_column(label, justify="right" if label else "left")
    for row in rows:
        made.add_row(*row)
    return made


def markdown(claim: str, runs: Runs) -> str:
    head, *rows = cells(claim, runs)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def write_docs(results: Mapping[str, Runs], sentences: dict[str, str], machine: dict[str, str], docs: Path) -> None:
    """Write numbers to docs/results/, pictures to docs/images/, tables to their places in docs/results.md."""
    (docs / "results").mkdir(exist_ok=True)
    page = docs / "results.md"
    text = page.read_text()
    for claim, runs in results.items():
        name = claim.replace(" ", "-")
        whole = {
            "claim": claim,
            "sentence": sentences[claim],
            "machine": machine,
            "runs": [one.to_json() for one in runs],
        }
        (docs / "results" / f"{name}.json").write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
        picture = figure(claim, runs)
        parts = [markdown(claim, runs)]
        if picture is not None:
            picture.savefig(docs / "images" / f"results-{name}.png")
            parts.append(f"![{alt_text(claim, runs)}](images/results-{name}.png)")
        seconds = sum(one.seconds for one in runs)
        seeds = len({one.seed for one in runs})
        parts.append(
            f"{len(runs)} runs, {seeds} seeds, {seconds / 60:.0f} minutes of one core: `python scripts/reproduce.py "
            f'"{claim}"`; every number in [results/{name}.json](results/{name}.json).'
        )
        begin, end = f"<!-- results {claim}: begin -->", f"<!-- results {claim}: end -->"
        if begin not in text:
            raise ValueError(f"{page} has no place for {claim!r}: write {begin} and {end} where its table belongs.")
        inside = f"{begin}\n" + "\n\n".join(parts) + f"\n{end}"
        before, rest = text.split(begin)
        text = before + inside + rest.split(end)[1]
    page.write_text(text)
