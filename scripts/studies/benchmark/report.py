"""Tables, the picture and the JSON of `benchmark.py`: ratios of medians with their spread, and what was asked of them.

A ratio is ours divided by theirs, so less is better for seconds and memory. Where a contender's loss is not what its
objective has on these rollouts, none of its ratios is given: a number that compares different work says nothing.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.studies.benchmark.clocks import PARTS
from scripts.studies.benchmark.reference import TOLERANCE


REFUSED = "refused: its loss is another"


# What is asked of the update time, by preset, contender and raggedness, and of peak memory
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


ASKED_OF_FLOOR = 1.3  # on a CPU


def agrees(found: dict[str, Any], dtype: str) -> bool:
    """Whether a contender's loss is its objective's, to rounding."""
    return abs(found["loss"] - found["expected"]) <= TOLERANCE[dtype] * max(abs(found["expected"]), found["scale"])


def ratio(ours: dict[str, Any], theirs: dict[str, Any], dtype: str, quantity: str) -> dict[str, float] | str:
    """
    Ours over theirs: of the medians, and the least and the greatest of turns side by side.

    Args:
        ours, theirs (`dict`): what was found of two contenders of one cell.
        dtype (`str`): the cell's, for what rounding may do to a loss.
        quantity (`str`): "update_s" or "step_s", measured in turns, or "peak_mib".

    Returns:
        `dict` with "median", "least", "most"; or a `str`, why there is none.
    """
    for found in (ours, theirs):
        if found.get("failed"):
            return found["failed"]
    if not (agrees(ours, dtype) and agrees(theirs, dtype)):
        return REFUSED
    if quantity not in ours or quantity not in theirs:
        return "not measured"
    mine, other = (x if isinstance(x, list) else [x] for x in (ours[quantity], theirs[quantity]))
    each = [a / b for a, b in zip(mine, other, strict=True)]
    return {"median": statistics.median(mine) / statistics.median(other), "least": min(each), "most": max(each)}


def base_of(cell: dict[str, Any]) -> str:
    """Our contender that the others of a cell are compared with."""
    return next(name for name, found in cell["contenders"].items() if found["ours"])


def pairs(results: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, dict[str, Any], dict[str, Any]]]:
    """Each cell with each contender that ours is compared with, outside of the growth."""
    for cell in results["cells"]:
        base = base_of(cell)
        for name, found in cell["contenders"].items():
            if name != base and not cell["axis"]:
                yield cell, name, cell["contenders"][base], found


def _asked(results: dict[str, Any], limit: float | None) -> float | None:
    """A rehearsal is not judged."""
    return None if results["dry_run"] else limit


def _shown(value: dict[str, float] | str, asked: float | None = None) -> tuple[str, str]:
    """A ratio with its spread, and whether it is what was asked."""
    if isinstance(value, str):
        return value, "" if asked is None else f"≤ {asked} ?"
    text = f"{value['median']:.2f}"
    if value["least"] != value["most"]:
        text += f" ({value['least']:.2f}–{value['most']:.2f})"
    return text, "" if asked is None else f"≤ {asked} {'✓' if value['median'] <= asked else '✗'}"


def _seconds(found: dict[str, Any], quantity: str = "update_s") -> str:
    return f"{statistics.median(found[quantity]):.3g}" if quantity in found else found.get("failed", "")


def _per_second(cell: dict[str, Any], found: dict[str, Any]) -> str:
    return f"{cell['completion_tokens'] / statistics.median(found['update_s']):.0f}" if "update_s" in found else ""


Sheet = tuple[str, list[str], list[list[str]]]


def speed(results: dict[str, Any]) -> Sheet:
    rows = []
    for cell, name, mine, other in pairs(results):
        if not cell["timed"]:
            continue
        asked = ASKED_SECONDS.get((results["preset"], name, cell["ragged"]))
        shown, verdict = _shown(ratio(mine, other, cell["dtype"], "update_s"), _asked(results, asked))
        step = _shown(ratio(mine, other, cell["dtype"], "step_s"))[0] if cell["generates"] else ""
        if "step_s" in mine and "step_s" in other and cell["generates"]:
            step = f"{_seconds(mine, 'step_s')} / {_seconds(other, 'step_s')}: {step}"
        row = [cell["name"], mine["label"], other["label"], _seconds(mine), _seconds(other), shown, verdict, step]
        rows.append([*row, _per_second(cell, mine), _per_second(cell, other)])
    columns = ["cell", "ours", "theirs", "update, s", "theirs, s", "ratio (spread)", "asked"]
    return "Time of an update", [*columns, "step with generation, s: ratio", "tokens/s", "theirs, tokens/s"], rows


def memory(results: dict[str, Any]) -> Sheet:
    rows = []
    for cell, name, mine, other in pairs(results):
        asked = ASKED_MEMORY.get(name)
        if name == "gkd" and not cell["timed"]:
            asked = ASKED_OF_GKD
        value = ratio(mine, other, cell["dtype"], "peak_mib")
        if value == "not measured":
            continue
        shown, verdict = _shown(value, _asked(results, asked))
        peaks = [f"{found['peak_mib']:.0f}" if "peak_mib" in found else "" for found in (mine, other)]
        rows.append([cell["name"], mine["label"], other["label"], *peaks, shown, verdict])
    columns = ["cell", "ours", "theirs", "peak, MiB", "theirs, MiB", "ratio", "asked"]
    return "Peak memory of an update, above models and optimizer", columns, rows


def floors(results: dict[str, Any]) -> Sheet:
    rows = []
    for cell in results["cells"]:
        if not cell.get("floor_s"):
            continue
        for name, found in cell["contenders"].items():
            if "update_s" not in found or not (name == base_of(cell) or not found["ours"]):
                continue
            asked = ASKED_OF_FLOOR if found["ours"] and results["preset"] == "cpu" else None
            floor = {**found, "update_s": cell["floor_s"]}
            shown, verdict = _shown(ratio(found, floor, cell["dtype"], "update_s"), _asked(results, asked))
            rows.append([cell["name"], found["label"], _seconds(floor), _seconds(found), shown, verdict])
    columns = ["cell", "contender", "floor, s", "update, s", "update / floor (spread)", "asked"]
    return "Distance from the floor", columns, rows


def shares(results: dict[str, Any]) -> Sheet:
    rows = []
    for cell in results["cells"]:
        for found in cell["contenders"].values():
            if "shares" in found:
                whole = sum(found["shares"].values())
                rows.append([cell["name"], found["label"], *(f"{found['shares'][part] / whole:.0%}" for part in PARTS)])
    return "Where the time goes", ["cell", "contender", *PARTS], rows


def losses(results: dict[str, Any]) -> Sheet:
    rows = []
    for cell in results["cells"]:
        for found in cell["contenders"].values():
            if cell["axis"] or "loss" not in found:
                continue
            gap = abs(found["loss"] - found["expected"]) / max(abs(found["expected"]), found["scale"])
            verdict = "✓" if agrees(found, cell["dtype"]) else "✗"
            row = [cell["name"], found["label"], found["objective"], f"{found['loss']:.6f}"]
            rows.append([*row, f"{found['expected']:.6f}", f"{gap:.0e} {verdict}"])
    columns = ["cell", "contender", "objective", "loss", "computed plainly", "relative difference"]
    return "Losses", columns, rows


def growth(results: dict[str, Any]) -> Sheet:
    rows = []
    for cell in results["cells"]:
        if cell["axis"]:
            mine = cell["contenders"][base_of(cell)]
            for found in cell["contenders"].values():
                seconds, peak = (
                    "" if found is mine else _shown(ratio(mine, found, cell["dtype"], quantity))[0]
                    for quantity in ("update_s", "peak_mib")
                )
                mib = f"{found['peak_mib']:.0f}" if "peak_mib" in found else found.get("failed", "")
                rows.append([AXES[cell["axis"]], f"{cell['at']:.6g}", found["label"], _seconds(found), mib])
                rows[-1] += [seconds, peak]
    return "Growth", ["grows", "to", "contender", "update, s", "peak, MiB", "ratio of time", "ratio of memory"], rows


def per_token(results: dict[str, Any]) -> Sheet:
    """Memory that each further token of a forward takes, with a small and with a large vocabulary."""
    rows = []
    for axis in ("tokens", "wide"):
        cells = [cell for cell in results["cells"] if cell["axis"] == axis]
        if len(cells) < 2:
            continue
        few, many = cells[0], cells[-1]
        tokens = (many["tokens"] - few["tokens"]) * few["micro_batch"]
        for name, found in few["contenders"].items():
            then = many["contenders"][name]
            if "peak_mib" in found and "peak_mib" in then and tokens > 0:
                kib = (then["peak_mib"] - found["peak_mib"]) * 1024 / tokens
                rows.append([found["label"], str(few["vocab"]), f"{kib:.0f}"])
    return "Memory against tokens", ["contender", "vocabulary", "KiB per token of a forward"], rows


PANELS = {
    "tokens": "tokens per step",
    "vocabulary": "ids in the vocabulary",
    "teacher": "teacher's layers, million parameters",
}


AXES = {**PANELS, "wide": "tokens per step, 4 × the vocabulary"}


SHEETS: tuple[Callable[[dict[str, Any]], Sheet], ...] = (speed, memory, floors, shares, losses, growth, per_token)


def show(results: dict[str, Any], console: Console) -> None:
    for sheet in SHEETS:
        title, columns, rows = sheet(results)
        if rows:
            table = Table(title=title)
            for column in columns:
                table.add_column(column)
            for row in rows:
                table.add_row(*row)
            console.print(table)


def markdown(results: dict[str, Any]) -> str:
    """All tables, and what they were measured on."""
    machine, versions = results["machine"], results["versions"]
    lines = [f"{machine['processor']}, {machine['device']}, {machine['threads']} threads."]
    lines += [", ".join(f"{name} {version}" for name, version in versions.items()) + ".", ""]
    lines += ["<!-- needs: time -->", "```console", f"$ {results['command']}", "```", ""]
    if results["dry_run"]:
        lines += ["A rehearsal at small size: its numbers say nothing.", ""]
    for sheet in SHEETS:
        title, columns, rows = sheet(results)
        if rows:
            lines += [f"### {title}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
            lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    return "\n".join(lines)


def write_docs(results: dict[str, Any], path: Path) -> None:
    """Replace what stands between the preset's markers in the docs page."""
    begin, end = (f"<!-- benchmark {results['preset']}: {side} -->" for side in ("begin", "end"))
    text = path.read_text()
    if begin not in text or end not in text:
        raise ValueError(f"{path} has no lines {begin!r} and {end!r} to write the tables between. Put them there.")
    before, _, after = text.partition(begin)
    path.write_text(f"{before}{begin}\n\n{markdown(results)}\n{end}{after.partition(end)[2]}")


