"""The exact divergence, over the whole vocabulary."""

from __future__ import annotations

import torch

from .._trl import has_triton
from ..heads.comparison import compared_positions
from ..heads.fused import DivergenceSpec, fused_divergence
from ..heads.kernel import kernel_divergence
from ..signals import HiddenStates
from .base import TokenMeasures
from .log_probs import measured_also, teacher_log_p


# Divergences that TRL's kernel computes, and its `beta` for each; `None` stands for the divergence's alpha
KERNEL_BETA = {"reverse_kl": 1.0, "forward_kl": 0.0, "jsd": None}


def uses_kernel(device: torch.device, divergence: str, kernel: str) -> bool:
    """Whether TRL's kernel computes this divergence here; it is used only where it runs in Triton."""
    return kernel == "trl" and divergence in KERNEL_BETA and has_triton(device)


class Full:
    """The exact divergence over the whole vocabulary: it adds no sampling noise, and is right on any text."""

    needs_log_probs, profiles = False, True
    takes: tuple[type, ...] = (HiddenStates,)
    measures = TokenMeasures

    def __init__(
        self,
        divergence: str,
        alpha: float,
        temperature: float,
        stops: list[int],
        log_p_temperature: float | None = None,
        also: frozenset[str] = frozenset(),
        kernel: str = "fused",
    ):
        self.also, self.kernel = also, kernel
        self.divergence, self.alpha, self.temperature, self.stops = divergence, alpha, temperature, stops
        self.log_p_temperature = log_p_temperature

    def _uses_kernel(self, device: torch.device) -> bool:
        return (
            uses_kernel(device, self.divergence, self.kernel) and not self.stops
        )  # it cannot count several ids as one

    def measure(self, hidden, head, signal, sampled, log_q, slopes=None, start=None) -> TokenMeasures:
        if self._uses_kernel(hidden.device):
            return self._by_kernel(hidden, head, signal, sampled, log_q)
        form = DivergenceSpec(self.divergence, self.alpha, self.temperature, tuple(self.stops))
        positions = compared_positions(sampled, start) if self.profiles else None
        found = fused_divergence(hidden, head, signal.hidden, signal.head, form, sampled, slopes, positions)
        log_p = found.log_p if self.log_p_temperature == self.temperature else self._log_p(head, signal, sampled, log_q)
        shared = slopes is not None and slopes.log_q is not None
        return TokenMeasures(
            divergence=found.divergence,
            entropy=found.entropy,
            log_p=log_p,
            policy_log_q=found.log_q if shared else None,
            comparison=found.comparison,
            **measured_also(self.also, hidden, head, signal, sampled, self.temperature, self.stops),
        )

    def _log_p(self, head, signal, sampled, log_q) -> torch.Tensor | None:
        """The teacher's log-probabilities of the sampled tokens `(N,)`, to log whether reward and teacher agree."""
        if self.log_p_temperature is None or log_q is None:
            return None
        return teacher_log_p(signal, sampled, min(head.vocab_size, signal.head.vocab_size), self.log_p_temperature)

    def _by_kernel(self, hidden, head, signal, sampled, log_q) -> TokenMeasures:
        kernel_beta = KERNEL_BETA[self.divergence]
        beta = self.alpha if kernel_beta is None else kernel_beta
        divergence, entropy = kernel_divergence(hidden, head, signal, beta, self.temperature)
        more = measured_also(self.also, hidden, head, signal, sampled, self.temperature)
        log_p = self._log_p(head, signal, sampled, log_q)
        return TokenMeasures(divergence=divergence, entropy=entropy, log_p=log_p, **more)

    def shares_logits(self, device) -> bool:
        return self.log_p_temperature == self.temperature and not self._uses_kernel(device)

    def term(self, measured, log_q, ratio, weight) -> torch.Tensor:
        return measured.divergence
