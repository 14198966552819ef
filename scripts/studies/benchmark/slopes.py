"""How an update of ours grows with each size: slopes on log-log axes, beside that of the products it must compute.

A slope of 1 is proportional growth. It is taken between the last two points, where what does not grow counts least.
Products are not all that an update does: passes over logits, the dense gradient of tied embeddings and the optimizer
grow in proportion to their sizes. So time may grow as the products do or in proportion, whichever is faster.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from scripts.studies.benchmark.reference import multiplications
from scripts.studies.benchmark.results import Results


LABELS = {
    "length": "tokens of one completion",
    "vocabulary": "ids in the vocabulary",
    "group": "completions per prompt",
    "teacher": "teacher's layers, million parameters",
    "teachers": "teachers of each row",
}


NOISE = 0.1  # by which the slope of a time may exceed what is allowed


@dataclass(frozen=True)
class Curve:
    """
    One axis.

    Attributes:
        at (`list[float]`): sizes.
        seconds, mib, products (`list[float]`): median time of an update, its peak memory (empty where it was not
            measured), and multiplications of the products that it must compute.
    """

    at: list[float]
    seconds: list[float]
    mib: list[float]
    products: list[float]

    def slope(self, values: list[float]) -> float:
        """Between the last two points."""
        return math.log(values[-1] / values[-2]) / math.log(self.at[-1] / self.at[-2])

    @property
    def within(self) -> bool:
        """Whether time grows no faster than the products or in proportion, and memory no faster than the size."""
        in_time = self.slope(self.seconds) <= max(self.slope(self.products), 1) + NOISE
        return in_time and (not self.mib or self.slope(self.mib) <= 1 + NOISE)


def curves_of(results: Results) -> dict[str, Curve]:
    """By axis, of cells with one contender; points whose loss is not the objective's are left out."""
    curves = {}
    for axis in LABELS:
        points = []
        for found in results.cells:
            if found.cell.axis != axis or len(found.contenders) != 1:
                continue
            (contender,) = found.contenders.values()
            if contender.update_s and contender.agrees(found.cell.dtype):
                points.append((found.cell, contender))
        if len(points) > 1:
            mib = [contender.peak_mib for _, contender in points if contender.peak_mib is not None]
            curves[axis] = Curve(
                [cell.at for cell, _ in points],
                [statistics.median(contender.update_s) for _, contender in points],
                mib if len(mib) == len(points) else [],
                [multiplications(cell) for cell, _ in points],
            )
    return curves


def sheet(results: Results) -> tuple[str, list[str], list[list[str]]]:
    """One line for each axis."""
    rows = []
    for axis, curve in curves_of(results).items():
        seconds, mib = (" → ".join(f"{v:.3g}" for v in values) for values in (curve.seconds, curve.mib))
        slopes = [
            f"{curve.slope(values):.2f}" if values else "" for values in (curve.seconds, curve.products, curve.mib)
        ]
        sizes = " → ".join(map(_size, curve.at))
        rows.append([LABELS[axis], sizes, seconds, *slopes[:2], mib, slopes[2], "✓" if curve.within else "✗"])
    columns = ["grows", "sizes", "update, s", "slope", "slope of the products", "peak, MiB", "slope", "allowed"]
    return "Slopes", columns, rows


def in_words(results: Results) -> str:
    """For those who do not see the picture."""
    parts = ["Time and peak memory of an update on log-log axes, with their slopes."]
    for axis, curve in curves_of(results).items():
        label, memory = LABELS[axis], f", memory {curve.slope(curve.mib):.2f}" if curve.mib else ""
        span = f"{label[0].upper()}{label[1:]}, {_size(curve.at[0])} to {_size(curve.at[-1])}"
        parts.append(f"{span}: time {curve.slope(curve.seconds):.2f}{memory}.")
    return " ".join(parts)


def _size(at: float) -> str:
    return f"{at:,.0f}" if at >= 1000 else f"{at:.3g}"


def draw(results: Results, path: Path) -> None:
    """
    A panel for each axis and quantity; the slope is in its legend, and the products' growth is dashed. Both sides of a
    panel span as many decades, so that a diagonal is proportional growth.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    curves = curves_of(results)
    figure, axes = plt.subplots(2, len(curves), figsize=(2.9 * len(curves), 6), layout="constrained", squeeze=False)
    for column, (axis, curve) in enumerate(curves.items()):
        for row, (unit, values, colour) in enumerate(
            (("update, seconds", curve.seconds, "#1f5fa8"), ("peak memory, MiB", curve.mib, "#c05a00"))
        ):
            panel = axes[row][column]
            if values:
                panel.loglog(
                    curve.at, values, "o-", color=colour, linewidth=2, label=f"slope {curve.slope(values):.2f}"
                )
            if row == 0:  # through the last point, so that the two slopes are seen beside each other
                scaled = [one * values[-1] / curve.products[-1] for one in curve.products]
                panel.loglog(curve.at, scaled, "--", color="#666", label=f"products {curve.slope(curve.products):.2f}")
            panel.set(xlabel=LABELS[axis] if row else "", ylabel="" if column else unit)
            panel.set_xticks(curve.at, [f"{at / 1000:.3g} k" if at >= 1000 else f"{at:.3g}" for at in curve.at])
            panel.minorticks_off()
            if values:
                middle, half = math.sqrt(values[0] * values[-1]), math.sqrt(curve.at[-1] / curve.at[0])
                half = max(half, math.sqrt(values[-1] / values[0])) * 1.2
                panel.set_ylim(middle / half, middle * half)
                panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                panel.yaxis.set_minor_formatter(NullFormatter())
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(alpha=0.25)
            if panel.lines:
                panel.legend(frameon=False, fontsize=8)
    figure.suptitle("How time and peak memory of an update grow")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
