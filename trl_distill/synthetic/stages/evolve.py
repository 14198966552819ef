"""Prompts are rewritten in rounds (Evol-Instruct, arXiv 2304.12244), and the prompts that this leads to.

A round rewrites what the round before made of each prompt; where that failed, its parent. The file of a round says for
each prompt how far it has come. Which rewrites can be used is decided in `operations.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from ..config import GenerateConfig
from ..output.counts import Skip, Stage
from ..records import Answer, Candidate, PromptRow, Refusal
from ..sources.base import Source, ask
from ..text import Text, content, flat, words
from ..work_folder import WorkFolder, digest, read_lines, seed_of
from .benchmarks import load_benchmarks
from .chunks import ChunkStage
from .contamination import Benchmarks
from .dedup import Seen
from .ingest import Prompts, prompt_key
from .operations import APOLOGY, Operation, load_operations
from .rewriting import answer_text, last_words


FOLDER = "evolved"


SHORT_APOLOGY = 80  # words; arXiv 2304.12244 takes a shorter answer with "sorry" for one that the model could not give


CHECK = """Here is a prompt that will be put to an assistant, word for word and with nothing beside it.

<prompt>
{prompt}
</prompt>

Can it be understood and answered as it stands, by somebody who knows enough? It cannot if it refers to a text, file,
table or number that is not in it, if it contradicts itself, or if it is no prompt at all.

