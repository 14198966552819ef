"""The claims of the field as experiments: for each its arms, and what one run of an arm returns as plain numbers.

An arm is a function of a place, a seed and a size (of the run, 1.0 in full). Models, trainers and learning rates are in
`reproduce_runs.py`; tables and pictures in `reproduce_report.py`. Left out: a search for the best settings of each arm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from scripts.studies.reproduce.runs import (
    BATCH,
    Cost,
    RunContext,
    TaskModels,
    distil,
    fine_tune,
    make_order_models,
    measured,
    save_whole,
    teacher_samples,
    write,
)
from scripts.studies.tasks.seeds import HELD_OUT, HUMAN, TRAIN
from trl_distill.data.sampling import prompt_ids
from trl_distill.reporting.evaluation import answer_all


Result = dict[str, Any]


Arm = Callable[[RunContext, int, float], Result]


@dataclass(frozen=True)
class Claim:
    """
    A sentence of the field, and what it is tried with.

    Attributes:
        sentence (`str`): as it is commonly put.
        arms (`dict[str, Arm]`): by name.
        prepare (*optional*): makes what all arms share.
    """

    sentence: str
    arms: dict[str, Arm]
    prepare: Callable[[RunContext], None] | None = None


def _ended(bench: TaskModels, model: Any, seed: int, cost: Cost, **how: int) -> Result:
    return {"final": measured(bench, model, seed, **how), "cost": asdict(cost)}


def _gap(kind: str, place: RunContext, seed: int, size: float, then: str | None = None) -> Result:
    """
    The same problems, and as many answers generated and trained on, whoever writes them.

    `then` is the learning rate of an on-policy half after one of SFT; without it there is none.
    """
    bench, cost, steps = TaskModels("one", place), Cost(), round(150 * size)
    student = bench.student()
    if kind == "on-policy":
        distil(bench, student, steps, seed, cost)
    elif kind == "soft targets":
        rows, texts, tokens = teacher_samples(bench, BATCH * steps, seed)
        rows = rows.add_column("completion", [[{"role": "assistant", "content": text}] for text in texts])
        distil(bench, student, steps, seed, cost, rows=rows, lmbda=0.0, generated=tokens, per_step=tokens // steps)
    else:
        share = 1.0 if then is None else 0.5
        rows, texts, tokens = teacher_samples(bench, round(BATCH * steps * share), seed)
        fine_tune(bench, student, rows, texts, round(steps * share), seed, cost, tokens)
        if then is not None:
            others = bench.task.problems(BATCH * steps, TRAIN + seed).select(range(len(rows), BATCH * steps))
            distil(bench, student, steps - round(steps * share), seed, cost, rate=then, rows=others)
    save_whole(student, _saved(place, kind, seed, size))
    return _ended(bench, student, seed, cost)


def _saved(place: RunContext, kind: str, seed: int, size: float) -> Path:
    """Where a model of this claim is kept for the next one."""
    return place.folder / "models" / f"gap-{kind}-{seed}-{size:g}"


OWN = (4, 12, 20, 28, 36, 43)  # tokens that the student writes itself; what comes before is a right answer's


def _mismatch(kind: str, place: RunContext, seed: int, size: float) -> Result:
    """Accuracy where right answers are continued from the middle; the models are those of "gap"."""
    bench = TaskModels("one", place)
    path = Path(bench.student_path) if kind == "before" else _saved(place, kind, seed, size)
    if not path.exists():
        _gap(kind, place, seed, size)
    model, rows = bench.load(path), bench.task.problems(round(400 * size), HELD_OUT + seed)
    solutions = [prompt_ids(bench.tokenizer, text) for text in rows["solution"]]
    curve = []
    for own in OWN:
        prefixes = [ids[: max(0, len(ids) + 1 - own)] for ids in solutions]  # and the stop token is its own
        found = [
            one
            for batch in answer_all(
                model,
                list(rows),
                bench.tokenizer,
                bench.sampling(1, seed),
                [bench.task.verifier],
                batch_size=200,
                prefixes=prefixes,
            )
            for one in batch
        ]
        curve.append((own, sum(one.score or 0.0 for one in found) / len(found)))
    return {"own": curve}


def _divergence(kind: str, student: str, place: RunContext, seed: int, size: float) -> Result:
    """On orders, which have many right answers; 16 answers to each of 100 problems are looked at."""
    bench, cost, steps = TaskModels("many", place, student), Cost(), round(300 * size)
    model = bench.student()
    if kind == "SFT":
        rows, texts, tokens = teacher_samples(bench, BATCH * steps, seed)
        fine_tune(bench, model, rows, texts, steps, seed, cost, tokens, rate="many")
    elif kind != "before":
        alpha = {"divergence_alpha": 0.5} if kind in ("jsd", "mixed") else {}
        distil(bench, model, steps, seed, cost, divergence=kind, rate="many", **alpha)
    return _ended(bench, model, seed, cost, prompts=100, generations=16)


def _teacher_of_orders(place: RunContext, seed: int, size: float) -> Result:
    bench = TaskModels("many", place)
    return _ended(bench, bench.teacher(), seed, Cost(), prompts=100, generations=16)


def _reward(changes: dict[str, Any], place: RunContext, seed: int, size: float) -> Result:
    bench, cost, steps = TaskModels("one", place), Cost(), round(150 * size)
    student, changes = bench.student(), dict(changes)
    rewards = None if changes.pop("teacher_only", False) else [bench.task.verifier]
    if changes.pop("then", False):
        switch = steps * 3 // 5
        changes |= {"reward_start_step": switch, "beta_schedule": "step", "beta_schedule_steps": switch}
    changes = {"num_generations": 2, **changes}
    distil(bench, student, steps, seed, cost, reward_funcs=rewards, **changes)
    return _ended(bench, student, seed, cost)


def _estimator(changes: dict[str, Any], place: RunContext, seed: int, size: float) -> Result:
    bench, cost = TaskModels("one", place), Cost()
    student = bench.student()
    distil(bench, student, round(100 * size), seed, cost, **changes)
    return _ended(bench, student, seed, cost)


def _control(kind: str, place: RunContext, seed: int, size: float) -> Result:
    bench, cost, steps = TaskModels("one", place), Cost(), round(60 * size)
    student, changes = bench.student(), {}
    if kind == "random teacher":
        changes["teacher"] = type(student)(bench.load(bench.teacher_path).config)
    elif kind == "teacher equal to student":
        changes |= {"teacher": bench.student(), "assume_different_teacher": True}
    elif kind == "teacher of another problem":
        rows = bench.task.problems(BATCH * steps, TRAIN + seed)
        changes["rows"] = rows.add_column("teacher_prompt", [*rows["prompt"][1:], rows["prompt"][0]])
    distil(bench, student, steps, seed, cost, **changes)
    return _ended(bench, student, seed, cost)


def _collapse(kind: str, place: RunContext, seed: int, size: float) -> Result:
    """Each round: 1,000 own answers at temperature 1, then 40 steps of SFT on them."""
    bench, rounds, count = TaskModels("many", place), round(6 * size), 1000
    model = bench.load(bench.teacher_path)
    found = [measured(bench, model, seed, prompts=100, generations=16)]
    for turn in range(rounds):
        rows = bench.task.problems(count, TRAIN + 100 * seed + turn)
        texts, _ = write(bench, model, rows, 100 * seed + turn)
        if kind == "right answers only":
            right = bench.task.verifier(texts, rows["answer"])
            kept = [i for i, one in enumerate(right) if one]
            rows, texts = rows.select(kept), [texts[i] for i in kept]
        elif kind == "a quarter by people":
            human = bench.task.problems(count // 4, HUMAN + 100 * seed + turn)
            rows = Dataset.from_list([*human, *rows.select(range(count * 3 // 4))])
            texts = [*human["solution"], *texts[: count * 3 // 4]]
        fine_tune(bench, model, rows, texts, 40, seed, Cost())
        found.append(measured(bench, model, seed, prompts=100, generations=16))
    return {"rounds": found}


def _arms(function: Callable[..., Result], *kinds: str) -> dict[str, Arm]:
    return {kind: functools.partial(function, kind) for kind in kinds}


DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "mixed")


CLAIMS = {
    "gap": Claim(
        "SFT on teacher samples gets most of the way; on-policy closes the gap.",
        {
            **_arms(_gap, "SFT", "soft targets", "on-policy"),
            "SFT, then on-policy": functools.partial(_gap, "SFT, then on-policy", then="on-policy"),
            "SFT, then slower": functools.partial(_gap, "SFT, then slower", then="after SFT"),
        },
    ),
    "mismatch": Claim(
        "The more of its own tokens stand in the context, the worse a student does that was trained offline.",
        _arms(_mismatch, "before", "SFT", "on-policy"),
    ),
    "diversity": Claim(
        "Forward KL is more diverse, reverse KL higher in quality.",
        {
            "teacher": _teacher_of_orders,
            **{k: functools.partial(_divergence, k, "small") for k in ("before", "SFT", *DIVERGENCES)},
        },
        make_order_models,
    ),
    "small student": Claim(
        "A student too small for its teacher puts mass under forward KL where the teacher has none.",
        {
            f"{size}, {kind}": functools.partial(_divergence, kind, size)
            for size in ("tiny", "small", "student")
            for kind in ("reverse_kl", "forward_kl")
        },
        make_order_models,
    ),
    "rewards": Claim(
        "Reward and teacher together reach more than either.",
        {
            "reward only": functools.partial(_reward, {"beta": 0.0, "rate": "reward", "num_generations": 8}),
            "teacher only": functools.partial(_reward, {"teacher_only": True}),
            **{f"both, beta={b:g}": functools.partial(_reward, {"beta": b}) for b in (0.03, 0.1, 0.3)},
            "distil, then RL": functools.partial(_reward, {"then": True, "beta_end": 0.01}),
        },
    ),
    "estimators": Claim(
        "At equal cost the exact divergence learns faster than its estimates, and short horizons than long ones.",
        {
            "full": functools.partial(_estimator, {}),
            "top-4": functools.partial(_estimator, {"kl_estimator": "topk", "kl_top_k": 4}),
            "sampled": functools.partial(_estimator, {"kl_estimator": "sampled"}),
            "full, γ=0.5": functools.partial(_estimator, {"kl_discount": 0.5}),
            "full, γ=1": functools.partial(_estimator, {"kl_discount": 1.0}),
            "full, slower": functools.partial(_estimator, {"rate": "estimates"}),
            "sampled, slower": functools.partial(_estimator, {"rate": "estimates", "kl_estimator": "sampled"}),
            "full, γ=1, slower": functools.partial(_estimator, {"rate": "estimates", "kl_discount": 1.0}),
        },
    ),
    "controls": Claim(
        "Only a teacher that knows the problem helps.",
        _arms(_control, "teacher", "random teacher", "teacher equal to student", "teacher of another problem"),
    ),
    "collapse": Claim(
        "A model that is trained on its own answers again and again loses what is rare; filtering and people help.",
        _arms(_collapse, "own answers", "right answers only", "a quarter by people"),
        make_order_models,
    ),
}
