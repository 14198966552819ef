"""The stages of a judge that compares, its check on labelled rows, and what both have shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..output.counts import Skip, Stage
from ..records import PromptAnswer
from ..work_folder import WorkFolder, read_lines, write_lines
from .chunks import ChunkStage
from .compare import (
    Comparison,
    PairJudge,
    PromptComparisons,
    compare_rows,
    comparisons_folder,
    read_comparisons,
    scores_of_teacher,
)
from .ingest import Prompts
from .judge_check import JudgeCheck, sentences
from .judge_measures import comparison_measures, described
from .revise import revised_scores


class CompareStage(ChunkStage[PairJudge]):
    """
    Comparisons of all teachers' completions of each prompt.

    Args:
        work, prompts, load: see [`ChunkStage`]; `load` gives the judge.
        judge (`PairJudge`): says where its comparisons are.
        teachers (`int`): how many there are.
    """

    def __init__(
        self, work: WorkFolder, prompts: Prompts, load: Callable[[], PairJudge], judge: PairJudge, teachers: int
    ):
        super().__init__(
            work, prompts, load, revised_scores(comparisons_folder(judge), work.completions), 0, "", judge.remote
        )
        self.teachers, self.label = teachers, "comparisons"

    def rows(self, worker: PairJudge, number: int) -> Iterator[dict[str, Any]]:
        answers = [answers_of(self.work, teacher, number) for teacher in range(self.teachers)]
        made = compare_rows(worker, self.prompts.chunk(number), answers, self.prompts.columns)
        yield from (one.as_dict() for one in made)


class Nobody:
    """Does work that needs no model."""

    def close(self) -> None:
        """Nothing is held."""


class RankStage(ChunkStage[Nobody]):
    """
    Bradley-Terry scores of one teacher's completions, in the form in which other verifiers leave theirs.

    Args:
        work, prompts, folder, index, teacher: see [`ChunkStage`].
        judge (`PairJudge`): says where its comparisons are.
    """

    def __init__(self, work: WorkFolder, prompts: Prompts, folder: str, index: int, teacher: str, judge: PairJudge):
        super().__init__(work, prompts, Nobody, folder, index, teacher)
        self.comparisons = revised_scores(comparisons_folder(judge), work.completions)
        self.label = f"scores of {teacher}"

    def rows(self, worker: Nobody, number: int) -> Iterator[dict[str, Any]]:
        found = map(PromptComparisons.from_dict, read_lines(self.work.chunk(self.comparisons, 0, number)))
        ids = [answer.id for answer in answers_of(self.work, self.index, number)]
        yield from (scores.as_dict() for scores in scores_of_teacher(found, ids, self.index))


def answers_of(work: WorkFolder, teacher: int, number: int) -> list[PromptAnswer]:
    """What one teacher answered to a chunk of prompts."""
    return [PromptAnswer.from_dict(line) for line in read_lines(work.chunk(work.completions, teacher, number))]


def run_check(work: WorkFolder, check: JudgeCheck, done: Callable[[int], None]) -> None:
    """
    Ask the judge about the labelled rows; what an earlier run asked is not asked again.

    Args:
        work (`WorkFolder`): where the answers are kept.
        check (`JudgeCheck`): the rows and the judge.
        done (`Callable[[int], None]`): called with the number of finished parts.
    """
    try:
        for number in range(len(check)):
            path = work.chunk(check.folder, 0, number)
            if not path.exists():
                write_lines(path, check.ask(number))
                work.share(path)
            done(number + 1)
    finally:
        check.judge.close()


@dataclass
class Findings:
    """
    What is known about the judge when all is asked.

    Attributes:
        stages (`list[Stage]`): that took part, for the table of stages.
        skips (`list[Skip]`): what could not be read.
        counts (`dict`): measures, as `counts.json` has them.
        lines (`list[str]`): the same in sentences, for the card and the terminal.
    """

    stages: list[Stage] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def section(self) -> str:
        """The judge's section of the card."""
        return "\n".join(["", "## Judge", "", *(f"- {line}" for line in self.lines), ""]) if self.lines else ""

    def as_counts(self) -> dict[str, Any]:
        """What `counts.json` holds."""
        return {"judge": {**self.counts, "lines": self.lines}} if self.lines else {}


def judge_findings(
    work: WorkFolder, prompts: Prompts, teachers: list[str], judge: Any, check: JudgeCheck | None
) -> Findings:
    """What comparisons and check have shown; empty without them."""
    made = Findings()
    if isinstance(judge, PairJudge):
        stage = Stage("compare", "comparisons")
        folder = revised_scores(comparisons_folder(judge), work.completions)

        def counted() -> Iterator[tuple[Comparison, int, int]]:
            for prompt in read_comparisons(work, prompts, folder):
                for (a, b), one in zip(prompt.pairs, prompt.comparisons, strict=True):
                    if not stage.count(one.refusal.kind if one.refusal else None) and one.refusal:
                        who = " and ".join(f"{teachers[t]} {i}" for t, i, _ in (prompt.answers[a], prompt.answers[b]))
                        made.skips.append(Skip("compare", f"prompt {prompt.id}, {who}", one.refusal.detail))
                    yield one, prompt.answers[a][2], prompt.answers[b][2]

        made.counts["comparisons"] = comparison_measures(counted())
        made.stages.append(stage)
        made.lines += described(made.counts["comparisons"])
    if check is not None:
        made.counts["check"], skips = check.report(work)
        made.skips += skips
        made.lines += sentences(made.counts["check"])
    return made
