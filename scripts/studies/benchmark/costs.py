"""The tables of docs/benchmarks.md about costs beside the update, from the files in docs/results/costs.

    python -m scripts.studies.benchmark.costs     # writes the page anew between its markers

The files are made by `shared_prompts.py`, `served_answers.py`, `estimator_heads.py`, `memory.py` and `start_up.py`.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from scripts.studies.benchmark import bars


ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "docs" / "results" / "costs"
PAGE = ROOT / "docs" / "benchmarks.md"


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bar(value: float, most: float | None) -> str:
    """What was asked, and whether it was reached."""
    return "" if most is None else f"≤ {most:g} {'✓' if value <= most else '✗'}"


def shared_prompts() -> str:
    rows = []
    for cell in read("shared_prompts")["cells"]:
        medians = [f"{statistics.median(times):.3g}" for times in cell["seconds"].values()]
        sizes = [str(cell[name]) for name in ("completions", "prompt", "completion")]
        ratio = [f"{cell['ratio']:.2f}", f"{cell['arithmetic']:.2f}", bar(cell["ratio"], cell["bar"])]
        rows.append([*sizes, *medians, *ratio])
    columns = [
        "completions",
        "prompt",
        "tokens each",
        "whole rows, s",
        "prompt once, s",
        "ratio",
        "tokens read",
        "asked",
    ]
    return table(columns, rows)


def served_answers() -> str:
    rows = []
    for cell in read("served_answers")["cells"]:
        medians = [statistics.median(cell[name]) for name in ("at_once", "with_json", "with_care")]
        rows.append([str(cell["alternatives"]), *(f"{value:.0f}" for value in medians), bar(medians[0], cell["bar"])])
    return table(["alternatives", "at once, µs", "with Python's json, µs", "position by position, µs", "asked"], rows)


def estimators() -> str:
    found, rows = read("estimators"), []
    for cell in found["cells"]:
        medians = {name: statistics.median(times) for name, times in cell["seconds"].items()}
        values = [f"{medians[name]:.2f}" for name in medians]
        ratios = [f"{cell['ratio'][name]:.2f}" for name in ("topk", "sampled")]
        slowest = bar(max(cell["ratio"][name] for name in ("topk", "sampled")), cell["bar"])
        loss = "reward and KL" if cell["rewarded"] else "KL"
        rows.append([str(cell["tokens"]), str(cell["vocabulary"]), loss, *values, *ratios, slowest])
    names = ["full, s", "topk, s", "sampled, s", "topk / full", "sampled / full"]
    return table(["tokens", "ids", "loss", *names, "asked"], rows)


def memory() -> str:
    found, rows = read("memory"), []
    for run in found["runs"]:
        ratio = run["formula"] / run["measured"]
        held = "✓" if abs(ratio - 1) <= found["bar"] else "✗"
        sizes = [f"{run[name]:.0f}" for name in ("formula", "measured")]
        rows.append([run["name"], *sizes, f"{ratio:.2f} {held}", run["phase"]])
    columns = ["run", "formula, MiB", "measured, MiB", "formula / measured", "largest phase"]
    return table(columns, rows)


def start_up() -> str:
    found, rows = read("start_up"), []
    for name, times in found["seconds"].items():
        clock, spent = min(times["clock"]), min(times["processor"])
        asked = bar(spent, found["bar"] if name.endswith("l --help") else None)
        rows.append([name, f"{clock:.2f}", f"{spent:.2f}", asked])
    return table(["until it is done", "clock, s", "processor, s", "asked"], rows)


def asked() -> str:
    names = ("shared_prompts", "served_answers", "estimators", "memory", "start_up")
    rows = bars.rows(RESULTS.parent / "benchmark", {name: read(name) for name in names})
    return table(["", "asked", "measured", ""], rows)


TABLES = {
    "asked": asked,
    "shared prompts": shared_prompts,
    "served answers": served_answers,
    "estimators": estimators,
    "memory": memory,
    "start-up": start_up,
}


def written(text: str) -> str:
    """The page with its tables made anew."""
    for name, make in TABLES.items():
        begin, end = f"<!-- costs, {name}: begin -->", f"<!-- costs, {name}: end -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{make()}\n\n{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    PAGE.write_text(written(PAGE.read_text()))


if __name__ == "__main__":
    main()
