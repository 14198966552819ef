"""Completions are criticised by a principle and rewritten (constitutional AI, arXiv 2212.08073).

A round asks twice: for a critique of each completion, and for a revision. Its file has the form of a teacher's
completions, with the revisions in their places; what does not succeed leaves the completion as it was. The drafts, the
critiques and the reasons stand beside them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..config import GenerateConfig
from ..output.counts import Stage
from ..records import Answer, Completion, PromptAnswer, PromptRow
from ..sources.base import Source, ask
from ..text import Text, normal
from ..work_folder import WorkFolder, digest, read_lines, seed_of
from .chunks import ChunkStage
from .ingest import Prompts
from .principles import Principle, load_principles
from .rewriting import answer_text


COMPLETIONS = "completions"


FORM = "1"  # of the requests; revisions that were asked for in another form are made again


NEXT_PARTS = ["(critique|revision)( request)?:"]  # with which a model that continues text goes on


ANNOUNCED = re.compile(  # a first line that is not part of the revised answer
    r"^((sure|certainly|of course|okay|ok)\b[^\n]{0,40}?)?(here('s| is)|below is) (the|my|a|an)\b[^\n]{0,40}"
    r"\b(answer|response|version|revision|reply|text)\b[^\n]{0,60}:\s*\n+|"
    r"^(revision|((the )?(revised|rewritten|improved|new) (answer|response|version)))\s*:\s*",
    re.IGNORECASE,
)


@dataclass
class Revision:
    """
    What has become of one completion.

    Attributes:
        draft (`Completion`, *optional*): the completion before all revisions; `None` while none succeeded.
        principles, critiques (`list[str]`): of the rounds that succeeded.
        faults (`list[str | None]`): of each round, why the completion was left as it was, or `None`.
    """

    draft: Completion | None = None
    principles: list[str] = field(default_factory=list)
    critiques: list[str] = field(default_factory=list)
    faults: list[str | None] = field(default_factory=list)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Revision:
        draft = found["draft"]
        return cls(**{**found, "draft": None if draft is None else Completion(**draft)})

    def as_dict(self) -> dict[str, Any]:
        """The revision as a line of JSON holds it."""
        draft = None if self.draft is None else self.draft.as_dict()
        return {"draft": draft, "principles": self.principles, "critiques": self.critiques, "faults": self.faults}

    def columns(self) -> dict[str, Any]:
        """The columns `draft` (as text), `critique` and `principle`."""
        draft = None if self.draft is None else self.draft.text
        return {"draft": draft, "critique": self.critiques, "principle": self.principles}


@dataclass
class _Work:
    """One completion in a round: the requests about it, and what came of them."""

    row: PromptRow
    number: int
    completion: Completion
    revision: Revision
    principle: Principle
    fault: str | None
    critique: str = ""


class ReviseStage(ChunkStage[Source]):
    """
    One round of revisions of one teacher's completions.

    Args:
        config (`GenerateConfig`): the seed, and where the files of all rounds are.
        work, prompts, load, index, teacher, remote: see [`ChunkStage`]; `load` gives who criticises and rewrites.
        principles (`list[Principle]`): of which one is drawn for each completion.
        round_number (`int`): counted from 1.
    """

    def __init__(
        self,
        config: GenerateConfig,
        work: WorkFolder,
        prompts: Prompts,
        load: Callable[[], Source],
        principles: list[Principle],
        round_number: int,
        index: int,
        teacher: str,
        remote: bool = False,
    ):
        super().__init__(work, prompts, load, completions_folder(config, round_number), index, teacher, remote)
        self.before = completions_folder(config, round_number - 1)
        self.config, self.principles, self.round = config, principles, round_number
        self.label = f"revisions of {teacher}" + (f", round {round_number}" if round_number > 1 else "")

    def rows(self, worker: Source, number: int) -> Iterator[dict[str, Any]]:
        rows = {row.id: row for row in self.prompts.chunk(number)}
        lines = list(read_lines(self.work.chunk(self.before, self.index, number)))
        works = [[*self._works(rows[line["id"]], line)] for line in lines]
        self._criticise(worker, [work for found in works for work in found])
        self._revise(worker, [work for found in works for work in found])
        for line, found in zip(lines, works, strict=True):
            answer = PromptAnswer.from_dict(line)
            if found:
                answer = PromptAnswer(answer.id, [work.completion for work in found])
            yield {**answer.as_dict(), "revisions": [work.revision.as_dict() for work in found]}

    def _works(self, row: PromptRow, line: dict[str, Any]) -> Iterator[_Work]:
        completions = PromptAnswer.from_dict(line).completions
        before = [Revision.from_dict(one) for one in line.get("revisions", [])] or [Revision() for _ in completions]
        for i, (completion, revision) in enumerate(zip(completions, before, strict=True)):
            principle = random.Random(self._seed("principle", row, i)).choice(self.principles)
            yield _Work(row, i, completion, revision, principle, _draft_fault(completion))

    def _criticise(self, worker: Source, works: list[_Work]) -> None:
        asked = [work for work in works if work.fault is None]
        for work, answer in zip(asked, self._answers(worker, asked, "critique", critique_question), strict=True):
            work.critique, fault = answer_text(answer, NEXT_PARTS if isinstance(work.row.prompt, str) else [])
            work.fault = f"critique: {fault}" if fault else None

    def _revise(self, worker: Source, works: list[_Work]) -> None:
        """Ask for the revisions, and put them in the places of the completions."""
        asked = [work for work in works if work.fault is None]
        for work, answer in zip(asked, self._answers(worker, asked, "revision", revision_question), strict=True):
            text, fault = answer_text(answer, NEXT_PARTS if isinstance(work.row.prompt, str) else [])
            text = ANNOUNCED.sub("", text, count=1).strip()
            if fault is None and not text:
                fault = "empty"
            if fault is None and normal(text) == normal(work.completion.text):
                fault = "equal to the draft"
            work.fault = f"revision: {fault}" if fault else None
            if fault is None:
                self._replace(work, text)
        for work in works:
            work.revision.faults.append(work.fault)

    def _replace(self, work: _Work, text: str) -> None:
        revision = work.revision
        revision.draft = revision.draft or work.completion
        revision.principles.append(work.principle.text)
        revision.critiques.append(work.critique)
        work.completion = Completion(text, "stop")

    def _answers(
        self, worker: Source, works: list[_Work], what: str, question: Callable[[_Work], Text]
    ) -> list[Answer]:
        seeds = [self._seed(what, work.row, work.number) for work in works]
        return ask(worker, [question(work) for work in works], seeds, self._had_revisions)

    def _had_revisions(self) -> bool:
        """Whether the reviser revised something before, in this round or an earlier one."""
        folders = [completions_folder(self.config, number) for number in range(1, self.round + 1)]
        paths = [path for folder in folders for path in sorted((self.work.path / folder).glob("*/*.jsonl"))]
        lines = (line for path in paths for line in read_lines(path))
        return any(revision["draft"] is not None for line in lines for revision in line["revisions"])

    def _seed(self, what: str, row: PromptRow, i: int) -> int:
        return seed_of(self.config.seed, "revise", what, self.round, self.teacher, row.id, i)


def critique_question(work: _Work) -> Text:
    """The prompt, the completion and the request for a critique."""
    prompt, draft, request = work.row.prompt, work.completion.text, work.principle.critique
    if isinstance(prompt, str):
        return f"{prompt}{_joined(prompt, draft)}\n\nCritique Request: {request}\n\nCritique:"
    ask_for = f"{request}\n\nWrite only the critique, not a new answer."
    return [*prompt, {"role": "assistant", "content": _spoken(draft)}, {"role": "user", "content": ask_for}]


def revision_question(work: _Work) -> Text:
    """The same, with the critique and the request for a revision."""
    before, request = critique_question(work), work.principle.revision
    if isinstance(before, str):
        return f"{before} {work.critique}\n\nRevision Request: {request}\n\nRevision:"
    ask_for = f"{request}\n\nWrite only the rewritten answer, as if it were the first one. Do not mention the critique."
    return [*before, {"role": "assistant", "content": work.critique}, {"role": "user", "content": ask_for}]


def _joined(prompt: str, draft: str) -> str:
    """The completion with white space before it, if none is there."""
    return draft if prompt[-1:].isspace() or draft[:1].isspace() else f" {draft}"


def _spoken(text: str) -> str:
    """A completion without its thoughts."""
    return text.rpartition("</think>")[2].strip() or text


def _draft_fault(completion: Completion) -> str | None:
    """Why a completion is not worth a critique. One that was cut off is: its revision may be whole."""
    if completion.stop_reason not in ("stop", "length"):
        return f"draft: ended by {completion.stop_reason!r}"
    return None if completion.text.strip() else "draft: empty"


def completions_folder(config: GenerateConfig, round_number: int | None = None) -> str:
    """
    Where the completions are that verifiers and filters read: those of the teachers, or their last revisions.

    Args:
        config (`GenerateConfig`): names the principles, whose contents are read, and who revises.
        round_number (`int`, *optional*): of revisions, counted from 1; 0 are the teachers' completions. The last one
            unless given.
    """
    last = config.revise_rounds if config.revise else 0
    number = last if round_number is None else round_number
    return f"revised-{digest(revise_identity(config), size=6).hex()}-{number}" if number else COMPLETIONS


def revised_scores(folder: str, completions: str) -> str:
    """
    Where a verifier's scores of revisions are.

    Args:
        folder (`str`): of its scores of the teachers' completions.
        completions (`str`): folder of what is scored.
    """
    return folder if completions == COMPLETIONS else f"{folder}-{completions}"


def revise_identity(config: GenerateConfig) -> list[str]:
    """What revisions depend on beside the completions; empty without revisions."""
    if not config.revise:
        return []
    texts = [text for one in load_principles(config.revise) for text in (one.critique, one.revision)]
    return [FORM, str(config.shown()["revise_model"]), *texts]


def revise_stages(config: GenerateConfig) -> list[Stage]:
    """One for each round, in which nothing is counted yet."""
    rounds = config.revise_rounds if config.revise else 0
    return [Stage(f"revise, round {number}", COMPLETIONS) for number in range(1, rounds + 1)]


def count_revision(stages: list[Stage], revision: Revision) -> None:
    """Count one completion in all rounds; where it was not revised, the draft stays."""
    for stage, fault in zip(stages, revision.faults, strict=True):
        stage.count(f"draft stays: {fault}" if fault else None)
