"""The figure of a training run, or of several: their metrics over the optimizer steps.

It needs matplotlib (extra `demo`), which is imported on first use. `trl-distill plot` and the callbacks for trackers
use it; figures of sweeps are in `sweeps/figures.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..foreign_text import in_figure, in_legend


BLUE, ORANGE = "#0072b2", "#d55e00"  # distinguishable with any colour vision


# The panels of the figure: label, and keys of the log, of which the first is drawn solid and the second dashed
_PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("KL to the teacher, nats per token", ("distill/reverse_kl", "distill/forward_kl")),
    ("divergence that is minimised", ()),  # keys depend on the run
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
    Both KLs, reward, objective, entropy, agreement and lengths over the steps of one run or several, as far as logged.

    Args:
        logs (`dict`): logs (`trainer.state.log_history`) by the name of the run.
        levels (`dict[str, float]`, *optional*): horizontal lines by key of the log, such as the teacher's reward.
        title (`str`): title of the figure.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        ValueError: the logs have neither a divergence nor a reward.
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
    figure.suptitle(in_figure(title), fontsize=11)
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

    return Line2D([], [], color=colour, linestyle=style, linewidth=1.8, label=in_legend(label))


def _run_colours(logs: Mapping[str, Any]) -> list[str]:
    colours = (BLUE, ORANGE, "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")  # the palette of Okabe and Ito
    return [colours[i % len(colours)] for i in range(len(logs))]


def _other_divergences(logs: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    """The keys of divergences without their own panel; those of single teachers among several are left out."""
    from ..objective.divergences import DIVERGENCES

    logged = dict.fromkeys(key for log in logs.values() for row in log for key in row)
    keys = [f"distill/{name}" for name in DIVERGENCES if not name.endswith("_kl") or name.startswith("skewed")]
    keys += [key for key in logged if is_custom(key)]
    return [key for key in keys if key in logged][:2]


def is_custom(key: str) -> bool:
    """Whether a key of the log is that of a divergence of one's own, whose name is an import path."""
    first, _, rest = key.partition("/")
    return first == "distill" and "." in rest.split("(")[0] and "/" not in rest


def new_figure(width: float, height: float) -> Any:
    """A figure without pyplot, which would change a notebook's backend. Raises `ImportError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("Figures need matplotlib: pip install 'trl_distill[demo]'.") from None
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
