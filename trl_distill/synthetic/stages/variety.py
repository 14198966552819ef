"""Collects what the card says about variety: samples of seeds, rows and human data, and of the prompts of each round.

Bounded memory: a sample of [`~trl_distill.synthetic.output.diversity.SAMPLE`] texts of each set. The measures are in
`output/diversity.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from ..output.diversity import Sample, by_round, compare, falls
from ..records import PromptRow
from ..text import flat
from ..work_folder import seed_of


STRETCHES = 4  # into which the rounds of new prompts are divided, which may be many


class Variety:
    """
    Args:
        seed (`int`): of the samples.
        seeds (`int`): how many prompts were read; those with a higher id were made.
        total (`int`): how many were read or made.
        evolves (`bool`, *optional*, defaults to `False`): whether prompts are rewritten; otherwise a column
            `evolution` is one of the input's.
    """

    def __init__(self, seed: int, seeds: int, total: int, evolves: bool = False):
        self.seed, self.seeds, self.total, self.evolves = seed, seeds, total, evolves
        self.samples: dict[tuple[str, str], Sample] = {}
        self.operations: Counter[str] = Counter()

    def add_prompts(self, originals: Iterable[PromptRow], completed: Iterable[PromptRow]) -> None:
        """The prompts of a chunk: those that were read or newly made, and those that teachers completed."""
        for row in originals:
            self._add("rounds", self._round(row.id), flat(row.prompt))
            if row.id < self.seeds:
                self._add("prompts", "seeds", flat(row.prompt))
        for row in completed:
            if self.evolves and row.columns.get("evolution"):
                self._add("rounds", f"evolve round {len(row.columns['evolution'])}", flat(row.prompt))

    def add_row(self, row: dict[str, Any], name: str = "dataset") -> None:
        """A row of the dataset, or (`name="human"`) of the human data."""
        self._add("prompts", name, flat(row["prompt"]))
        self._add("completions", name, flat(row["completion"] if "completion" in row else row["chosen"]))
        if self.evolves and name == "dataset" and (evolution := row.get("evolution")):
            self.operations[evolution[-1]] += 1

    def summary(self) -> dict[str, Any]:
        """All measures, as `counts.json` holds them."""
        prompts, completions, rounds = (self._texts(kind) for kind in ("prompts", "completions", "rounds"))
        found: dict[str, Any] = {"prompts": compare(prompts, near="seeds"), "completions": compare(completions)}
        if len(rounds) > 1:
            found["rounds"] = by_round(rounds)
        if self.operations:
            found["last operation"] = dict(sorted(self.operations.items()))
        return found

    def _round(self, number: int) -> str:
        if number < self.seeds:
            return "seeds"
        stretch = (number - self.seeds) * STRETCHES // (self.total - self.seeds)
        return f"new prompts, quarter {stretch + 1}"

    def _add(self, kind: str, name: str, text: str) -> None:
        sample = self.samples.get((kind, name))
        if sample is None:
            sample = self.samples[kind, name] = Sample(seed_of(self.seed, "variety", kind, name))
        sample.add(text)

    def _texts(self, kind: str) -> dict[str, list[str]]:
        """In the order of the rounds."""
        names = [name for of, name in self.samples if of == kind]
        order = ("seeds", "new", "evolve", "dataset", "human")
        names.sort(key=lambda name: (order.index(name.split(",")[0].split()[0]), len(name), name))
        return {name: self.samples[kind, name].texts for name in names}


def variety_notes(summary: dict[str, Any]) -> list[str]:
    """Warnings where variety falls from round to round."""
    return falls(summary.get("rounds", {}))
