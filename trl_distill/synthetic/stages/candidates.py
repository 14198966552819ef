"""Completions and scores are read back from the work folder and put together, prompt by prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..output.counts import Skip, SkipFile, Stage
from ..records import AspectScores, Candidate, Completion, PromptAnswer, PromptRow, PromptScores, Refusal, Score
from ..work_folder import WorkFolder, read_lines
from .difficulty import Difficulty, PromptDifficulties, difficulty_columns
from .drafts import DraftReader, NoDrafts
from .ingest import Prompts


class CandidateReader:
    """
    Reads what teachers and verifier left, and counts what they refused.

    Args:
        work (`WorkFolder`): with completions and scores.
        prompts (`Prompts`): what was asked.
        teachers (`list[str]`): in the order of their folders.
        scores (`str`, *optional*): folder of the scores; `None` without a verifier.
        difficulty (`str`, *optional*): folder of the difficulties.
        drafts (`DraftReader`, *optional*): what the completions were before they were revised.

    Attributes:
        asked, written (`Stage`): requests to teachers, and completions that came of them.
    """

    def __init__(
        self,
        work: WorkFolder,
        prompts: Prompts,
        teachers: list[str],
        scores: str | None,
        difficulty: str | None = None,
        drafts: DraftReader | None = None,
    ):
        self.difficulty, self.drafts = difficulty, drafts or NoDrafts()
        self.work, self.prompts, self.teachers, self.scores = work, prompts, teachers, scores
        self.asked = Stage("ask the teachers", "requests")
        self.written = Stage("verify" if scores else "complete", "completions")

    def read(self, number: int, skips: SkipFile) -> Iterator[list[Candidate]]:
        """The completions of each prompt of a chunk, of all teachers in their order; refusals go to `skips`."""
        rows = {row.id: row for row in self.prompts.chunk(number)}
        found: dict[int, list[Candidate]] = {prompt: [] for prompt in rows}
        for index, teacher in enumerate(self.teachers):
            difficulties, drafts = self._difficulties(number, index), self.drafts.chunk(number, index)
            for answer, scores in self._answers(number, index):
                if answer.id not in rows:
                    continue  # a rewrite that equals an earlier prompt
                where, row = f"prompt {answer.id}, teacher {teacher}", rows[answer.id]
                if isinstance(answer.answer, Refusal):
                    self.asked.count(answer.answer.kind)
                    skips.add(Skip(self.asked.name, where, answer.answer.detail))
                    continue
                self.asked.count(None)
                drafts.count(answer)
                of_each = difficulties.get(answer.id) or [None] * len(answer.answer)
                for i, (completion, score, difficulty) in enumerate(zip(answer.answer, scores, of_each, strict=True)):
                    if isinstance(score, Refusal):
                        self.written.count(score.kind)
                        skips.add(Skip(self.written.name, where, score.detail))
                        continue
                    self.written.count(None)
                    value, aspects = (score.score, score.aspects) if isinstance(score, AspectScores) else (score, {})
                    made = (completion.text, completion.stop_reason, teacher, value, _columns(row, completion), aspects)
                    if isinstance(difficulty, Refusal):
                        skips.add(Skip("measure difficulty", where, difficulty.detail))
                    measured = difficulty_columns(difficulty) if self.difficulty else {}
                    candidate = Candidate(row.prompt, *made, measured)
                    found[row.id].append(drafts.attach(candidate, answer.id, i))
        yield from found.values()

    def _difficulties(self, number: int, index: int) -> dict[int, list[Difficulty | Refusal | None]]:
        """The difficulties of a teacher's completions in a chunk, by prompt."""
        if self.difficulty is None:
            return {}
        found = map(PromptDifficulties.from_dict, read_lines(self.work.chunk(self.difficulty, index, number)))
        return {one.id: list(one.values) for one in found}

    def _answers(self, number: int, index: int) -> Iterator[tuple[PromptAnswer, list[Score] | list[None]]]:
        """A teacher's answers in a chunk, with a score, or `None`, for each completion."""
        answers = map(PromptAnswer.from_dict, read_lines(self.work.chunk(self.work.completions, index, number)))
        if self.scores is None:
            yield from ((answer, [None] * len(answer.completions)) for answer in answers)
            return
        scores = map(PromptScores.from_dict, read_lines(self.work.chunk(self.scores, index, number)))
        yield from ((answer, of_answer.scores) for answer, of_answer in zip(answers, scores, strict=True))


def _columns(row: PromptRow, completion: Completion) -> dict[str, Any]:
    """A row's columns without the one that says who is asked; the reasoning, where that is kept as a column."""
    columns = {name: value for name, value in row.columns.items() if name != "teacher"}
    return columns if completion.reasoning is None else {**columns, "reasoning": completion.reasoning}
