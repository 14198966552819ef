"""What a run of `scripts/reproduce.py` leaves: a file each, and the same rows in docs/results/."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass
class Cost:
    """
    Completion tokens so far, and the accuracy that they bought.

    Attributes:
        generated, trained (`int`): tokens that a model wrote, and that the student was trained on.
        curve (`list[tuple[int, int, float]]`): generated and trained tokens with the accuracy at that point.
    """

    generated: int = 0
    trained: int = 0
    curve: list[tuple[int, int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """
    The numbers of one run; which ones there are depends on the claim.

    Attributes:
        final (`dict[str, float]`): measurements of the trained model, by name.
        cost ([`Cost`], *optional*): of the training.
        own (`list[tuple[int, float]]`): tokens that the student writes itself, and its accuracy then.
        rounds (`list[dict[str, float]]`): measurements before the first round and after each.
    """

    final: dict[str, float] = field(default_factory=dict)
    cost: Cost | None = None
    own: list[tuple[int, float]] = field(default_factory=list)
    rounds: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class RunRecord:
    """
    One finished run.

    Attributes:
        claim (`str`): that it belongs to.
        arm (`str`): the arm's label, as tables and pictures show it.
        seed (`int`): of the run.
        size (`float`): 1.0 in full; less is a rehearsal.
        result ([`Result`]): its numbers.
        seconds (`int`): that it took.
    """

    claim: str
    arm: str
    seed: int
    size: float
    result: Result
    seconds: int

    def to_json(self) -> dict[str, Any]:
        """Plain values; of the result, what there is."""
        numbers = {name: value for name, value in asdict(self.result).items() if value}
        head = {"claim": self.claim, "arm": self.arm, "seed": self.seed, "size": self.size}
        return {**head, **numbers, "seconds": self.seconds}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> RunRecord:
        """The way back; pairs of a curve come back as tuples."""
        numbers = {one.name: found[one.name] for one in fields(Result) if one.name in found}
        if "cost" in numbers:
            cost = Cost(**numbers["cost"])
            numbers["cost"] = Cost(
                cost.generated, cost.trained, [(made, seen, right) for made, seen, right in cost.curve]
            )
        if "own" in numbers:
            numbers["own"] = [(own, accuracy) for own, accuracy in numbers["own"]]
        head = {name: found[name] for name in ("claim", "arm", "seed", "size", "seconds")}
        return cls(result=Result(**numbers), **head)

    def save(self, path: Path) -> None:
        """Write a file that is either whole or not there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(self.to_json()) + "\n")
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> RunRecord:
        return cls.from_json(json.loads(path.read_text()))
