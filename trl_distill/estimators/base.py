"""Estimators of the divergence: what each computes from hidden states, and the term it makes of that.

Two steps, because they happen in two places. `measure` runs inside the student's forward, where the LM heads are
whole, and projects what is needed, in tiles. `term` runs in the trainer and turns those numbers into a loss per token,
with the formulas of `objective.py`. A new estimator is a class and one line in `make_estimator`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from . import objective
from ._compat import has_triton
from .fused import Form, Slopes, fused_divergence
from .heads import LMHead, kernel_divergence, log_probs_of, logits_of, top_ids, where_to_look
from .signals import HiddenStates, Signal, TokenLogProbs


Measured = dict[str, torch.Tensor]

# Divergences that TRL's kernel has, as the value of its `beta`; `None`: that is the divergence's alpha
KERNEL_BETA = {"reverse_kl": 1.0, "forward_kl": 0.0, "jsd": None}


def uses_kernel(device: torch.device, divergence: str) -> bool:
    """Whether TRL's kernel computes a divergence: where it runs in Triton."""
    return divergence in KERNEL_BETA and has_triton(device)


class Estimator(Protocol):
    """
    What the trainer and the student's forward ask of an estimator.

    Attributes:
        needs_log_probs (`bool`): whether the student's log-probability of the sampled token is needed, with gradient.
        takes (`tuple` of types): the signals that it can work with.
        temperature (`float`): softmax temperature of both models.
        stops (`list[int]`): ids that count as one; empty where there is nothing to merge.
    """

    needs_log_probs: bool
    takes: tuple[type, ...]
    temperature: float
    stops: list[int]

    def shares_logits(self, device: torch.device) -> bool:
        """Whether `measure` also gives the student's log-probabilities at the sampling temperature: "own_log_q"."""
        ...

    def measure(
        self,
        hidden: torch.Tensor,  # (N, H_s)
        head: LMHead,
        signal: Any,  # one of `takes`, for the same N tokens
        sampled: torch.Tensor,  # (N,) ids
        log_q: torch.Tensor | None,  # (N,) the student's log-probability of `sampled`, at the sampling temperature
        slopes: Slopes | None = None,  # what the gradients will be, where that is known
    ) -> Measured:
        """
        Per judged token, tensors of shape `(N,)` or `(N, K)`.

        With them may come "own_log_q", where logits are shared, and "looked", the [`~trl_distill.heads.differences`].
        """
        ...

    def term(
        self,
        measured: Measured,
        log_q: torch.Tensor | None,
        ratio: torch.Tensor | None,
        weight: torch.Tensor | None,
    ) -> torch.Tensor:
        """A term (see `objective.py`), `(B, C)`, from what was measured, now of shape `(B, C)` or `(B, C, K)`."""
        ...


class Full:
    """The exact divergence over the whole vocabulary: no noise of its own, and right on any prefix."""

    needs_log_probs = False
    takes: tuple[type, ...] = (HiddenStates,)

    def __init__(
        self,
        divergence: str,
        alpha: float,
        temperature: float,
        stops: list[int],
        log_p_temperature: float | None = None,
    ):
        self.divergence, self.alpha, self.temperature, self.stops = divergence, alpha, temperature, stops
        self.log_p_temperature = log_p_temperature

    def measure(self, hidden, head, signal, sampled, log_q, slopes=None) -> Measured:
        if uses_kernel(hidden.device, self.divergence):
            return self._by_kernel(hidden, head, signal, sampled, log_q)
        form = Form(self.divergence, self.alpha, self.temperature, tuple(self.stops))
        look = where_to_look(sampled)
        found = fused_divergence(hidden, head, signal.hidden, signal.head, form, sampled, slopes, look)
        measured = {"divergence": found.divergence, "entropy": found.entropy, "looked": found.looked}
        if slopes is not None and slopes.log_q is not None:
            measured["own_log_q"] = found.log_q
        if self.log_p_temperature == self.temperature:
            measured["log_p"] = found.log_p
        elif self.log_p_temperature is not None and log_q is not None:
            shared = min(head.vocab_size, signal.head.vocab_size)
            measured["log_p"] = _log_p(signal, sampled, shared, self.log_p_temperature)
        return measured

    def _by_kernel(self, hidden, head, signal, sampled, log_q) -> Measured:
        kernel_beta = KERNEL_BETA[self.divergence]
        beta = self.alpha if kernel_beta is None else kernel_beta
        divergence, entropy = kernel_divergence(hidden, head, signal, beta, self.temperature)
        shared = min(head.vocab_size, signal.head.vocab_size)
        if self.stops:
            of_student = _log_probs_of_few(hidden, head, self.stops, shared, self.temperature)
            with torch.no_grad():
                of_teacher = _log_probs_of_few(signal.hidden, signal.head, self.stops, shared, self.temperature)
            of_teacher = of_teacher.to(of_student.device)
            divergence = objective.as_one_class(divergence, of_student, of_teacher, self.divergence, self.alpha)
        measured = {"divergence": divergence, "entropy": entropy}
        if self.log_p_temperature is not None and log_q is not None:  # for the log: do reward and teacher agree?
            measured["log_p"] = _log_p(signal, sampled, shared, self.log_p_temperature)
        return measured

    def shares_logits(self, device) -> bool:
        return self.log_p_temperature == self.temperature and not uses_kernel(device, self.divergence)

    def term(self, measured, log_q, ratio, weight) -> torch.Tensor:
        return measured["divergence"]


