"""Tables and pictures of `scripts/reproduce.py`, from the records of its runs; nothing is trained or measured here.

A number is the mean over the seeds, with the least and the greatest. The page docs/results.md is written by hand around
marked places for tables and pictures; the numbers behind them are in docs/results/.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from scripts.studies.reproduce.records import Cost, RunRecord
from trl_distill.reporting.curves import new_figure, plain


Runs = Sequence[RunRecord]


ByArm = dict[str, list[RunRecord]]  # by label


Read = Callable[[RunRecord], float]


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")  # Okabe and Ito's


MARKERS = "osD^vP*X"


WIDTHS = {"tiny": "16 wide, one layer", "small": "24 wide, two layers", "student": "48 wide, two layers"}


def by_arm(runs: Runs) -> ByArm:
    found: ByArm = {}
    for one in runs:
        found.setdefault(one.arm, []).append(one)
    return found


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


def cost_of(run: RunRecord) -> Cost:
    """The cost, of a claim whose runs have one."""
    assert run.result.cost is not None
    return run.result.cost


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


def figure(claim: str, runs: Runs) -> Any:
    """A claim's picture; `None` where the table says it all."""
    draw = FIGURES.get(claim)
    if draw is None:
        return None
    made = new_figure(7.5, 4.6)
    axis = made.subplots()
    plain(axis)
    draw(axis, by_arm(runs))
    axis.legend(frameon=False, fontsize=9)
    return made


def _styles(arms: dict[str, Any]) -> Any:
    return zip(arms.items(), COLOURS, MARKERS, strict=False)


def _lines(axis: Any, arms: ByArm, read: Callable[[RunRecord], Sequence[tuple[float, float]]]) -> None:
    """For each arm the mean over the seeds as a line, and the range between them."""
    for (arm, runs), colour, marker in _styles(arms):
        curves = [read(one) for one in runs]
        points = list(zip(*curves, strict=True))
        across = [statistics.mean(x for x, _ in point) for point in points]
        values = [[y for _, y in point] for point in points]
        axis.fill_between(
            across, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, linewidth=0
        )
        mean = [statistics.mean(v) for v in values]
        axis.plot(across, mean, color=colour, marker=marker, markersize=5, linewidth=1.8, label=arm)


def _dots(axis: Any, arms: ByArm, x: str, y: str) -> None:
    for (arm, runs), colour, marker in _styles(arms):
        xs, ys = ([one.result.final[name] for one in runs] for name in (x, y))
        axis.plot(xs, ys, color=colour, marker=marker, markersize=8, linestyle="none", alpha=0.8, label=arm)


def _curve(run: RunRecord) -> list[tuple[float, float]]:
    return [((made + trained) / 1000, right) for made, trained, right in cost_of(run).curve]


def _gap(axis: Any, arms: ByArm) -> None:
    _lines(axis, arms, _curve)
    axis.set(xlabel="thousand completion tokens, generated and trained", ylabel="accuracy on 200 problems")


def _mismatch(axis: Any, arms: ByArm) -> None:
    _lines(axis, arms, lambda run: run.result.own)
    axis.set(xlabel="tokens of its own in the context at the end", ylabel="accuracy")


def _diversity(axis: Any, arms: ByArm) -> None:
    _dots(axis, arms, "different of right", "avg@16")
    axis.set(xlabel="share of different ones among right answers", ylabel="avg@16: share of right answers")


def _pareto(axis: Any, arms: ByArm) -> None:
    _dots(axis, arms, "kl", "avg@4")
    axis.set(xlabel="KL(student ‖ teacher), nats per token", ylabel="accuracy")


def _small(axis: Any, arms: ByArm) -> None:
    kinds: dict[str, ByArm] = {}
    for arm, runs in arms.items():
        size, kind = arm.split(", ")
        kinds.setdefault(kind, {})[size] = runs
    for (kind, sizes), colour, marker in _styles(kinds):
        values = [[1 - one.result.final["avg@16"] for one in runs] for runs in sizes.values()]
        mean = [statistics.mean(v) for v in values]
        axis.fill_between(
            range(len(sizes)), [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15
        )
        axis.plot(range(len(sizes)), mean, color=colour, marker=marker, linewidth=1.8, label=kind)
    axis.set_xticks(range(len(sizes)), [WIDTHS.get(size, size) for size in sizes])
    axis.set(xlabel="student", ylabel="share of wrong answers", ylim=(0, 1))


def _collapse(axis: Any, arms: ByArm) -> None:
    _lines(axis, arms, lambda run: [(i, one["different right"]) for i, one in enumerate(run.result.rounds)])
    axis.set(xlabel="round of training on its own answers", ylabel="different right answers among 16")


FIGURES: dict[str, Callable[[Any, ByArm], None]] = {
    "gap": _gap,
    "mismatch": _mismatch,
    "diversity": _diversity,
    "small student": _small,
    "rewards": _pareto,
    "estimators": _gap,
    "collapse": _collapse,
}


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
            parts.append(f"![{sentences[claim]}](images/results-{name}.png)")
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
