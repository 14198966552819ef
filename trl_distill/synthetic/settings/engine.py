"""Who runs the stages, where what is finished lies, arguments of chat templates, and what becomes of reasoning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


FIXED = ("keep_reasoning", "chat_template_kwargs")


FREE = ("workers", "engine", "engine_options", "work_dir")  # rows do not depend on these


ENGINES = ("process", "slurm", "ray")


REASONING = ("no", "think", "column")


@dataclass(repr=False)
class EngineSettings:
    """
    Who runs the stages, where what is finished lies, chat templates, and what becomes of reasoning.

    > Parameters that control the engine

    Args:
        workers (`int`, *optional*, defaults to `1`): worker processes. Each makes the chunks whose number, divided by
            `workers`, leaves its own; the dataset is the same whatever their number is.
        engine (`str`, *optional*, defaults to `"process"`): where workers run: on this machine (`"process"`), or as
            tasks of `"slurm"` or `"ray"` through datatrove, which the extra `engines` installs.
        engine_options (`dict` or `str`, *optional*): JSON with arguments of datatrove's executor, such as Slurm's
            partition: `{"partition": "gpu", "time": "10:00:00", "cpus_per_task": 4}`.
        work_dir (`str`, *optional*): folder of what is finished, in place of `<output_dir>.work`: a path, or a URL of
            any storage that fsspec knows, such as `s3://bucket/run`; each machine then works in a copy on its own disk,
            `<output_dir>.work`. Workers on other machines must reach it.
        keep_reasoning (`str`, *optional*, defaults to `"no"`): what becomes of the reasoning that an endpoint gives
            beside its answer: it is left out (`"no"`), put in front of the completion as `<think>` text (`"think"`),
            or kept as a column `reasoning` (`"column"`).
        chat_template_kwargs (`dict` or `str`, *optional*): JSON with arguments of the chat template, such as
            `{"enable_thinking": false}`, for teachers, and models that rewrite, in this process; not for a judge. For
            an endpoint, write them into `request_options`.
    """

    workers: int = field(default=1, metadata={"help": "Worker processes."})
    engine: str = field(default="process", metadata={"help": "Where workers run: `process`, `slurm` or `ray`."})
    engine_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON with arguments of datatrove's executor, such as Slurm's partition."}
    )
    work_dir: str | None = field(
        default=None, metadata={"help": "Folder or URL of what is finished, in place of <output_dir>.work."}
    )
    keep_reasoning: str = field(
        default="no", metadata={"help": "Reasoning beside an endpoint's answer: `no`, `think` or `column`."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON with arguments of the chat template, for teachers in this process."}
    )

    def engine_faults(self) -> Iterator[str]:
        """What is wrong with these settings."""
        for name, choices in (("engine", ENGINES), ("keep_reasoning", REASONING)):
            if getattr(self, name) not in choices:
                yield f"`{name}={getattr(self, name)!r}` is not known. Choose one of {', '.join(map(repr, choices))}."
        if self.engine_options and self.engine == "process":
            yield "`engine_options` are Slurm's or Ray's, but `engine` is 'process'. Leave them out, or set `engine`."
        if self.engine != "process" and self.workers == 1:
            yield f"`engine={self.engine!r}` is given, but `workers` is 1, which needs none. Set `--workers 8`, say."
        if self.workers < 1:
            yield f"`workers` is {self.workers}; it must be at least 1."
        if self.keep_reasoning == "column" and getattr(self, "pairs", False):
            yield (
                "`keep_reasoning='column'` has no place in pairs, which hold two completions a row. Use `think`, which "
                "keeps the reasoning in the text."
            )
