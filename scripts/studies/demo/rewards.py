"""Reward, teacher, or both? The demo's student under four recipes, three seeds each.

    python scripts/demo.py --rewards            # one to two hours on two cores; stopped and called again, it goes on

The reward is 1 for a right final answer and 0 otherwise; it knows nothing about the steps. All recipes see the same
problems and as many answers, for the same number of steps. A table and `rewards.png` compare the accuracy on held-out
problems; each finished run leaves its numbers in a file of its own, which later calls read instead of training again.

Left out: a search for the best settings of each recipe. The reward alone has a smaller learning rate, since in trials
it fell apart at larger ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from scripts.studies.demo.student import console, load, measure, train
from scripts.studies.tasks.additions import correct, problems


STEPS = 500  # unless `--steps` says else


SEEDS = (0, 1, 2)


def recipes(steps: int) -> dict[str, dict[str, Any]]:
    """By name, what differs from the demo's settings."""
    switch = steps * 3 // 5  # step at which "distil, then RL" turns from the teacher to the reward
    return {
        "reward only": {"reward_funcs": [correct], "beta": 0.0, "learning_rate": 5e-5, "num_generations": 8},
        "teacher only": {"num_generations": 2},
        "both": {"reward_funcs": [correct], "beta": 0.1, "num_generations": 2},
        "distil, then RL": {
            "reward_funcs": [correct],
            "reward_start_step": switch,
            "beta_schedule": "step",
            "beta_schedule_steps": switch,
            "beta_end": 0.01,
            "num_generations": 2,
        },
    }


def run(options: argparse.Namespace, recipe: str, seed: int, path: Path) -> dict[str, Any]:
    """Train one recipe on one seed, or read what an earlier call with the same options found."""
    settings = {**recipes(options.steps)[recipe], "max_steps": options.steps, "seed": seed}
    asked = {"steps": options.steps, "learning_rate": options.learning_rate, "held_out": options.held_out}
    if path.exists():
        found = json.loads(path.read_text())
        if found["options"] == asked:
            return found
    start = time.perf_counter()
    student, teacher, tokenizer = load(options.models)
    held_out, glance = problems(options.held_out, seed=10_000 + seed), problems(250, seed=20_000 + seed)
    _, watch = train(
        options,
        f"{recipe}, seed {seed}",
        student,
        lambda: measure(student, teacher, tokenizer, glance, seed),
        **settings,
    )
    result = {
        "recipe": recipe,
        "seed": seed,
        "options": asked,
        **measure(student, teacher, tokenizer, held_out, seed),
        "seconds": round(time.perf_counter() - start),
        "curve": watch.accuracy,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result) + "\n")
    return result


def baselines(options: argparse.Namespace) -> dict[str, list[float]]:
    """Accuracy of the teacher and of the untrained student on each seed's held-out problems."""
    student, teacher, tokenizer = load(options.models)
    rows = {seed: problems(options.held_out, seed=10_000 + seed) for seed in SEEDS}
    return {
        name: [measure(model, teacher, tokenizer, rows[seed], seed)["accuracy"] for seed in SEEDS]
        for name, model in (("teacher", teacher), ("student before", student))
    }


def draw(results: dict[str, list[dict[str, Any]]], teacher: float, path: Path) -> None:
    """Accuracy over the steps: the mean of each recipe's seeds, and the range between them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = ("#7a3b8f", "#1f5fa8", "#c05a00", "#3a7d44")
    figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    axis.axhline(teacher, color="#555555", linestyle="--", linewidth=1.2, label=f"teacher {teacher:.1%}")
    for colour, (recipe, runs) in zip(colours, results.items(), strict=True):
        steps = [step for step, _ in runs[0]["curve"]]
        at = list(zip(*([value for _, value in run["curve"]] for run in runs), strict=True))
        axis.fill_between(steps, [min(v) for v in at], [max(v) for v in at], color=colour, alpha=0.15, linewidth=0)
        mean = statistics.mean(run["accuracy"] for run in runs)
        axis.plot(steps, [statistics.mean(v) for v in at], color=colour, linewidth=2, label=f"{recipe} {mean:.1%}")
    axis.set(
        xlabel="optimizer step (64 answers each)", ylabel="accuracy on 250 problems", ylim=(0, 1.02), xlim=(0, None)
    )
    axis.set_title(f"Mean and range of {len(SEEDS)} seeds; numbers: {len(SEEDS)} × 1000 held-out problems", fontsize=10)
    axis.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.48))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def compare(options: argparse.Namespace) -> None:
    """Run what has not been run yet, then table and picture."""
    folder = options.output_dir / "rewards"
    options.steps = options.steps or STEPS
    results: dict[str, list[dict[str, Any]]] = {}
    for recipe in recipes(options.steps):
        name = recipe.replace(", ", "-").replace(" ", "-")
        results[recipe] = [run(options, recipe, seed, folder / f"{name}-{seed}.json") for seed in SEEDS]
    console.print("Measuring teacher and untrained student ...")
    known = baselines(options)
    teacher = statistics.mean(known["teacher"])
    table = Table(
        title=f"{options.held_out} held-out problems per seed, one sampled answer each; {options.steps} steps"
    )
    for column in ("", "accuracy", "by seed", "KL to the teacher, nats per token"):
        table.add_column(column, justify="left" if not column else "right")
    rows: dict[str, tuple[list[float], list[float] | None]] = {name: (values, None) for name, values in known.items()}
    rows |= {name: ([r["accuracy"] for r in runs], [r["reverse_kl"] for r in runs]) for name, runs in results.items()}
    for name, (values, kl) in rows.items():
        by_seed = " ".join(f"{value:.1%}" for value in values)
        table.add_row(name, f"{statistics.mean(values):.1%}", by_seed, f"{statistics.mean(kl):.3f}" if kl else "")
    console.print(table)
    draw(results, teacher, folder / "rewards.png")
    summary = {name: {"accuracy": values, "reverse_kl": kl} for name, (values, kl) in rows.items()}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    best = max(results, key=lambda name: statistics.mean(r["accuracy"] for r in results[name]))
    above = statistics.mean(r["accuracy"] for r in results[best]) - teacher
    console.print(f"Best: {best}, {abs(above):.1%} {'above' if above > 0 else 'below'} the teacher.")
    console.print(f"Results are in {folder}: summary.json, rewards.png, and the numbers of each run")