def save(results: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json").write_text(json.dumps(results, indent=2) + "\n")


def draw(results: dict[str, Any], path: Path) -> None:
    """Time and memory on each axis, ours and theirs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(PANELS), figsize=(10, 5.5), layout="constrained", squeeze=False)
    for column, (axis, label) in enumerate(PANELS.items()):
        cells = [cell for cell in results["cells"] if cell["axis"] == axis]
        for row, (quantity, unit) in enumerate((("update_s", "update, s"), ("peak_mib", "peak memory, MiB"))):
            panel = axes[row][column]
            for colour, name in zip(("#1f5fa8", "#c05a00"), ("ours", "distillation"), strict=True):
                found = [(cell["at"], cell["contenders"][name]) for cell in cells if name in cell["contenders"]]
                points = [(at, f[quantity]) for at, f in found if quantity in f and agrees(f, cells[0]["dtype"])]
                values = [statistics.median(y) if isinstance(y, list) else y for _, y in points]
                label_of = found[0][1]["label"].strip("`") if found else name
                panel.plot([at for at, _ in points], values, "o-", color=colour, linewidth=2, label=label_of)
            panel.set(xlabel=label, ylabel=unit if column == 0 else "", ylim=(0, None), xlim=(0, None))
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(alpha=0.25)
    axes[0][0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def disagreeing(results: dict[str, Any]) -> list[str]:
    """A sentence for each contender whose loss is not its objective's."""
    return [
        f"{cell['name']}: the loss of {found['label']} is {found['loss']:.6g}, but its objective "
        f"({found['objective']}) is {found['expected']:.6g} on these rollouts. It did other work than it says, so "
        "it has no ratio."
        for cell in results["cells"]
        for found in cell["contenders"].values()
        if "loss" in found and not agrees(found, cell["dtype"])
    ]
