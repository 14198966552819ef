"""The arms and the runs: what starts, what it is paid for, what the teacher weighs, how long and how fast it trains.

Every arm writes as many answers. The answers of a step are to different problems, one each, since that decided more
than anything else in trials; the reward is compared with the mean of the other answers of the step.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


BETAS = (1.0, 0.5, 0.3, 0.1)

SEEDS = (0, 1, 2)

STEPS, BATCH = 300, 64  # optimizer steps, answers in each: the same for all arms

SETTINGS: dict[str, Any] = {
    "num_generations": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "adam_beta2": 0.95,
    "logging_steps": 10,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
}

# What one token may pull is bounded, for a student that starts far from its teacher: see scripts/studies/demo/run.py.
CAP: dict[str, Any] = {"token_weighting": "cap", "token_weighting_kwargs": {"nats": 0.3}}


@dataclass(frozen=True)
class Arm:
    """
    One way of training.

    Attributes:
        label (`str`): in table and picture.
        beta (`float`, *optional*): for which the formula promises an accuracy; `None` where it promises none.
        reward (`str`, *optional*): a key of `REWARDS`.
        start (`str`): what is trained, "student" or "teacher".
        rate (`float`): learning rate at its peak.
        reference (`str`, *optional*): second teacher, for signed weights: "student", or the level of a teacher.
        steps (`int`): optimizer steps.
        problems (`int`, *optional*): different ones, which come again and again; `None` where none comes twice.
        changes (`dict[str, Any]`): fields of `OPDConfig`.
        part (`str`): of the page that shows it: "table", "reward" (the one with a hole), "settings" or "staleness".
    """

    label: str
    beta: float | None
    reward: str | None = "right"
    start: str = "student"
    rate: float = 6e-4
    reference: str | None = None
    steps: int = STEPS
    problems: int | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    part: str = "table"


FEW = STEPS * BATCH // 8  # problems, where each comes 8 times

RATE = 6e-4  # at its peak; "faster" is twice that, "slower" a half


def both(beta: float, reward: str = "right") -> Arm:
    """Reward and teacher in one loss."""
    return Arm(f"both, beta={beta:g}", beta, reward, changes={"beta": beta, **CAP})


def then(beta: float, rate: float = RATE, more: str = "") -> Arm:
    """The teacher alone, at beta=1, for a third of the steps; then both."""
    at = STEPS // 3
    switch = {"beta": 1.0, "beta_schedule": "step", "beta_schedule_steps": at, "beta_end": beta}
    label = f"teacher alone for {at} steps, then both, beta={beta:g}{more}"
    return Arm(label, beta, rate=rate, changes={**switch, "reward_start_step": at, **CAP})


def reward_alone(rate: float, reward: str = "right", more: str = "") -> Arm:
    return Arm(f"reward only{more}", None, reward, rate=rate, changes={"beta": 0.0})


def from_teacher(beta: float, rate: float, reward: str = "right", more: str = "") -> Arm:
    """The usual RL: the teacher's own weights are trained, and anchored to it; with `beta=0` they are not anchored."""
    label = f"from the teacher, beta={beta:g}{more}"
    return Arm(label, beta or None, reward, start="teacher", rate=rate, changes={"beta": beta})


def beyond(teacher: float, reference: str) -> Arm:
    """Signed weights: the target lies beyond the teacher, as seen from the reference; there is no reward."""
    weights = {"teacher": teacher, "ref": round(1 - teacher, 6)}
    seen_from = "the student" if reference == "student" else "an earlier copy"
    label = f"no reward, {teacher:g} × the teacher − {teacher - 1:g} × {seen_from}"
    return Arm(label, None, None, reference=reference, changes={"teacher_weights": weights, **CAP})


