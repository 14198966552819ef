"""What a sweep's YAML asks for: it is read and checked, configurations are drawn, and become command lines.

The drawing is that of wandb's own package `sweeps` (extra `sweeps`), with a seed for each run. Running is left to
`sweep.py`. Left out: nested parameters and `early_terminate`, which only wandb's server can act on.
"""

from __future__ import annotations

import random
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of a newer pydantic than `sweeps` was written for
    try:
        from sweeps.config import SweepConfig, schema_violations_from_proposed_config
        from sweeps.run import RunState, SweepRun, next_run
    except ImportError:
        sys.exit("scripts/sweep.py needs wandb's package `sweeps`: pip install 'trl_distill[sweeps]'.")


TOGETHER = "together"  # the parameter whose value is several arguments


ENDLESS = ("random", "bayes")


MACROS = ("${env}", "${interpreter}", "${program}", "${args}")


@dataclass(frozen=True)
class Drawn:
    """An earlier run, as far as the next draw needs it: its parameters, and its metric if it has ended well."""

    parameters: dict[str, Any]
    metric: float | None


def read_sweep(path: Path) -> dict[str, Any]:
    """
    A sweep's configuration, checked against the schema of wandb's package, with the schema's defaults.

    Raises:
        ValueError: it cannot be read, does not fit the schema, or asks for what only wandb's server can do.
    """
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"The sweep {str(path)!r} cannot be read: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("parameters", {}), dict):
        raise ValueError(f"The sweep {str(path)!r} holds no settings; see scripts/sweeps/beta.yaml for what it needs.")
    wrong = schema_violations_from_proposed_config(config)
    missing = [name for name in ("program", "method", "metric", "parameters") if name not in config]
    wrong += [f"{name!r} is missing" for name in missing]
    for name, spec in config.get("parameters", {}).items():
        values = [spec["value"]] if "value" in spec else spec.get("values", [])
        if "parameters" in spec or any(isinstance(value, list | dict) for value in values):
            wrong.append(
                f"the parameter {name!r} is nested or a list, which is no argument of a program; write it as "
                f"`{TOGETHER}: {{value: --{name} one two}}`"
            )
    if "early_terminate" in config:
        wrong.append("`early_terminate` needs wandb's server: take it out here, or use `wandb agent`")
    unknown = [word for word in config.get("command", []) if str(word).startswith("${") and word not in MACROS]
    if unknown:
        wrong.append(f"`command` has {', '.join(unknown)}; known here are {', '.join(MACROS)}")
    if wrong:
        raise ValueError(f"The sweep {str(path)!r} is not valid: " + "; ".join(wrong) + ".")
    return dict(SweepConfig(config))


def draw(config: dict[str, Any], index: int, earlier: Sequence[Drawn], seed: int) -> dict[str, Any] | None:
    """
    The parameters of run `index`, `None` where the grid is used up.

    They depend on the sweep, the seed, the index and the earlier runs, and on nothing else: a sweep that was
    interrupted draws what it would have drawn.
    """
    name = config["metric"]["name"]
    runs = []
    for run in earlier:
        state = RunState.failed if run.metric is None else RunState.finished
        metrics = {} if run.metric is None else {name: run.metric}
        settings = {key: {"value": value} for key, value in run.parameters.items()}
        runs.append(SweepRun(config=settings, state=state, summaryMetrics=metrics))  # pydantic 2 drops the field's name
    random.seed(f"{seed}/{index}")
    np.random.seed([seed, index])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a Gaussian process on a handful of points does not converge; it says so often
        run = next_run(config, runs)
    if run is None:
        return None
    found = {key: setting["value"] for key, setting in run.config.items()}
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in found.items()}


def size_of(config: dict[str, Any], asked: int | None) -> int:
    """
    Runs in the sweep: as many as were asked for, at most the grid.

    Raises:
        ValueError: draws without end, and nobody said how many.
    """
    if asked is not None and asked < 1:
        raise ValueError(f"`--runs` is {asked}; it counts runs, from 1.")
    if config["method"] in ENDLESS:
        if asked is None:
            raise ValueError(f"`method: {config['method']}` draws without end. Say how many with `--runs`.")
        return asked
    points: list[Drawn] = []
    while (found := draw(config, len(points), points, 0)) is not None:
        points.append(Drawn(found, None))
    return len(points) if asked is None else min(asked, len(points))


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
    Arguments after `--` win over the sweep's, so they may not be what it varies.

    Raises:
        ValueError: one of them is, or is the folder, which each run has of its own.
    """
    first = draw(config, 0, [], 0) or {}
    names = {word[2:].partition("=")[0] for word in overrides if word.startswith("--")}
    clash = sorted(names & set(shown(config, first)))
    if clash:
        raise ValueError(f"`--{clash[0]}` is what the sweep varies; given once for all, all runs would be the same.")
    if "output_dir" in names:
        raise ValueError("`--output_dir` stands before `--`: each run gets a folder of its own in it.")
    if overrides and not overrides[0].startswith("-"):
        raise ValueError(
            f"After `--` stand arguments of {config['program']}, such as `--use_cpu`; found {overrides[0]!r}."
        )


def logged_name(metric: str) -> str:
    """wandb's name of a metric as the trainer logs it: 'train/reward' is "reward", 'eval/reward' is "eval_reward"."""
    return metric.removeprefix("train/").replace("eval/", "eval_", 1)
