"""A divergence of one's own: a function, or its import path, tried on a small example before it is used.

It has the form of the formulas in `divergences.py`: `f(log_q, log_p)` returns what each id adds, in nats. Bind
parameters with `functools.partial`. Left out: divergences that are no sum over ids, since stop tokens could not be
merged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from .user_functions import NamedFunction


logger = logging.getLogger(__name__)

Summands = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
HOW_TO_WRITE = (
    "Write `def my_divergence(log_q, log_p)` that takes log-probabilities of student and teacher, of any equal shape, "
    "and returns what each id adds, in that shape; see docs/objective.md."
)


class CustomDivergence(NamedFunction):
    """
    The name of a divergence of one's own, which carries its function.

    Attributes:
        function (`Callable`): from log-probabilities of student and teacher to the summands, nats.
    """

    what = "divergence"
    how = HOW_TO_WRITE


def load_divergence(value: Any, known: Any = ()) -> Any:
    """
    Find the function of a divergence of one's own, and try it.

    Args:
        value (`str` or `Callable`): a name, an import path such as `my_module.my_divergence`, or a function.
        known: names of the library's divergences.

    Returns:
        [`CustomDivergence`] for a function or a path; everything else as it was given.

    Raises:
        ValueError: the function cannot be imported, or fails the check of [`check_function`].
    """
    if isinstance(value, CustomDivergence) or (isinstance(value, str) and value in known):
        return value
    found = CustomDivergence.from_value(value)
    if found is None:
        return value
    check_function(found, found.function)
    return found


def _examples() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Log-probabilities of student and teacher, `(3, 7)` each, by what is special about them."""
    generator = torch.Generator().manual_seed(0)
    q, p = 2 * torch.randn(2, 3, 7, generator=generator)
    alike = p.log_softmax(-1)
    sure = 40 * torch.eye(7)[:3]  # probabilities of 1 and 4e-18, as models have them
    return {
        "two different distributions": (q.log_softmax(-1), p.log_softmax(-1)),
        "two equal distributions": (alike, alike),
        "a student that is sure of one id": (sure.log_softmax(-1), p.log_softmax(-1)),
        "a teacher that is sure of one id": (q.log_softmax(-1), sure.log_softmax(-1)),
    }


def check_function(name: str, function: Summands) -> None:
    """
    Try a function on small examples, in fp32 on the CPU.

    Args:
        name (`str`): for messages.
        function (`Callable`): see [`CustomDivergence`].

    Raises:
        ValueError: it fails, returns something else than one finite number for each id, has no finite gradient by the
            student's log-probabilities, changes its arguments, or an id's number depends on other ids. A value or
            gradient other than 0 at q = p, or a smaller value elsewhere, is a warning.
    """
    values = {}
    for case, (log_q, log_p) in _examples().items():
        values[case] = _tried(f"The divergence {name!r}, tried on {case},", function, log_q, log_p)
    log_q, log_p = _examples()["two different distributions"]
    whole = values["two different distributions"][0]
    parts: list[Any] = [(slice(0, 2), slice(0, 4)), (slice(None), 0)]
    for part in parts:  # merged stop tokens are computed apart, and their sum without a dimension of ids
        found = _called(f"The divergence {name!r}", function, log_q[part], log_p[part])
        if found.shape != whole[part].shape or not torch.allclose(found, whole[part], rtol=1e-4, atol=1e-6):
            raise ValueError(
                f"The divergence {name!r} gives an id another value if other ids or tokens are left out. It must be a "
                f"sum of one term for each id, so that stop tokens can be merged. {HOW_TO_WRITE}"
            )
    _warn(name, values)


def _called(what: str, function: Summands, log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """The function's result, if it is a tensor of the right shape."""
    given = log_q.detach().clone(), log_p.clone()
    try:
        found = function(log_q, log_p)
    except Exception as error:  # a user's own code
        raise ValueError(f"{what} failed: {type(error).__name__}: {f'{error}'.rstrip('.')}. {HOW_TO_WRITE}") from error
    if not isinstance(found, torch.Tensor):
        raise ValueError(f"{what} returned {found!r:.100}, which is no tensor. {HOW_TO_WRITE}")
    if found.shape != log_q.shape:
        raise ValueError(
            f"{what} returned a tensor of shape {(*found.shape,)} for log-probabilities of shape {(*log_q.shape,)}, "
            f"but the sum over ids is taken later. {HOW_TO_WRITE}"
        )
    if not torch.equal(given[0], log_q) or not torch.equal(given[1], log_p):
        raise ValueError(f"{what} changed its arguments in place, which are used again. {HOW_TO_WRITE}")
    return found


def _tried(
    what: str, function: Summands, log_q: torch.Tensor, log_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summands and the gradient of their sum by the student's logits, `(3, 7)` each."""
    with torch.enable_grad():
        logits = log_q.clone().requires_grad_()
        own = logits.log_softmax(-1)
        found = _called(what, function, own, own.detach() if log_p is log_q else log_p)  # equal to the last bit
        if not found.isfinite().all():
            raise ValueError(
                f"{what} returned {found[~found.isfinite()][0].item()}. Log-probabilities reach -40 and less, and "
                "probabilities round to 0 and 1 there: keep to logarithms (`torch.logaddexp`), or clamp."
            )
        if not found.requires_grad:
            raise ValueError(
                f"{what} returned a tensor without a gradient, so the student would learn nothing. Compute it from "
                "`log_q` with torch's functions, without `detach`, `no_grad`, `item` or numpy."
            )
        (gradient,) = torch.autograd.grad(found.sum(), logits, allow_unused=True)
    if gradient is None:
        raise ValueError(f"{what} does not depend on `log_q`, so the student would learn nothing. {HOW_TO_WRITE}")
    if not gradient.isfinite().all():
        raise ValueError(
            f"{what} has a gradient that is NaN or infinite, which would end the run. Roots and quotients have such "
            "gradients at 0: add a small number under the root, or clamp."
        )
    return found.detach(), gradient


def _warn(name: str, values: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Warn of what is allowed, but rarely meant."""
    (value, gradient), (other, slope) = values["two equal distributions"], values["two different distributions"]
    least, most = value.sum(-1), other.sum(-1)
    if slope.abs().max() < 1e-6:
        logger.warning(f"The divergence {name!r} has no gradient on a small example: the student may learn nothing.")
    if gradient.abs().max() > 1e-4:
        logger.warning(
            f"The divergence {name!r} has a gradient where student and teacher are equal (up to "
            f"{gradient.abs().max():.2g} by the logits of a small example), so training would not end at the teacher."
        )
    if least.abs().max() > 1e-4:
        logger.warning(
            f"The divergence {name!r} is {least.abs().max():.3g} where student and teacher are equal, not 0. Training "
            "is the same with a constant added, but the log does not show how far the student is from the teacher."
        )
    if (most < least - 1e-4).any():
        logger.warning(
            f"The divergence {name!r} is smaller where student and teacher differ ({(most - least).min():.3g}) than "
            "where they are equal: minimising it drives the student away from the teacher. Is its sign right?"
        )
