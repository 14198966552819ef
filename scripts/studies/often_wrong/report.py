"""Table and picture of the study in docs/results.md, from the files of finished runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.studies.often_wrong.arms import BATCH, BETAS, SEEDS, runs, then
from scripts.studies.often_wrong.formula import frontier, promised
from scripts.studies.reproduce.figures import COLOURS, GREY, MARKERS
from scripts.studies.reproduce.report import spread
from trl_distill.reporting.curves import new_figure, plain


Records = list[dict[str, Any]]

SHOWN = 70  # the teacher of the picture


def load(folder: Path, part: str = "table") -> dict[int, dict[str, Records]]:
    """
    Finished runs by the teacher's level and the arm's label, in the order of the arms.

    Args:
        folder (`Path`): of the results.
        part (`str`): of the page; see [`Arm`].
    """
    found: dict[int, dict[str, Records]] = {}
    for name, plan in runs().items():
        path = folder / f"{name}.json"
        if path.exists() and plan.arm.part == part:
            record = json.loads(path.read_text())
            found.setdefault(plan.level, {}).setdefault(record["arm"], []).append(record)
    return found


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _values(records: Records, key: str, form: str) -> str:
    return spread([one[key] for one in records], form)


def _named(label: str, records: Records) -> str:
    """The arm, and how many seeds it had if not all."""
    return label if len(records) == len(SEEDS) else f"{label} ({len(records)} seed{'s' * (len(records) > 1)})"


def table(by_arm: dict[str, Records], teacher: dict[str, Any] | None = None) -> str:
    """One teacher's rows, as Markdown; the first ones are its own, where its facts are given."""
    head = ["", "right", "the formula", "KL to the teacher, nats per answer", "lowest on the way"]
    rows = []
    if teacher is not None:
        rows.append(["the teacher, sampled", spread(teacher["accuracy"], ".1%"), "", "0", ""])
        if "greedy" in teacher:
            rows.append(["the teacher, most likely tokens", f"{teacher['greedy']:.1%}", "", "", ""])
    for label, records in by_arm.items():
        promised = records[0]["promised"]
        rows.append(
            [
                _named(label, records),
                _values(records, "accuracy", ".1%"),
                "" if promised is None else f"{promised:.1%}",
                _values(records, "kl_per_answer", ".2f"),
                spread([min(right for _, right in one["curve"]) for one in records], ".0%"),
            ]
        )
    return markdown(head, rows)


def cheat_table(by_arm: dict[str, Records], before: dict[str, float]) -> str:
    """The reward with a hole, as Markdown, below the models that it begins with."""
    head = ["", "right", "without a number", "KL to the teacher, nats per answer"]
    rows = [[f"the {name} before", "", f"{share:.1%}", ""] for name, share in before.items()]
    for label, records in by_arm.items():
        cells = [("accuracy", ".1%"), ("without_number", ".1%"), ("kl_per_answer", ".2f")]
        rows.append([_named(label, records), *(_values(records, key, form) for key, form in cells)])
    return markdown(head, rows)


