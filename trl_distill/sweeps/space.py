"""The points of a sweep: a grid's by their number, the others drawn by Optuna.

A draw depends on the sweep, the seed, the run's number and the results of earlier runs, and on nothing else: an
interrupted sweep draws what it would have drawn. Nothing here imports PyTorch: the memory is left to the runs.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from .schema import ENDLESS


try:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.trial import TrialState
except ImportError as error:
    raise ImportError("Sweeps need Optuna: pip install 'trl_distill[sweeps]'.") from error


STARTUP = 5  # of a bayes sweep: runs drawn at random before results count; sweeps of training runs are short


EDGE = 1e-9  # a quantile is at least this far from 0 and 1, where a normal distribution has none


@dataclass(frozen=True)
class Drawn:
    """
    An earlier run, as far as the next draw needs it.

    Attributes:
        parameters (`dict[str, Any]`): of the program.
        metric (`float`, *optional*): the sweep's; `None` where the run failed, which counts as the worst.
        history (`tuple[float, ...]`): the metric's logged values, of runs in a sweep with `early_terminate`.
        stopped (`bool`): whether the run was ended early.
    """

    parameters: dict[str, Any]
    metric: float | None
    history: tuple[float, ...] = ()
    stopped: bool = False


@dataclass(frozen=True)
class Axis:
    """
    A parameter as Optuna sees it.

    Attributes:
        distribution (`BaseDistribution`): of the coordinate that Optuna draws.
        value (`Callable`): coordinate to the program's value.
        coordinate (`Callable`): the way back; values that were rounded beyond the bounds are moved onto them.
    """

    distribution: BaseDistribution
    value: Callable[[Any], Any]
    coordinate: Callable[[Any], Any]


def axis_of(spec: dict[str, Any]) -> Axis:
    """
    The axis of a parameter.

    Args:
        spec (`dict[str, Any]`): with all defaults, as [`~schema.parameter`] returns it.
    """
    kind = spec["distribution"]
    if kind == "categorical":
        return Axis(
            CategoricalDistribution(range(len(spec["values"]))),
            lambda place: spec["values"][place],
            lambda value: _place(spec["values"], value),
        )
    if kind == "categorical_w_probabilities":
        ends = list(itertools.accumulate(spec["probabilities"]))
        last = max(i for i, share in enumerate(spec["probabilities"]) if share > 0)  # sums are rounded
        return Axis(
            FloatDistribution(0, 1),
            lambda at: spec["values"][min(bisect.bisect_right(ends, at), last)],
            lambda value: min(1.0, _middle(ends, _place(spec["values"], value))),
        )
    if kind == "int_uniform":
        return Axis(IntDistribution(spec["min"], spec["max"]), lambda at: at, lambda value: value)
    if "normal" in kind:
        return _rounded(_gaussian(spec["mu"], spec["sigma"], "log" in kind), spec.get("q"))
    low, high = float(spec["min"]), float(spec["max"])
    distribution = FloatDistribution(low, high, log="log" in kind)  # the inverse of a log-uniform value is one, too
    return _rounded(Axis(distribution, float, lambda value: min(max(float(value), low), high)), spec.get("q"))


def _gaussian(mu: float, sigma: float, log: bool) -> Axis:
    """Drawn as a quantile, since Optuna has no normal distribution; `log` says whether the logarithm is normal."""
    standard = NormalDist()

    def value(quantile: float) -> float:
        found = mu + sigma * standard.inv_cdf(min(max(quantile, EDGE), 1 - EDGE))
        return math.exp(found) if log else found

    def coordinate(found: float) -> float:
        if log:
            found = math.log(found) if found > 0 else -math.inf  # rounded to 0
        return standard.cdf((found - mu) / sigma) if sigma > 0 else 0.5

    return Axis(FloatDistribution(0, 1), value, coordinate)


def _rounded(axis: Axis, q: float | None) -> Axis:
    """To multiples of `q`: whole numbers where `q` is one."""
    if q is None:
        return axis
    return Axis(axis.distribution, lambda at: round(axis.value(at) / q) * q, axis.coordinate)


def _place(values: Sequence[Any], value: Any) -> int:
    return next(i for i, one in enumerate(values) if type(one) is type(value) and one == value)


def _middle(ends: Sequence[float], place: int) -> float:
    return (ends[place] + (ends[place - 1] if place else 0.0)) / 2


def draw(config: dict[str, Any], index: int, earlier: Sequence[Drawn], seed: int) -> dict[str, Any] | None:
    """
    The parameters of one run.

    Args:
        config (`dict[str, Any]`): the sweep's, as [`~schema.read_sweep`] returns it.
        index (`int`): the run's number, from 0.
        earlier (`Sequence[Drawn]`): the runs before it; read by `method: bayes` alone.
        seed (`int`): of the draws; a grid has none.

    Returns:
        `dict[str, Any]`, *optional*: by name, in alphabetical order as wandb has them; `None` beyond the grid's end.
    """
    parameters = dict(sorted(config["parameters"].items()))
    if config["method"] == "grid":
        return _grid_point({name: grid_values(spec) for name, spec in parameters.items()}, index)
    axes = {name: axis_of(spec) for name, spec in parameters.items() if spec["distribution"] != "constant"}
    study = _study(config, axes, earlier, _seed(seed, index))
    asked = study.ask({name: axis.distribution for name, axis in axes.items()}).params
    found = {name: axis.value(asked[name]) for name, axis in axes.items()}
    return {name: found[name] if name in found else spec["value"] for name, spec in parameters.items()}


def _seed(seed: int, index: int) -> int:
    """Of one draw, in 32 bits; neighbours have nothing in common."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:4], "big")


