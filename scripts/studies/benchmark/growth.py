"""The picture of how time and memory grow, and what is said in its place: of ours and of `DistillationTrainer`.

It is drawn from what `scripts/benchmark.py` has just measured, or again from the table in docs/benchmarks.md.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from scripts.studies.benchmark.results import ContenderResult, Results


PANELS = {
    "tokens": "tokens per step",
    "vocabulary": "ids in the vocabulary",
    "teacher": "teacher's layers, million parameters",
}


def measured(found: ContenderResult, quantity: str) -> list[float]:
    """The values of "update_s", "step_s" or "peak_mib"; none where it was not measured."""
    if quantity == "peak_mib":
        return [] if found.peak_mib is None else [found.peak_mib]
    return found.update_s if quantity == "update_s" else found.step_s


Curves = dict[str, dict[str, dict[str, list[tuple[float, float]]]]]  # by axis, contender's label and quantity


QUANTITIES = {"update_s": "update, seconds", "peak_mib": "peak memory, MiB"}


def curves_of(results: Results) -> Curves:
    """Medians of ours and of `DistillationTrainer` on each axis, where their losses are right."""
    curves: Curves = {axis: {} for axis in PANELS}
    for found in results.cells:
        for name in ("ours", "distillation"):
            contender = found.contenders.get(name)
            if found.cell.axis not in curves or contender is None or not contender.agrees(found.cell.dtype):
                continue
            by_quantity = curves[found.cell.axis].setdefault(contender.label.strip("`"), {})
            for quantity in QUANTITIES:
                if values := measured(contender, quantity):
                    by_quantity.setdefault(quantity, []).append((found.cell.at, statistics.median(values)))
    return curves


def curves_on_page(text: str, preset: str) -> Curves:
    """The same, from the page that `report.py` has written; its numbers are rounded."""
    curves: Curves = {axis: {} for axis in PANELS}
    axes = {label: axis for axis, label in PANELS.items()}
    table = text.partition(f"<!-- benchmark {preset}: begin -->")[2].partition("### Growth")[2].partition("###")[0]
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] not in axes:
            continue
        by_quantity = curves[axes[cells[0]]].setdefault(cells[2].strip("`"), {})
        for quantity, value in zip(QUANTITIES, cells[3:5], strict=True):
            if value.replace(".", "").isdigit():
                by_quantity.setdefault(quantity, []).append((float(cells[1]), float(value)))
    return curves


def in_words(curves: Curves) -> str:
    """For those who do not see the picture."""
    parts = ["Time and peak memory of an update as one size grows."]
    for axis, label in PANELS.items():
        ends = []
        for name, found in curves[axis].items():
            seconds, mib = (found.get(quantity) for quantity in QUANTITIES)
            if seconds and mib:
                ends.append(
                    f"{name} {seconds[0][1]:.3g} to {seconds[-1][1]:.3g} seconds and {mib[0][1]:.0f} to "
                    f"{mib[-1][1]:.0f} MiB"
                )
                span = f"{label}, {seconds[0][0]:.5g} to {seconds[-1][0]:.6g}"
        if ends:
            parts.append(f"{span[0].upper()}{span[1:]}: {'; '.join(ends)}.")
    return " ".join(parts)


def draw(curves: Curves, path: Path) -> None:
    """Time and memory on each axis, ours and theirs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(PANELS), figsize=(10, 6), layout="constrained", squeeze=False, sharex="col", sharey="row"
    )
    for column, (axis, label) in enumerate(PANELS.items()):
        for row, (quantity, unit) in enumerate(QUANTITIES.items()):
            panel = axes[row][column]
            for colour, marker, (name, found) in zip(("#1f5fa8", "#c05a00"), "os", curves[axis].items(), strict=False):
                across, values = zip(*found.get(quantity, [(0, 0)]), strict=True)
                panel.plot(across, values, marker=marker, color=colour, linewidth=2, label=name)
                panel.set_xticks(
                    across, [f"{at / 1000:g} k" if at >= 8000 else f"{at:.{4 if at > 100 else 2}g}" for at in across]
                )
            panel.set(xlabel=label if row else "", ylabel="" if column else unit, xlim=(0, None))
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(alpha=0.25)
    for panel, *_ in axes:  # of a row, which shares its axis
        panel.set_ylim(0, None)
    figure.suptitle("Time and peak memory of an update as one size grows")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