class _FromLogProbs:
    """Estimators that are given the student's log-probabilities."""

    needs_log_probs = True
    takes: tuple[type, ...] = (HiddenStates, TokenLogProbs)

    def shares_logits(self, device: torch.device) -> bool:
        return False


class Sampled(_FromLogProbs):
    """The sampled token's log-ratio as a cost: unbiased, and noisy."""

    def __init__(self, temperature: float, stops: list[int]):
        self.temperature, self.stops = temperature, stops

    def measure(self, hidden, head, signal, sampled, log_q, slopes=None) -> Measured:
        log_p = _log_p(signal, sampled, head.vocab_size, self.temperature)
        if not self.stops:
            return {"log_p": log_p}
        of_student, of_teacher = _columns(hidden, head, signal, [self.stops], sampled, log_q, log_p, self.temperature)
        stopped = _is_in(sampled, self.stops)
        return {
            "log_p": torch.where(stopped, of_teacher.logsumexp(-1), log_p),
            "log_q": torch.where(stopped, of_student.logsumexp(-1), log_q).detach(),
        }

    def term(self, measured, log_q, ratio, weight) -> torch.Tensor:
        return objective.sampled_reverse_kl(measured.get("log_q", log_q), measured["log_p"], ratio, weight)


class TopK(_FromLogProbs):
    """
    The K most likely ids exactly, the rest by the sampled token: unbiased for every K.

    The ids are the student's where the teacher's head is at hand, and the teacher's where it names its own. The forward
    KL takes the rest as one class instead, a lower bound.
    """

    def __init__(self, k: int, divergence: str, temperature: float, stops: list[int]):
        self.k, self.divergence, self.temperature, self.stops = k, divergence, temperature, stops

    def measure(self, hidden, head, signal, sampled, log_q, slopes=None) -> Measured:
        log_p = _log_p(signal, sampled, head.vocab_size, self.temperature)
        if isinstance(signal, TokenLogProbs):
            ids = signal.top_ids[:, : self.k]
        else:
            ids = top_ids(hidden, head, min(self.k, head.vocab_size))  # (N, K)
        outside = ~(ids == sampled[:, None]).any(-1)
        unknown = ids >= head.vocab_size  # padding of the teacher's, which the student never writes
        ids = ids.masked_fill(unknown, 0)
        chosen: list[Any] = [ids, self.stops] if self.stops else [ids]
        both = _columns(hidden, head, signal, chosen, sampled, log_q, log_p, self.temperature)
        k, left_out = ids.shape[1], (unknown | _is_in(ids, self.stops)) if self.stops else unknown
        heads = [x[:, :k].masked_fill(left_out, _NEVER) for x in both]
        if self.stops:  # out of the head, and back into it as one class
            heads = [torch.cat([x, y[:, k:].logsumexp(-1, keepdim=True)], 1) for x, y in zip(heads, both, strict=True)]
            outside &= ~_is_in(sampled, self.stops)
        return {"log_p": log_p, "head_log_q": heads[0], "head_log_p": heads[1], "outside": outside}

    def term(self, measured, log_q, ratio, weight) -> torch.Tensor:
        m = measured
        if self.divergence == "forward_kl":
            return objective.topk_forward_kl(m["head_log_q"], m["head_log_p"])
        return objective.topk_reverse_kl(
            m["head_log_q"], m["head_log_p"], log_q, m["log_p"], m["outside"], ratio, weight
        )


