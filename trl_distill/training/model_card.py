"""The model card of a trained student: TRL's, completed by what was distilled from what, and how.

TRL writes `README.md`; [`complete`] replaces its first sentence, which knows hub names only, and adds a table.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..config import OPDConfig
from ..foreign_text import as_code, in_markdown, in_markdown_table
from ..redaction import redacted


ORIGIN = re.compile(r"^This model is a fine-tuned version of .*$", re.MULTILINE)  # TRL's sentence


HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


BEFORE = "### Framework versions"  # TRL's heading, before which the table stands


def complete(text: str, facts: dict[str, Any], args: OPDConfig) -> str:
    """
    TRL's card with student, teachers and the settings of the distillation. Secrets are masked.

    Args:
        text (`str`): the card that TRL wrote.
        facts (`dict`): "student", "teachers" by name, and "reward_funcs".
        args ([`OPDConfig`]): resolved.

    Returns:
        `str`: the card. If TRL's sentence or heading is not found, both are put at the end.
    """
    facts = redacted(facts)
    teachers = list(facts["teachers"].values())
    origin = f"This model is a fine-tuned version of {_linked(facts['student'])}"
    dataset = re.search(r" on the \[.*?\]\(https://huggingface\.co/datasets/.*?\) dataset", text)
    origin += dataset[0] if dataset else ""
    if teachers:
        origin += f", distilled from {' and '.join(map(_linked, teachers))} on its own completions"
    rows = "\n".join(f"| {name} | {value} |" for name, value in _rows(facts, args).items())
    table = f"### Distillation\n\n| setting | value |\n|---|---|\n{rows}\n"
    text = text.replace('model="None"', 'model="path/to/this/model"')  # TRL knows the name of pushed models only
    text = ORIGIN.sub(lambda _: f"{origin}.", text, count=1) if ORIGIN.search(text) else f"{text}\n{origin}.\n"
    return text.replace(BEFORE, f"{table}\n{BEFORE}", 1) if BEFORE in text else f"{text}\n{table}"


def complete_file(path: Path, facts: dict[str, Any], args: OPDConfig) -> None:
    """[`complete`] a card in place."""
    path.write_text(complete(path.read_text("utf-8"), facts, args), "utf-8")


def _rows(facts: dict[str, Any], args: OPDConfig) -> dict[str, str]:
    """The table: what of, by what, how much, and how."""
    settings = args.without_secrets()
    beta = f"{settings.beta:g}"
    if settings.beta_schedule != "constant":
        beta += f" to {settings.beta_end:g} ({settings.beta_schedule})"
    rows: dict[str, Any] = {"student": _linked(facts["student"])}
    for name, teacher in facts["teachers"].items():
        rows["teacher" if len(facts["teachers"]) == 1 else in_markdown(f"teacher {name!r}")] = _linked(teacher)
    rows["`beta`, weight of the teacher"] = beta
    if facts["teachers"]:
        alpha = settings.alpha_of(settings.divergence)
        parameter = f", `divergence_alpha={alpha:g}`" if alpha else ""
        rows["divergence"] = f"`{settings.divergence}`{parameter}"
        size = f", `kl_top_k={settings.kl_top_k}`" if settings.kl_estimator == "topk" else ""
        rows["estimator"] = f"`{settings.kl_estimator}`{size}"
        rows["`kl_discount`"] = f"{settings.kl_discount:g}"
        if settings.lmbda < 1:
            rows["`lmbda`, share of on-policy batches"] = f"{settings.lmbda:g}"
            rows["divergence on the dataset's completions"] = f"`{settings.off_policy_divergence}`"
    rows["rewards"] = ", ".join(map(as_code, facts["reward_funcs"])) or "none"
    return {in_markdown_table(name): in_markdown_table(value) for name, value in rows.items()}


def _linked(name: str) -> str:
    """A hub name as a link; of a folder only its last part, since a path says more about a machine than a model."""
    if os.path.isdir(name) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        return f"{as_code(Path(name).name)} (a local folder)"
    return f"[{name}](https://huggingface.co/{name})" if HUB_NAME.fullmatch(name) else as_code(name)