def arms() -> dict[str, Arm]:
    """By name, which also names the files of their runs."""
    falling = {"beta": 1.0, "beta_schedule": "linear", "beta_end": 0.1}
    return {
        "teacher": Arm("teacher only", None, None, changes=CAP),
        "reward": reward_alone(1e-4),
        "reward-faster": reward_alone(3e-4, more=", faster"),
        **{f"both-{beta:g}": both(beta) for beta in BETAS},
        "falling": Arm("both, beta from 1 to 0.1", 0.1, changes={**falling, **CAP}),
        "then-0.3": then(0.3),
        "then-0.1": then(0.1),
        "then-0.3-faster": then(0.3, 2 * RATE, ", faster"),
        "own-0.3": from_teacher(0.3, RATE / 2),
        "own-0.3-faster": from_teacher(0.3, RATE, more=", faster"),
        "beyond": beyond(1.5, "50"),
        "beyond-start": beyond(1.25, "student"),
        **cheated(),
        **settings(),
        **stale(),
    }


def cheated() -> dict[str, Arm]:
    """The reward with a hole; half as many steps are enough to see whether it is found."""
    found = {"lenient-reward": reward_alone(3e-4, "lenient")}
    found |= {f"lenient-{beta:g}": both(beta, "lenient") for beta in (0.3, 1.0, 3.0)}
    found |= {f"lenient-own-{beta:g}": from_teacher(beta, RATE / 2, reward="lenient") for beta in (0.0, 0.3)}
    return {name: replace(arm, part="reward", steps=STEPS // 2) for name, arm in found.items()}


def settings() -> dict[str, Arm]:
    """What else decides: prompts and answers of a step, what a reward is compared with, the cap, time."""
    found = {}
    for answers, baseline in ((2, "group"), (4, "group"), (8, "group"), (2, "batch"), (8, "batch")):
        changes = {**then(0.3).changes, "num_generations": answers, "reward_baseline": baseline}
        label = f"{BATCH // answers} prompts × {answers} answers, `reward_baseline='{baseline}'`"
        found[f"{BATCH // answers}x{answers}-{baseline}"] = replace(then(0.3), label=label, changes=changes)
    for baseline in ("batch", "prompt"):
        changes = {**then(0.3).changes, "reward_baseline": baseline}
        label = f"{BATCH} prompts × 1 answer of {FEW:,}, `reward_baseline='{baseline}'`"
        found[f"few-{baseline}"] = replace(then(0.3), label=label, changes=changes, problems=FEW)
    plain = {name: value for name, value in then(0.3).changes.items() if name not in CAP}
    found["uncapped"] = replace(then(0.3), label=f"{BATCH} prompts × 1, no cap", changes=plain)
    found["teacher-uncapped"] = Arm("teacher only, no cap", None, None)
    longer = from_teacher(0.3, RATE / 2, more=f", {3 * STEPS} steps")
    found["own-0.3-longer"] = replace(longer, steps=3 * STEPS)
    return {name: replace(arm, part="settings") for name, arm in found.items()}


def stale() -> dict[str, Arm]:
    """The teacher alone, with answers that are used several times: as many updates, and fewer answers written."""
    found = {}
    for name, divergence in (("reverse", "reverse_kl"), ("forward", "forward_kl")):
        for times in (1, 2, 4, 8):
            changes = {"divergence": divergence, "num_iterations": times, **CAP}
            label = f"{name} KL, `num_iterations={times}`"
            found[f"stale-{name}-{times}"] = Arm(label, None, None, changes=changes, part="staleness")
    return {name: replace(arm, steps=STEPS // 2) for name, arm in found.items()}


@dataclass(frozen=True)
class Run:
    """An arm with a teacher's level and a seed."""

    arm: Arm
    level: int
    seed: int


WITH_OTHERS = ("teacher", "both-0.3", "then-0.3")  # arms that are tried with all teachers


def runs() -> dict[str, Run]:
    """All runs by name: "70-both-0.3-1" is the teacher's level, the arm and the seed."""
    known = arms()
    return {
        f"{level}-{name}-{seed}": Run(known[name], level, seed)
        for level in (70, 85, 50)
        for name in (known if level == 70 else WITH_OTHERS)
        for seed in SEEDS
    }