def stale_table(by_arm: dict[str, Records]) -> str:
    """Answers that are used several times, as Markdown."""
    head = ["", "answers written", "right", "KL to the teacher, nats per answer"]
    rows = []
    for label, records in by_arm.items():
        one = records[0]
        written = one["steps"] * one["answers_per_step"] // one["settings"]["num_iterations"]
        cells = [_values(records, "accuracy", ".1%"), _values(records, "kl_per_answer", ".2f")]
        rows.append([_named(label, records), f"{written:,}", *cells])
    return markdown(head, rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def draw(by_arm: dict[str, Records], path: Path) -> None:
    """Accuracy against KL to the teacher, one point per seed, with the curve of the theory."""
    p = next(iter(by_arm.values()))[0]["p"]
    figure = new_figure(7.5, 5.2)
    axis = figure.subplots()
    plain(axis)
    levels = [p + (1 - p) * i / 400 for i in range(1, 400)]
    axis.plot([frontier(p, one) for one in levels], levels, color=GREY, label="the best that is possible")
    for beta in BETAS:
        best = promised(p, beta)
        beside = ((7, -4), "left") if beta == min(BETAS) else ((-7, 1), "right")
        place = (frontier(p, best), best)
        axis.plot(*place, "o", color=GREY, markersize=4)
        axis.annotate(f"β {beta:g}", place, beside[0], textcoords="offset points", ha=beside[1], color=GREY)
    axis.axhline(p, color=GREY, linestyle="--", linewidth=1.2)
    axis.annotate(f"teacher {p:.1%}", (0, p), (4, 4), ("axes fraction", "data"), "offset points", color=GREY)
    for i, (label, records) in enumerate(by_arm.items()):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        xs, ys = zip(*((one["kl_per_answer"], one["accuracy"]) for one in records), strict=True)
        fill = colour if i < len(COLOURS) else "white"
        axis.plot(xs, ys, marker, color=colour, markerfacecolor=fill, markersize=7, label=label)
    least = min(p, *(one["accuracy"] for records in by_arm.values() for one in records))
    axis.set(xlabel="KL(student ‖ teacher), nats per answer", ylabel="right answers", xscale="log")
    axis.set(xlim=(0.02, None), ylim=(max(0, least - 0.05), 1.01))
    axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    figure.suptitle(f"A teacher that is right {p:.0%} of the time, and a reward", fontsize=12)
    axis.set_title("one point per seed, on 1000 held-out problems", fontsize=9, color=GREY)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path)


def in_words(by_arm: dict[str, Records]) -> str:
    """For those who do not see the picture."""
    p = next(iter(by_arm.values()))[0]["p"]
    parts = [
        f"{label} {_values(records, 'accuracy', '.1%')} at {_values(records, 'kl_per_answer', '.2f')} nats"
        for label, records in by_arm.items()
    ]
    return f"Right answers against KL to a teacher that is right {p:.1%}. {'; '.join(parts)}."


def write(folder: Path, docs: Path) -> None:
    """
    Put what has been run into docs/results.md, between its marks, and draw the picture.

    Args:
        folder (`Path`): of the results.
        docs (`Path`): the documentation.
    """
    found, others = load(folder), load(folder, "settings").get(SHOWN, {})
    cheated = load(folder, "reward").get(SHOWN, {})
    alike = {label: records for label, records in found.get(SHOWN, {}).items() if label == then(0.3).label}
    known = _read(folder / "teachers.json")
    parts = []
    for level, by_arm in found.items():
        if level != SHOWN:
            parts.append(f"With a teacher that is right {known[str(level)]['p']:.0%} of the time:")
        parts.append(table(by_arm, known[str(level)]))
    if SHOWN in found:
        draw(found[SHOWN], docs / "images" / "often_wrong.png")
        parts.insert(1, f"![{in_words(found[SHOWN])}](images/often_wrong.png)")
    count = sum(len(records) for by_arm in found.values() for records in by_arm.values())
    parts.append(
        f"{count} runs of {BATCH} answers a step: `python -m scripts.studies.often_wrong.run`; every number in "
        "[results/often_wrong/](results/often_wrong)."
    )
    pages = {"table": "\n\n".join(parts)}
    if others:
        pages["settings"] = table({**alike, **others})
    stale = load(folder, "staleness").get(SHOWN, {})
    if stale:
        pages["staleness"] = stale_table(stale)
    if cheated:
        begun = folder / "before.json"
        pages["reward"] = cheat_table(cheated, _read(begun) if begun.exists() else {})
    page = docs / "results.md"
    text = page.read_text()
    for name, made in pages.items():
        begin, end = f"<!-- often_wrong {name}: begin -->", f"<!-- often_wrong {name}: end -->"
        if begin not in text or end not in text:
            raise ValueError(f"{page} has no place for {name!r}: write {begin} and {end} where it belongs.")
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n{made}\n{end}{rest.partition(end)[2]}"
    page.write_text(text)
