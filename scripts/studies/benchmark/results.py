"""What `scripts/benchmark.py` has measured: of each contender, of each cell, of a whole call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from scripts.studies.benchmark.cells import Cell, Size


TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}  # of a loss, relative to the size of its terms


@dataclass
class ContenderResult:
    """
    What was measured of a contender in one cell.

    Attributes:
        label (`str`): in tables.
        ours (`bool`): whether it is one of our trainers.
        objective (`str`): that it minimises.
        expected (`float`): the loss that this objective has on the cell's rollouts.
        scale (`float`): size of the terms that the loss is a sum of.
        loss (`float`, *optional*): that the trainer reports.
        update_s, step_s (`list[float]`): seconds of an update in each turn, and of a step with generation.
        generation_s (`float`, *optional*): seconds of the generation alone.
        shares (`dict[str, float]`): seconds of an update by part.
        whole (`dict[str, float]`): seconds of a step with generation by part; of ours.
        peak_mib (`float`, *optional*): peak memory above models and optimizer.
        failed (`str`): why there are no numbers; empty otherwise.
    """

    label: str
    ours: bool
    objective: str
    expected: float
    scale: float
    loss: float | None = None
    update_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    generation_s: float | None = None
    shares: dict[str, float] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)
    peak_mib: float | None = None
    failed: str = ""

    def difference(self) -> float:
        """Of the loss from its objective, relative to the size of its terms."""
        assert self.loss is not None
        return abs(self.loss - self.expected) / max(abs(self.expected), self.scale)

    def agrees(self, dtype: str) -> bool:
        """Whether the loss is the objective's, to the rounding of the cell's dtype."""
        return self.difference() <= TOLERANCE[dtype]


@dataclass
class CellResult:
    """
    What was measured of a cell.

    Attributes:
        cell ([`Cell`]): the shape.
        tokens_in_all, completion_tokens (`int`): of one step, with and without the prompts.
        contenders (`dict[str, ContenderResult]`): by name.
        floor_s (`list[float]`): seconds of the bare matrix products, in each round.
    """

    cell: Cell
    tokens_in_all: int
    completion_tokens: int
    contenders: dict[str, ContenderResult]
    floor_s: list[float] = field(default_factory=list)

    def base(self) -> str:
        """Our contender that the others are compared with."""
        return next(name for name, found in self.contenders.items() if found.ours)

    def to_json(self) -> dict[str, Any]:
        """Plain values; of the contenders, those that were measured."""
        contenders = {
            name: {key: value for key, value in asdict(found).items() if value not in (None, [], {}, "")}
            for name, found in self.contenders.items()
        }
        measured = {"lengths": self.cell.lengths(), "contenders": contenders, "floor_s": self.floor_s}
        tokens = {"tokens_in_all": self.tokens_in_all, "completion_tokens": self.completion_tokens}
        return {**asdict(self.cell), **measured, **tokens}


@dataclass(frozen=True)
class Machine:
    """What was measured on: processor, device, threads of PyTorch."""

    processor: str
    device: str
    threads: int


@dataclass
class Results:
    """
    One call of the benchmark.

    Attributes:
        preset (`str`): of cells.
        dry_run (`bool`): whether it is a rehearsal.
        machine ([`Machine`]): that it ran on.
        versions (`dict[str, str]`): of Python and the libraries.
        command (`str`): that was typed.
        cells (`list[CellResult]`): in their order.
        beside (`str`): what else ran on the machine.
    """

    preset: str
    dry_run: bool
    machine: Machine
    versions: dict[str, str]
    command: str
    cells: list[CellResult] = field(default_factory=list)
    beside: str = ""

    def pairs(self) -> Iterator[tuple[CellResult, str, ContenderResult, ContenderResult]]:
        """Each cell with each contender that ours is compared with, outside of the growth: cell, name, ours, theirs."""
        for found in self.cells:
            base = found.base()
            for name, theirs in found.contenders.items():
                if name != base and not found.cell.axis:
                    yield found, name, found.contenders[base], theirs

    @classmethod
    def load(cls, path: Path) -> Results:
        """What [`save`] wrote."""
        whole = json.loads(path.read_text())
        cells = []
        for one in whole["cells"]:
            kept = {field.name: one[field.name] for field in fields(Cell) if field.name in one}
            kept |= {name: Size(**one[name]) for name in ("student", "teacher")}
            contenders = {name: ContenderResult(**found) for name, found in one["contenders"].items()}
            cell = Cell(**{**kept, "contenders": tuple(contenders)})
            cells.append(CellResult(cell, one["tokens_in_all"], one["completion_tokens"], contenders, one["floor_s"]))
        return cls(**{**whole, "machine": Machine(**whole["machine"]), "cells": cells})

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        whole = {
            "preset": self.preset,
            "dry_run": self.dry_run,
            "machine": asdict(self.machine),
            "versions": self.versions,
            "command": self.command,
            "beside": self.beside,
            "cells": [found.to_json() for found in self.cells],
        }
        (folder / "benchmark.json").write_text(json.dumps(whole, indent=2) + "\n")
