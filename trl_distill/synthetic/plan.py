"""The plan: which chunk stages a run has, and in which order. A new stage is a class and a layer here.

The stages of one layer do not read each other's files; each may read, in its own chunk, the files of all layers before.
Running them is left to `pipeline.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from .address import Address
from .config import GenerateConfig
from .sources.base import Sampling, Source
from .stages.chunks import ChunkStage, CompleteStage, ScoreStage
from .stages.difficulty import DifficultyModel, DifficultyStage, difficulty_folder
from .stages.evolve import EvolveStage
from .stages.ingest import Prompts
from .stages.judge_stages import CompareStage, RankStage
from .stages.operations import load_operations
from .stages.principles import load_principles
from .stages.revise import ReviseStage, completions_folder, revised_scores
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
    layers = [*_rewrites(config, work, load), _completions(config, work, prompts, load)]
    layers += _revisions(config, work, prompts, load)
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


def _rewrites(config: GenerateConfig, work: WorkFolder, load: LoadSource) -> list[Layer]:
    """Rounds of rewriting prompts."""
    if not config.evolve:
        return []
    address = config.evolve_address or next(iter(config.teachers.values()))
    loader = partial(load, address, replace(Sampling.from_config(config), n=1), config)
    given = (config, work, Prompts(work), loader, load_operations(config.evolve_operations))
    remote = address.kind == "endpoint"
    return [[EvolveStage(*given, number, remote)] for number in range(1, config.evolve + 1)]


def _revisions(config: GenerateConfig, work: WorkFolder, prompts: Prompts, load: LoadSource) -> list[Layer]:
    """Rounds of revising each teacher's completions."""
    if not config.revise:
        return []
    principles, sampling = load_principles(config.revise), replace(Sampling.from_config(config), n=1)
    layers = []
    for number in range(1, config.revise_rounds + 1):
        layer: Layer = []
        for index, (name, teacher) in enumerate(config.teachers.items()):
            address = config.revise_address or teacher
            loader = partial(load, address, sampling, config)
            remote = address.kind == "endpoint"
            layer.append(ReviseStage(config, work, prompts, loader, principles, number, index, name, remote))
        layers.append(layer)
    return layers


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
    scored = {completions_folder(config), *(("completions",) if config.pairs else ())}  # of pairs, the drafts, too
    return [
        ScoreStage(work, prompts, lambda: scorer, revised_scores(folder, of), index, name, remote, of)
        for index, name in enumerate(config.teachers)
        for of in sorted(scored)
    ]


def _difficulties(config: GenerateConfig, model: str, work: WorkFolder, prompts: Prompts) -> Layer:
    load, folder = (
        partial(DifficultyModel, model, config.batch_size),
        revised_scores(difficulty_folder(model), work.completions),
    )
    return [DifficultyStage(work, prompts, load, folder, i, name) for i, name in enumerate(config.teachers)]


def _comparisons(config: GenerateConfig, work: WorkFolder, prompts: Prompts, judge: PairJudge) -> list[Layer]:
    folder = revised_scores(scores_folder(judge), work.completions)
    ranks: Layer = [RankStage(work, prompts, folder, i, name, judge) for i, name in enumerate(config.teachers)]
    return [[CompareStage(work, prompts, lambda: judge, judge, len(config.teachers))], ranks]
