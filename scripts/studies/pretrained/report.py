"""The tables and the picture of docs/pretrained.md, from the files of finished runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.studies.pretrained.prompts import VERIFIED
from scripts.studies.reproduce.figures import COLOURS, MARKERS
from trl_distill.reporting.curves import new_figure, plain


SHOWN = range(6)  # held-out prompts whose greedy answers are shown: one of each template


QUESTIONS = (*VERIFIED, "capital")


COLUMNS = {
    "KL(student ‖ teacher), own answers": ("reverse_kl", ".2f"),
    "KL(teacher ‖ student), teacher's answers": ("forward_kl", ".2f"),
    "same most likely token": ("agreement", ".0%"),
    "teacher's −log p of own answers": ("teacher_nll_of_own", ".2f"),
    "tokens per answer": ("length", ".0f"),
}


Records = dict[str, list[dict[str, Any]]]  # finished runs by the arm's label


def load(folder: Path, labels: dict[str, str]) -> Records:
    """Finished runs of each arm, in the order of the arms and of the seeds."""
    found = {label: [json.loads(path.read_text()) for path in _paths(folder, arm)] for arm, label in labels.items()}
    return {label: runs for label, runs in found.items() if runs}


def _paths(folder: Path, arm: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"{arm}-*.json") if path.stem.rpartition("-")[0] == arm)


def _cells(measured: Sequence[dict[str, Any]]) -> list[str]:
    """A row of the table: means, and the range where there are several seeds."""
    values = [([one[key] for one in measured], form) for key, form in COLUMNS.values()]
    values += [([one["accuracy"][kind] for one in measured], ".0%") for kind in QUESTIONS]
    return [_spread(numbers, form) for numbers, form in values]


def _spread(numbers: Sequence[float], form: str) -> str:
    if not numbers:
        return "not measured"
    mean = format(statistics.mean(numbers), form)
    return mean if len(numbers) < 2 else f"{mean} ({format(min(numbers), form)}–{format(max(numbers), form)})"


def table(before: dict[str, Any], runs: Records) -> str:
    """Everything that is measured, by arm."""
    head = ["", *COLUMNS, *(f"right: {kind}" for kind in QUESTIONS), "seconds", "seeds"]
    rows = [["student before", *_cells([before["student"]]), "", ""]]
    for label, records in runs.items():
        seconds = _spread([one["seconds"] for one in records], ".0f")
        rows.append([label, *_cells([one["final"] for one in records]), seconds, str(len(records))])
    rows.append(["teacher", *_cells([before["teacher"]]), "", ""])
    return _markdown(head, rows)


def samples(before: dict[str, Any], runs: Records, prompts: Sequence[str]) -> str:
    """Greedy answers side by side; of the first seed."""
    who = {"student before": before["student"], **{label: records[0]["final"] for label, records in runs.items()}}
    who["teacher"] = before["teacher"]
    parts = []
    for place, prompt in zip(SHOWN, prompts, strict=True):
        answers = [[name, _plain(of["samples"][place])] for name, of in who.items()]
        parts.append(f"**{prompt}**\n\n{_markdown(['', 'greedy answer'], answers, right=False)}")
    return "\n\n".join(parts)


def _plain(text: str) -> str:
    """An answer in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def log(record: dict[str, Any], every: int = 10) -> str:
    """Some lines of a run's log: what a healthy one looks like."""
    names = {
        "distill/reverse_kl": "`distill/reverse_kl`",
        "distill/top1_agreement": "`distill/top1_agreement`",
        "grad_norm": "`grad_norm`",
        "completions/mean_length": "`completions/mean_length`",
        "completions/clipped_ratio": "`completions/clipped_ratio`",
    }
    known = [name for name in names if name in record["log"][-1]]
    lines = [line for line in record["log"] if line["step"] == 1 or line["step"] % every == 0]
    rows = [[str(line["step"]), *(format(line[name], ".2f") for name in known)] for line in lines]
    return _markdown(["step", *(names[name] for name in known)], rows)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]], right: bool = True) -> str:
    rule = ["---", *("---:" if right else "---" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def draw(before: dict[str, Any], runs: Records, path: Path) -> None:
    """KL to the teacher over the answers that were trained on, one line per arm and seed."""
    figure = new_figure(7, 4.2)
    axis = figure.subplots()
    for (label, records), colour, marker in zip(runs.items(), COLOURS, MARKERS, strict=False):
        for i, record in enumerate(records):
            steps, values = zip(*record["curve"], strict=True)
            style = {"color": colour, "marker": marker, "linewidth": 1.8, "markersize": 5}
            axis.plot(steps, values, label=label.replace("`", "") if i == 0 else None, **style)
    axis.set_title("A pruned SmolLM2 is healed: KL to the teacher on held-out prompts", loc="left", fontsize=11)
    axis.set(xlabel="optimizer step, 16 answers each", ylabel="KL(student ‖ teacher), nats per token", ylim=(0, None))
    plain(axis)
    axis.legend(frameon=False)
    figure.savefig(path)


def write(folder: Path, labels: dict[str, str], page: Path, picture: Path) -> None:
    """
    Put what has been run into the page, between its marks.

    Args:
        folder (`Path`): of the results.
        labels (`dict[str, str]`): of the arms, by name.
        page (`Path`), picture (`Path`): to write.
    """
    before, runs = json.loads((folder / "before.json").read_text()), load(folder, labels)
    text = page.read_text()
    parts = {
        "table": table(before, runs),
        "samples": samples(before, runs, before["prompts"]),
        "log": log(runs["on-policy"][0]),
    }
    for name, made in parts.items():
        begin, end = f"<!-- pretrained {name}: begin -->", f"<!-- pretrained {name}: end -->"
        if begin not in text or end not in text:
            raise ValueError(f"{page} has no place for {name!r}: write {begin} and {end} where it belongs.")
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n{made}\n{end}{rest.partition(end)[2]}"
    page.write_text(text)
    draw(before, runs, picture)
