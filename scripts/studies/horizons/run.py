"""Horizons between γ = 0 and γ = 1, tried on a late reward and on the demo's task.

    python -m scripts.studies.horizons.run --late                  # the fixed points: a few seconds
    python -m scripts.studies.horizons.run --runs whole-0 none-0   # trainings: an arm and a seed, two minutes each
    python -m scripts.studies.horizons.run --report                # the table in docs/results.md, from finished runs

The training is the claim "estimators" of `scripts/reproduce.py` at its slower rate: 100 steps of 64 answers from the
demo's student, the whole vocabulary. Left out: rewards in the training, and a search for the best rate of each horizon.
"""

from __future__ import annotations

from scripts.studies.startup import ONE_THREAD, prepare_environment  # before the libraries


prepare_environment(HF_HUB_OFFLINE="1", OMP_NUM_THREADS=ONE_THREAD, TOKENIZERS_PARALLELISM="false")

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts.studies.horizons import late
from scripts.studies.horizons.horizons import HORIZONS
from scripts.studies.horizons.trainer import with_horizon
from scripts.studies.often_wrong.train import machine
from scripts.studies.reproduce.models import TaskModels, be_quiet, measured
from scripts.studies.reproduce.presets import PRESETS, RunContext
from scripts.studies.reproduce.records import Cost
from scripts.studies.reproduce.report import spread
from scripts.studies.reproduce.training import Schedule, distil


ROOT = Path(__file__).parents[3]

RESULTS = ROOT / "docs" / "results" / "horizons"

STEPS, SEEDS = 100, (0, 1, 2)


def save(path: Path, found: dict[str, Any]) -> None:
    """Write a file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found) + "\n")
    part.replace(path)


def train(name: str, seed: int, path: Path, steps: int = STEPS) -> None:
    """
    Distil the demo's student with a horizon, and write what came out.

    Args:
        name (`str`): a key of `HORIZONS`.
        seed (`int`): of problems and sampling.
        path (`Path`): of the file.
        steps (`int`): of 64 answers.
    """
    be_quiet()
    begun, cost = time.perf_counter(), Cost()
    with tempfile.TemporaryDirectory() as folder:
        models = TaskModels("one", RunContext(Path(folder), PRESETS["cpu"]))
        student, schedule = models.student(), Schedule(steps, seed, "estimates")
        distil(models, student, schedule, cost, kind=with_horizon(name), kl_discount=1.0)
        final = measured(models, student, seed)
    save(
        path,
        {
            "horizon": HORIZONS[name].label,
            "seed": seed,
            "steps": steps,
            "learning_rate": PRESETS["cpu"].rates["estimates"],
            "accuracy": final["avg@4"],
            "kl_per_token": final["kl"],
            "tokens_per_answer": final["length"],
            "curve": [[made, right] for made, _, right in cost.curve],
            "seconds": round(time.perf_counter() - begun),
            "machine": machine(),
        },
    )


def table(folder: Path) -> str:
    """Both cases by horizon, as Markdown."""
    exact = json.loads((folder / "late.json").read_text())
    head = ["", "late reward: from the optimum"]
    away = {name: [one[name] for one in exact["total_variation"]] for name in exact["total_variation"][0]}
    rows = [["the teacher itself", spread(away["teacher"], ".3f")]]
    rows += [[horizon.label, spread(away[name], ".3f")] for name, horizon in HORIZONS.items()]
    trained = {name: [folder / f"{name}-{seed}.json" for seed in SEEDS] for name in HORIZONS}
    if any(path.exists() for paths in trained.values() for path in paths):
        head += ["the task: right", "KL, nats per token", "tokens per answer"]
        rows[0] += [""] * 3
        forms = (("accuracy", ".1%"), ("kl_per_token", ".3f"), ("tokens_per_answer", ".0f"))
        for row, paths in zip(rows[1:], trained.values(), strict=True):
            runs = [json.loads(path.read_text()) for path in paths if path.exists()]
            row += [spread([one[key] for one in runs], form) if runs else "not run" for key, form in forms]
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(folder: Path, page: Path) -> None:
    """Put the table into the page, between its marks."""
    begin, end = "<!-- horizons: begin -->", "<!-- horizons: end -->"
    text = page.read_text()
    if begin not in text or end not in text:
        raise ValueError(f"{page} has no place for the table: write {begin} and {end} where it belongs.")
    before, _, rest = text.partition(begin)
    page.write_text(f"{before}{begin}\n{table(folder)}\n{end}{rest.partition(end)[2]}")


def main(words: list[str] | None = None) -> int:
    known = [f"{name}-{seed}" for name in HORIZONS for seed in SEEDS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--late", action="store_true", help="solve the late reward")
    parser.add_argument("--runs", nargs="+", default=[], choices=known, metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--report", action="store_true", help="write the table in docs/results.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(words)
    if options.late:
        found = {"beta": late.BETA, "total_variation": [late.distances(seed) for seed in range(late.TEACHERS)]}
        save(options.results / "late.json", found)
    for one in options.runs:
        path = options.results / f"{one}.json"
        if not path.exists():
            name, _, seed = one.rpartition("-")
            train(name, int(seed), path)
    if options.report:
        write(options.results, ROOT / "docs" / "results.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
