"""Tables of `scripts/benchmark.py`: ratios of medians with their spread, and the limits that were set.

A ratio is ours divided by theirs, so less is better for seconds and memory. Where a contender's loss is not what its
objective has on these rollouts, none of its ratios is given: a number that compares different work says nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from scripts.studies.benchmark import slopes
from scripts.studies.benchmark.clocks import PARTS
from scripts.studies.benchmark.growth import PANELS, curves_of, in_words, measured
from scripts.studies.benchmark.results import CellResult, ContenderResult, Results


REFUSED = "refused: its loss is another"


# Limits of the update time, by preset, contender and raggedness; then of peak memory
ASKED_SECONDS = {
    ("cpu", "distillation", False): 0.85,
    ("cpu", "distillation", True): 0.28,
    ("cpu", "grpo", False): 1.25,
    ("cpu", "grpo", True): 0.75,
    ("gpu", "distillation", False): 0.95,
    ("gpu", "distillation", True): 0.65,
    ("gpu", "grpo", False): 1.10,
    ("gpu", "grpo", True): 0.75,
    ("cpu", "ours, without metrics", False): 1.03,
    ("gpu", "ours, without metrics", False): 1.03,
}


ASKED_MEMORY = {"distillation": 1.0}


ASKED_OF_GKD = 0.35  # of its memory at 152 k ids and 4 k tokens


ASKED_OF_FLOOR = {"cpu": 1.3, "real": 1.25}


@dataclass(frozen=True)
class Ratio:
    """Ours over theirs: of the medians, and the least and the greatest of turns side by side."""

    median: float
    least: float
    most: float


def ratio(ours: ContenderResult, theirs: ContenderResult, dtype: str, quantity: str) -> Ratio | str:
    """
    Args:
        ours, theirs ([`ContenderResult`]): of one cell.
        dtype (`str`): the cell's, for what rounding may do to a loss.
        quantity (`str`): "update_s" or "step_s", measured in turns, or "peak_mib".

    Returns:
        [`Ratio`], or a `str`: why there is none.
    """
    for found in (ours, theirs):
        if found.failed:
            return found.failed
    if not (ours.agrees(dtype) and theirs.agrees(dtype)):
        return REFUSED
    mine, other = measured(ours, quantity), measured(theirs, quantity)
    if not mine or not other:
        return "not measured"
    each = [a / b for a, b in zip(mine, other, strict=True)]
    return Ratio(statistics.median(mine) / statistics.median(other), min(each), max(each))


def _asked(results: Results, limit: float | None) -> float | None:
    """A rehearsal has no limits."""
    return None if results.dry_run else limit


def _shown(value: Ratio | str, asked: float | None = None) -> tuple[str, str]:
    """A ratio with its spread, and whether it is within its limit."""
    if isinstance(value, str):
        return value, "" if asked is None else f"≤ {asked} ?"
    text = f"{value.median:.2f}"
    if value.least != value.most:
        text += f" ({value.least:.2f}–{value.most:.2f})"
    return text, "" if asked is None else f"≤ {asked} {'✓' if value.median <= asked else '✗'}"


def _seconds(found: ContenderResult, quantity: str = "update_s") -> str:
    values = measured(found, quantity)
    return f"{statistics.median(values):.3g}" if values else found.failed


def _per_second(found: CellResult, contender: ContenderResult) -> str:
    seconds = contender.update_s
    return f"{found.completion_tokens / statistics.median(seconds):.0f}" if seconds else ""


def _mib(found: ContenderResult) -> str:
    return "" if found.peak_mib is None else f"{found.peak_mib:.0f}"


Sheet = tuple[str, list[str], list[list[str]]]  # title, columns, rows


def speed(results: Results) -> Sheet:
    rows = []
    for found, name, mine, other in results.pairs():
        cell = found.cell
        if not cell.timed:
            continue
        asked = ASKED_SECONDS.get((results.preset, name, cell.ragged))
        shown, verdict = _shown(ratio(mine, other, cell.dtype, "update_s"), _asked(results, asked))
        step = _shown(ratio(mine, other, cell.dtype, "step_s"))[0] if cell.generates else ""
        if mine.step_s and other.step_s and cell.generates:
            step = f"{_seconds(mine, 'step_s')} / {_seconds(other, 'step_s')}: {step}"
        row = [cell.name, mine.label, other.label, _seconds(mine), _seconds(other), shown, verdict, step]
        rows.append([*row, _per_second(found, mine), _per_second(found, other)])
    columns = ["cell", "ours", "theirs", "update, s", "theirs, s", "ratio (spread)", "asked"]
    return "Time of an update", [*columns, "step with generation, s: ratio", "tokens/s", "theirs, tokens/s"], rows


def memory(results: Results) -> Sheet:
    rows = []
    for found, name, mine, other in results.pairs():
        asked = ASKED_MEMORY.get(name)
        if name == "gkd" and not found.cell.timed:
            asked = ASKED_OF_GKD
        value = ratio(mine, other, found.cell.dtype, "peak_mib")
        if value == "not measured":
            continue
        shown, verdict = _shown(value, _asked(results, asked))
        rows.append([found.cell.name, mine.label, other.label, _mib(mine), _mib(other), shown, verdict])
    columns = ["cell", "ours", "theirs", "peak, MiB", "theirs, MiB", "ratio", "asked"]
    return "Peak memory of an update, above models and optimizer", columns, rows


def floors(results: Results) -> Sheet:
    rows = []
    for found in results.cells:
        if not found.floor_s:
            continue
        for name, contender in found.contenders.items():
            if not contender.update_s or not (name == found.base() or not contender.ours):
                continue
            asked = ASKED_OF_FLOOR.get(results.preset) if contender.ours else None
            floor = replace(contender, update_s=found.floor_s)
            shown, verdict = _shown(ratio(contender, floor, found.cell.dtype, "update_s"), _asked(results, asked))
            rows.append([found.cell.name, contender.label, _seconds(floor), _seconds(contender), shown, verdict])
    columns = ["cell", "contender", "floor, s", "update, s", "update / floor (spread)", "asked"]
    return "Distance from the floor", columns, rows


def shares(results: Results) -> Sheet:
    rows = []
    for found in results.cells:
        for contender in found.contenders.values():
            if contender.shares:
                whole = sum(contender.shares.values())
                parts = (f"{contender.shares[part] / whole:.0%}" for part in PARTS)
                rows.append([found.cell.name, contender.label, *parts])
    return "Where the time goes", ["cell", "contender", *PARTS], rows


def whole(results: Results) -> Sheet:
    """A step with generation by part; the largest is marked."""
    rows, parts = [], ("generation", "scoring", "data", *PARTS[:4], "optimizer", "logging", "rest")
    for found in results.cells:
        for contender in found.contenders.values():
            if contender.whole:
                seconds = sum(contender.whole.values())
                shown = [f"{contender.whole[part] / seconds:.1%}" for part in parts]
                largest = max(range(len(parts)), key=lambda i: contender.whole[parts[i]])
                shown[largest] = f"**{shown[largest]}**"
                rows.append([found.cell.name, contender.label, f"{seconds:.3g}", *shown])
    return "A whole step by part", ["cell", "contender", "seconds", *parts], rows


def losses(results: Results) -> Sheet:
    rows = []
    for found in results.cells:
        for contender in found.contenders.values():
            if found.cell.axis or contender.loss is None:
                continue
            verdict = "✓" if contender.agrees(found.cell.dtype) else "✗"
            row = [found.cell.name, contender.label, contender.objective, f"{contender.loss:.6f}"]
            rows.append([*row, f"{contender.expected:.6f}", f"{contender.difference():.0e} {verdict}"])
    columns = ["cell", "contender", "objective", "loss", "computed plainly", "relative difference"]
    return "Losses", columns, rows


def growth(results: Results) -> Sheet:
    rows = []
    for found in results.cells:
        cell = found.cell
        if cell.axis in AXES and len(found.contenders) > 1:
            mine = found.contenders[found.base()]
            for contender in found.contenders.values():
                seconds, peak = (
                    "" if contender is mine else _shown(ratio(mine, contender, cell.dtype, quantity))[0]
                    for quantity in ("update_s", "peak_mib")
                )
                mib = _mib(contender) or contender.failed
                rows.append([AXES[cell.axis], f"{cell.at:.6g}", contender.label, _seconds(contender), mib])
                rows[-1] += [seconds, peak]
    return "Growth", ["grows", "to", "contender", "update, s", "peak, MiB", "ratio of time", "ratio of memory"], rows


def per_token(results: Results) -> Sheet:
    """Memory of each further token of a forward, with a small and with a large vocabulary."""
    rows = []
    for axis in ("tokens", "wide"):
        cells = [found for found in results.cells if found.cell.axis == axis]
        if len(cells) < 2:
            continue
        few, many = cells[0], cells[-1]
        tokens = (many.cell.tokens - few.cell.tokens) * few.cell.micro_batch
        for name, contender in few.contenders.items():
            first, last = contender.peak_mib, many.contenders[name].peak_mib
            if first is not None and last is not None and tokens > 0:
                rows.append([contender.label, str(few.cell.vocab), f"{(last - first) * 1024 / tokens:.0f}"])
    return "Memory against tokens", ["contender", "vocabulary", "KiB per token of a forward"], rows


AXES = {**PANELS, "wide": "tokens per step, 4 × the vocabulary"}


SHEETS: tuple[Callable[[Results], Sheet], ...] = (
    speed,
    memory,
    floors,
    shares,
    whole,
    losses,
    growth,
    per_token,
    slopes.sheet,
)


def show(results: Results, console: Console) -> None:
    for sheet in SHEETS:
        title, columns, rows = sheet(results)
        if rows:
            table = Table(title=title)
            for column in columns:
                table.add_column(column)
            for row in rows:
                table.add_row(*row)
            console.print(table)


def markdown(results: Results) -> str:
    """All tables, and what they were measured on."""
    machine = results.machine
    threads = f"{machine.threads} thread" + "s" * (machine.threads > 1)
    lines = [" ".join(filter(None, [f"{machine.processor}, {machine.device}, {threads}.", results.beside]))]
    lines += [", ".join(f"{name} {version}" for name, version in results.versions.items()) + ".", ""]
    lines += ["<!-- needs: time -->", "```console", f"$ {results.command}", "```", ""]
    if results.dry_run:
        lines += ["A rehearsal at small size: its numbers say nothing.", ""]
    for sheet in SHEETS:
        title, columns, rows = sheet(results)
        if rows:
            lines += [f"### {title}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
            lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
        if rows and sheet is growth and results.preset == "cpu":
            lines += [f"![{in_words(curves_of(results))}](images/benchmark_growth.png)", ""]
        if rows and sheet is slopes.sheet:
            lines += [f"![{slopes.in_words(results)}](images/benchmark_slopes.png)", ""]
    return "\n".join(lines)


def write_docs(results: Results, path: Path) -> None:
    """Replace what stands between the preset's markers in the docs page."""
    begin, end = (f"<!-- benchmark {results.preset}: {side} -->" for side in ("begin", "end"))
    text = path.read_text()
    if begin not in text or end not in text:
        raise ValueError(f"{path} has no lines {begin!r} and {end!r} to write the tables between. Put them there.")
    before, _, after = text.partition(begin)
    path.write_text(f"{before}{begin}\n\n{markdown(results)}\n{end}{after.partition(end)[2]}")


def disagreeing(results: Results) -> list[str]:
    """A sentence for each contender whose loss is not its objective's."""
    return [
        f"{found.cell.name}: the loss of {contender.label} is {contender.loss:.6g}, but its objective "
        f"({contender.objective}) is {contender.expected:.6g} on these rollouts. It did other work than it says, so "
        "it has no ratio."
        for found in results.cells
        for contender in found.contenders.values()
        if contender.loss is not None and not contender.agrees(found.cell.dtype)
    ]
