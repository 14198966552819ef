"""Estimators of the divergence: what each measures in the student's forward pass, and its loss term per token."""

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
    also: frozenset[str] = frozenset(),
    kernel: str = "fused",
) -> Estimator:
    """
    The estimator that `kl_estimator` names.

    Args:
        name (`str`): "full", "topk" or "sampled".
        divergence (`str`): a name of [`~trl_distill.objective.divergences.summands`].
        temperature (`float`): softmax temperature of both models.
        k (`int`): ids in the head of "topk".
        alpha (`float`): parameter of the divergence.
        stops (`list[int]`, *optional*): ids that count as one.
        log_p_temperature (`float`, *optional*): with "full", also measure the teacher's log-probability of the sampled
            token at this temperature, for the log. Another temperature than that of the divergence costs one more
            projection of the teacher.
        also (`frozenset[str]`): further measures for a token weighting: "teacher_entropy", "agreement".
        kernel (`str`): what "full" computes with, see [`OPDConfig`].
    """
    stops = stops or []
    table: dict[str, Callable[[], Estimator]] = {
        "full": lambda: Full(divergence, alpha, temperature, stops, log_p_temperature, also, kernel),
        "topk": lambda: TopK(k, divergence, temperature, stops, also),
        "sampled": lambda: Sampled(temperature, stops, also),
    }
    return table[name]()
