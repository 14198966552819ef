"""Where workers run: on this machine, or as tasks of Slurm or Ray through datatrove.

datatrove was chosen over Ray Data: its executors take the unit that is here already, a function of rank and world size
that leaves its result in shared storage, and give it to Slurm, which most clusters run, and to Ray alike. Ray Data
would hold the rows itself, a second copy of what the work folder keeps, and knows no Slurm. Fault tolerance is taken
from neither: a file is complete or missing, and whoever finds it missing makes it.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ..redaction import redacted
from .config import GenerateConfig
from .workers import Workers


EVERY = 10.0  # seconds between two looks at a queue


def run_workers(config: GenerateConfig, folder: Path, show: Callable[[], Any]) -> None:
    """
    Let workers make the chunks; returns when all have ended, whether they made everything or not.

    Args:
        config (`GenerateConfig`): all settings.
        folder (`Path`): the work folder; gets the logs of datatrove in "engine".
        show (`Callable`): called now and then while workers on this machine work.

    Raises:
        ValueError: datatrove or Ray is not installed, or the settings hold secrets, which would be written down.
    """
    if config.engine == "process":
        return Workers(config, show).run()
    settings = asdict(config)
    if redacted(settings) != settings:
        raise ValueError(
            f"The settings hold a secret, and `engine={config.engine!r}` would write it into the file of a job. Put "
            'keys into the variable that `api_key_env` names, or write them as `"$NAME"` in `request_options`.'
        )
    assert not isinstance(config.engine_options, str)
    options = {"tasks": config.workers, "logging_dir": str(folder / "engine"), "skip_completed": False}
    run = _run_on_slurm if config.engine == "slurm" else _run_on_ray
    run([partial(_task, settings)], {**options, **(config.engine_options or {})})


def _task(settings: dict[str, Any], data: Any, rank: int, world_size: int) -> None:
    """
    What datatrove calls for each rank, in a process of its pool, which waits for ever if that is killed. So the work is
    done in another process: the one that grows, and that a system short of memory kills.
    """
    Workers(GenerateConfig(**settings), lambda: None, [rank], world_size).run()


def _run_on_slurm(pipeline: list[Any], options: dict[str, Any]) -> None:
    """Submit an array of jobs, and wait until the queue does not list it any more."""
    try:
        from datatrove.executor import SlurmPipelineExecutor
    except ImportError as error:
        raise _missing("slurm", error) from None
    executor = SlurmPipelineExecutor(pipeline, job_name="trl_distill", **options)
    executor.run()
    try:
        while _is_queued(str(executor.job_id)):
            time.sleep(EVERY)
    except BaseException:
        subprocess.run(["scancel", str(executor.job_id)], check=False)  # workers end with whoever waits for them
        raise


def _is_queued(job: str) -> bool:
    """Whether the queue lists a job. Only the queue's word counts that it is gone, not a failure to ask."""
    found = subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True)
    if found.returncode:
        return "invalid job id" not in found.stderr.casefold()
    return bool(found.stdout.strip())


def _run_on_ray(pipeline: list[Any], options: dict[str, Any]) -> None:
    """Run on a Ray cluster: that of `address`, or one that is started here."""
    try:
        import ray
        from datatrove.executor import RayPipelineExecutor
    except ImportError as error:
        raise _missing("ray", error) from None
    address = options.pop("address", None)
    if not ray.is_initialized():
        ray.init(address=address)
    RayPipelineExecutor(pipeline, **options).run()


def _missing(engine: str, error: ImportError) -> ValueError:
    return ValueError(
        f"`engine={engine!r}` needs {error.name}, which is not installed. Install it with `pip install "
        "'trl_distill[engines]'`, or leave `engine` out to start the workers on this machine."
    )
