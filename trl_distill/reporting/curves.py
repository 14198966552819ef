"""Pictures: reward against KL over a sweep, one metric over a sweep, and how one run went.

Each function returns a figure of matplotlib (extra `demo`), which is imported when the first one is drawn. Reading logs
is left to `scripts/sweep.py` and to the callback that sends the last picture to wandb.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


BLUE, ORANGE = "#0072b2", "#d55e00"  # told apart with any colour vision, and by their markers
_STEPS: dict[str, Any] = {"drawstyle": "steps-post"}  # what lies between two runs is not known to be reachable


@dataclass(frozen=True)
class Point:
    """One finished run in a picture: what it is called, where it lies."""

    label: str
    x: float
    y: float


def pareto_front(points: Iterable[Point]) -> list[Point]:
    """The points to which no other is preferable: none has as little `x` and as much `y`, and more of either."""
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
    axis.set(xlabel=x_label, ylabel=y_label)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    _label(figure, axis, [(point, BLUE) for point in front] + [(point, ORANGE) for point in rest])
    return figure


def metric_figure(points: Sequence[Point], x_label: str, y_label: str, maximize: bool, title: str = "") -> Any:
    """
    One number varied, and a metric: a dot for each run, over a logarithmic axis where decades lie between them.

    Args and errors as [`pareto_figure`]; `maximize` says which run is the best one.
    """
    figure, axis = _axis(len(points), title)
    ordered = sorted(points, key=lambda p: p.x)
    best = (max if maximize else min)(ordered, key=lambda p: p.y)
    axis.plot(*_columns(ordered), color=BLUE, marker="o", markersize=8, linewidth=1, alpha=0.9)
    axis.plot(best.x, best.y, color=ORANGE, marker="D", markersize=11, linestyle="none", label=f"best: {best.label}")
    _decades(axis, [point.x for point in points])
    axis.margins(0.08)
    axis.set(xlabel=x_label, ylabel=y_label)
    figure.legend(loc="outside lower center", frameon=False)
    return figure


def ranking_figure(rows: Sequence[tuple[str, float]], label: str, maximize: bool, title: str = "") -> Any:
    """
    Configurations that are no numbers, and a metric: one line for each, the best on top.

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
    axis.set_yticks(places, names)
    axis.margins(x=0.14)
    axis.set(xlabel=label)
    return figure


# What a run's picture shows: the label of each panel, and its keys; the first is drawn solid, the second dashed
_PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("KL to the teacher, nats per token", ("distill/reverse_kl", "distill/forward_kl")),
    ("divergence that is minimised", ()),  # one of its own name
    ("reward", ("reward",)),
    ("objective: reward − beta · KL", ("objective",)),
    ("entropy, nats", ("entropy", "distill/teacher_entropy")),
    ("agreement", ("distill/top1_agreement", "distill/top_overlap")),
    ("completion length, tokens", ("completions/mean_length",)),
)
_NAMES = {
    "distill/reverse_kl": "KL(student ‖ teacher)",
    "distill/forward_kl": "KL(teacher ‖ student)",
    "entropy": "student",
    "distill/teacher_entropy": "teacher",
    "distill/top1_agreement": "likeliest token",
    "distill/top_overlap": "16 likeliest tokens",
}


