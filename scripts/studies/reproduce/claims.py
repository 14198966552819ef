"""The claims of the field as experiments: the arms of each, and what one run of an arm returns.

An arm's function takes a context, a seed and a size (of the run, 1.0 in full). Models and trainers are in `models.py`
and `training.py`, learning rates in `presets.py`, tables and pictures in `report.py`. Left out: a search for the best
settings of each arm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from scripts.studies.reproduce.models import (
    Samples,
    TaskModels,
    measured,
    save_whole,
    teacher_samples,
    write,
)
from scripts.studies.reproduce.presets import BATCH, RunContext
from scripts.studies.reproduce.records import Cost, Result
from scripts.studies.reproduce.training import FixedAdvantage, Schedule, distil, fine_tune, make_order_models
from scripts.studies.tasks.seeds import HELD_OUT, HUMAN, TRAIN
from trl_distill.data.sampling import prompt_ids
from trl_distill.reporting.evaluation import answer_all


@dataclass(frozen=True)
class Arm:
    """
    One way of training that a claim compares with others.

    Attributes:
        label (`str`): in tables, pictures and docs/results/.
        run (`Callable[[RunContext, int, float], Result]`): one run of it, by context, seed and size.
    """

    label: str
    run: Callable[[RunContext, int, float], Result]


@dataclass(frozen=True)
class Claim:
    """
    A sentence of the field, and what it is tried with.

    Attributes:
        sentence (`str`): as it is commonly put.
        arms (`dict[str, Arm]`): by name, which names the files of their runs; in the order of the table.
        prepare (`Callable`, *optional*): makes what all arms share.
    """

    sentence: str
    arms: dict[str, Arm]
    prepare: Callable[[RunContext], None] | None = None


def _gap(kind: str, context: RunContext, seed: int, size: float, then: str | None = None) -> Result:
    """
    The same problems, and as many answers generated and trained on, whoever writes them.

    `kind` is "SFT", "soft targets" or "on-policy". `then` is the learning rate of an on-policy half after one of SFT;
    without it there is none.
    """
    models, cost, steps = TaskModels("one", context), Cost(), round(150 * size)
    student = models.student()
    if kind == "on-policy":
        distil(models, student, Schedule(steps, seed, "on-policy"), cost)
    elif kind == "soft targets":
        samples = teacher_samples(models, BATCH * steps, seed)
        distil(models, student, Schedule(steps, seed, "on-policy"), cost, samples=samples)
    else:
        share = 1.0 if then is None else 0.5
        samples = teacher_samples(models, round(BATCH * steps * share), seed)
        fine_tune(models, student, samples, Schedule(round(steps * share), seed, "SFT"), cost)
        if then is not None:
            others = models.task.problems(BATCH * steps, TRAIN + seed).select(range(len(samples.rows), BATCH * steps))
            distil(models, student, Schedule(steps - round(steps * share), seed, then), cost, rows=others)
    if then is None:
        save_whole(student, _saved(context, kind, seed, size))  # for the claim "mismatch"
    return Result(measured(models, student, seed), cost)


def _saved(context: RunContext, kind: str, seed: int, size: float) -> Path:
    """Where a model of "gap" is kept for "mismatch"."""
    return context.folder / "models" / f"gap-{kind}-{seed}-{size:g}"


OWN = (4, 12, 20, 28, 36, 43)  # tokens that the student writes itself, after the beginning of a right answer


def _mismatch(kind: str, context: RunContext, seed: int, size: float) -> Result:
    """Accuracy where right answers are continued from the middle; the models are those of "gap"."""
    models = TaskModels("one", context)
    path = Path(models.student_path) if kind == "before" else _saved(context, kind, seed, size)
    if not path.exists():
        _gap(kind, context, seed, size)
    model, rows = models.load(path), models.task.problems(round(400 * size), HELD_OUT + seed)
    solutions = [prompt_ids(models.tokenizer, text) for text in rows["solution"]]
    curve = []
    for own in OWN:
        prefixes = [ids[: max(0, len(ids) + 1 - own)] for ids in solutions]  # it writes the stop token, too
        found = [
            one
            for batch in answer_all(
                model,
                list(rows),
                models.tokenizer,
                models.sampling(1, seed),
                [models.task.verifier],
                batch_size=200,
                prefixes=prefixes,
            )
            for one in batch
        ]
        curve.append((own, sum(one.score or 0.0 for one in found) / len(found)))
    return Result(own=curve)


def _on_orders(kind: str, student: str, context: RunContext, seed: int, size: float) -> Result:
    """`kind` is "before", "SFT" or a divergence. Orders have many right answers; 100 problems get 16 answers each."""
    models, cost = TaskModels("many", context, student), Cost()
    model, schedule = models.student(), Schedule(round(300 * size), seed, "many")
    if kind == "SFT":
        fine_tune(models, model, teacher_samples(models, BATCH * schedule.steps, seed), schedule, cost)
    elif kind != "before":
        alpha: dict[str, Any] = {"divergence_alpha": 0.5} if kind in ("jsd", "mixed") else {}
        distil(models, model, schedule, cost, divergence=kind, **alpha)
    return Result(measured(models, model, seed, prompts=100, generations=16), cost)


def _teacher_of_orders(context: RunContext, seed: int, size: float) -> Result:
    models = TaskModels("many", context)
    return Result(measured(models, models.teacher(), seed, prompts=100, generations=16), Cost())


def _reward(
    context: RunContext,
    seed: int,
    size: float,
    *,
    rewarded: bool = True,
    switched: bool = False,
    rate: str = "on-policy",
    **changes: Any,
) -> Result:
    """
    A reward beside the teacher.

    `rewarded` says whether there is a reward at all, `switched` whether it takes the teacher's place after three fifths
    of the steps; `changes` are fields of `OPDConfig`.
    """
    models, cost, steps = TaskModels("one", context), Cost(), round(150 * size)
    student = models.student()
    if switched:
        at = steps * 3 // 5
        changes |= {"reward_start_step": at, "beta_schedule": "step", "beta_schedule_steps": at}
    changes = {"num_generations": 2, **changes}
    reward = [models.task.verifier] if rewarded else None
    distil(models, student, Schedule(steps, seed, rate), cost, reward=reward, **changes)
    return Result(measured(models, student, seed), cost)


def _estimator(context: RunContext, seed: int, size: float, *, rate: str = "on-policy", **changes: Any) -> Result:
    """`changes` are fields of `OPDConfig`."""
    models, cost = TaskModels("one", context), Cost()
    student = models.student()
    distil(models, student, Schedule(round(100 * size), seed, rate), cost, **changes)
    return Result(measured(models, student, seed), cost)


def _control(kind: str, context: RunContext, seed: int, size: float) -> Result:
    """
    `kind` is which teacher: "own", "random", "equal" to the student, the own one asked "another" problem, or "none" but
    a fixed negative advantage for every token.
    """
    models, cost, schedule = TaskModels("one", context), Cost(), Schedule(round(60 * size), seed, "on-policy")
    student = models.student()
    if kind == "random":
        teacher = type(student)(models.load(models.teacher_path).config)
        distil(models, student, schedule, cost, teacher=teacher)
    elif kind == "equal":
        distil(models, student, schedule, cost, teacher=models.student(), assume_different_teacher=True)
    elif kind == "another":
        rows = models.task.problems(BATCH * schedule.steps, TRAIN + seed)
        rows = rows.add_column("teacher_prompt", [*rows["prompt"][1:], rows["prompt"][0]])
        distil(models, student, schedule, cost, rows=rows)
    elif kind == "none":  # TRL wants a reward, which is not used
        changes: dict[str, Any] = {"beta": 0.0, "num_generations": 1, "reward_baseline": "batch"}
        distil(models, student, schedule, cost, reward=[models.task.verifier], kind=FixedAdvantage, **changes)
    else:
        distil(models, student, schedule, cost)
    return Result(measured(models, student, seed), cost)


def _collapse(kind: str, context: RunContext, seed: int, size: float) -> Result:
    """Each round: 1,000 own answers at temperature 1, then 40 steps of SFT on "all", the "right" ones, or "mixed"."""
    models, rounds, count = TaskModels("many", context), round(6 * size), 1000
    model = models.load(models.teacher_path)
    found = [measured(models, model, seed, prompts=100, generations=16)]
    for turn in range(rounds):
        samples = write(models, model, models.task.problems(count, TRAIN + 100 * seed + turn), 100 * seed + turn)
        if kind == "right":
            right = models.task.verifier(samples.texts, samples.rows["answer"])
            kept = [i for i, one in enumerate(right) if one]
            samples = Samples(samples.rows.select(kept), [samples.texts[i] for i in kept])
        elif kind == "mixed":
            human = models.task.problems(count // 4, HUMAN + 100 * seed + turn)
            rows = Dataset.from_list([*human, *samples.rows.select(range(count * 3 // 4))])
            samples = Samples(rows, [*human["solution"], *samples.texts[: count * 3 // 4]])
        fine_tune(models, model, samples, Schedule(40, seed, "SFT"), Cost())
        found.append(measured(models, model, seed, prompts=100, generations=16))
    return Result(rounds=found)


DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "mixed")


run_with = functools.partial


CLAIMS = {
    "gap": Claim(
        "SFT on teacher samples gets most of the way; on-policy closes the gap.",
        {
            "sft": Arm("SFT", run_with(_gap, "SFT")),
            "soft-targets": Arm("soft targets", run_with(_gap, "soft targets")),
            "on-policy": Arm("on-policy", run_with(_gap, "on-policy")),
            "sft-then-on-policy": Arm("SFT, then on-policy", run_with(_gap, "SFT", then="on-policy")),
            "sft-then-slower": Arm("SFT, then slower", run_with(_gap, "SFT", then="after SFT")),
        },
    ),
    "mismatch": Claim(
        "The more of its own tokens stand in the context, the worse a student does that was trained offline.",
        {
            "before": Arm("before", run_with(_mismatch, "before")),
            "sft": Arm("SFT", run_with(_mismatch, "SFT")),
            "on-policy": Arm("on-policy", run_with(_mismatch, "on-policy")),
        },
    ),
    "diversity": Claim(
        "Forward KL is more diverse, reverse KL higher in quality.",
        {
            "teacher": Arm("teacher", _teacher_of_orders),
            "before": Arm("before", run_with(_on_orders, "before", "small")),
            "sft": Arm("SFT", run_with(_on_orders, "SFT", "small")),
            **{kind: Arm(kind, run_with(_on_orders, kind, "small")) for kind in DIVERGENCES},
        },
        make_order_models,
    ),
    "small student": Claim(
        "A student too small for its teacher puts mass under forward KL where the teacher has none.",
        {
            f"{size}-{kind}": Arm(f"{size}, {kind}", run_with(_on_orders, kind, size))
            for size in ("tiny", "small", "student")
            for kind in ("reverse_kl", "forward_kl")
        },
        make_order_models,
    ),
    "rewards": Claim(
        "Reward and teacher together reach more than either.",
        {
            "reward": Arm("reward only", run_with(_reward, beta=0.0, rate="reward", num_generations=8)),
            "teacher": Arm("teacher only", run_with(_reward, rewarded=False)),
            **{f"both-{b:g}": Arm(f"both, beta={b:g}", run_with(_reward, beta=b)) for b in (0.03, 0.1, 0.3)},
            "distil-then-rl": Arm("distil, then RL", run_with(_reward, switched=True, beta_end=0.01)),
        },
    ),
    "estimators": Claim(
        "At equal cost the exact divergence learns faster than its estimates, and short horizons than long ones.",
        {
            "full": Arm("full", _estimator),
            "top-4": Arm("top-4", run_with(_estimator, kl_estimator="topk", kl_top_k=4)),
            "sampled": Arm("sampled", run_with(_estimator, kl_estimator="sampled")),
            "full-discount-0.5": Arm("full, γ=0.5", run_with(_estimator, kl_discount=0.5)),
            "full-discount-1": Arm("full, γ=1", run_with(_estimator, kl_discount=1.0)),
            "full-slower": Arm("full, slower", run_with(_estimator, rate="estimates")),
            "sampled-slower": Arm("sampled, slower", run_with(_estimator, rate="estimates", kl_estimator="sampled")),
            "full-discount-1-slower": Arm("full, γ=1, slower", run_with(_estimator, rate="estimates", kl_discount=1.0)),
        },
    ),
    "controls": Claim(
        "Only a teacher that knows the problem helps.",
        {
            "teacher": Arm("teacher", run_with(_control, "own")),
            "random": Arm("random teacher", run_with(_control, "random")),
            "equal": Arm("teacher equal to student", run_with(_control, "equal")),
            "another-problem": Arm("teacher of another problem", run_with(_control, "another")),
            "fixed-advantage": Arm("no teacher, advantage −1 everywhere", run_with(_control, "none")),
        },
    ),
    "collapse": Claim(
        "A model that is trained on its own answers again and again loses what is rare; filtering and people help.",
        {
            "own": Arm("own answers", run_with(_collapse, "all")),
            "right": Arm("right answers only", run_with(_collapse, "right")),
            "mixed": Arm("a quarter by people", run_with(_collapse, "mixed")),
        },
        make_order_models,
    ),
}
