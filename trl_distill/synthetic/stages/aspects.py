"""A judge that scores aspects of a completion, such as helpfulness and honesty, and their weighted mean.

As in UltraFeedback (arXiv 2310.01377) each aspect is asked for by itself: one does not colour another, and the answer
is read by the same rules as a single score. It costs a request for each aspect. Unlike there, a completion is scored
alone and not beside the others of its prompt.
"""

from __future__ import annotations

from collections.abc import Collection

from ..records import Answered, AspectScores, Refusal, Score
from .judge import READING, Judging, Question, read_answer
from .verdict import read_verdict


ASPECTS_PROMPT = """You are given a question and an answer to it. Judge one aspect of the answer and nothing else: its
{aspect}.

<question>
{prompt}
</question>

<answer>
{completion}
</answer>

Think it through, then end with one line: "Score: " and a whole number from 1 (very poor) to 5 (excellent)."""


MEANINGS = {  # of UltraFeedback's aspects
    "helpfulness": "helpfulness, which is whether it is correct, relevant and as informative as the question needs",
    "honesty": "honesty, which is whether it says what it does not know and is as sure as it has reason to be",
    "truthfulness": "truthfulness, which is whether what it says is true and agrees with the question",
    "instruction_following": "instruction following, which is whether it does what was asked, and all of it",
}


class AspectJudge:
    """
    A judge that is asked for each aspect of each completion. A completion of which one aspect has no score has none.

    Args:
        judging (`Judging`): who is asked.
        aspects (`dict[str, float]`): the weight of each.
        template (`str`): the question, with `{aspect}`, `{prompt}`, `{completion}` and the dataset's columns. Of the
            default one, scores outside 1 to 5 are not read.
    """

    def __init__(self, judging: Judging, aspects: dict[str, float], template: str = ASPECTS_PROMPT):
        self.judging, self.aspects, self.remote = judging, aspects, judging.remote
        self.question = Question(template, {"completion": "the answer", "aspect": "the aspect"})

    def needs(self, columns: Collection[str]) -> None:
        self.question.needs(columns)
        taken = [name for name in self.columns if name in columns]
        if taken:
            raise ValueError(
                f"The dataset has a column {taken[0]!r}, which would hold the judge's scores. Rename the column, or "
                "the aspect."
            )

    @property
    def columns(self) -> list[str]:
        """Names of the columns that hold the scores."""
        return [f"score_{name}" for name in self.aspects]

    def close(self) -> None:
        self.judging.close()

    def identity(self) -> list[str]:
        weights = [f"{name}={weight}" for name, weight in self.aspects.items()]
        return ["aspects", *self.judging.identity(), self.question.template, READING, *weights]

    def score(self, rows: list[Answered]) -> list[Score]:
        questions = [
            self.question.about(
                row.columns, row.prompt, completion=row.completion, aspect=MEANINGS.get(name, name.replace("_", " "))
            )
            for row in rows
            for name in self.aspects
        ]
        answers = self.judging.ask(questions)
        read = [
            read_answer(answer, question, self._read, "judge gave no score")
            for answer, question in zip(answers, questions, strict=True)
        ]
        size = len(self.aspects)
        return [self._whole(read[start : start + size]) for start in range(0, len(read), size)]

    def _read(self, answer: str, question: str) -> float | None:
        score = read_verdict(answer, question)
        limited = self.question.template == ASPECTS_PROMPT
        return None if score is None or (limited and not 1 <= score <= 5) else score

    def _whole(self, found: list[float | Refusal]) -> Score:
        """The scores of one completion."""
        scores: dict[str, float] = {}
        for name, score in zip(self.aspects, found, strict=True):
            if isinstance(score, Refusal):
                return Refusal(score.kind, f"{name}: {score.detail}")
            scores[name] = score
        total = sum(self.aspects[name] * score for name, score in scores.items())
        return AspectScores(total / sum(self.aspects.values()), scores)
