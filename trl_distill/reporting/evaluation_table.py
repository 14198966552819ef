"""The results of an evaluation, as a table and as JSON."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from rich.table import Table

from ..foreign_text import as_written, in_markdown_table
from .evaluation import Answer, Estimate, difference, summarise
from .win_rates import Compared, win_rates


SHARES = (
    "avg@",
    "pass@",
    "truncated",
    "win rate",
    "length-controlled",
    "longer than",
    "judge agrees",
)  # shown in percent if scores are right or wrong


def shown(name: str, estimate: Estimate, graded: bool) -> str:
    """An estimate as text, such as "93.4% (91.2–95.1)", or "–"; graded scores are not in percent."""
    if not math.isfinite(estimate.value):
        return "–"
    if name.startswith(SHARES) and not (graded and name.startswith("avg@")):
        return f"{estimate.value:.1%} ({100 * estimate.low:.1f}–{100 * estimate.high:.1f})"
    digits = 1 if name == "length" else 3
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f}–{estimate.high:.{digits}f})"


def table_rows(results: dict[str, dict[str, Estimate]], graded: bool) -> list[list[str]]:
    """The heading, then a row for each estimate with a column for each model; graded scores are not in percent."""
    names = list(dict.fromkeys(name for estimates in results.values() for name in estimates))
    names = [name for name in names if not (graded and name.startswith("pass@") and " − " in name)]
    rows = [["", *results]]
    for name in names:
        found = [estimates.get(name) for estimates in results.values()]
        label = {"kl": "KL to the teacher, nats per token", "length": "length, tokens"}.get(name, name)
        rows.append([label, *("" if one is None else shown(name, one, graded) for one in found)])
    return rows


def as_json(one: Estimate) -> dict[str, float | None]:
    """An estimate for JSON, with `None` for NaN and infinity."""
    return {key: value if math.isfinite(value) else None for key, value in one._asdict().items()}


class Results:
    """Results so far, saved after each model, so that nothing is lost if a later one fails."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.answers: dict[str, list[Answer]] = {}
        self.seconds: dict[str, float] = {}
        self.unjudged: dict[str, dict[str, int]] = {}
        self.compared: dict[str, tuple[str, list[Compared], dict[str, Any]]] = {}

    def add(self, name: str, answers: list[Answer], seconds: float) -> None:
        self.answers[name], self.seconds[name] = answers, seconds
        self.save()

    def add_comparisons(self, name: str, against: str, found: list[Compared], measures: dict[str, Any]) -> None:
        """A model's comparisons with another, and counts of what the judge said."""
        self.compared[name] = (against, found, measures)
        self.save()

    @property
    def graded(self) -> bool:
        """Whether there are scores other than 0 and 1."""
        return any(one.score not in (None, 0.0, 1.0) for found in self.answers.values() for one in found)

    def estimates(self) -> dict[str, dict[str, Estimate]]:
        found = {
            name: summarise(answers, self.options.k, self.options.correct_from)
            for name, answers in self.answers.items()
        }
        first, *others = self.answers
        scored = self.options.reward_funcs or (self.options.judge and self.options.judge_mode == "score")
        for name in others if scored else ():
            label = f"avg@{self.options.num_generations} − the first's"
            found[name][label] = difference(self.answers[name], self.answers[first])
        for name, (against, compared, _) in self.compared.items():
            found[name] |= win_rates(compared, against)
        return found

    def save(self) -> Path:
        """Write the estimates as JSON and the table as Markdown; returns the path of the table."""
        models: dict[str, dict[str, Any]] = {}
        for name, estimates in self.estimates().items():
            scores: dict[int, list[float | None]] = {}
            for answer in self.answers[name]:
                scores.setdefault(answer.prompt, []).append(answer.score)
            models[name] = {
                "estimates": {key: as_json(one) for key, one in estimates.items()},
                "scores": list(scores.values()),
                "seconds": round(self.seconds[name], 1),
            }
            if name in self.unjudged:
                models[name] |= {"judge_gave_no_score": self.unjudged[name]}
            if name in self.compared:
                against, compared, measures = self.compared[name]
                outcomes: dict[int, list[float | None]] = {}
                for one in compared:
                    outcomes.setdefault(one.prompt, []).append(one.outcome)
                models[name]["comparisons"] = {"against": against, **measures, "outcomes": list(outcomes.values())}
        output: Path = self.options.output
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self.options).items()}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"settings": settings, "models": models}, indent=1, allow_nan=False) + "\n")
        head, *rows = table_rows(self.estimates(), self.graded)
        rule = ["---", *["---:"] * (len(head) - 1)]
        path = output.with_suffix(".md")
        lines = ("| " + " | ".join(map(in_markdown_table, row)) + " |" for row in [head, rule, *rows])
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def table(self, prompts: int) -> Table:
        """The results as a table for the terminal."""
        title = f"{prompts} prompts, {self.options.num_generations} answers each; 95 % intervals over prompts"
        made = Table(title=title)
        head, *body = table_rows(self.estimates(), self.graded)
        for label in head:
            made.add_column(as_written(label), justify="right" if label else "left", overflow="fold")
        for row in body:
            made.add_row(*map(as_written, row))
        return made
