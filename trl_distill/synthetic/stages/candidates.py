"""Completions and scores are read back from the work folder and put together, prompt by prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..output.counts import Skip, SkipFile, Stage
from ..records import Candidate, PromptAnswer, PromptRow, PromptScores, Refusal, Score
from ..work_folder import WorkFolder, read_lines
from .ingest import Prompts


class CandidateReader:
    """
    Reads what teachers and verifier left, and counts what they refused.

    Args:
        work (`WorkFolder`): with completions and scores.
        prompts (`Prompts`): what was asked.
        teachers (`list[str]`): in the order of their folders.
        scores (`str`, *optional*): folder of the scores; `None` without a verifier.

    Attributes:
        asked, written (`Stage`): requests to teachers, and completions that came of them.
    """

    def __init__(self, work: WorkFolder, prompts: Prompts, teachers: list[str], scores: str | None):
        self.work, self.prompts, self.teachers, self.scores = work, prompts, teachers, scores
        self.asked = Stage("ask the teachers", "requests")
        self.written = Stage("verify" if scores else "complete", "completions")

    def read(self, number: int, skips: SkipFile) -> Iterator[list[Candidate]]:
        """The completions of each prompt of a chunk, of all teachers in their order; refusals go to `skips`."""
        rows = {row.id: row for row in self.prompts.chunk(number)}
        found: dict[int, list[Candidate]] = {prompt: [] for prompt in rows}
        for index, teacher in enumerate(self.teachers):
            for answer, scores in self._answers(number, index):
                where, row = f"prompt {answer.id}, teacher {teacher}", rows[answer.id]
                if isinstance(answer.answer, Refusal):
                    self.asked.count(answer.answer.kind)
                    skips.add(Skip(self.asked.name, where, answer.answer.detail))
                    continue
                self.asked.count(None)
                for completion, score in zip(answer.answer, scores, strict=True):
                    if isinstance(score, Refusal):
                        self.written.count(score.kind)
                        skips.add(Skip(self.written.name, where, score.detail))
                        continue
                    self.written.count(None)
                    made = (completion.text, completion.stop_reason, teacher, score, _columns(row))
                    found[row.id].append(Candidate(row.prompt, *made))
        yield from found.values()

    def _answers(self, number: int, index: int) -> Iterator[tuple[PromptAnswer, list[Score] | list[None]]]:
        """A teacher's answers in a chunk, with a score, or `None`, for each completion."""
        answers = map(PromptAnswer.from_dict, read_lines(self.work.chunk("completions", index, number)))
        if self.scores is None:
            yield from ((answer, [None] * len(answer.completions)) for answer in answers)
            return
        scores = map(PromptScores.from_dict, read_lines(self.work.chunk(self.scores, index, number)))
        yield from ((answer, of_answer.scores) for answer, of_answer in zip(answers, scores, strict=True))


def _columns(row: PromptRow) -> dict[str, Any]:
    """A row's columns without the one that says who is asked."""
    return {name: value for name, value in row.columns.items() if name != "teacher"}
