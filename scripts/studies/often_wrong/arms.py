"""The arms and the runs: what starts, what it is paid for, what the teacher weighs, how long and how fast it trains.

Every arm writes as many answers. The answers of a step are to different problems, one each, since that decided more
than anything else in trials; the reward is compared with the mean of the other answers of the step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
        changes (`dict[str, Any]`): fields of `OPDConfig`.
    """

    label: str
    beta: float | None
    reward: str | None = "right"
    start: str = "student"
    rate: float = 6e-4
    reference: str | None = None
    steps: int = STEPS
    changes: dict[str, Any] = field(default_factory=dict)


RATE, FASTER = 6e-4, 1.2e-3  # peaks


def both(beta: float, rate: float = RATE, reward: str = "right") -> Arm:
    """Reward and teacher in one loss."""
    return Arm(f"both, beta={beta:g}", beta, reward, rate=rate, changes={"beta": beta, **CAP})


def from_teacher(beta: float, rate: float) -> Arm:
    """The usual RL: the teacher's own weights are trained, and anchored to it."""
    return Arm(f"from the teacher, beta={beta:g}", beta, start="teacher", rate=rate, changes={"beta": beta})


def beyond(teacher: float, reference: str) -> Arm:
    """Signed weights: the target lies beyond the teacher, as seen from the reference; there is no reward."""
    weights = {"teacher": teacher, "ref": round(1 - teacher, 6)}
    seen_from = "the student" if reference == "student" else "an earlier copy"
    label = f"no reward, {teacher:g} × the teacher − {teacher - 1:g} × {seen_from}"
    return Arm(label, None, None, reference=reference, changes={"teacher_weights": weights, **CAP})


def arms() -> dict[str, Arm]:
    """By name, which also names the files of their runs."""
    at = STEPS // 2  # step at which the reward begins
    then = {"beta": 1.0, "beta_schedule": "step", "beta_schedule_steps": at, "beta_end": 0.1, "reward_start_step": at}
    falling = {"beta": 1.0, "beta_schedule": "linear", "beta_end": 0.1}
    slow = {f"both-{beta:g}": both(beta) for beta in BETAS}
    fast = {f"both-{beta:g}-faster": both(beta, FASTER) for beta in BETAS}
    return {
        "teacher": Arm("teacher only", None, None, changes=CAP),
        "teacher-faster": Arm("teacher only", None, None, rate=FASTER, changes=CAP),
        "reward": Arm("reward only", None, rate=1e-4, changes={"beta": 0.0}),
        "reward-faster": Arm("reward only", None, rate=3e-4, changes={"beta": 0.0}),
        **slow,
        **fast,
        "falling": Arm("both, beta from 1 to 0.1", 0.1, rate=FASTER, changes={**falling, **CAP}),
        "then-rl": Arm("distil, then RL (beta=0.1)", 0.1, rate=FASTER, changes={**then, **CAP}),
        "own": from_teacher(0.3, RATE),
        "own-slower": from_teacher(0.3, RATE / 3),
        "beyond": beyond(1.5, "50"),
        "beyond-start": beyond(1.25, "student"),
        "lenient-reward": Arm("reward only", None, "lenient", rate=3e-4, changes={"beta": 0.0}),
        **{f"lenient-{beta:g}": both(beta, FASTER, "lenient") for beta in (1.0, 0.3, 0.1, 0.03)},
    }


@dataclass(frozen=True)
class Run:
    """An arm with a teacher's level and a seed."""

    arm: Arm
    level: int
    seed: int


def runs() -> dict[str, Run]:
    """All runs by name, "70-both-0.3-1", the most important first."""
    known = arms()
    others = ("teacher-faster", "both-0.3-faster", "own")  # tried with the other teachers
    found = {
        f"{level}-{name}-{seed}": Run(known[name], level, seed)
        for level in (70, 85, 50)
        for name in (known if level == 70 else others)
        for seed in SEEDS
    }
    return found