def _study(config: dict[str, Any], axes: dict[str, Axis], earlier: Sequence[Drawn], seed: int) -> optuna.Study:
    """Optuna's, with the earlier runs as its trials."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler: optuna.samplers.BaseSampler
    if config["method"] == "random":
        sampler, earlier = optuna.samplers.RandomSampler(seed), ()
    else:
        sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP, seed=seed)
    study = optuna.create_study(sampler=sampler, direction=config["metric"]["goal"])
    distributions = {name: axis.distribution for name, axis in axes.items()}
    for run in earlier:
        done = run.metric is not None and not run.stopped
        trial = optuna.trial.create_trial(
            state=TrialState.COMPLETE if done else TrialState.PRUNED,  # without values it ranks below all others
            value=run.metric if done else None,
            params={name: axis.coordinate(run.parameters[name]) for name, axis in axes.items()},
            distributions=distributions,
            intermediate_values=dict(enumerate(run.history)) if run.stopped else {},
        )
        study.add_trial(trial)
    return study


def grid_values(spec: dict[str, Any]) -> Sequence[Any]:
    """The values of a parameter in a grid, each once."""
    kind = spec["distribution"]
    if kind == "int_uniform":
        return range(spec["min"], spec["max"] + 1)
    if kind == "q_uniform":
        return np.arange(spec["min"], spec["max"], spec["q"]).tolist()  # as wandb, without the end
    values = [spec["value"]] if kind == "constant" else spec["values"]
    return list({(type(value), value): value for value in values}.values())


def _grid_point(values: dict[str, Sequence[Any]], index: int) -> dict[str, Any] | None:
    """The point with this number, in the order of `itertools.product`: the last parameter varies fastest."""
    found = {}
    for name, its_values in reversed(values.items()):
        index, place = divmod(index, len(its_values))
        found[name] = its_values[place]
    return None if index else dict(reversed(found.items()))


def size_of(config: dict[str, Any], asked: int | None) -> int:
    """
    Runs in the sweep.

    Args:
        config (`dict[str, Any]`): the sweep's.
        asked (`int`, *optional*): how many were asked for; a grid has no more than its points.

    Raises:
        ValueError: draws without end, and nobody said how many; or fewer than one were asked for.
    """
    if asked is not None and asked < 1:
        raise ValueError(f"`--runs` is {asked}; it counts runs, from 1.")
    if config["method"] in ENDLESS:
        if asked is None:
            raise ValueError(f"`method: {config['method']}` draws without end. Say how many with `--runs`.")
        return asked
    points = math.prod(len(grid_values(spec)) for spec in config["parameters"].values())
    return points if asked is None else min(asked, points)
