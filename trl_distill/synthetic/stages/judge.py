"""A model that judges: who is asked, what it is asked, and what of its answers counts.

One judge scores completions one by one; those that compare and that score aspects are in `compare.py` and `aspects.py`.
Verdicts are read by `verdict.py`.
"""

from __future__ import annotations

import copy
import string
import threading
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ..address import parse_address
from ..records import Answered, Completion, Refusal, Score
from ..sources.base import Sampling, Source
from ..sources.endpoint import Endpoint, RefusedError, check_some_usable
from ..sources.load import check_source, load_source
from ..text import flat
from .verdict import read_verdict


if TYPE_CHECKING:
    from ..config import GenerateConfig


T = TypeVar("T")


JUDGE_PROMPT = """You are given a question and an answer to it. Judge whether the answer is right and complete.

<question>
{prompt}
</question>

<answer>
{completion}
</answer>

Think it through, then end with one line: "Score: 1" for a right answer, "Score: 0" for a wrong one."""


READING = "3"  # of a judge's answers; scores that were read in another way are made again


LONGEST = 1024  # tokens of a local judge's answer


class Judging(Protocol):
    """A model that answers questions, at temperature 0."""

    remote: bool

    def ask(self, questions: Sequence[str]) -> list[Completion | Refusal]:
        """
        An answer to each question, or why there is none.

        Raises:
            TeacherUnavailable: no answer for a reason that may pass.
        """
        ...

    def identity(self) -> list[str]:
        """What the answers depend on."""
        ...

    def close(self) -> None:
        """Give back memory."""
        ...


class EndpointJudging:
    """
    A judge behind an endpoint.

    Args:
        endpoint (`Endpoint`): where.
    """

    remote = True

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint

    def ask(self, questions: Sequence[str]) -> list[Completion | Refusal]:
        answers = self.endpoint.all([partial(self._one, question) for question in questions])
        check_some_usable(answers, "the judge's endpoint")
        return answers

    def identity(self) -> list[str]:
        return [self.endpoint.url, self.endpoint.model]

    def close(self) -> None:
        """Close the connections; a later question opens others."""
        self.endpoint.close()

    def _one(self, question: str, halt: threading.Event) -> Completion | Refusal:
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0.0}
        try:
            return self.endpoint.ask("/chat/completions", body, halt)[0]
        except RefusedError as error:
            return Refusal(f"{error.kind} the judge's endpoint", str(error))


class LocalJudging:
    """
    A judge in this process: transformers or vLLM. It is loaded with the first question, since the teacher needs the
    memory until then.

    Args:
        name (`str`): its address.
        load (`Callable[[], Source]`): loads it.
    """

    remote = False

    def __init__(self, name: str, load: Callable[[], Source]):
        self.name, self.load = name, load
        self._source: Source | None = None

    def ask(self, questions: Sequence[str]) -> list[Completion | Refusal]:
        self._source = self._source or self.load()
        answers = self._source.complete([[{"role": "user", "content": question}] for question in questions], 0)
        return [answer if isinstance(answer, Refusal) else answer[0] for answer in answers]

    def identity(self) -> list[str]:
        return ["local", self.name]

    def close(self) -> None:
        if self._source is not None:
            self._source.close()
            self._source = None


def load_judging(config: GenerateConfig) -> Judging:
    """
    The model that `judge` names.

    Raises:
        ValueError: it is not there, or cannot be asked.
    """
    assert config.judge is not None
    address = parse_address(config.judge)
    if address.kind == "endpoint":
        return EndpointJudging(Endpoint.from_config(address, config))
    check_source(address)
    plain = copy.copy(config)
    plain.chat_template_kwargs = None  # those are the teachers'
    return LocalJudging(config.judge, partial(load_source, address, Sampling(1, LONGEST, 0.0), plain))


def template_of(config: GenerateConfig, default: str) -> str:
    """The question that the settings name."""
    if not config.judge_prompt:
        return default
    if not Path(config.judge_prompt).is_file():
        raise ValueError(f"`judge_prompt` names {config.judge_prompt!r}, which is not a file.")
    return Path(config.judge_prompt).read_text(encoding="utf-8")


class Question:
    """
    What a judge is asked, with fields.

    Args:
        template (`str`): with the fields in braces; those that are no columns are in `shown`.
        shown (`dict[str, str]`): fields that must be there, and what each of them is.

    Raises:
        ValueError: it is malformed, or shows too little.
    """

    def __init__(self, template: str, shown: dict[str, str]):
        self.template, self.shown = template, shown
        try:
            self.fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        except ValueError as error:
            raise ValueError(
                f"The judge's prompt is malformed ({error}). Write braces that are meant as such twice: {{{{ and }}}}."
            ) from None
        for name, what in shown.items():
            if name not in self.fields:
                raise ValueError(f"The judge's prompt does not show {what}. Put `{{{name}}}` where it belongs.")

    def needs(self, columns: Collection[str]) -> None:
        """Raise `ValueError` if the dataset does not have a column that the question asks for."""
        missing = sorted(self.fields - {*columns, "prompt", *self.shown})
        if missing:
            raise ValueError(
                f"The judge's prompt asks for {', '.join(map(repr, missing))}, which the dataset does not have (columns"
                f": {', '.join(sorted(columns)) or 'none beside the prompt'}). Braces that are meant as such are "
                "written twice."
            )

    def about(self, columns: dict[str, Any], prompt: Any, **shown: str) -> str:
        """The question with all fields filled in."""
        return self.template.format(**{**columns, "prompt": flat(prompt), **shown})


class Judge:
    """
    A model that is asked about each completion and ends its answer with "Score: <number>".

    Args:
        judging (`Judging`): who is asked.
        template (`str`): the question, with `{prompt}`, `{completion}` and the dataset's columns.
    """

    def __init__(self, judging: Judging, template: str = JUDGE_PROMPT):
        self.judging, self.question = judging, Question(template, {"completion": "the answer"})
        self.remote = judging.remote

    def needs(self, columns: Collection[str]) -> None:
        self.question.needs(columns)

    def close(self) -> None:
        self.judging.close()

    def identity(self) -> list[str]:
        return ["judge", *self.judging.identity(), self.question.template, READING]

    def score(self, rows: list[Answered]) -> list[Score]:
        questions = [self.question.about(row.columns, row.prompt, completion=row.completion) for row in rows]
        answers = self.judging.ask(questions)
        return [
            read_answer(answer, question, read_verdict, "judge gave no score")
            for answer, question in zip(answers, questions, strict=True)
        ]


def read_answer(
    answer: Completion | Refusal, question: str, read: Callable[[str, str], T | None], missing: str
) -> T | Refusal:
    """
    The verdict in an answer, or why there is none.

    Args:
        answer (`Completion` or `Refusal`): the judge's.
        question (`str`): what it was asked.
        read (`Callable[[str, str], T | None]`): reads an answer and its question.
        missing (`str`): what is counted where it finds nothing.
    """
    if isinstance(answer, Refusal):
        return answer
    if answer.stop_reason != "stop":
        why = "cut at a length limit" if answer.stop_reason == "length" else f"ended by {answer.stop_reason!r}"
        return Refusal("judge's answer is not whole", f"{why}: {answer.text[-200:]!r}")
    verdict = read(answer.text, question)
    return Refusal(missing, f"it wrote: {answer.text[-200:]!r}") if verdict is None else verdict