_NEVER = -1e4  # a log-probability whose exponential is 0; the same for both models, so that it adds nothing


def _is_in(ids: torch.Tensor, few: list[int]) -> torch.Tensor:
    return torch.isin(ids, torch.tensor(few, device=ids.device))


@torch.no_grad()
def _log_p(signal: Signal, sampled: torch.Tensor, vocab_size: int, temperature: float) -> torch.Tensor:
    """The teacher's log-probability of each sampled token, `(N,)`."""
    if isinstance(signal, TokenLogProbs):
        return signal.log_p
    return log_probs_of(signal.hidden, signal.head, sampled, vocab_size, temperature)


def _columns(
    hidden: torch.Tensor,
    head: LMHead,
    signal: Signal,
    chosen: list[Any],
    sampled: torch.Tensor,
    log_q: torch.Tensor,
    log_p: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probabilities of a few ids, `(N, K)` of student and teacher; `chosen` are ids `(N, k)` or the same for all.

    log p(v) = z_v − log Z, and log Z = z_y − log p(y): the normalisers come with the sampled token's.
    """
    rows = [x if isinstance(x, torch.Tensor) else torch.tensor(x).expand(len(sampled), -1) for x in chosen]
    ids = torch.cat([*(x.to(sampled.device) for x in rows), sampled[:, None]], dim=1)
    of_student = logits_of(hidden, head, ids, temperature)
    of_student = of_student[:, :-1] - (of_student[:, -1] - log_q)[:, None]
    if isinstance(signal, TokenLogProbs):
        return of_student, signal.top_log_p[:, : of_student.shape[1]]
    with torch.no_grad():
        of_teacher = logits_of(signal.hidden, signal.head, ids, temperature)
        return of_student, of_teacher[:, :-1] - (of_teacher[:, -1] - log_p)[:, None]


def _log_probs_of_few(
    hidden: torch.Tensor, head: LMHead, ids: list[int], vocab_size: int, temperature: float
) -> torch.Tensor:
    """Log-probabilities of the same few ids at each position, `(N, |ids|)`, by one projection for the normaliser."""
    columns = torch.tensor(ids, device=hidden.device).expand(len(hidden), -1)
    logits = logits_of(hidden, head, columns, temperature)
    first = log_probs_of(hidden, head, columns[:, 0], vocab_size, temperature)
    return logits - (logits[:, 0] - first)[:, None]


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


def check_signals(name: str, estimator: Estimator, teachers: dict[str, Any], temperature: float) -> None:
    """Every teacher must give a signal that the estimator takes, at its temperature; raises `ValueError` otherwise."""
    for who, teacher in teachers.items():
        gives, fixed = getattr(teacher, "gives", HiddenStates), getattr(teacher, "temperature", None)
        if not issubclass(gives, estimator.takes):
            raise ValueError(
                f"kl_estimator={name!r} needs hidden states and an LM head, which the teacher {who!r} "
                f"({type(teacher).__name__}) does not give. Use kl_estimator='topk' or 'sampled'."
            )
        if estimator.stops and issubclass(gives, TokenLogProbs):
            raise ValueError(
                f"Student and teacher end a turn with different ids, and the teacher {who!r} "
                f"({type(teacher).__name__}) does not say how likely it is to stop as a whole. Give both the same stop "
                "tokens, use a local teacher, or set `merge_stop_tokens=False` and watch the length of completions."
            )
        asked = getattr(teacher, "top_k", None)
        if asked is not None and isinstance(estimator, TopK) and asked != estimator.k:
            raise ValueError(
                f"The teacher {who!r} asks the server for {asked} of its likeliest ids, but `kl_top_k` is "
                f"{estimator.k}. Give both the same number: `{type(teacher).__name__}(..., top_k={estimator.k})`."
            )
        if fixed is not None and fixed != temperature:
            raise ValueError(
                f"The teacher {who!r} ({type(teacher).__name__}) judges at temperature {fixed:g} only, but the "
                f"divergence is taken at {temperature:g}. Set `temperature` to {fixed:g}, or use a local teacher."
            )
