"""Stages that make one file for each chunk of prompts: a teacher's completions, and their scores.

A file that is there is complete and is not made again. Seeds are derived from prompts and teachers, never from the
order of work, so a run that was killed begins again with the chunks that it was at, and comes to the same rows. A model
in this process samples whole batches, so there the chunk is the unit: its file depends on its prompts alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from ..config import GenerateConfig
from ..records import Answered, PromptAnswer, PromptRow, PromptScores
from ..sources.base import Source, ask
from ..work_folder import WorkFolder, read_lines, seed_of, write_lines
from .ingest import Prompts
from .verify import Scorer


class Closable(Protocol):
    """Holds memory or connections that it can give back."""

    def close(self) -> None:
        """Give them back."""
        ...


Worker = TypeVar("Worker", bound=Closable)


class ChunkStage(Generic[Worker]):
    """
    One stage for one teacher.

    Args:
        work (`WorkFolder`): where the files are.
        prompts (`Prompts`): whose chunks are worked on.
        load (`Callable[[], Worker]`): gives who does the work; called only if a file is missing.
        folder (`str`): the stage's folder in the work folder.
        index (`int`): the teacher's number, its folder in there.
        teacher (`str`): the teacher's name.
        remote (`bool`, *optional*, defaults to `False`): whether the worker only waits for servers, so that it may work
            on several chunks at once, in threads. Others hold a model in memory, and one of them works at a time.
    """

    label: str  # for the progress bar

    def __init__(
        self,
        work: WorkFolder,
        prompts: Prompts,
        load: Callable[[], Worker],
        folder: str,
        index: int,
        teacher: str,
        remote: bool = False,
    ):
        self.remote = remote
        self.work, self.prompts, self.load = work, prompts, load
        self.folder, self.index, self.teacher = folder, index, teacher

    def finished(self) -> set[int]:
        """The chunks whose files are there."""
        return self.work.chunks(self.folder, self.index)

    def make(self, worker: Worker, number: int) -> None:
        """Write the file of one chunk; called for several at once, in threads, if the stage is `remote`."""
        path = self.work.chunk(self.folder, self.index, number)
        write_lines(path, self.rows(worker, number))
        self.work.share(path)

    def rows(self, worker: Worker, number: int) -> Iterator[dict[str, Any]]:
        """The lines of one chunk's file."""
        raise NotImplementedError


class CompleteStage(ChunkStage[Source]):
    """
    One teacher's completions.

    Args:
        config (`GenerateConfig`): which prompts each teacher completes, and the seed.
        work, prompts, load, index, teacher, remote: see [`ChunkStage`]; `load` gives the teacher.
    """

    def __init__(
        self,
        config: GenerateConfig,
        work: WorkFolder,
        prompts: Prompts,
        load: Callable[[], Source],
        index: int,
        teacher: str,
        remote: bool = False,
    ):
        super().__init__(work, prompts, load, "completions", index, teacher, remote)
        self.config, self.label = config, f"completions of {teacher}"

    def rows(self, worker: Source, number: int) -> Iterator[dict[str, Any]]:
        rows = [row for row in self.prompts.chunk(number) if self._asks(row)]
        seeds = [seed_of(self.config.seed, self.teacher, row.id) for row in rows]
        answers = ask(worker, [row.prompt for row in rows], seeds, self._had_completions)
        for row, answer in zip(rows, answers, strict=True):
            yield PromptAnswer(row.id, answer).as_dict()

    def _had_completions(self) -> bool:
        return any(map(self._has_completion, sorted(self.finished())))

    def _has_completion(self, number: int) -> bool:
        """Whether a finished chunk holds a completion."""
        answers = map(PromptAnswer.from_dict, read_lines(self.work.chunk(self.folder, self.index, number)))
        return any(answer.completions for answer in answers)

    def _asks(self, row: PromptRow) -> bool:
        """Whether this teacher completes a prompt."""
        if self.config.teacher_assignment == "rotate":
            return row.id % len(self.config.teachers) == self.index
        return self.config.asks_all or row.columns.get("teacher", self.teacher) == self.teacher


class ScoreStage(ChunkStage[Scorer]):
    """
    The scores of one teacher's completions.

    Args:
        work, prompts, load, folder, index, teacher, remote: see [`ChunkStage`]; `load` gives the verifier, and `folder`
            belongs to it, so that another verifier's scores are not taken for its own.
        completions (`str`, *optional*): folder of what is scored; that of the teachers' completions by default.
    """

    def __init__(
        self,
        work: WorkFolder,
        prompts: Prompts,
        load: Callable[[], Scorer],
        folder: str,
        index: int,
        teacher: str,
        remote: bool = False,
        completions: str = "completions",
    ):
        super().__init__(work, prompts, load, folder, index, teacher, remote)
        self.completions, self.label = completions, f"scores of {teacher}"

    def rows(self, worker: Scorer, number: int) -> Iterator[dict[str, Any]]:
        rows = {row.id: row for row in self.prompts.chunk(number)}
        answers = [
            PromptAnswer.from_dict(line) for line in read_lines(self.work.chunk(self.completions, self.index, number))
        ]
        asked = [
            Answered(rows[answer.id].prompt, completion.text, self._columns(rows[answer.id]))
            for answer in answers
            for completion in answer.completions
        ]
        scores = iter(worker.score(asked) if asked else [])
        for answer in answers:
            yield PromptScores(answer.id, [next(scores) for _ in answer.completions]).as_dict()

    def _columns(self, row: PromptRow) -> dict[str, Any]:
        """All of the dataset's columns, also those that this row does not have."""
        return {name: row.columns.get(name) for name in self.prompts.columns}
