"""Settings of the engine: who runs the stages, where what is finished lies, and what becomes of reasoning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


FIXED = ("keep_reasoning",)


FREE = ("workers", "engine", "work_dir")  # rows do not depend on these


ENGINES = ("process", "slurm", "ray")


REASONING = ("no", "think", "column")


@dataclass(repr=False)
class EngineSettings:
    """
    Who runs the stages, where what is finished lies, and what becomes of reasoning.

    > Parameters that control the engine

    Args:
        workers (`int`, *optional*, defaults to `1`): worker processes. Each makes the chunks whose number, divided by
            `workers`, leaves its own; the dataset is the same whatever their number is.
        engine (`str`, *optional*, defaults to `"process"`): where workers run: on this machine (`"process"`), or as
            tasks of `"slurm"` or `"ray"` through datatrove, which the extra `engines` installs.
        work_dir (`str`, *optional*): folder of what is finished, in place of `<output_dir>.work`: a path, or a URL of
            any storage that fsspec knows, such as `s3://bucket/run`. Workers on other machines must reach it.
        keep_reasoning (`str`, *optional*, defaults to `"no"`): what becomes of the reasoning that an endpoint gives
            beside its answer: it is left out (`"no"`), put in front of the completion as `<think>` text (`"think"`),
            or kept as a column `reasoning` (`"column"`).
    """

    workers: int = field(default=1, metadata={"help": "Worker processes."})
    engine: str = field(default="process", metadata={"help": "Where workers run: `process`, `slurm` or `ray`."})
    work_dir: str | None = field(
        default=None, metadata={"help": "Folder or URL of what is finished, in place of <output_dir>.work."}
    )
    keep_reasoning: str = field(
        default="no", metadata={"help": "Reasoning beside an endpoint's answer: `no`, `think` or `column`."}
    )

    def engine_faults(self) -> Iterator[str]:
        """What is wrong with these settings."""
        for name, choices in (("engine", ENGINES), ("keep_reasoning", REASONING)):
            if getattr(self, name) not in choices:
                yield f"`{name}={getattr(self, name)!r}` is not known. Choose one of {', '.join(map(repr, choices))}."
        if self.workers < 1:
            yield f"`workers` is {self.workers}; it must be at least 1."
        if self.keep_reasoning == "column" and getattr(self, "pairs", False):
            yield (
                "`keep_reasoning='column'` has no place in pairs, which hold two completions a row. Use `think`, which "
                "keeps the reasoning in the text."
            )
