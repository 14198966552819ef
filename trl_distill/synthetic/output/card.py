"""The card of a dataset: a README that says how it was made and counts what each stage kept and why.

The YAML at its head names no data files: `datasets` would then cache by the folder's last name alone, and read an older
dataset instead of this one. It finds `data/train-*.parquet` by itself. The numbers are given by the pipeline.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from ..config import GenerateConfig
from .counts import Skip, Stage


LISTED = 100  # skipped rows


HEAD = """---
tags:
- synthetic
- trl_distill
---
"""


def card(
    config: GenerateConfig,
    settings: dict[str, Any],
    stages: list[Stage],
    rows: dict[str, int],
    skips: Iterable[Skip],
    notes: list[str],
) -> str:
    """
    The text of README.md.

    Args:
        config (`GenerateConfig`): whose teachers are named.
        settings (`dict`): what is listed as settings.
        stages (`list[Stage]`): in their order.
        rows (`dict[str, int]`): of the finished dataset, by who wrote them.
        skips (`Iterable[Skip]`): what could not be used; the first 100 are listed.
        notes (`list[str]`): what a reader must know beside the numbers.
    """
    kind = "Preference pairs" if config.pairs else "Prompts and completions"
    text = [HEAD, "# Synthetic dataset", f"{kind}, {sum(rows.values())} rows, made by `scripts/generate.py`."]
    text += [f"**{note}**" for note in notes]
    text += ["## What each stage kept", _table(("stage", "unit", "in", "kept", "dropped", "why"), map(_line, stages))]
    text += ["## Who wrote the rows", _table(("writer", "rows"), ((n, str(count)) for n, count in rows.items()))]
    where = [(name, address.kind, address.model) for name, address in config.teachers.items()]
    text += ["## Teachers", _table(("name", "run by", "model"), where)]
    chosen = ((f"`{name}`", f"`{value}`") for name, value in settings.items() if value is not None)
    text += ["## Settings", _table(("setting", "value"), chosen)]
    listed = list(islice(skips, LISTED + 1))
    if listed:
        lines = [(skip.stage, skip.where, skip.why) for skip in listed[:LISTED]]
        more = f"The first {LISTED}; " if len(listed) > LISTED else ""
        text += ["## Skipped", f"{more}all are in `skipped.jsonl`.", _table(("stage", "where", "why"), lines)]
    return "\n\n".join(text) + "\n"


def _line(stage: Stage) -> tuple[str, ...]:
    why = "; ".join(f"{reason}: {count}" for reason, count in sorted(stage.dropped.items()))
    return (stage.name, stage.unit, str(stage.seen), str(stage.kept), str(stage.dropped.total()), why)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
