"""What a token weighs in the divergence: built-in weightings, and functions of one's own.

A weighting is a function of what was measured at the tokens, by the names of its parameters (`ARGUMENTS`). None of them
depends on the sampled token, so a weight is a function of the prefix: KL = 0 stays a fixed point, and estimates by the
score function stay unbiased. What is measured, and where weights are applied, is in `training/loss_weighting.py`.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .user_functions import NamedFunction, name_of


logger = logging.getLogger(__name__)

COUNTED = ("divergence", "student_entropy", "teacher_entropy")  # quantities with statistics of the previous step
ARGUMENTS = (*COUNTED, "agreement", "position", "mask", "previous")
HOW_TO_WRITE = (
    f"Write `def my_weighting({ARGUMENTS[0]}, mask)` with those of {', '.join(ARGUMENTS)} that it needs, and further "
    "parameters from `token_weighting_kwargs`; it returns weights >= 0 in the shape of `mask`. See docs/objective.md."
)

BINS, LOWEST, STEP = 512, -14.0, 0.042  # of a histogram: ln(nats), from 8e-7 to 1,800, 4 % each


class CustomWeighting(NamedFunction):
    """
    The name of a weighting of one's own, which carries its function.

    Attributes:
        function (`Callable`): from what was measured to weights, see [`TokenWeighting`].
    """

    what = "token weighting"
    how = HOW_TO_WRITE


@dataclass(frozen=True)
class PreviousStep:
    """
    Statistics over all judged tokens of the last optimizer step, of all processes: the same everywhere, and
    independent of how a step is split into micro-batches.

    Attributes:
        tallies (`dict[str, torch.Tensor]`): by quantity, the sum of [`tally`] over those tokens.
    """

    tallies: dict[str, torch.Tensor]

    def mean(self, quantity: str) -> float:
        """The mean of "divergence", "student_entropy" or "teacher_entropy", nats."""
        total, counts = self.tallies[quantity][0], self.tallies[quantity][1:]
        return float(total / counts.sum().clamp(min=1))

    def threshold(self, quantity: str, share: float) -> float:
        """The value that this share of the tokens reaches, nats, to 4 %."""
        counts = self.tallies[quantity][1:].double()
        wanted = share * counts.sum()
        above = counts.flip(0).cumsum(0).flip(0)  # tokens in this bin or a higher one
        place = int((above >= wanted).sum()) - 1  # the highest bin at which enough are reached
        if place <= 0:
            return 0.0
        inside = float((above[place] - wanted) / counts[place].clamp(min=1))
        return float(torch.tensor(LOWEST + STEP * (place - 1 + inside), dtype=torch.float64).exp())


def tally(values: torch.Tensor) -> torch.Tensor:
    """The sum of n values, nats, and a histogram of them: `(1 + BINS,)`. Tallies of parts of a step add up."""
    bins = (values.clamp(min=1e-30).log().sub(LOWEST).div(STEP).floor() + 1).clamp(0, BINS - 1).long()
    return torch.cat([values.sum().view(1).float(), torch.bincount(bins, minlength=BINS).float()])


def cap(
    divergence: torch.Tensor, previous: PreviousStep | None, nats: float | None = None, times_mean: float = 1.0
) -> torch.Tensor:
    """
    min(1, c / KL): no token pulls with more than a KL of c would (c is `nats`, or `times_mean` times the mean KL).

    At first a few tokens carry most of the divergence: states that no teacher has been in, where its opinion is worth
    little. The source is this package; docs/objective.md says what it brought.

    Args:
        divergence (`torch.Tensor` of shape `(B, C)`): nats.
        previous ([`PreviousStep`], *optional*): for the mean; in the first step all weights are then 1.
        nats (`float`, *optional*): a fixed c.
        times_mean (`float`): c as a multiple of the mean divergence of the previous step.
    """
    if nats is None:
        if previous is None:
            return torch.ones_like(divergence)
        nats = times_mean * previous.mean("divergence")
    return torch.where(divergence > nats, nats / divergence, 1.0)


def top_share(divergence: torch.Tensor, previous: PreviousStep | None, share: float = 0.5) -> torch.Tensor:
    """1 for the `share` of tokens with the most divergence, by the threshold of the previous step, else 0 (TIP,
    arXiv 2604.14084, finds most of the signal in few of them)."""
    return _from_threshold("divergence", divergence, previous, share)


def by_student_entropy(
    student_entropy: torch.Tensor, previous: PreviousStep | None, share: float = 0.5
) -> torch.Tensor:
    """1 for the `share` of tokens at which the student is least sure, by the threshold of the previous step, else 0
    (TIP, arXiv 2604.14084: half of the tokens match all)."""
    return _from_threshold("student_entropy", student_entropy, previous, share)


def by_teacher_entropy(teacher_entropy: torch.Tensor, nats: float = 1.0) -> torch.Tensor:
    """
    exp(−H / `nats`), with H the teacher's entropy: less where the teacher itself is unsure.

    Entropy-aware distillation (arXiv 2603.07079) finds the reverse KL's signal unstable there, and adds the forward KL;
    this is only the weight of the reverse part.
    """
    return (-teacher_entropy / nats).exp()


def by_position(position: torch.Tensor, tokens: int) -> torch.Tensor:
    """
    1 for the first `tokens` judged tokens of a completion, then 0.

    The later a token, the less the teacher's opinion is worth (arXiv 2606.22600: the first 30 % of tokens match all).
    A share of the completion's length would not do: it depends on tokens that come later.
    """
    return (position < tokens).float()


def _from_threshold(quantity: str, values: torch.Tensor, previous: PreviousStep | None, share: float) -> torch.Tensor:
    if previous is None:
        return torch.ones_like(values)
    return (values >= previous.threshold(quantity, share)).float()


WEIGHTINGS: dict[str, Callable[..., torch.Tensor]] = {
    "cap": cap,
    "top_share": top_share,
    "student_entropy": by_student_entropy,
    "teacher_entropy": by_teacher_entropy,
    "position": by_position,
}
RANGES: dict[str, tuple[float, float]] = {"share": (0, 1), "nats": (0, float("inf")), "times_mean": (0, float("inf"))}


@dataclass(frozen=True)
class TokenWeighting:
    """
    A weighting with its parameters.

    Attributes:
        name (`str`): its name in the settings.
        function (`Callable`): takes `needs` by name.
        needs (`frozenset[str]`): those of `ARGUMENTS` that it takes. Tensors are of shape `(B, C)`, without gradient,
            and 0 at tokens that are not judged: `divergence` (that which is minimised), `student_entropy` and
            `teacher_entropy` in nats, at the divergence's temperature; `agreement`, 1 where both models have the same
            most likely id; `position`, the number of judged tokens before it; `mask`, bool. `previous` is
            [`PreviousStep`], or `None` in the first step of a run.
    """

    name: str
    function: Callable[..., torch.Tensor]
    needs: frozenset[str]

    def __call__(self, **measured: Any) -> torch.Tensor:
        """Weights `(B, C)`, fp32, without gradient."""
        with torch.no_grad():
            return self.function(**{name: measured[name] for name in self.needs}).float()

    @property
    def known_ahead(self) -> bool:
        """Whether weights are known before the forward pass."""
        return self.needs <= {"position", "mask"}

    @property
    def counted(self) -> list[str]:
        """Quantities of which it needs statistics of the previous step."""
        return [name for name in COUNTED if name in self.needs] if "previous" in self.needs else []


def load_weighting(value: Any) -> Any:
    """
    Find the function of a weighting of one's own.

    Args:
        value (`str` or `Callable`, *optional*): a name, an import path such as `my_module.my_weighting`, or a function.

    Returns:
        [`CustomWeighting`] for a function or a path; everything else as it was given.

    Raises:
        ValueError: the path cannot be imported.
    """
    if value is None or isinstance(value, CustomWeighting) or (isinstance(value, str) and value in WEIGHTINGS):
        return value
    return CustomWeighting.from_value(value) or value


def make_weighting(name: str, parameters: dict[str, Any] | None = None) -> TokenWeighting:
    """
    The weighting that the settings name, tried on a small example.

    Args:
        name (`str`): one of `WEIGHTINGS`, or a [`CustomWeighting`].
        parameters (`dict`, *optional*): by name.

    Raises:
        ValueError: it is unknown, its parameters do not fit, or it fails on the example.
    """
    function = name.function if isinstance(name, CustomWeighting) else WEIGHTINGS.get(name)
    if function is None:
        raise ValueError(
            f"`token_weighting` is {name!r}; this version has {', '.join(WEIGHTINGS)}, or a function of your own by "
            "its import path `module.function`."
        )
    parameters = dict(parameters or {})
    needs = _needs_of(name, function, parameters)
    for key, value in parameters.items() if name in WEIGHTINGS else ():
        _check_parameter(name, key, value)
    bound = functools.partial(function, **parameters)
    weighting = TokenWeighting(str(name) if name in WEIGHTINGS else name_of(function), bound, needs)
    try_weighting(weighting)
    return weighting


def measured_for(config: Any) -> frozenset[str]:
    """What an estimator must measure besides, for the weighting that a configuration names."""
    if config.token_weighting is None:
        return frozenset()
    needs = make_weighting(config.token_weighting, config.token_weighting_kwargs).needs
    return needs & {"teacher_entropy", "agreement"}


def _needs_of(name: str, function: Callable[..., Any], parameters: dict[str, Any]) -> frozenset[str]:
    """Those of `ARGUMENTS` that a function takes; an error if its other parameters are not those given."""
    found = inspect.signature(function).parameters.values()
    named = {p.name: p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    own = {key: p for key, p in named.items() if key not in ARGUMENTS}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in found)
    unknown = [] if open_ended else [key for key in parameters if key not in own]
    if unknown:
        known = ", ".join(f"`{key}`" for key in own) or "none"
        raise ValueError(
            f"`token_weighting_kwargs` has {unknown[0]!r}, which the token weighting {name!r} does not take. Its "
            f"parameters: {known}."
        )
    missing = [key for key, p in own.items() if p.default is p.empty and key not in parameters]
    if missing:
        given = "" if name in WEIGHTINGS else f" What is measured: {', '.join(ARGUMENTS)}."
        raise ValueError(
            f"The token weighting {name!r} needs {missing[0]!r}. Give it with `token_weighting_kwargs`, such as "
            f"`{{{missing[0]!r}: ...}}`.{given}"
        )
    return frozenset(key for key in named if key in ARGUMENTS and key not in parameters)


def _check_parameter(name: str, key: str, value: Any) -> None:
    lowest, highest = RANGES.get(key, (0, float("inf")))
    if isinstance(value, bool) or not isinstance(value, int | float) or not lowest < value <= highest:
        bounds = f"in ({lowest:g}, {highest:g}]" if highest < float("inf") else f"above {lowest:g}"
        raise ValueError(
            f"`token_weighting_kwargs` has {key}={value!r} for the token weighting {name!r}; it must be a number "
            f"{bounds}."
        )


def _example(rows: int = 3, length: int = 6) -> dict[str, Any]:
    """What is measured at a few tokens; some agree exactly, one is 50 nats away, some are not judged."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(length) < torch.tensor([length, 4, 2])[:rows, None]
    divergence, ours, theirs = (torch.rand(rows, length, generator=generator) * 2 for _ in range(3))
    divergence[0, 0], divergence[0, 1], divergence[1, 1] = 0.0, 50.0, 0.0
    measured = {"divergence": divergence, "student_entropy": ours, "teacher_entropy": theirs}
    measured = {key: value * mask for key, value in measured.items()}
    agreement = (torch.rand(rows, length, generator=generator) < 0.5).float() * mask
    return {
        **measured,
        "agreement": agreement,
        "position": (mask.long().cumsum(1) - 1).clamp(min=0),
        "mask": mask,
        "previous": PreviousStep({key: tally(value[mask]) for key, value in measured.items()}),
    }


