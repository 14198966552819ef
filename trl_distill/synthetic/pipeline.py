"""The pipeline: reads prompts, has them completed and scored chunk by chunk, and hands what is there to `finish.py`.

A chunk of prompts is asked about with a seed of its own and written when all its answers are there, so a run that was
killed begins again with the chunk that it was at, and comes to the same rows. What the stages do is in the modules
named after them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .config import FIXED, GenerateConfig
from .records import Answered, Refusal, Score
from .sources.base import Sampling, Source
from .sources.load import check_source, load_source
from .stages.dedup import check_installed
from .stages.finish import DatasetBuilder, publish
from .stages.human import check_human
from .stages.ingest import Ingest, Prompts, read_rows
from .stages.new_prompts import NewPrompts
from .stages.verify import Scorer, load_scorer
from .work_folder import WorkFolder, digest, file_digest, read_json, read_lines, seed_of, write_lines


FREE = ("output_dir", "overwrite", "concurrency", "timeout", "retries", "api_key_env")  # rows do not hang on these


def run_pipeline(config: GenerateConfig, console: Console | None = None) -> dict[str, Any]:
    """
    Make the dataset, or go on where an earlier run stopped.

    Args:
        config (`GenerateConfig`): all settings.
        console (`Console`, *optional*): where progress is shown.

    Returns:
        `dict`: the contents of the finished `counts.json`.

    Raises:
        ValueError: settings or inputs with which no dataset can be made.
        TeacherUnavailable: an endpoint stays away; what is finished is kept.
        TeacherAnswerError: an endpoint refuses everything, or answers something else.
    """
    return Pipeline(config, console or Console()).run()


class Pipeline:
    """One run; see [`run_pipeline`]."""

    def __init__(self, config: GenerateConfig, console: Console):
        self.config, self.console = config, console
        self.output = Path(config.output_dir).absolute()
        self.work = WorkFolder(self.output.with_name(f"{self.output.name}.work"))
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )

    def run(self) -> dict[str, Any]:
        self.scorer = load_scorer(self.config)
        settings = {name: value for name, value in asdict(self.config).items() if name not in FREE}
        fingerprint = self._fingerprint(settings)
        if done := self._finished(fingerprint):
            return done
        check_installed(self.config.near_duplicates)
        for address in self.config.teachers.values():
            check_source(address)
        with self.work.locked(), self.progress:
            self.work.check_settings(
                {**{name: settings[name] for name in FIXED}, "dataset_digest": _digest(self.config)}
            )
            self._read()
            if self.scorer is not None:
                self.scorer.needs(Prompts(self.work).columns)
            if self.config.human_data:
                check_human(self.config.human_data, Prompts(self.work).text)
            if self.config.new_prompts:
                self._make_prompts()
            self._write()
            scores = self._score() if self.scorer is not None else None
            task = self.progress.add_task("filtering", total=len(Prompts(self.work)))
            DatasetBuilder(self.config, self.work, scores, lambda: self.progress.advance(task)).build(
                settings, fingerprint
            )
            publish(self.work, self.output)
        return read_json(self.output / "counts.json")

    def _fingerprint(self, settings: dict[str, Any]) -> str:
        """Of everything that the rows hang on; local files by their contents."""
        human = self.config.human_data
        identity = self.scorer.identity() if self.scorer is not None else []
        inputs = [_digest(self.config), file_digest(Path(human)) if human and Path(human).is_file() else None]
        return digest(settings, identity, inputs).hex()

    def _finished(self, fingerprint: str) -> dict[str, Any] | None:
        """The counts of a dataset that is already there; an error if it is another one."""
        if not self.output.exists() or (self.output.is_dir() and not any(self.output.iterdir())):
            return None
        counts = self.output / "counts.json"
        if not counts.is_file() or "fingerprint" not in (found := read_json(counts)):
            raise ValueError(
                f"{self.output} exists and was not made by this pipeline. Pass another `--output_dir`, or remove it."
            )
        if found["fingerprint"] != fingerprint and not self.config.overwrite:
            raise ValueError(
                f"{self.output} holds a dataset that was made with other settings or inputs. Pass `--overwrite` to "
                "replace it, or another `--output_dir`."
            )
        return found if found["fingerprint"] == fingerprint else None

    def _read(self) -> None:
        config = self.config
        task = self.progress.add_task("reading prompts", total=None)
        rows = read_rows(config.dataset_name, config.dataset_config, config.dataset_split)

        def shown() -> Iterator[Any]:
            for row in rows:
                yield row
                self.progress.advance(task)

        routed = config.teachers if config.teacher_assignment == "column" else None
        Ingest(self.work, config.chunk_size, routed).run(shown(), config.max_prompts)
        total = Prompts(self.work).stages[0].seen
        self.progress.update(task, total=total, completed=total)

    def _make_prompts(self) -> None:
        config = self.config
        task = self.progress.add_task("new prompts", total=config.new_prompts)
        first = next(iter(config.teachers.values()))

        def source() -> Source:
            sampling = Sampling(1, config.max_completion_length, config.temperature, config.top_p)
            return load_source(first, sampling, config)

        NewPrompts(config, self.work, source).run(lambda made: self.progress.update(task, completed=made))

    def _write(self) -> None:
        prompts = Prompts(self.work)
        for index, (name, address) in enumerate(self.config.teachers.items()):

            def complete(source: Source, number: int, index: int = index, name: str = name) -> Iterator[dict[str, Any]]:
                rows = [row for row in prompts.chunk(number) if self._asks(row, index, name)]
                seed = seed_of(self.config.seed, number, index)
                answers = source.complete([row["prompt"] for row in rows], seed) if rows else []
                for row, answer in zip(rows, answers, strict=True):
                    if isinstance(answer, Refusal):
                        yield {"id": row["id"], "refusal": asdict(answer)}
                    else:
                        yield {"id": row["id"], "completions": [asdict(completion) for completion in answer]}

            self._chunks(
                f"completions of {name}",
                ("completions", index),
                partial(load_source, address, Sampling.from_config(self.config), self.config),
                complete,
            )

    def _asks(self, row: dict[str, Any], index: int, name: str) -> bool:
        """Whether a teacher completes a prompt."""
        if self.config.teacher_assignment == "rotate":
            return row["id"] % len(self.config.teachers) == index
        return self.config.asks_all or row["columns"].get("teacher", name) == name

    def _score(self) -> str:
        """Score what is not scored yet; the folder of the scores, which is another for another verifier."""
        assert self.scorer is not None
        folder = f"scores-{digest(self.scorer.identity(), size=6).hex()}"
        prompts = Prompts(self.work)
        for index, name in enumerate(self.config.teachers):

            def score(scorer: Scorer, number: int, index: int = index) -> Iterator[dict[str, Any]]:
                rows = {row["id"]: row for row in prompts.chunk(number)}
                columns = {  # all of the dataset's, also where no row of this chunk has them
                    i: {name: row["columns"].get(name) for name in prompts.columns} for i, row in rows.items()
                }
                answers = list(read_lines(self.work.chunk("completions", index, number)))
                asked = [
                    Answered(rows[answer["id"]]["prompt"], completion["text"], columns[answer["id"]])
                    for answer in answers
                    for completion in answer.get("completions", [])
                ]
                found = iter(scorer.score(asked) if asked else [])
                for answer in answers:
                    values = [_stored(next(found)) for _ in answer.get("completions", [])]
                    yield {"id": answer["id"], "scores": values}

            self._chunks(f"scores of {name}", (folder, index), lambda: self.scorer, score)
        return folder

    def _chunks(
        self,
        label: str,
        folders: tuple[Any, ...],
        load: Callable[[], Any],
        make: Callable[[Any, int], Iterator[dict[str, Any]]],
    ) -> None:
        """Make the files of all chunks that are not there; `load` gives what it takes, and is called only if needed."""
        prompts, worker = Prompts(self.work), None
        task = self.progress.add_task(label, total=prompts.total)
        try:
            for number in range(len(prompts)):
                path = self.work.chunk(*folders, number)
                if not path.exists():
                    worker = worker or load()
                    write_lines(path, make(worker, number))
                self.progress.update(task, completed=min((number + 1) * self.config.chunk_size, prompts.total))
        finally:
            if worker is not None:
                worker.close()


def _stored(score: Score) -> Any:
    return asdict(score) if isinstance(score, Refusal) else score


def _digest(config: GenerateConfig) -> str | None:
    """Of a local file of prompts."""
    path = Path(config.dataset_name)
    return file_digest(path) if path.is_file() else None
