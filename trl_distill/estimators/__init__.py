"""Estimators of the divergence: what each measures in the student's forward pass, and the term it makes of it."""

from __future__ import annotations

from collections.abc import Callable

from .base import Estimator
from .full import Full
from .sampled import Sampled
from .topk import TopK


def make_estimator(
    name: str,
    divergence: str,
    temperature: float,
    k: int,
    alpha: float = 0.0,
    stops: list[int] | None = None,
    log_p_temperature: float | None = None,
) -> Estimator:
    """
    The estimator that `kl_estimator` names.

    Ids in `stops` count as one. With `log_p_temperature`, "full" measures the sampled token too, at that temperature,
    where the student's log-probabilities are at hand: one more projection of the teacher, for the log.
    """
    stops = stops or []
    table: dict[str, Callable[[], Estimator]] = {
        "full": lambda: Full(divergence, alpha, temperature, stops, log_p_temperature),
        "topk": lambda: TopK(k, divergence, temperature, stops),
        "sampled": lambda: Sampled(temperature, stops),
    }
    return table[name]()
