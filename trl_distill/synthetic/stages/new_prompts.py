"""New prompts: a teacher writes more of the kind that a few examples show (Self-Instruct, arXiv 2212.10560).

In rounds of a fixed size, each with a seed of its own and written when it is complete. A new prompt that equals or
resembles an example, or one made before, is dropped. Completing them is left to the pipeline.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from typing import Any

from ..config import GenerateConfig
from ..output.counts import Skip, SkipFile, Stage
from ..records import Answer, PromptRow, Refusal, answer_as_dict, answer_from_dict
from ..sources.base import Source, ask
from ..text import Text, flat
from ..work_folder import WorkFolder, read_lines, seed_of, write_lines
from .contamination import Benchmarks
from .dedup import Duplicates
from .ingest import PromptCounts, Prompts, write_chunks


POOL = 1000  # examples that are kept in memory, an even sample of all


BARREN = 5  # rounds in a row without a new prompt, after which it is given up


CUE = "New task:"


class NewPrompts:
    """
    Makes `config.new_prompts` prompts into the work folder's "new_prompts".

    Args:
        config (`GenerateConfig`): how many, from how many examples at a time, duplicates, seed.
        work (`WorkFolder`): with the prompts that serve as examples.
        source (`Callable[[], Source]`): loads who writes them; called only if something is to be written.
        benchmarks (`Benchmarks`, *optional*): with which prompts must share no n-gram.
    """

    def __init__(
        self,
        config: GenerateConfig,
        work: WorkFolder,
        source: Callable[[], Source],
        benchmarks: Benchmarks | None = None,
    ):
        self.config, self.work, self.load, self.benchmarks = config, work, source, benchmarks
        self.worker: Source | None = None

    def run(self, show: Callable[[int], None]) -> None:
        """Make them, unless it was done before; fewer where the teacher has nothing new to say."""
        if (self.work.path / "new_prompts").exists():
            return show(self.config.new_prompts)
        try:
            self._make(show)
        finally:
            if self.worker is not None:
                self.worker.close()

    def _make(self, show: Callable[[int], None]) -> None:
        self.seeds = Prompts(self.work)
        self.stage = Stage("new prompts", "prompts")
        pool = self._pool()
        with self.work.folder("new_prompts") as folder:
            with SkipFile(folder / "skipped.jsonl") as self.skips:
                index = self._index(folder)
                chunks = write_chunks(folder, self._new(index, pool, show), self.config.chunk_size)
                index.close()
            (folder / "duplicates.db").unlink()
            PromptCounts([self.stage], chunks, self.seeds.columns, self.seeds.text).write(folder)

    def _pool(self) -> list[str]:
        """An even sample of all prompts (reservoir sampling)."""
        draw, pool = random.Random(self.config.seed), list[str]()
        for i, text in enumerate(self._seed_texts()):
            if i < POOL:
                pool.append(text)
            elif (place := draw.randrange(i + 1)) < POOL:
                pool[place] = text
        return pool

    def _seed_texts(self) -> Iterator[str]:
        for number in range(len(self.seeds)):
            for row in self.seeds.chunk(number):
                yield flat(row.prompt)

    def _index(self, folder: Any) -> Duplicates:
        index = Duplicates(folder / "duplicates.db", self.config.near_duplicates)
        for text in self._seed_texts():
            index.fault(text, "")
        return index

    def _new(self, index: Duplicates, pool: list[str], show: Callable[[int], None]) -> Iterator[PromptRow]:
        """New prompts as rows, numbered on from the seeds."""
        first, barren, number = self.seeds.total, 0, 0
        while self.stage.kept < self.config.new_prompts and barren < BARREN:
            before = self.stage.kept
            for answer in self._round(number, pool):
                text, fault = _read(answer)
                if fault is None and self.stage.kept >= self.config.new_prompts:
                    fault = "more than asked for"
                if fault is None and self.benchmarks and (overlap := self.benchmarks.overlap(text)):
                    fault = overlap.reason
                    self.skips.add(Skip("new prompts", f"round {number}", overlap.detail))
                if fault is None:
                    fault = index.fault(text, "")
                if not self.stage.count(fault):
                    if isinstance(answer, Refusal):
                        self.skips.add(Skip("new prompts", f"round {number}", answer.detail))
                    continue
                prompt: Text = text if self.seeds.text else [{"role": "user", "content": text}]
                show(self.stage.kept)
                yield PromptRow(first + self.stage.kept - 1, prompt, {})
            barren = 0 if self.stage.kept > before else barren + 1
            number += 1

    def _round(self, number: int, pool: list[str]) -> list[Answer]:
        """What the teacher wrote in one round, from its file if that is there."""
        path = self.work.chunk("rounds", number)
        if not path.exists():
            self.worker = self.worker or self.load()
            draw = random.Random(seed_of(self.config.seed, "new prompts", number))
            examples = min(self.config.new_prompts_seeds, len(pool))
            asked = [self._question(draw.sample(pool, examples)) for _ in range(self.config.chunk_size)]
            seeds = [seed_of(self.config.seed, "round", number, i) for i in range(len(asked))]
            answers = ask(self.worker, asked, seeds, lambda: number > 0)
            write_lines(path, map(answer_as_dict, answers))
            self.work.share(path)
        return [answer_from_dict(found) for found in read_lines(path)]

    def _question(self, examples: list[str]) -> Text:
        shown = "\n\n".join(f"Task {i}:\n{text}" for i, text in enumerate(examples, start=1))
        if self.seeds.text:  # a model that continues text goes on with the list
            return f"Different tasks of one kind, each with numbers and words of its own.\n\n{shown}\n\n{CUE}\n"
        request = (
            f"Here are examples of a kind of task.\n\n{shown}\n\nWrite one new task of this kind that differs from "
            f'all of them. Do not solve it. Write "{CUE}" and then the task, and nothing else.'
        )
        return [{"role": "user", "content": request}]


def _read(answer: Answer) -> tuple[str, str | None]:
    """The task in an answer, and why it is none (or `None`)."""
    if isinstance(answer, Refusal):
        return "", answer.kind
    text = answer[0].text.rpartition(CUE)[2]
    follow = re.search(r"^\s*Task \d+:", text, re.MULTILINE)  # a model that continues the list with more
    if follow is None and answer[0].stop_reason != "stop":
        return "", "cut off at the length limit"
    text = (text[: follow.start()] if follow else text).strip()
    return text, None if text else "empty"
