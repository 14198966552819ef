"""`trl-distill train --accelerate_config zero3`: the command starts itself again, on several processes.

This process becomes `accelerate launch`, so that signals and statuses are those of a run that was launched by hand.
Left to accelerate: everything that its YAML files say.
"""

from __future__ import annotations

import difflib
import importlib.resources
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


LAUNCHED = "TRL_DISTILL_LAUNCHED"  # set for the processes that are started from here


@dataclass
class LaunchArguments:
    """
    Arguments of `accelerate launch`. With any of them, training is launched by it.

    Args:
        accelerate_config (`str`, *optional*): a YAML file of `accelerate config`, or the name of one that comes with
            this package.
        num_processes (`int`, *optional*): on all machines together.
        num_machines (`int`, *optional*): how many machines take part; the command is started on each.
        machine_rank (`int`, *optional*): this machine's place among them, from 0.
        main_process_ip (`str`, *optional*): address of the first machine.
        main_process_port (`int`, *optional*): a free port there.
        gpu_ids (`str`, *optional*): devices of this machine, such as `"0,1"`.
    """

    accelerate_config: str | None = field(
        default=None,
        metadata={"help": "Launch under accelerate: zero2, zero3, zero3_offload, fsdp2 ..., or a YAML file."},
    )
    num_processes: int | None = field(default=None, metadata={"help": "Processes to launch, on all machines."})
    num_machines: int | None = field(default=None, metadata={"help": "Machines that take part."})
    machine_rank: int | None = field(default=None, metadata={"help": "This machine's place among them, from 0."})
    main_process_ip: str | None = field(default=None, metadata={"help": "Address of the first machine."})
    main_process_port: int | None = field(default=None, metadata={"help": "A free port there."})
    gpu_ids: str | None = field(default=None, metadata={"help": "Devices of this machine, such as 0,1."})


def find_config(name: str) -> Path:
    """
    The YAML file that `--accelerate_config` means.

    Args:
        name (`str`): a path, or the name of a file in this package's `accelerate_configs/`, without its suffix.

    Raises:
        ValueError: there is neither; lists the names.
    """
    if Path(name).is_file():
        return Path(name)
    folder = Path(str(importlib.resources.files("trl_distill.cli"))) / "accelerate_configs"
    shipped = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    close = difflib.get_close_matches(Path(name).stem, shipped, n=1)
    meant = f"Did you mean {close[0]!r}? " if close else ""
    raise ValueError(
        f"`--accelerate_config` is {name!r}, which is neither a file nor one of the shipped configurations. {meant}"
        f"They are {', '.join(shipped)}; write one of these, or the path of a YAML file of `accelerate config`."
    )


def launch_command(options: Any, command: str, words: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """
    The command line that starts this command under accelerate.

    Args:
        options: parsed arguments, with those of [`LaunchArguments`].
        command (`str`): `"train"` or `"check"`.
        words (`Sequence[str]`): all arguments of the command.
        environment (`Mapping[str, str]`): this process's.

    Returns:
        `list[str]`: empty where nothing is to be launched: not asked for, or this is a process that was.

    Raises:
        ValueError: there is no such configuration, or another launcher has started this process.
    """
    names = [one.name for one in fields(LaunchArguments)]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if not given or LAUNCHED in environment:
        return []
    if "RANK" in environment:
        raise ValueError(
            f"`--{next(iter(given))}` launches the run, but this is a process that another launcher has started "
            "(`accelerate launch`, `torchrun`). Give the argument to that launcher, or start without it: "
            f"`trl-distill {command} ...`."
        )
    config = given.pop("accelerate_config", None)
    launcher = ["--config_file", str(find_config(config))] if config is not None else []
    for name, value in given.items():
        launcher += [f"--{name}", str(value)]
    start = [sys.executable, "-m", "accelerate.commands.launch", *launcher]
    return [*start, "-m", "trl_distill.cli", command, *words]


def become(line: Sequence[str]) -> None:
    """Replace this process by another command."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(line[0], [*line], {**os.environ, LAUNCHED: "1"})
