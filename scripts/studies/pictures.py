"""Draw the pictures of docs/images again, from the numbers in docs/; nothing is trained or measured.

    python -m scripts.studies.pictures                # all
    python -m scripts.studies.pictures gap pareto     # these

Pictures of claims come from docs/results/*.json, and their lines in docs/results.md are written again; variance and the
Pareto plot from docs/results/pictures/, growth from a table of docs/benchmarks.md, rewards from the README's table.
Left out: demo.png, which `scripts/demo.py` writes, and report.png, a screenshot.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import re
import statistics
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


def rewards_on_page(text: str) -> tuple[float, dict[str, tuple[list[float], float]]]:
    """From the README's table: the teacher's accuracy, and by recipe the accuracies of its seeds, in %, and the KL."""
    rows = re.findall(r"^\| ([^|]+) \| [\d.]+% \(([^)]+)\) \| ?([\d.]*) ?\|$", text, re.MULTILINE)
    accuracies = {name: [float(value) for value in values.split(", ")] for name, values, _ in rows}
    teacher = statistics.mean(accuracies.pop("teacher"))
    kls = {name: float(kl) for name, _, kl in rows if kl and name != "teacher"}
    named = {re.split(r":|, at |, `", name)[0]: (accuracies[name], kl) for name, kl in kls.items()}
    return teacher, named


def rewards(docs: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    teacher, recipes = rewards_on_page((docs.parent / "README.md").read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    colour = "#1f5fa8"
    for place, (accuracies, kl) in enumerate(recipes.values()):
        mean = statistics.mean(accuracies)
        left.barh(place, mean, color=colour, alpha=0.35, height=0.6)
        left.plot(accuracies, [place] * len(accuracies), "o", color=colour, markersize=5)
        left.annotate(f"{mean:.1f} %", (1, place), xytext=(2, place), va="center", fontsize=9)
        right.barh(place, kl, color=colour, alpha=0.35, height=0.6)
        right.annotate(f"{kl:.3f}", (kl, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    left.axvline(teacher, color="#555555", linestyle="--", linewidth=1.2)
    left.set(xlim=(0, 105), xlabel="accuracy on 1000 held-out problems, %", yticks=range(len(recipes)))
    left.set_yticklabels(list(recipes))
    left.invert_yaxis()
    left.set_title(f"bars: mean of three seeds, dots: seeds, dashed: teacher ({teacher:.1f} %)", fontsize=9)
    right.set(xlim=(0, 0.5), xlabel="KL to the teacher, nats per token")
    figure.suptitle("Reward, teacher, or both: after 500 steps of 64 answers", fontsize=12)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.25)
    figure.savefig(docs / "images" / "rewards.png", dpi=130)
    plt.close(figure)


def pictures(docs: Path) -> dict[str, Callable[[], None]]:
    """What draws each picture, by name."""
    claims = {path.stem: functools.partial(claim_picture, path, docs) for path in (docs / "results").glob("*.json")}
    others = {"growth": growth, "variance": variance, "pareto": pareto, "demo rewards": rewards}
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