def try_weighting(weighting: TokenWeighting) -> None:
    """
    Try a weighting on a small example, with and without statistics of a previous step.

    Raises:
        ValueError: it fails, returns no tensor of the mask's shape, negative, NaN or infinite weights, or changes its
            arguments. Weights that depend on other rows or on later tokens are a warning.
    """
    whole = _example()
    found = _tried(weighting, whole)
    _tried(weighting, {**whole, "previous": None})
    mask = whole["mask"]
    shorter = mask & (torch.arange(mask.shape[1]) < 3)
    cut = {key: value * shorter if isinstance(value, torch.Tensor) else value for key, value in whole.items()}
    for other, where, what in (
        (
            _rows(whole, slice(1, None)),
            (slice(1, None), mask[1:]),
            "other rows of the micro-batch, so it depends on its size",
        ),
        (cut, (slice(None), shorter), "later tokens, so it is no function of the prefix, and sampled terms are biased"),
    ):
        rows, judged = where
        again = _tried(weighting, other)
        if not torch.allclose(again[judged], found[rows][judged], rtol=1e-4, atol=1e-6):
            logger.warning(f"The token weighting {weighting.name!r} gives a token a weight that depends on {what}.")
    if not found[mask].any():
        logger.warning(f"The token weighting {weighting.name!r} is 0 at every token of a small example.")


