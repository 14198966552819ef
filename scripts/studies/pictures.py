"""Draw the pictures of docs/images again, from the numbers in docs/; nothing is trained or measured.

    python -m scripts.studies.pictures                # all
    python -m scripts.studies.pictures gap pareto     # these

Pictures of claims come from docs/results/*.json, and their lines in docs/results.md are written again; variance and the
Pareto plot from docs/results/pictures/, growth from a table of docs/benchmarks.md. Left out: demo.png and rewards.png,
whose runs write them (`scripts/demo.py`), and report.png, a screenshot.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
from collections.abc import Callable
from pathlib import Path

from scripts.studies.benchmark import growth as benchmark
from scripts.studies.reproduce import gradient_variance
from scripts.studies.reproduce import report as reproduce
from scripts.studies.reproduce.records import RunRecord
from trl_distill.sweeps.figures import Point, pareto_figure, pareto_front


DOCS = Path(__file__).parents[2] / "docs"


def claim_picture(path: Path, docs: Path) -> None:
    """Picture, table and text of a claim in docs/results.md, from its file in docs/results/."""
    found = json.loads(path.read_text())
    runs = [RunRecord.from_json(one) for one in found["runs"]]
    claim = found["claim"]
    reproduce.write_docs({claim: runs}, {claim: found["sentence"]}, found["machine"], docs)


def growth(docs: Path) -> None:
    points = benchmark.curves_on_page((docs / "benchmarks.md").read_text(), "cpu")
    benchmark.draw(points, docs / "images" / "benchmark_growth.png")


def variance_results(docs: Path) -> dict[str, dict[str, float]]:
    """Of the student before the demo, by the seed of its completions."""
    found = json.loads((docs / "results" / "pictures" / "variance.json").read_text())
    return {seed: results["before the demo"] for seed, results in found.items()}


def variance(docs: Path) -> None:
    gradient_variance.draw(variance_results(docs), docs / "images" / "variance.png")


def pareto_points(docs: Path) -> list[Point]:
    """From the `results.csv` of the sweep in docs/sweeps.md."""
    with (docs / "results" / "pictures" / "pareto.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [
        Point(f"beta={float(row['beta']):g}", float(row["distill/reverse_kl"]), float(row["reward"])) for row in rows
    ]


def pareto(docs: Path) -> None:
    title = "Reward against KL to the teacher\nbeta: means of the last 5 logged steps"
    figure = pareto_figure(pareto_points(docs), "distill/reverse_kl, nats per token", "reward", title)
    figure.savefig(docs / "images" / "pareto.png")


def pareto_in_words(points: list[Point]) -> str:
    """For those who do not see the picture."""
    front = {point.label for point in pareto_front(points)}
    parts = [f"{p.label} {p.y:.2f} at {p.x:.2f} nats{'' if p.label in front else ' (off the front)'}" for p in points]
    return f"Reward against KL to the teacher per token. {'; '.join(parts)}."


def pictures(docs: Path) -> dict[str, Callable[[], None]]:
    """What draws each picture, by name."""
    claims = {path.stem: functools.partial(claim_picture, path, docs) for path in (docs / "results").glob("*.json")}
    others = {"growth": growth, "variance": variance, "pareto": pareto}
    return {**claims, **{name: functools.partial(draw, docs) for name, draw in others.items()}}


def main(words: list[str] | None = None, docs: Path = DOCS) -> None:
    known = pictures(docs)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all unless given: {', '.join(sorted(known))}")
    names = parser.parse_args(words).names or sorted(known)
    if unknown := sorted({*names} - {*known}):
        parser.error(f"there are no numbers for {', '.join(unknown)}. Choose from {', '.join(sorted(known))}.")
    for name in names:
        known[name]()
        print(f"{name}: drawn")


if __name__ == "__main__":
    main()
