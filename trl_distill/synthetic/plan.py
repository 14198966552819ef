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
from .stages.ingest import Prompts
from .stages.verify import Judge, Scorer
from .work_folder import WorkFolder, digest


Layer = list[ChunkStage[Any]]


LoadSource = Callable[[Address, Sampling, GenerateConfig], Source]


def make_plan(
    config: GenerateConfig, work: WorkFolder, prompts: Prompts, scorer: Scorer | None, load: LoadSource
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
    if scorer is not None:
        layers.append(_scores(config, work, prompts, scorer))
    return layers


def scores_folder(scorer: Scorer) -> str:
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
    folder, remote = scores_folder(scorer), isinstance(scorer, Judge)
    return [
        ScoreStage(work, prompts, lambda: scorer, folder, index, name, remote=remote)
        for index, name in enumerate(config.teachers)
    ]