def _rows(measured: dict[str, Any], rows: slice) -> dict[str, Any]:
    return {key: value[rows] if isinstance(value, torch.Tensor) else value for key, value in measured.items()}


def _tried(weighting: TokenWeighting, measured: dict[str, Any]) -> torch.Tensor:
    """The weights for an example."""
    what = f"The token weighting {weighting.name!r}, tried on a small example,"
    given = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in measured.items()}
    try:
        found = weighting.function(**{name: given[name] for name in weighting.needs})
    except Exception as error:  # a user's own code
        raise ValueError(f"{what} failed: {type(error).__name__}: {f'{error}'.rstrip('.')}. {HOW_TO_WRITE}") from error
    mask = measured["mask"]
    if not isinstance(found, torch.Tensor) or found.shape != mask.shape:
        shape = f"a tensor of shape {(*found.shape,)}" if isinstance(found, torch.Tensor) else f"{found!r:.100}"
        raise ValueError(f"{what} returned {shape} for tokens of shape {(*mask.shape,)}. {HOW_TO_WRITE}")
    judged = found[mask].float()
    if not judged.isfinite().all() or (judged < 0).any():
        wrong = judged[~judged.isfinite() | (judged < 0)][0].item()
        raise ValueError(f"{what} returned {wrong:g}; a weight must be finite and not negative. {HOW_TO_WRITE}")
    if any(isinstance(value, torch.Tensor) and not torch.equal(value, measured[key]) for key, value in given.items()):
        raise ValueError(f"{what} changed its arguments in place, which are used again. {HOW_TO_WRITE}")
    return found.float()
