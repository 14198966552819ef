"""A judge that compares two completions of a prompt in both orders, and scores that follow from all comparisons.

Comparisons are one stage, which reads all teachers' completions; the scores of each teacher's completions are another,
which asks nobody. Which pairs are compared, and the fit, is in `ranking.py`; what is counted, in `judge_measures.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..records import PromptAnswer, PromptRow, PromptScores, Refusal, Score
from ..text import Text
from ..work_folder import WorkFolder, digest, read_lines, seed_of
from .judge import Judging, Question, read_answer
from .ranking import bradley_terry, chosen_pairs
from .verdict import read_choice


if TYPE_CHECKING:
    from .ingest import Prompts


PAIR_PROMPT = """You are given a question and two answers to it. Judge which answer is better: more correct, more
complete, more helpful. Neither the order of the answers nor their length counts.

<question>
{prompt}
</question>

<answer_1>
{first}
</answer_1>

<answer_2>
{second}
</answer_2>

Think it through, then end with one line: "Verdict: 1" if answer 1 is better, "Verdict: 2" if answer 2 is better,
"Verdict: tie" if they are equally good."""


READING = "1"  # of a judge's choices; comparisons that were read in another way are made again


Choice = int | Refusal  # 1 if the answer in the first place is better, -1 if that in the second is, 0 for a tie


@dataclass(frozen=True)
class Comparison:
    """
    What the judge said about two answers.

    Attributes:
        there (`int` or `Refusal`): its choice with a in the first place.
        back (`int` or `Refusal`): its choice with b in the first place.
        equal (`bool`): the texts are the same, and it was not asked.
    """

    there: Choice
    back: Choice
    equal: bool = False

    @property
    def refusal(self) -> Refusal | None:
        """Why there is no verdict, if there is none: both orders must be read."""
        return next((one for one in (self.there, self.back) if isinstance(one, Refusal)), None)

    @property
    def outcome(self) -> float | None:
        """1 if a is better, 0 if b is, 0.5 for a tie or where the orders contradict each other; `None` if unread."""
        if isinstance(self.there, Refusal) or isinstance(self.back, Refusal):
            return None
        return 0.5 if self.there != -self.back else (self.there + 1) / 2

    @property
    def contradicts(self) -> bool:
        """Whether the orders were read and have different outcomes."""
        return self.refusal is None and self.there != -self.back  # type: ignore[operator]

    def as_dict(self) -> dict[str, Any]:
        """As a line of JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Comparison:
        def read(choice: Any) -> Choice:
            return Refusal(**choice) if isinstance(choice, dict) else choice

        return cls(read(found["there"]), read(found["back"]), found["equal"])


@dataclass(frozen=True)
class Pair:
    """
    Two answers to one prompt.

    Attributes:
        prompt (`str` or messages): what was asked.
        a, b (`str`): the answers.
        columns (`dict`): the dataset's other columns.
    """

    prompt: Text
    a: str
    b: str
    columns: dict[str, Any]


class PairJudge:
    """
    A judge that says which of two answers is better and ends with "Verdict: 1", "Verdict: 2" or "Verdict: tie".

    Args:
        judging (`Judging`): who is asked.
        template (`str`): the question, with `{first}`, `{second}`, `{prompt}` and the dataset's columns.
        comparisons (`int`, *optional*): for each prompt, at most; see [`chosen_pairs`].
        seed (`int`): of the pairs.
    """

    def __init__(
        self, judging: Judging, template: str = PAIR_PROMPT, comparisons: int | None = None, seed: int = 0
    ) -> None:
        self.judging, self.comparisons, self.seed, self.remote = judging, comparisons, seed, judging.remote
        self.question = Question(template, {"first": "the first answer", "second": "the second answer"})

    def needs(self, columns: Collection[str]) -> None:
        """Raise `ValueError` if the dataset does not have what the question asks for."""
        self.question.needs(columns)

    def close(self) -> None:
        """Give back memory."""
        self.judging.close()

    def identity(self) -> list[str]:
        """What the scores depend on."""
        asked = [*self.judging.identity(), self.question.template, READING]
        return ["pairwise", *asked, str(self.comparisons), str(self.seed)]

    def compare(self, pairs: Sequence[Pair]) -> list[Comparison]:
        """Both orders of each pair; equal texts are a tie without a question."""
        asked = [pair for pair in pairs if pair.a != pair.b]
        questions = [
            self.question.about(pair.columns, pair.prompt, first=first, second=second)
            for pair in asked
            for first, second in ((pair.a, pair.b), (pair.b, pair.a))
        ]
        answers = self.judging.ask(questions) if questions else []
        choices = (
            read_answer(answer, question, read_choice, "judge gave no verdict")
            for answer, question in zip(answers, questions, strict=True)
        )
        return [
            Comparison(0, 0, equal=True) if pair.a == pair.b else Comparison(next(choices), next(choices))
            for pair in pairs
        ]


