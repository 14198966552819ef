"""What was drawn, as the program's command line and as a label; which arguments may be given beside it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .schema import MACROS, TOGETHER


HELP_SECONDS = 300  # for a program to print its help, on a busy machine


def varied(config: dict[str, Any]) -> list[str]:
    """Names of the parameters that differ between runs."""
    return [name for name, spec in config["parameters"].items() if "value" not in spec]


def shown(config: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """What was drawn for a run, by argument; `together` is taken apart."""
    found: dict[str, Any] = {}
    for name in varied(config):
        found |= in_parts(parameters[name]) if name == TOGETHER else {name: parameters[name]}
    return found


def in_parts(arguments: str) -> dict[str, str]:
    """'--a=1 --b 2' as {"a": "1", "b": "2"}; a name without a value is "true"."""
    parts: dict[str, list[str]] = {}
    name = ""
    for word in shlex.split(arguments):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            parts[name] = [value] if equals else []
        else:
            parts.setdefault(name, []).append(word)
    return {name: " ".join(values) or "true" for name, values in parts.items()}


def label(settings: dict[str, Any]) -> str:
    """What was drawn, in few words: 'beta=0.1', 'forward_kl, topk'."""
    words = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in settings.values())
    if all(isinstance(value, str) for value in settings.values()):
        return ", ".join(words)
    return ", ".join(f"{name}={word}" for name, word in zip(settings, words, strict=True))


def command_line(config: dict[str, Any], parameters: dict[str, Any]) -> list[str]:
    """The command that `wandb agent` would run, with this interpreter."""
    arguments = [f"--{name}={value}" for name, value in parameters.items()]
    meaning = {
        "${env}": ["/usr/bin/env"],
        "${interpreter}": [sys.executable],
        "${program}": [config["program"]],
        "${args}": arguments,
    }
    return [part for word in config.get("command", MACROS) for part in meaning.get(word, [str(word)])]


def check_overrides(config: dict[str, Any], overrides: Sequence[str]) -> None:
    """
    Arguments after `--` win over the sweep's, so they must not be what it varies, in whatever spelling.

    Args:
        config (`dict[str, Any]`): the sweep's.
        overrides (`Sequence[str]`): the words after `--`.

    Raises:
        ValueError: one of them is what the sweep varies, or is the folder, which each run has of its own.
    """
    drawn: set[str] = set()
    for name in varied(config):
        values = config["parameters"][name].get("values", [])
        drawn |= {part for value in values for part in in_parts(str(value))} if name == TOGETHER else {name}
    known: set[str] | None = None

    def options() -> set[str]:  # asked for at most once: a program may take seconds to print its help
        nonlocal known
        known = options_of(config["program"]) if known is None else known
        return known

    for given in names_in(overrides):
        meant = meaning_of(given, sorted(drawn), options)
        if meant is not None:
            same = f"`--{given}`" if given == meant else f"`--{given}` is read as `--{meant}`, which"
            raise ValueError(f"{same} is what the sweep varies; given once for all, all runs would be the same.")
        if meaning_of(given, ["output_dir"], options) is not None:
            raise ValueError(f"`--{given}` stands before `--`: each run gets a folder of its own in it.")
    if overrides and not overrides[0].startswith("-"):
        raise ValueError(
            f"After `--` stand arguments of {config['program']}, such as `--use_cpu`; found {overrides[0]!r}."
        )


def names_in(words: Sequence[str]) -> Iterator[str]:
    """Names of the arguments in a command line, as they are spelled there; `--together="..."` is taken apart."""
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            continue
        if _plain(name) == TOGETHER:
            yield from names_in(shlex.split(value))
        else:
            yield name


def meaning_of(given: str, names: Sequence[str], options: Callable[[], set[str]]) -> str | None:
    """
    Which argument a spelling means to a parser of transformers: dashes, `no_` before a switch, or its beginning.

    Args:
        given (`str`): the spelling, without leading dashes.
        names (`Sequence[str]`): the arguments in question.
        options (`Callable[[], set[str]]`): all options of the program; called where a beginning may be a whole name.

    Returns:
        `str`, *optional*: one of `names`, or `None` where it is another argument.
    """
    forms = [_plain(given), _plain(given).removeprefix("no_")]
    for name in names:
        if _plain(name) in forms:
            return name
    begun = [name for name in names if any(form and _plain(name).startswith(form) for form in forms)]
    return begun[0] if begun and forms[0] not in options() else None


def _plain(name: str) -> str:
    return name.replace("-", "_")


def options_of(program: str) -> set[str]:
    """Names of a program's options, from its `--help`; none where it prints no help."""
    try:
        command = [sys.executable, program, "--help"]
        printed = subprocess.run(command, capture_output=True, text=True, timeout=HELP_SECONDS, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return set()
    return {_plain(name) for name in re.findall(r"(?<![\w-])--([A-Za-z][\w-]*)", printed)}


def logged_name(metric: str) -> str:
    """wandb's name of a metric as the trainer logs it: 'train/reward' is "reward", 'eval/reward' is "eval_reward"."""
    return metric.removeprefix("train/").replace("eval/", "eval_", 1)
