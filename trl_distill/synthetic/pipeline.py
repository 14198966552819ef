"""The pipeline: the stages in their order, each with its progress bar, and when a dataset is finished already.

What the stages do, and how each can be interrupted, is in the modules named after them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from .. import foreign_text
from ..data.json_rows import InputRow
from .config import FIXED, GenerateConfig
from .engines import run_workers
from .images import check_images
from .make_chunks import ChunkMaker, work_folder
from .plan import scores_folder
from .settings import engine
from .sources.base import Sampling
from .sources.load import check_source, load_source
from .stages.benchmarks import benchmarks_digest, load_benchmarks
from .stages.chunks import ChunkStage
from .stages.dedup import check_installed
from .stages.difficulty import check_difficulty_model
from .stages.evolve import operations_digest
from .stages.finish import DatasetBuilder, publish
from .stages.human import check_human
from .stages.ingest import Ingest, Prompts, read_rows
from .stages.judge_check import load_check
from .stages.judge_stages import judge_findings, run_check
from .stages.language import check_language
from .stages.new_prompts import NewPrompts
from .stages.revise import revise_identity
from .stages.verify import RewardFunctions, load_scorer
from .work_folder import digest, file_digest, read_json


FREE = ("output_dir", "overwrite", "concurrency", "timeout", "retries", "api_key_env", *engine.FREE)  # not the rows


def run_pipeline(config: GenerateConfig, console: Console | None = None) -> dict[str, Any]:
    """
    Make the dataset; a run that was interrupted is resumed.

    Args:
        config (`GenerateConfig`): all settings.
        console (`Console`, *optional*): where progress is shown.

    Returns:
        `dict`: the contents of the finished `counts.json`.

    Raises:
        ValueError: settings or inputs with which no dataset can be made.
        TeacherUnavailable: an endpoint does not answer; what is finished is kept.
        TeacherAnswerError: an endpoint refuses everything, or answers something else.
    """
    return Pipeline(config, console or foreign_text.console()).run()


class Pipeline:
    """One run; see [`run_pipeline`]."""

    def __init__(self, config: GenerateConfig, console: Console):
        self.config, self.console = config, console
        self.output = Path(config.output_dir).absolute()
        self.work = work_folder(config)
        self.progress = Progress(
            foreign_text.description_column(),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )

    def run(self) -> dict[str, Any]:
        """See [`run_pipeline`]."""
        self.scorer = load_scorer(self.config)
        settings = _settings(self.config)
        fingerprint = self._fingerprint(settings)
        if done := self._finished(fingerprint):
            return done
        check_installed(self.config.near_duplicates)
        check_language(self.config.language or ())
        check_difficulty_model(self.config.difficulty_model)
        for address in (*self.config.teachers.values(), *self.config.rewriters):
            check_source(address)
        self.benchmarks = load_benchmarks(self.config)
        with self.work.locked(), self.progress:
            fixed = {name: settings[name] for name in FIXED}
            defaults = {field.name: field.default for field in fields(self.config) if field.name in FIXED}
            digests = {"dataset_digest": _digest(self.config), "benchmarks_digest": benchmarks_digest(self.config)}
            self.work.check_settings({**fixed, **digests, **operations_digest(self.config)}, defaults)
            self.work.share_all()
            self._read()
            self._check_inputs()
            if self.config.new_prompts:
                self._make_prompts()
            scores = self._complete_and_score()
            self._build(scores, settings, fingerprint)
            publish(self.work, self.output)
        return read_json(self.output / "counts.json")

    def _fingerprint(self, settings: dict[str, Any]) -> str:
        """
        Of everything that the rows depend on; local files by their contents. What is not used does not count, so that a
        dataset of an older version, which did not have it, stays the same.
        """
        config = self.config
        identity = self.scorer.identity() if self.scorer is not None else []
        inputs = [_digest(config), _file(config.human_data)]
        inputs += [_file(config.judge_check)] if config.judge_check else []
        inputs += [benchmarks_digest(config)] if config.benchmarks else []
        inputs += [*operations_digest(config).values(), *revise_identity(config)]
        return digest(_in_use(config, settings), identity, inputs).hex()

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

        def shown() -> Iterator[InputRow]:
            for row in rows:
                yield row
                self.progress.advance(task)

        routed = config.teachers if config.teacher_assignment == "column" else None
        Ingest(self.work, config.chunk_size, routed, self.benchmarks).run(shown(), config.max_prompts)
        total = Prompts(self.work).stages[0].seen
        self.progress.update(task, total=total, completed=total)

    def _check_inputs(self) -> None:
        """Find out before any teacher is asked what verifier and human data need."""
        prompts = Prompts(self.work)
        if prompts.images:
            check_images(self.config)
        _check_columns(self.config, prompts.columns)
        if self.scorer is not None:
            self.scorer.needs(prompts.columns)
        self.check = load_check(self.config, self.scorer, RewardFunctions)
        if self.config.human_data:
            check_human(self.config.human_data, prompts.text)
        if self.check is not None:
            task = self.progress.add_task("judge check", total=len(self.check))
            run_check(self.work, self.check, lambda parts: self.progress.update(task, completed=parts))

    def _make_prompts(self) -> None:
        config = self.config
        task = self.progress.add_task("new prompts", total=config.new_prompts)
        first = next(iter(config.teachers.values()))
        sampling = Sampling(1, config.max_completion_length, config.temperature, config.top_p)
        load = partial(load_source, first, sampling, config)
        new = NewPrompts(config, self.work, load, self.benchmarks)
        new.run(lambda made: self.progress.update(task, completed=made))

    def _complete_and_score(self) -> str | None:
        """Make the files of all stages; the folder of the scores, which is another for another verifier."""
        maker = ChunkMaker(self.config, self.work, self.scorer, load_source)
        bars = self._bars(maker)
        if self.config.workers > 1:
            run_workers(
                self.config,
                self.work.path,
                lambda: [bars(stage, len(stage.finished())) for stage in maker.stages],
            )
            self.work.pull()
        maker.make(range(len(maker.prompts)), bars)
        return scores_folder(self.scorer) if self.scorer is not None else None

    def _bars(self, maker: ChunkMaker) -> Callable[[ChunkStage[Any], int], None]:
        """A progress bar in prompts for each stage; what tells them how many chunks are finished."""
        total, size = maker.prompts.total, self.config.chunk_size
        bars = {stage: self.progress.add_task(stage.label, total=total) for stage in maker.stages}
        return lambda stage, chunks: self.progress.update(bars[stage], completed=min(chunks * size, total))

    def _build(self, scores: str | None, settings: dict[str, Any], fingerprint: str) -> None:
        task = self.progress.add_task("filtering", total=len(Prompts(self.work)))
        builder = DatasetBuilder(
            *(self.config, self.work, scores, lambda: self.progress.advance(task)), benchmarks=self.benchmarks
        )
        builder.findings = judge_findings(
            self.work, Prompts(self.work), list(self.config.teachers), self.scorer, self.check
        )
        builder.build(settings, fingerprint)


def _settings(config: GenerateConfig) -> dict[str, Any]:
    """The settings that rows depend on, as they are written down: without secrets."""
    return {name: value for name, value in config.shown().items() if name not in FREE}


def _in_use(config: GenerateConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of the first version in its order, then those that are not at their defaults, by name."""
    own = [field.name for field in fields(config) if field.name in GenerateConfig.__annotations__]
    after = own.index("reward_model") + 1
    first = [name for name in (*own[:after], "judge", "judge_prompt", *own[after:]) if name in settings]
    defaults = {field.name: field.default for field in fields(config)}
    later = sorted(name for name in settings if name not in first and settings[name] != defaults[name])
    return {name: settings[name] for name in (*first, *later)}


def _check_columns(config: GenerateConfig, columns: Collection[str]) -> None:
    """
    Raises:
        ValueError: a column of the input has a name under which a stage would write.
    """
    written = {
        "evolve": ("evolved_from", "evolution") if config.evolve else (),
        "keep_reasoning": ("reasoning",) if config.keep_reasoning == "column" else (),
        "keep_drafts": ("draft", "critique", "principle") if config.keep_drafts else (),
        "difficulty_model": ("ifd", "perplexity", "perplexity_alone") if config.difficulty_model else (),
    }
    for setting, names in written.items():
        if taken := [name for name in names if name in columns]:
            raise ValueError(
                f"The dataset has a column {taken[0]!r}, which `{setting}` would write. Rename the column, or leave it "
                "out."
            )


def _digest(config: GenerateConfig) -> str | None:
    """Of a local file of prompts."""
    path = Path(config.dataset_name)
    return file_digest(path) if path.is_file() else None


def _file(name: str | None) -> str | None:
    """The digest of a file, if there is one."""
    return file_digest(Path(name)) if name and Path(name).is_file() else None
