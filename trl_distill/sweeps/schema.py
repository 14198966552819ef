"""A sweep's YAML, read and checked: wandb's keys, with wandb's defaults filled in.

How a parameter is drawn is in `space.py`. Left out: nested parameters, and wandb's deprecated or rare distributions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


TOGETHER = "together"  # the parameter whose value is several arguments


METHODS = ("bayes", "grid", "random")


ENDLESS = ("random", "bayes")


MACROS = ("${env}", "${interpreter}", "${program}", "${args}")


REQUIRED = ("program", "method", "metric", "parameters")


KNOWN = {*REQUIRED, *("name", "description", "project", "entity", "command", "early_terminate")}
KNOWN |= {"apiVersion", "kind", "controller"}  # read by wandb alone


RANGE: dict[str, Any] = {"min": None, "max": None}
QUANTISED: dict[str, Any] = {**RANGE, "q": 1.0}
GAUSSIAN: dict[str, Any] = {"mu": 0.0, "sigma": 1.0}


# Distributions and their keys, with wandb's defaults; `None` must be given
DISTRIBUTIONS: dict[str, dict[str, Any]] = {
    "constant": {"value": None},
    "categorical": {"values": None},
    "categorical_w_probabilities": {"values": None, "probabilities": None},
    "int_uniform": RANGE,
    "uniform": RANGE,
    "q_uniform": QUANTISED,
    "log_uniform_values": RANGE,
    "q_log_uniform_values": QUANTISED,
    "inv_log_uniform_values": RANGE,
    "normal": GAUSSIAN,
    "q_normal": {**GAUSSIAN, "q": 1.0},
    "log_normal": GAUSSIAN,
    "q_log_normal": {**GAUSSIAN, "q": 1.0},
}


IN_A_GRID = ("constant", "categorical", "int_uniform", "q_uniform")


DEPRECATED = ("log_uniform", "q_log_uniform", "inv_log_uniform")  # bounds are exponents; refused by wandb, too


def read_sweep(path: Path) -> dict[str, Any]:
    """
    A sweep's configuration, with wandb's defaults.

    Args:
        path (`Path`): the YAML.

    Returns:
        `dict[str, Any]`: as in the file; each parameter has its `distribution`, the metric its `goal`.

    Raises:
        ValueError: the file cannot be read, or holds something that cannot be run here. All faults are named at once.
    """
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"The sweep {str(path)!r} cannot be read: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("parameters", {}), dict):
        raise ValueError(f"The sweep {str(path)!r} holds no settings; see scripts/sweeps/beta.yaml for what it needs.")
    faults = [*_faults_of_keys(config), *_faults_of_metric(config), *_faults_of_early_terminate(config)]
    filled: dict[str, Any] = {}
    for name, spec in config.get("parameters", {}).items():
        try:
            filled[name] = parameter(name, spec)
            if config.get("method") == "grid" and filled[name]["distribution"] not in IN_A_GRID:
                raise ValueError(
                    f"the parameter {name!r} is drawn from {filled[name]['distribution']!r}, which has no end to its "
                    "values, so a grid cannot hold it; write `values: [...]`, or `method: random`"
                )
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError(f"The sweep {str(path)!r} is not valid: {'; '.join(faults)}.")
    config |= {"parameters": filled, "metric": {"goal": "minimize", **config["metric"]}}
    if "early_terminate" in config:
        config["early_terminate"] = {"eta": 3, **config["early_terminate"]}
    return config


def _faults_of_keys(config: dict[str, Any]) -> Iterator[str]:
    yield from (f"{name!r} is missing" for name in REQUIRED if name not in config)
    if "parameters" in config and not config["parameters"]:
        yield "'parameters' is empty"
    for name in config:
        if name == "run_cap":
            yield "`run_cap` is not read here: leave it out, and write `--runs`"
        elif name not in KNOWN:
            yield f"{name!r} is not a key of a sweep; known are {', '.join(sorted(KNOWN))}"
    if "method" in config and config["method"] not in METHODS:
        yield f"'method': {config['method']!r} is not one of {', '.join(METHODS)}"
    command = config.get("command", [])
    if not isinstance(command, list):
        yield "`command` is not a list of words"
        return
    unknown = [word for word in command if str(word).startswith("${") and word not in MACROS]
    if unknown:
        yield f"`command` has {', '.join(unknown)}; known here are {', '.join(MACROS)}"


def _faults_of_metric(config: dict[str, Any]) -> Iterator[str]:
    if "metric" not in config:
        return
    metric = config["metric"]
    if not isinstance(metric, dict) or not isinstance(metric.get("name"), str):
        yield "`metric` needs a name, as in `metric: {name: train/reward, goal: maximize}`"
        return
    unknown = sorted(set(metric) - {"name", "goal", "target", "impute"})
    if unknown:
        yield f"`metric` has {', '.join(map(repr, unknown))}; known are name, goal, target, impute"
    if metric.get("goal", "minimize") not in ("minimize", "maximize"):
        yield f"`metric.goal` is {metric['goal']!r}; write minimize or maximize"
    if metric.get("impute", "worst") != "worst":
        yield (
            f"`metric.impute` is {metric['impute']!r}, but here a failed run always counts as the worst: "
            "leave it out, or write worst"
        )


def _faults_of_early_terminate(config: dict[str, Any]) -> Iterator[str]:
    if "early_terminate" not in config:
        return
    rule = config["early_terminate"]
    if not isinstance(rule, dict) or rule.get("type") != "hyperband":
        yield "`early_terminate` has one type, hyperband: write `early_terminate: {type: hyperband, min_iter: 3}`"
        return
    unknown = sorted(set(rule) - {"type", "min_iter", "max_iter", "s", "eta"})
    if unknown:
        yield f"`early_terminate` has {', '.join(map(repr, unknown))}; known are type, min_iter, max_iter, s, eta"
    if "min_iter" not in rule and not {"max_iter", "s"} <= set(rule):
        yield "`early_terminate` needs `min_iter`, or `max_iter` with `s`: after how many values runs are judged"
    for name in ("min_iter", "max_iter", "s"):
        if name in rule and not (_is_int(rule[name]) and rule[name] >= 1):
            yield f"`early_terminate.{name}` is {rule[name]!r}; write a whole number from 1"
    eta = rule.get("eta", 3)
    if not (_is_number(eta) and eta > 1):
        yield f"`early_terminate.eta` is {eta!r}, of which 1/eta go on at each cut; write a number above 1"
    elif all(_is_int(rule.get(name)) for name in ("max_iter", "s")) and rule["max_iter"] / eta < 1:
        yield f"`early_terminate` never looks: max_iter {rule['max_iter']} / eta {eta} is below 1"


def parameter(name: str, spec: Any) -> dict[str, Any]:
    """
    One parameter with its distribution and that distribution's defaults.

    Args:
        name (`str`): of the program's argument.
        spec (`Any`): what the YAML says.

    Returns:
        `dict[str, Any]`: `distribution`, and the keys that [`DISTRIBUTIONS`] lists for it.

    Raises:
        ValueError: it cannot be drawn here; the message is a part of a sentence.
    """
    if not isinstance(spec, dict):
        raise ValueError(f"the parameter {name!r} is {spec!r}; write `{name}: {{value: {spec}}}`")
    values = [spec["value"]] if "value" in spec else spec.get("values", [])
    if not isinstance(values, list) or ("values" in spec and not values):
        raise ValueError(f"the `values` of {name!r} are {values!r}; write a list with at least one value")
    if endless := [value for value in values if isinstance(value, float) and not math.isfinite(value)]:
        raise ValueError(
            f"the parameter {name!r} has the value {endless[0]}, which the sweep's files (JSON) cannot hold; write it "
            f'as text: "{endless[0]}"'
        )
    if "parameters" in spec or any(isinstance(value, list | dict) for value in values):
        raise ValueError(
            f"the parameter {name!r} is nested or a list, which is no argument of a program; write it as "
            f"`{TOGETHER}: {{value: --{name} one two}}`"
        )
    kind = spec.get("distribution", _inferred(spec))
    if kind == "categorical" and "probabilities" in spec:
        kind = "categorical_w_probabilities"
    if kind in DEPRECATED:
        raise ValueError(f"the distribution {kind!r} of {name!r} is deprecated; write {kind}_values, with plain bounds")
    if kind not in DISTRIBUTIONS:
        raise ValueError(f"the distribution {kind!r} of {name!r} is unknown here; known are {', '.join(DISTRIBUTIONS)}")
    defaults = DISTRIBUTIONS[kind]
    missing = [key for key, default in defaults.items() if default is None and key not in spec]
    unknown = [key for key in spec if key not in defaults and key != "distribution"]
    if missing or unknown:
        found = [f"lacks {key!r}" for key in missing] + [f"has {key!r}" for key in unknown]
        raise ValueError(f"the parameter {name!r} {', '.join(found)}; {kind!r} takes {', '.join(defaults)}")
    filled = {**defaults, **spec, "distribution": kind}
    _check_numbers(name, filled)
    return filled


def _inferred(spec: dict[str, Any]) -> str:
    if "value" in spec:
        return "constant"
    if "values" in spec:
        return "categorical"
    return "int_uniform" if _is_int(spec.get("min")) and _is_int(spec.get("max")) else "uniform"


def _check_numbers(name: str, spec: dict[str, Any]) -> None:
    for key in ("min", "max", "q", "mu", "sigma"):
        if key in spec and not _is_number(spec[key]):
            hint = "; YAML reads 1e-5 as text: write 1.0e-5" if isinstance(spec[key], str) else ""
            raise ValueError(f"`{key}` of {name!r} is {spec[key]!r}, which is not a number{hint}")
    kind = spec["distribution"]
    if kind == "int_uniform" and not (_is_int(spec["min"]) and _is_int(spec["max"])):
        raise ValueError(f"{name}: int_uniform needs whole numbers as min and max")
    if "min" in spec and spec["min"] >= spec["max"]:
        raise ValueError(f"{name}: min {spec['min']} is not less than max {spec['max']}")
    if "log_uniform" in kind and spec["min"] <= 0:
        raise ValueError(f"{name}: min {spec['min']} is not above 0, and has no logarithm")
    if spec.get("q", 1) <= 0 or spec.get("sigma", 0) < 0:
        raise ValueError(f"{name}: q must be above 0, and sigma must not be below 0")
    if "probabilities" in spec:
        shares = spec["probabilities"]
        if not isinstance(shares, list) or not all(_is_number(p) and p >= 0 for p in shares):
            raise ValueError(f"{name}: probabilities are {shares!r}; write a list of numbers from 0")
        if len(shares) != len(spec["values"]) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
            raise ValueError(f"{name}: probabilities {shares} must be one for each of the values and sum to 1")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