Think about it briefly, then end with one line: "Verdict: yes" or "Verdict: no".
"""


VERDICTS = {"yes": r"verdict\W{0,5}yes\b", "no": r"verdict\W{0,5}no\b"}


@dataclass(frozen=True)
class Evolved:
    """
    How far a prompt has come after a round.

    Attributes:
        id (`int`): of the original prompt.
        prompt (`str` or messages): the last rewrite that could be used, or the original.
        operations (`list[str]`): that led to it.
        operation (`str`): the one of this round.
        fault (`str`, *optional*): why its result cannot be used; `None` if `prompt` is its result.
        said (`str`): what could not be used, or the details of a refusal.
        refused (`bool`): whether it is listed: the rewriter refused, or the rewrite overlaps with a benchmark.
    """

    id: int
    prompt: Text
    operations: list[str]
    operation: str
    fault: str | None = None
    said: str = ""
    refused: bool = False


class EvolveStage(ChunkStage[Source]):
    """
    One round.

    Args:
        config (`GenerateConfig`): seed, and whether rewrites are checked.
        work, prompts, load, remote: see [`ChunkStage`]; `prompts` are the original ones, `load` gives the rewriter.
        operations (`list[Operation]`): what is drawn from.
        round_number (`int`): counted from 1.
    """

    def __init__(
        self,
        config: GenerateConfig,
        work: WorkFolder,
        prompts: Prompts,
        load: Callable[[], Source],
        operations: list[Operation],
        round_number: int,
        remote: bool = False,
    ):
        super().__init__(work, prompts, load, FOLDER, round_number, "", remote)
        self.config, self.operations = config, operations
        self.label = f"rewriting prompts, round {round_number}"

    def rows(self, worker: Source, number: int) -> Iterator[dict[str, Any]]:
        parents = self._parents(number)
        drawn = [random.Random(self._seed("operation", p.id)).choice(self.operations) for p in parents]
        questions = [_question(parent.prompt, one) for parent, one in zip(parents, drawn, strict=True)]
        answers = ask(worker, questions, [self._seed("rewrite", p.id) for p in parents], lambda: self._had(number))
        found = [_evolved(*three) for three in zip(parents, drawn, answers, strict=True)]
        found = [self._clean(*two) for two in zip(parents, found, strict=True)]
        yield from map(asdict, self._checked(worker, parents, found) if self.config.evolve_check else found)

    @cached_property
    def _benchmarks(self) -> Benchmarks | None:
        return load_benchmarks(self.config)

    def _clean(self, parent: Evolved, one: Evolved) -> Evolved:
        """A rewrite that shares an n-gram with a benchmark fails, and is listed."""
        overlap = self._benchmarks.overlap(one.prompt) if self._benchmarks and one.fault is None else None
        return _failed(parent, one.operation, overlap.reason, overlap.detail, refused=True) if overlap else one

    def _parents(self, number: int) -> list[Evolved]:
        if self.index > 1:
            return read_round(self.work, self.index - 1, number)
        return [Evolved(row.id, row.prompt, [], "") for row in self.prompts.chunk(number)]

    def _had(self, number: int) -> bool:
        """Whether the rewriter rewrote prompts before, in this round or an earlier one."""
        earlier = [
            path
            for index in range(1, self.index + 1)
            for path in sorted((self.work.path / FOLDER / str(index)).glob("*.jsonl"))
        ]
        return any(Evolved(**line).operations for path in earlier for line in read_lines(path))

    def _checked(self, worker: Source, parents: list[Evolved], found: list[Evolved]) -> Iterator[Evolved]:
        """Rewrites that the rewriter itself finds unanswerable fail, too."""
        usable = [one for one in found if one.fault is None]
        questions = [_as_prompt(CHECK.replace("{prompt}", flat(one.prompt)), one.prompt) for one in usable]
        answers = iter(ask(worker, questions, [self._seed("check", one.id) for one in usable], lambda: True))
        for parent, one in zip(parents, found, strict=True):
            fault = _verdict_fault(next(answers)) if one.fault is None else None
            yield one if fault is None else _failed(parent, one.operation, fault, last_turn(one.prompt))

    def _seed(self, what: str, prompt: int) -> int:
        return seed_of(self.config.seed, "evolve", what, self.index, prompt)


class EvolvedPrompts(Prompts):
    """
    The prompts of a work folder that are completed: originals and rewrites, or the last rewrites alone.

    The id of a rewrite is that of its original, raised by the number of all originals for each round.

    Args:
        work (`WorkFolder`): with the files of all rounds, where chunks are asked for.
        rounds (`int`): how many there are.
        keep (`str`): "all" or "last".
    """

    def __init__(self, work: WorkFolder, rounds: int, keep: str):
        super().__init__(work)
        self.work, self.rounds, self.keep = work, rounds, keep
        self._originals = super().total

    @property
    def total(self) -> int:
        """How many original prompts there are."""
        return self._originals

    def original_chunk(self, number: int) -> list[PromptRow]:
        """The prompts before all rewriting."""
        return super().chunk(number)

    def chunk(self, number: int) -> list[PromptRow]:
        originals = self.original_chunk(number)
        if self.keep == "last":
            return [row for _, row in self._rewrites(originals, self.rounds, number) if row is not None]
        found = [self._rewrites(originals, index, number) for index in range(1, self.rounds + 1)]
        return originals + [row for rows in found for one, row in rows if row is not None and one.fault is None]

    def _rewrites(self, originals: list[PromptRow], index: int, number: int) -> list[tuple[Evolved, PromptRow | None]]:
        """What a round says of each prompt, and the row of its last rewrite so far, if there is one."""
        found = []
        for one, row in zip(read_round(self.work, index, number), originals, strict=True):
            teacher = {"teacher": row.columns["teacher"]} if "teacher" in row.columns else {}
            lineage = {"evolved_from": flat(row.prompt), "evolution": one.operations}
            made = PromptRow(self._originals * index + row.id, one.prompt, {**teacher, **lineage})
            found.append((one, made if one.operations else None))
        return found

    def skips(self) -> Iterator[Skip]:
        yield from super().skips()
        for index in range(1, self.rounds + 1):
            for number in range(len(self)):
                for one in read_round(self.work, index, number):
                    if one.refused:
                        yield Skip(_stage_name(index), f"prompt {one.id}", one.said)


class KeptPrompts(EvolvedPrompts):
    """
    [`EvolvedPrompts`] without those that equal an earlier prompt, as the dataset is built from them; with counts.

    Chunks are read in their order, each once; the last one may be read again. Originals count as earlier than all
    rewrites.
    """

    def __init__(self, work: WorkFolder, rounds: int, keep: str):
        super().__init__(work, rounds, keep)
        self._rounds = [Stage(_stage_name(index), "prompts") for index in range(1, rounds + 1)]
        self._kept = Stage("keep rewrites" if keep == "all" else "keep the last rewrites", "prompts")
        self.stages = [*self.stages, *self._rounds, self._kept]
        self._seen: Seen | None = None
        self._index_path = work.path / "dataset.unfinished" / "prompts.db"
        self._last: tuple[int, list[PromptRow]] = (-1, [])

    def chunk(self, number: int) -> list[PromptRow]:
        if number == self._last[0]:
            return self._last[1]
        assert number == self._last[0] + 1, f"chunk {number} is read after chunk {self._last[0]}"
        seen = self._seen = self._seen or self._index()
        originals = self.original_chunk(number)
        kept = [row for row in originals if self._kept.count(None)] if self.keep == "all" else []
        for index, stage in enumerate(self._rounds, start=1):
            for one, row in self._rewrites(originals, index, number):
                if stage.count(one.fault) and self.keep == "all" and row is not None:
                    fault = None if seen.add(prompt_key(row.prompt)) else "equal to an earlier prompt"
                    kept += [row] if self._kept.count(fault) else []
        if self.keep == "last":
            kept = list(self._last_rewrites(originals, number, seen))
        self._last = number, kept
        if number == len(self) - 1:
            seen.close()
            self._index_path.unlink()
        return kept

    def _last_rewrites(self, originals: list[PromptRow], number: int, seen: Seen) -> Iterator[PromptRow]:
        for _, row in self._rewrites(originals, self.rounds, number):
            fault = "no round could rewrite it" if row is None else None
            if row is not None and not seen.add(prompt_key(row.prompt)):
                fault = "equal to an earlier prompt"
            if self._kept.count(fault) and row is not None:
                yield row

    def _index(self) -> Seen:
        """With all originals."""
        seen = Seen(self._index_path)
        for number in range(len(self)):
            for row in self.original_chunk(number):
                seen.add(prompt_key(row.prompt))
        return seen


def operations_digest(config: GenerateConfig) -> dict[str, str]:
    """What rewrites depend on beside the settings: the texts of the operations; empty without rewriting."""
    if not config.evolve:
        return {}
    operations = load_operations(config.evolve_operations)
    return {"operations_digest": digest([asdict(one) for one in operations], CHECK).hex()}


def prompts_to_complete(config: GenerateConfig, work: WorkFolder) -> Prompts:
    """The prompts that teachers are asked to complete."""
    return EvolvedPrompts(work, config.evolve, config.evolve_keep) if config.evolve else Prompts(work)


def prompts_to_build(config: GenerateConfig, work: WorkFolder) -> Prompts:
    """The prompts that the dataset is built from; see [`KeptPrompts`]."""
    return KeptPrompts(work, config.evolve, config.evolve_keep) if config.evolve else Prompts(work)


def read_round(work: WorkFolder, index: int, number: int) -> list[Evolved]:
    """The file of a round for one chunk of prompts."""
    return [Evolved(**line) for line in read_lines(work.chunk(FOLDER, index, number))]


def rewrite_fault(candidate: Candidate) -> str | None:
    """
    Why the completion of a rewrite shows that the rewrite cannot be answered (arXiv 2304.12244, steps 2 and 3 of its
    elimination): a short apology, or no word at all. `None` for other completions, and for those of original prompts.
    """
    if not candidate.columns.get("evolution"):
        return None
    if not any(character.isalnum() for character in candidate.text):
        return "no word in the answer to a rewritten prompt"
    apologises = len(words(candidate.text)) < SHORT_APOLOGY and APOLOGY.search(candidate.text)
    return "apology in answer to a rewritten prompt" if apologises else None


def last_turn(prompt: Text) -> str:
    """What is rewritten: a text, or the last message."""
    return prompt if isinstance(prompt, str) else content(prompt[-1])


def _with_last_turn(prompt: Text, text: str) -> Text:
    if isinstance(prompt, str):
        return text
    shaped = text if isinstance(prompt[-1].get("content"), str) else [{"type": "text", "text": text}]
    return [*prompt[:-1], {**prompt[-1], "content": shaped}]


def _as_prompt(question: str, like: Text) -> Text:
    """A question as text where prompts are text, otherwise as a message."""
    return question if isinstance(like, str) else [{"role": "user", "content": question}]


def _question(prompt: Text, operation: Operation) -> Text:
    turns = [] if isinstance(prompt, str) else [m for m in prompt[:-1] if m["role"] in ("user", "assistant")]
    before = "\n".join(f"{message['role']}: {content(message)}" for message in turns)
    return _as_prompt(operation.question(last_turn(prompt), before), prompt)


def _evolved(parent: Evolved, operation: Operation, answer: Answer) -> Evolved:
    """What has become of a prompt after the rewriter's answer."""
    text, fault = operation.read(answer, last_turn(parent.prompt), continues=isinstance(parent.prompt, str))
    if fault is not None:
        if isinstance(answer, Refusal):
            return _failed(parent, operation.name, fault, answer.detail, refused=True)
        return _failed(parent, operation.name, fault, text)
    prompt = _with_last_turn(parent.prompt, text)
    return Evolved(parent.id, prompt, [*parent.operations, operation.name], operation.name)


def _failed(parent: Evolved, operation: str, fault: str, said: str, refused: bool = False) -> Evolved:
    return Evolved(parent.id, parent.prompt, parent.operations, operation, fault, said, refused)


def _verdict_fault(answer: Answer) -> str | None:
    """Why the rewriter's own check speaks against a rewrite, or `None`."""
    text, fault = answer_text(answer, [])
    verdict = last_words(text, VERDICTS)
    if isinstance(answer, Refusal) or verdict is None:
        return f"check without a verdict: {fault}" if fault else "check without a verdict"
    return None if verdict == "yes" else "unanswerable: the rewriter's own verdict"


def _stage_name(index: int) -> str:
    return f"evolve, round {index}"
