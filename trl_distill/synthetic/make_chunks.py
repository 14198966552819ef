"""Makes the files of all stages for some of the chunks: all of them in one process, a share in each worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .address import parse_address
from .config import GenerateConfig
from .plan import Layer, LoadSource, make_plan
from .scheduler import Scheduler, chunks_at_once
from .stages.chunks import ChunkStage
from .stages.evolve import prompts_to_complete
from .stages.revise import completions_folder
from .work_folder import WorkFolder


class ChunkMaker:
    """
    The plan of a run, in a work folder whose prompts are there.

    Args:
        config (`GenerateConfig`): all settings.
        work (`WorkFolder`): see [`work_folder`].
        scorer: the verifier, or `None`.
        load (`Callable`): gives the source at an address.

    Attributes:
        layers (`list[list[ChunkStage]]`): the plan.
        prompts (`Prompts`): whose chunks are made.
    """

    def __init__(self, config: GenerateConfig, work: WorkFolder, scorer: Any, load: LoadSource):
        self.config, self.prompts = config, prompts_to_complete(config, work)
        self.layers: list[Layer] = make_plan(config, work, self.prompts, scorer, load)

    @property
    def stages(self) -> list[ChunkStage[Any]]:
        """All stages, in the plan's order."""
        return [stage for layer in self.layers for stage in layer]

    def make(self, chunks: Sequence[int], done: Callable[[ChunkStage[Any], int], None] = lambda *_: None) -> None:
        """Make what is missing of some chunks; see [`Scheduler`]."""
        Scheduler(self.layers, chunks, _at_once(self.config), done).run()


def _at_once(config: GenerateConfig) -> int:
    """Chunks of a stage under way at once: enough for the model at most endpoints, and for a teacher's share."""
    judge = [parse_address(config.judge)] if config.judge else []
    endpoints = max(len(address.urls) for address in (*config.teachers.values(), *config.rewriters, *judge))
    sharing = 1 if config.asks_all else len(config.teachers)
    return chunks_at_once(config.concurrency * max(endpoints, 1) * sharing, config.chunk_size)


def work_folder(config: GenerateConfig) -> WorkFolder:
    """The folder of what is finished, with what other machines have finished so far."""
    output = Path(config.output_dir).absolute()
    beside, where = output.with_name(f"{output.name}.work"), config.work_dir
    if where and "://" in where:
        return WorkFolder(beside, completions_folder(config), where)
    return WorkFolder(Path(where).absolute() if where else beside, completions_folder(config))