@dataclass(frozen=True)
class PromptComparisons:
    """
    All comparisons of one prompt.

    Attributes:
        id (`int`): of the prompt.
        answers (`list[list[int]]`): of each answer its teacher, its number among that teacher's, and its characters.
        pairs (`list[list[int]]`): positions of a and b in `answers`.
        comparisons (`list[Comparison]`): of each pair.
    """

    id: int
    answers: list[list[int]]
    pairs: list[list[int]]
    comparisons: list[Comparison]

    def as_dict(self) -> dict[str, Any]:
        """As a line of JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> PromptComparisons:
        made = [Comparison.from_dict(one) for one in found["comparisons"]]
        return cls(found["id"], found["answers"], found["pairs"], made)

    def scores(self) -> list[Score]:
        """The Bradley-Terry score of each answer, or why it has none."""
        read = [
            (a, b, one.outcome)
            for (a, b), one in zip(self.pairs, self.comparisons, strict=True)
            if one.outcome is not None
        ]
        seen = {place for a, b, _ in read for place in (a, b)}
        fitted = bradley_terry(len(self.answers), read)
        none = Refusal("no other completion to compare with", "the prompt has a single completion")
        if len(self.answers) > 1:
            none = Refusal("no comparison has a verdict", "the judge's answers about it could not be read")
        return [fitted[place] if place in seen else none for place in range(len(self.answers))]


def comparisons_folder(judge: PairJudge) -> str:
    """Where a judge's comparisons are."""
    return f"comparisons-{digest(judge.identity(), size=6).hex()}"


def compare_rows(
    judge: PairJudge, rows: list[PromptRow], answers: Sequence[Sequence[PromptAnswer]], columns: Collection[str]
) -> Iterator[PromptComparisons]:
    """
    The comparisons of a chunk of prompts; all questions are put at once.

    Args:
        judge (`PairJudge`): who is asked.
        rows (`list[PromptRow]`): the prompts.
        answers (`list[list[PromptAnswer]]`): of each teacher.
        columns (`Collection[str]`): of the dataset, also those that a row does not have.
    """
    texts: dict[int, list[tuple[list[int], str]]] = {row.id: [] for row in rows}
    for teacher, of_teacher in enumerate(answers):
        for answer in of_teacher:
            for i, completion in enumerate(answer.completions):
                texts[answer.id].append(([teacher, i, len(completion.text)], completion.text))
    chosen = {
        row.id: chosen_pairs(len(texts[row.id]), judge.comparisons, seed_of(judge.seed, "compare", row.id))
        for row in rows
    }
    asked = [
        Pair(row.prompt, texts[row.id][a][1], texts[row.id][b][1], {name: row.columns.get(name) for name in columns})
        for row in rows
        for a, b in chosen[row.id]
    ]
    found = iter(judge.compare(asked))
    for row in rows:
        pairs = chosen[row.id]
        made = [next(found) for _ in pairs]
        yield PromptComparisons(row.id, [place for place, _ in texts[row.id]], [list(pair) for pair in pairs], made)


def scores_of_teacher(found: Iterator[PromptComparisons], ids: Sequence[int], teacher: int) -> Iterator[PromptScores]:
    """The scores of one teacher's completions of the prompts `ids`, in their order."""
    by_id = {one.id: one for one in found}
    for prompt in ids:
        one = by_id[prompt]
        scores = zip(one.answers, one.scores(), strict=True)
        yield PromptScores(prompt, [score for (owner, *_), score in scores if owner == teacher])


def read_comparisons(work: WorkFolder, prompts: Prompts, folder: str) -> Iterator[PromptComparisons]:
    """All comparisons of a run, prompt by prompt."""
    for number in range(len(prompts)):
        yield from map(PromptComparisons.from_dict, read_lines(work.chunk(folder, 0, number)))
