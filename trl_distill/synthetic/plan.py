"""The plan: which chunk stages a run has, and in which order. A new stage is a class and a layer here.

The stages of one layer do not read each other's files; each may read, in its own chunk, the files of all layers before.
Running them is left to `pipeline.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .address import Address
from .config import GenerateConfig
from .sources.base import Sampling, Source
from .stages.chunks import ChunkStage, CompleteStage, ScoreStage
from .stages.difficulty import DifficultyModel, DifficultyStage, difficulty_folder
from .stages.ingest import Prompts
from .stages.judge_stages import CompareStage, RankStage
from .stages.verify import PairJudge, Scorer
from .work_folder import WorkFolder, digest


Layer = list[ChunkStage[Any]]


LoadSource = Callable[[Address, Sampling, GenerateConfig], Source]


def make_plan(
    config: GenerateConfig, work: WorkFolder, prompts: Prompts, scorer: Scorer | PairJudge | None, load: LoadSource
) -> list[Layer]:
    """
    The chunk stages of a run.

    Args:
        config (`GenerateConfig`): all settings.
        work (`WorkFolder`): where the files are.
        prompts (`Prompts`): whose chunks are worked on.
        scorer (`Scorer`, *optional*): the verifier.
        load (`Callable`): gives the source at an address.

    Returns:
        `list[list[ChunkStage]]`: layers, in their order.
    """
    layers = [_completions(config, work, prompts, load)]
    if isinstance(scorer, PairJudge):
        layers += _comparisons(config, work, prompts, scorer)
    elif scorer is not None:
        layers.append(_scores(config, work, prompts, scorer))
    if config.difficulty_model:
        layers.append(_difficulties(config, config.difficulty_model, work, prompts))
    return layers


def scores_folder(scorer: Scorer | PairJudge) -> str:
    """Where a verifier's scores are: another verifier's are not taken for its own."""
    return f"scores-{digest(scorer.identity(), size=6).hex()}"


def _completions(config: GenerateConfig, work: WorkFolder, prompts: Prompts, load: LoadSource) -> Layer:
    sampling = Sampling.from_config(config)
    return [
        CompleteStage(
            *(config, work, prompts, partial(load, address, sampling, config), index, name),
            remote=address.kind == "endpoint",
        )
        for index, (name, address) in enumerate(config.teachers.items())
    ]


def _scores(config: GenerateConfig, work: WorkFolder, prompts: Prompts, scorer: Scorer) -> Layer:
    folder, remote = scores_folder(scorer), scorer.remote
    return [
        ScoreStage(work, prompts, lambda: scorer, folder, index, name, remote=remote)
        for index, name in enumerate(config.teachers)
    ]


def _difficulties(config: GenerateConfig, model: str, work: WorkFolder, prompts: Prompts) -> Layer:
    load, folder = partial(DifficultyModel, model, config.batch_size), difficulty_folder(model)
    return [DifficultyStage(work, prompts, load, folder, i, name) for i, name in enumerate(config.teachers)]


def _comparisons(config: GenerateConfig, work: WorkFolder, prompts: Prompts, judge: PairJudge) -> list[Layer]:
    folder = scores_folder(judge)
    ranks: Layer = [RankStage(work, prompts, folder, i, name, judge) for i, name in enumerate(config.teachers)]
    return [[CompareStage(work, prompts, lambda: judge, judge, len(config.teachers))], ranks]
