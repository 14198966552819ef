"""The card of a dataset: a README that says how it was made and counts what each stage kept and why.

The YAML at its head names no data files: `datasets` would then cache by the folder's last name alone, and read an older
dataset instead of this one. It finds `data/train-*.parquet` by itself. The numbers are given by the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from ...foreign_text import as_code, in_markdown, in_markdown_table
from ..config import GenerateConfig
from .counts import Skip, Stage
from .diversity import WORDS


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
    variety: dict[str, Any] | None = None,
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
        variety (`dict`, *optional*): as [`~trl_distill.synthetic.stages.variety.Variety`] summarises it.
    """
    kind = "Preference pairs" if config.pairs else "Prompts and completions"
    text = [HEAD, "# Synthetic dataset", f"{kind}, {sum(rows.values())} rows, made by `scripts/generate.py`."]
    text += [f"**{note}**" for note in notes]
    text += ["## What each stage kept", _table(("stage", "unit", "in", "kept", "dropped", "why"), map(_line, stages))]
    text += ["## Who wrote the rows", _table(("writer", "rows", "share"), _shares(rows))]
    text += _variety(variety or {})
    where = [(name, address.kind, address.model) for name, address in config.teachers.items()]
    text += ["## Teachers", _table(("name", "run by", "model"), where)]
    chosen = ((str(name), str(value)) for name, value in settings.items() if value is not None)
    text += ["## Settings", _table(("setting", "value"), chosen, shown=as_code)]
    listed = list(islice(skips, LISTED + 1))
    if listed:
        lines = [(skip.stage, skip.where, skip.why) for skip in listed[:LISTED]]
        more = f"The first {LISTED}; " if len(listed) > LISTED else ""
        text += ["## Skipped", f"{more}all are in `skipped.jsonl`.", _table(("stage", "where", "why"), lines)]
    return "\n\n".join(text) + "\n"


def _shares(rows: dict[str, int]) -> list[tuple[str, str, str]]:
    total = sum(rows.values())
    return [(name, str(count), f"{count / total:.1%}") for name, count in rows.items()]


def _variety(found: dict[str, Any]) -> list[str]:
    """The section about variety; nothing where nothing was measured."""
    if not found:
        return []
    text = [
        "## Variety",
        f"Measured on samples of equal size (`texts`), each text cut to its first {WORDS} words; `words` are quantiles "
        "of the whole texts' lengths in the sample. Similarity is the Jaccard similarity of word 3-grams to the "
        "nearest other text, or to the nearest seed (a seed that stays in the dataset is nearest to itself). More "
        "variety: more distinct n-grams; lower self-BLEU, compression ratio and similarity.",
    ]
    for title, sets in (("prompts", found["prompts"]), ("completions", found["completions"])):
        names = list(dict.fromkeys(name for of_set in sets.values() for name in of_set))
        rows = [(name, *(_shown(of_set.get(name)) for of_set in sets.values())) for name in names]
        text += [_table((title, *sets), rows)]
    if found.get("rounds"):
        rows = [(name, *map(_shown, of_round.values())) for name, of_round in found["rounds"].items()]
        text += [_table(("round", "texts", "distinct-2", "nearest other"), rows)]
    if operations := found.get("last operation"):
        total = sum(operations.values())
        shares = [(name, str(count), f"{count / total:.1%}") for name, count in operations.items()]
        text += [_table(("last operation", "rows", "share of the rewrites"), shares)]
    return text


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {number:g}" for name, number in value.items())
    return "" if value is None else f"{value:g}"


def _line(stage: Stage) -> tuple[str, ...]:
    why = "; ".join(f"{reason}: {count}" for reason, count in sorted(stage.dropped.items()))
    return (stage.name, stage.unit, str(stage.seen), str(stage.kept), str(stage.dropped.total()), why)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]], shown: Callable[[object], str] = in_markdown) -> str:
    """A table whose cells are text as it is written, or code."""
    lines = [map(in_markdown, head), ("---",) * len(head), *(map(shown, row) for row in rows)]
    return "\n".join("| " + " | ".join(map(in_markdown_table, line)) + " |" for line in lines)