def training_figure(
    logs: Mapping[str, Sequence[dict[str, Any]]], levels: dict[str, float] | None = None, title: str = ""
) -> Any:
    """
    How one run went, or several: KL both ways, reward, objective, entropy, agreement and lengths, as far as logged.

    Args:
        logs (`dict`): by the run's name its log, `trainer.state.log_history`.
        levels (`dict[str, float]`, *optional*): by the log's key a level that is known, such as the teacher's reward.
        title (`str`): above the picture.

    Raises:
        ValueError: nothing of that was logged.
        ImportError: matplotlib is not installed.
    """
    panels = []
    for label, keys in _PANELS:
        chosen = keys or tuple(_other_divergences(logs))
        if any(row.get(key) is not None for log in logs.values() for row in log for key in chosen):
            panels.append((label, chosen))
    if not any("KL" in label or "divergence" in label or label == "reward" for label, _ in panels):
        raise ValueError("The log holds neither a divergence nor a reward; log at least one step (`logging_steps`).")
    rows = -(-len(panels) // 2)
    figure = new_figure(11, 2.7 * rows + 0.7)
    axes = figure.subplots(rows, 2, sharex=True, squeeze=False).flatten()
    for axis, (label, keys) in zip(axes, panels, strict=False):
        _panel(axis, label, keys, logs, levels or {})
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[max(0, len(panels) - 2) : len(panels)]:
        axis.set(xlabel="optimizer step")
        axis.tick_params(labelbottom=True)
        axis.xaxis.get_major_locator().set_params(integer=True)
    if len(logs) > 1:
        handles = [_key(colour, "-", run) for run, colour in zip(logs, _run_colours(logs), strict=True)]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(logs)), frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def _panel(
    axis: Any, label: str, keys: Sequence[str], logs: Mapping[str, Sequence[dict[str, Any]]], levels: dict[str, float]
) -> None:
    for log, colour in zip(logs.values(), _run_colours(logs), strict=True):
        for key, style in zip(keys, ("-", "--"), strict=False):
            points = [(row["step"], row[key]) for row in log if row.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, linestyle=style, linewidth=1.6)
    shown = [key for key in keys if any(row.get(key) is not None for log in logs.values() for row in log)]
    handles = [_key("#555555", ("-", "--")[keys.index(key)], _NAMES.get(key, key)) for key in shown if len(keys) > 1]
    for key in set(keys) & set(levels):
        axis.axhline(levels[key], color="#555555", linestyle=":", linewidth=1.4)
        handles.append(_key("#555555", ":", f"teacher {levels[key]:.3g}"))
    if handles:
        axis.legend(handles=handles, frameon=False, fontsize=8)
    axis.set_title(label, fontsize=10, loc="left")
    plain(axis)


def _key(colour: str, style: Any, label: str) -> Any:
    """An entry of a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linestyle=style, linewidth=1.8, label=label)


def _run_colours(logs: Mapping[str, Any]) -> list[str]:
    colours = (BLUE, ORANGE, "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")  # Okabe and Ito's
    return [colours[i % len(colours)] for i in range(len(logs))]


def _other_divergences(logs: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    """The keys of divergences that have no panel of their own; several teachers' own ones are left out."""
    from .config import DIVERGENCES

    keys = (f"distill/{name}" for name in DIVERGENCES if not name.endswith("_kl") or name.startswith("skewed"))
    return [key for key in keys if any(key in row for log in logs.values() for row in log)][:2]


def new_figure(width: float, height: float) -> Any:
    """A figure of its own, without pyplot, which would change the backend of the notebook that trains."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("Pictures need matplotlib: pip install 'trl_distill[demo]'.") from None
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def _axis(size: int, title: str, height: float = 4.8) -> tuple[Any, Any]:
    if size == 0:
        raise ValueError("There is nothing to draw: no run has logged what the picture shows.")
    figure = new_figure(7.5, height)
    axis = figure.subplots()
    axis.set_title(title, fontsize=11)
    plain(axis)
    return figure, axis


def plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)


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


def _label(figure: Any, axis: Any, points: Sequence[tuple[Point, str]]) -> None:
    """Write each label at the nearest place where it covers no point and no other label, with a line if that is far."""
    figure.draw_without_rendering()  # settles where the points are on the page
    inside = axis.get_window_extent()
    taken: list[Any] = []
    dots = [axis.transData.transform((point.x, point.y)) for point, _ in points]
    for point, colour in points:
        style = {"ha": "center", "va": "center", "color": colour, "fontsize": 10, "textcoords": "offset points"}
        text = axis.annotate(point.label, (point.x, point.y), (0, 0), **style)
        for distance, angle in itertools.product(range(14, 110, 12), (120, 90, 60, 150, 30, 270, 300, 240, 330, 210)):
            turned = math.radians(angle)
            offset = (1.7 * distance * math.cos(turned), distance * math.sin(turned))  # letters are wide
            text.set_position(offset)
            box = text.get_window_extent().padded(6)
            within = inside.x0 < box.x0 and box.x1 < inside.x1 and inside.y0 < box.y0 and box.y1 < inside.y1
            if within and not any(box.contains(*dot) for dot in dots) and not any(map(box.overlaps, taken)):
                break
        taken.append(box)
        if distance > 14:
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 7, "shrinkB": 5}
            axis.annotate("", (point.x, point.y), offset, textcoords="offset points", arrowprops=line)
