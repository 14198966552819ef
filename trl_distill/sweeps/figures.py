"""Pictures of a sweep: Pareto front, metric, ranking."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..foreign_text import in_figure, in_legend
from ..reporting.curves import BLUE, ORANGE, new_figure, plain
from .labels import write_labels


_STEPS: dict[str, Any] = {"drawstyle": "steps-post"}  # nothing is known between two runs


@dataclass(frozen=True)
class Point:
    """A finished run in a picture: its label and its coordinates."""

    label: str
    x: float
    y: float


def pareto_front(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats: none has no more `x` and no less `y`, and is better in one."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y)):
        same = bool(front) and (point.x, point.y) == (front[-1].x, front[-1].y)
        if not front or point.y > front[-1].y or same:
            front.append(point)
    return front


def pareto_figure(points: Sequence[Point], x_label: str, y_label: str, title: str = "") -> Any:
    """
    Reward against KL: the Pareto front as a line, every run with its label.

    Args:
        points (`Sequence[Point]`): at least one; `x` the KL in nats, `y` the reward.
        x_label (`str`): of the KL, with its unit.
        y_label (`str`): of the reward.
        title (`str`): above the picture.

    Raises:
        ValueError: there are no points.
        ImportError: matplotlib is not installed.
    """
    figure, axis = _axis(len(points), title)
    front = pareto_front(points)
    rest = [point for point in points if point not in front]
    axis.plot(*_columns(front), color=BLUE, marker="o", markersize=8, linewidth=2, label="Pareto front", **_STEPS)
    if rest:
        hollow = {"color": ORANGE, "marker": "s", "markersize": 8, "markerfacecolor": "none", "linestyle": "none"}
        axis.plot(*_columns(rest), **hollow, label="another run has less KL and more reward")
    _decades(axis, [point.x for point in points])
    axis.margins(0.14)
    if min(point.y for point in points) >= 0:
        axis.set_ylim(bottom=0)
    axis.set(xlabel=in_figure(x_label), ylabel=in_figure(y_label))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    coloured = [(point, BLUE) for point in front] + [(point, ORANGE) for point in rest]
    write_labels(figure, axis, [(point.label, point.x, point.y, colour) for point, colour in coloured])
    return figure


def metric_figure(points: Sequence[Point], x_label: str, y_label: str, maximize: bool, title: str = "") -> Any:
    """
    A metric over the one number that was varied: a dot for each run, on a logarithmic axis where values span decades.

    Args and errors as [`pareto_figure`]; `maximize` says which run is the best one.
    """
    figure, axis = _axis(len(points), title)
    ordered = sorted(points, key=lambda p: p.x)
    best = (max if maximize else min)(ordered, key=lambda p: p.y)
    axis.plot(*_columns(ordered), color=BLUE, marker="o", markersize=8, linewidth=1, alpha=0.9)
    axis.plot(
        best.x,
        best.y,
        color=ORANGE,
        marker="D",
        markersize=11,
        linestyle="none",
        label=in_legend(f"best: {best.label}"),
    )
    _decades(axis, [point.x for point in points])
    axis.margins(0.08)
    axis.set(xlabel=in_figure(x_label), ylabel=in_figure(y_label))
    figure.legend(loc="outside lower center", frameon=False)
    return figure


def ranking_figure(rows: Sequence[tuple[str, float]], label: str, maximize: bool, title: str = "") -> Any:
    """
    A metric by configuration, where these are not numbers: one line for each, the best on top.

    Args and errors as [`pareto_figure`]; a row is a configuration's name and its metric.
    """
    figure, axis = _axis(len(rows), title, height=1.6 + 0.36 * len(rows))
    ordered = sorted(rows, key=lambda row: row[1], reverse=not maximize)
    names, values = zip(*ordered, strict=True)
    places = range(len(ordered))
    axis.plot(values, places, color=BLUE, marker="o", markersize=8, linestyle="none")
    axis.plot(values[-1], places[-1], color=ORANGE, marker="D", markersize=11, linestyle="none")
    for place, value in zip(places, values, strict=True):
        axis.annotate(f"{value:.3g}", (value, place), (10, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set_yticks(places, [in_figure(name) for name in names])
    axis.margins(x=0.14)
    axis.set(xlabel=in_figure(label))
    return figure


def _axis(size: int, title: str, height: float = 4.8) -> tuple[Any, Any]:
    if size == 0:
        raise ValueError("There is nothing to draw: no run has logged what the picture shows.")
    figure = new_figure(7.5, height)
    axis = figure.subplots()
    axis.set_title(in_figure(title), fontsize=11)
    plain(axis)
    return figure, axis


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.x for point in points], [point.y for point in points]


def _decades(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis where the values span a decade, with ticks that read as plain numbers."""
    decades = math.log10(max(values) / min(values)) if min(values) > 0 else 0
    if decades < 1:
        return
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
