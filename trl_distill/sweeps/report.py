"""What came out of a sweep: a table on the screen, `table.md`, `results.csv`, and a picture.

    python scripts/sweep.py --output_dir sweeps/beta --report_only      # again, from the results that are there

`results.csv` has all metrics, the others the main ones. The picture is reward against KL (`pareto.png`) where the sweep
varies beta and both were logged, else the sweep's metric (`metric.png`); `figures.py` draws it. Runs that were ended
early are in the tables, but not in the picture: their metrics are those of a shorter training.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..foreign_text import as_written, in_markdown_table
from ..objective.divergences import DIVERGENCES
from .commands import label, logged_name
from .figures import Point, metric_figure, pareto_figure, pareto_front, ranking_figure
from .results import SWEEP, Row, collect


DIVERGENCE_KEYS = tuple(f"distill/{name}" for name in DIVERGENCES)


MAIN = ("reward", *DIVERGENCE_KEYS, "distill/sequence_kl", "objective", "entropy")


def reward_against_kl(rows: list[Row]) -> tuple[str, dict[str, Point]]:
    """Where the sweep varies beta: the divergence's key, and by run its reward and KL, where both were logged."""
    kl = next((key for key in DIVERGENCE_KEYS for row in rows if key in row.metrics), "")
    whole = [row for row in rows if not row.stopped]
    both = [row for row in whole if "beta" in row.settings and {kl, "reward"} <= row.metrics.keys()]
    return kl, {row.run: Point(label(row.settings), row.metrics[kl], row.metrics["reward"]) for row in both}


def draw_picture(folder: Path, rows: list[Row], sweep: dict[str, Any], caption: str) -> Path | None:
    """Draw the sweep's picture; `None` where no run has logged its metric."""
    metric, maximize = logged_name(sweep["metric"]["name"]), sweep["metric"]["goal"] == "maximize"
    measured = [(row.settings, row.metrics[metric]) for row in rows if metric in row.metrics and not row.stopped]
    numeric = all(len(found) == 1 and isinstance(next(iter(found.values())), int | float) for found, _ in measured)
    kl, points = reward_against_kl(rows)
    if points:
        path = folder / "pareto.png"
        title = f"Reward against KL to the teacher\n{caption}"
        figure = pareto_figure([*points.values()], f"{kl}, nats per token", "reward", title)
    elif not measured:
        return None
    elif numeric:
        path, ((name, _),) = folder / "metric.png", measured[0][0].items()
        dots = [Point(label(settings), settings[name], value) for settings, value in measured]
        figure = metric_figure(dots, name, metric, maximize, caption)
    else:
        path = folder / "metric.png"
        figure = ranking_figure([(label(settings), value) for settings, value in measured], metric, maximize, caption)
    figure.savefig(path)
    return path


def table_of(rows: list[Row], metric: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the short table: what varied, the main metrics, and a remark."""
    settings = list(dict.fromkeys(name for row in rows for name in row.settings))
    logged = {name for row in rows for name in row.metrics}
    metrics = [name for name in dict.fromkeys((metric, *MAIN)) if name in logged]
    _, points = reward_against_kl(rows)
    front = pareto_front(points.values())
    cells = []
    for row in rows:
        values = [row.settings.get(name, "") for name in settings] + [row.metrics.get(name, "") for name in metrics]
        remark = "failed" if row.failure else "ended early" if row.stopped else ""
        if points.get(row.run) in front:
            remark = "Pareto front"
        cells.append([row.run, *(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values), remark])
    return ["run", *settings, *metrics, ""], cells


def report(folder: Path, console: Console) -> list[Row]:
    """Write `results.csv`, `table.md` and the picture, print the table, and say where they lie."""
    state = json.loads((folder / SWEEP).read_text())
    sweep, rows = state["sweep"], collect(folder)
    if not rows:
        console.print(as_written(f"No run in {folder} has ended yet."))
        return rows
    header, cells = table_of(rows, logged_name(sweep["metric"]["name"]))
    caption = f"{sweep.get('name', folder.name)}: means of the last {state['last']} logged steps"
    table = Table(title=as_written(caption))
    for name in header:
        table.add_column(as_written(name), justify="left" if name in ("run", "") else "right", overflow="fold")
    for cell in cells:
        table.add_row(*map(as_written, cell))
    console.print(table)

    lines = [header, ["---"] * len(header), *cells]
    (folder / "table.md").write_text("".join(f"| {' | '.join(map(in_markdown_table, line))} |\n" for line in lines))
    settings = list(dict.fromkeys(name for row in rows for name in row.settings))
    metrics = sorted({name for row in rows for name in row.metrics})
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", *settings, *metrics, "stopped", "failure"])
        for row in rows:
            found = [row.settings.get(name, "") for name in settings] + [row.metrics.get(name, "") for name in metrics]
            writer.writerow([row.run, *found, row.stopped, row.failure])
    for row in rows:
        if row.failure:
            console.print(f"Run {row.run} ({label(row.settings)}) failed:\n{row.failure}", markup=False)
    picture = draw_picture(folder, rows, sweep, caption)
    drawn = picture.name if picture else f"no picture, since no run has logged {sweep['metric']['name']}"
    console.print(as_written(f"Results are in {folder}: table.md, results.csv, {drawn}"))
    return rows
