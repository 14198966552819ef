"""Reward, teacher, or both? The demo's student under four recipes, three seeds each.

    python scripts/demo.py --rewards      # one to two hours on two cores; if interrupted, rerun it to resume

The reward is 1 for a right final answer and 0 otherwise, whatever the steps. All recipes see the same problems and as
many answers, for the same number of steps. A table and `rewards.png` compare the accuracy on held-out problems; each
finished run leaves its numbers in a file of its own, which later calls read instead of training again.

Left out: a search for the best settings of each recipe. The reward alone has a smaller learning rate, since in trials
it collapsed at larger ones.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from scripts.studies.demo.student import Setting, console, load, measure, train
from scripts.studies.tasks.additions import correct, problems


SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Recipe:
    """
    How the student is trained.

    Attributes:
        label (`str`): in the table.
        rewarded (`bool`): whether right answers are rewarded.
        changes (`dict[str, Any]`): fields of `OPDConfig` that differ from the demo's.
    """

    label: str
    rewarded: bool
    changes: dict[str, Any] = field(default_factory=dict)


def recipes(steps: int) -> dict[str, Recipe]:
    """By name, which also names the files of their runs."""
    switch = steps * 3 // 5  # step at which "distil, then RL" turns from the teacher to the reward
    then_rl = {
        "reward_start_step": switch,
        "beta_schedule": "step",
        "beta_schedule_steps": switch,
        "beta_end": 0.01,
        "num_generations": 2,
    }
    return {
        "reward-only": Recipe("reward only", True, {"beta": 0.0, "learning_rate": 5e-5, "num_generations": 8}),
        "teacher-only": Recipe("teacher only", False, {"num_generations": 2}),
        "both": Recipe("both", True, {"beta": 0.1, "num_generations": 2}),
        "distil-then-RL": Recipe("distil, then RL", True, then_rl),
    }


@dataclass(frozen=True)
class RewardRun:
    """
    One finished run.

    Attributes:
        recipe (`str`): its label.
        seed (`int`): of the run.
        options (`dict[str, Any]`): what it was made with; runs with other options are not compared.
        accuracy, reverse_kl (`float`): of the trained student, on held-out problems.
        seconds (`int`): that it took.
        curve (`list[tuple[int, float]]`): accuracy on other problems by optimizer step.
    """

    recipe: str
    seed: int
    options: dict[str, Any]
    accuracy: float
    reverse_kl: float
    seconds: int
    curve: list[tuple[int, float]]


def run(setting: Setting, recipe: Recipe, path: Path) -> RewardRun:
    """Train one recipe on the setting's seed, or read what an earlier call with the same options found."""
    options = {name: getattr(setting, name) for name in ("steps", "learning_rate", "held_out")}
    if path.exists():
        found = RewardRun(**json.loads(path.read_text()))
        if found.options == options:
            return found
    start, seed = time.perf_counter(), setting.seed
    models = load(setting.models)
    held_out, glance = problems(setting.held_out, seed=10_000 + seed), problems(250, seed=20_000 + seed)
    _, watch = train(
        setting,
        models,
        f"{recipe.label}, seed {seed}",
        lambda: measure(models, models.student, glance, seed),
        reward=[correct] if recipe.rewarded else None,
        **recipe.changes,
    )
    after = measure(models, models.student, held_out, seed)
    seconds = round(time.perf_counter() - start)
    result = RewardRun(recipe.label, seed, options, after.accuracy, after.reverse_kl, seconds, watch.accuracy)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(result)) + "\n")
    return result


def baselines(setting: Setting) -> dict[str, list[float]]:
    """Accuracy of the teacher and of the untrained student on each seed's held-out problems."""
    models = load(setting.models)
    rows = {seed: problems(setting.held_out, seed=10_000 + seed) for seed in SEEDS}
    return {
        name: [measure(models, model, rows[seed], seed).accuracy for seed in SEEDS]
        for name, model in (("teacher", models.teacher), ("student before", models.student))
    }


def draw(results: dict[str, list[RewardRun]], teacher: float, path: Path) -> None:
    """Accuracy over the steps: the mean of each recipe's seeds, and the range between them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = ("#7a3b8f", "#1f5fa8", "#c05a00", "#3a7d44")
    figure, axis = plt.subplots(figsize=(7.5, 5), layout="constrained")
    axis.axhline(teacher, color="#555555", linestyle="--", linewidth=1.2, label=f"teacher {teacher:.1%}")
    for colour, (recipe, runs) in zip(colours, results.items(), strict=True):
        steps = [step for step, _ in runs[0].curve]
        at = list(zip(*([value for _, value in run.curve] for run in runs), strict=True))
        axis.fill_between(steps, [min(v) for v in at], [max(v) for v in at], color=colour, alpha=0.15, linewidth=0)
        mean = statistics.mean(run.accuracy for run in runs)
        dashes = (0, (4, 2)) if recipe == "distil, then RL" else "-"  # its first part is another recipe's line
        label = f"{recipe} {mean:.1%}"
        axis.plot(steps, [statistics.mean(v) for v in at], color=colour, linewidth=2, linestyle=dashes, label=label)
    axis.set(xlabel="optimizer step (64 answers each)", ylabel="accuracy on 250 problems", ylim=(0, 1), xlim=(0, None))
    axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    figure.suptitle("Accuracy over the steps: reward, teacher, both", fontsize=12)
    what = f"{len(SEEDS)} seeds, mean and range; in the legend, at the end, on {len(SEEDS)} × 1000 held-out problems"
    axis.set_title(what, fontsize=9, color="#555555")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def compare(setting: Setting) -> None:
    """Run what has not been run yet, then table and picture."""
    folder = setting.output_dir / "rewards"
    results: dict[str, list[RewardRun]] = {}
    for name, recipe in recipes(setting.steps).items():
        seeds = [replace(setting, seed=seed) for seed in SEEDS]
        results[recipe.label] = [run(one, recipe, folder / f"{name}-{one.seed}.json") for one in seeds]
    console.print("Measuring teacher and untrained student ...")
    known = baselines(setting)
    teacher = statistics.mean(known["teacher"])
    rows: dict[str, tuple[list[float], list[float] | None]] = {label: (values, None) for label, values in known.items()}
    rows |= {label: ([r.accuracy for r in runs], [r.reverse_kl for r in runs]) for label, runs in results.items()}
    title = f"{setting.held_out} held-out problems per seed, one sampled answer each; {setting.steps} steps"
    table = Table(title=title)
    for column in ("", "accuracy", "by seed", "KL to the teacher, nats per token"):
        table.add_column(column, justify="left" if not column else "right")
    for label, (values, kl) in rows.items():
        by_seed = " ".join(f"{value:.1%}" for value in values)
        table.add_row(label, f"{statistics.mean(values):.1%}", by_seed, f"{statistics.mean(kl):.3f}" if kl else "")
    console.print(table)
    draw(results, teacher, folder / "rewards.png")
    summary = {label: {"accuracy": values, "reverse_kl": kl} for label, (values, kl) in rows.items()}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    best = max(results, key=lambda label: statistics.mean(r.accuracy for r in results[label]))
    above = statistics.mean(r.accuracy for r in results[best]) - teacher
    console.print(f"Best: {best}, {abs(above):.1%} {'above' if above > 0 else 'below'} the teacher.")
    console.print(f"Results are in {folder}: summary.json, rewards.png, and the numbers of each run")
