"""What was asked of speed and memory, beside what was measured: the first table of docs/benchmarks.md."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from scripts.studies.benchmark.report import ASKED_OF_FLOOR, floors, speed
from scripts.studies.benchmark.results import Results
from scripts.studies.benchmark.slopes import curves_of


def rows(folder: Path, costs: dict[str, Any]) -> list[list[str]]:
    """
    Lines of the table: what was asked, what was measured, and where it stands on the page.

    Args:
        folder (`Path`): with the benchmark's results by preset; a preset that was not measured has no line.
        costs (`dict`): the files of docs/results/costs, by name.
    """
    found = {path.stem: Results.load(path) for path in folder.glob("*.json")}
    floor = _floor(found["real"]) if "real" in found else []
    tiny = _tiny(found["cpu"]) if "cpu" in found else []
    return [*floor, *tiny, *_costs(costs), *([_growth(found["growth"])] if "growth" in found else [])]


def _floor(results: Results) -> list[list[str]]:
    """One line for each of full fine-tuning and LoRA, alone and with rewards: the ratios of the cells."""
    asked, lines = ASKED_OF_FLOOR["real"], []
    for lora in (False, True):
        for group in (1, 4):
            ratios = {}
            for found in results.cells:
                if (found.cell.lora, found.cell.group) == (lora, group):
                    seconds = found.contenders[found.base()].update_s
                    ratios[found.cell.name] = statistics.median(seconds) / statistics.median(found.floor_s)
            if ratios:
                shown = ", ".join(f"{value:.2f} ({name})" for name, value in ratios.items())
                what = f"update / floor, {'LoRA' if lora else 'full'}, {'with rewards' if group > 1 else 'pure'}"
                lines.append([what, f"≤ {asked}", shown, verdict(max(ratios.values()) <= asked)])
    return lines


def _tiny(results: Results) -> list[list[str]]:
    """Tiny models: comparisons with TRL's trainers, and cells beside the floor, that are within their bars."""
    lines = []
    for what, (_, columns, rows) in (
        ("update, of TRL's trainers' time", speed(results)),
        ("update / floor", floors(results)),
    ):
        asked = [row[columns.index("asked")] for row in rows]
        bars = sorted({float(one.split()[1]) for one in asked if one})
        reached = sum(one.endswith("✓") for one in asked)
        of_all = sum(bool(one) for one in asked)
        span = " to ".join(f"{one:g}" for one in dict.fromkeys((bars[0], bars[-1])))
        shown = f"{reached} of {of_all} comparisons" if "TRL" in what else f"{reached} of {of_all} cells"
        lines.append([f"{what}, tiny models", f"≤ {span}", shown, verdict(reached == of_all)])
    return lines


def _costs(costs: dict[str, Any]) -> list[list[str]]:
    prompts = next(cell for cell in costs["shared_prompts"]["cells"] if cell["bar"] is not None)
    served = next(cell for cell in costs["served_answers"]["cells"] if cell["bar"] is not None)
    micros = statistics.median(served["at_once"])
    slower = [cell["ratio"][name] for cell in costs["estimators"]["cells"] for name in ("topk", "sampled")]
    bar = costs["memory"]["bar"]
    off = {run["name"]: run["formula"] / run["measured"] for run in costs["memory"]["runs"]}
    start = costs["start_up"]
    seconds = min(next(times for name, times in start["seconds"].items() if name.endswith("l --help"))["processor"])
    return [
        [
            "a teacher's time for 8 completions of 128 tokens after a prompt of 1,024, of whole rows'",
            f"≤ {prompts['bar']}",
            f"{prompts['ratio']:.2f}",
            verdict(prompts["ratio"] <= prompts["bar"]),
        ],
        [
            "`topk` and `sampled`, of `full`'s time",
            "≤ 1",
            f"{min(slower):.2f} to {max(slower):.2f}",
            verdict(max(slower) <= 1),
        ],
        [
            "a served answer with 64 alternatives, µs per token",
            f"≤ {served['bar']:g}",
            f"{micros:.0f}",
            verdict(micros <= served["bar"]),
        ],
        [
            "memory by the formula, of what was measured",
            f"± {bar:.0%}",
            f"{min(off.values()):.2f} to {max(off.values()):.2f} in {len(off)} runs",
            verdict(all(abs(ratio - 1) <= bar for ratio in off.values())),
        ],
        [
            "`trl-distill --help`, seconds of the processor",
            f"≤ {start['bar']}",
            f"{seconds:.2f}",
            verdict(seconds <= start["bar"]),
        ],
    ]


def _growth(results: Results) -> list[str]:
    curves = curves_of(results)
    within = [axis for axis, curve in curves.items() if curve.within]
    shown = f"{len(within)} of {len(curves)} axes"
    return [
        "time no faster than the products or in proportion, memory no faster than the size",
        "all axes",
        shown,
        verdict(len(within) == len(curves)),
    ]


def verdict(reached: bool) -> str:
    return "✓" if reached else "✗"
