"""The horizons that were tried: what each credits a token with, beside its own KL.

With KL_t' the divergence of the judged tokens of one completion, t' = 1 ... T, a token's gradient is that of its own KL
plus F_t ∇log q(y_t). The library has F_t = Σ_{t'>t} γ^{t'−t} KL_t' (`kl_discount`). Here are others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


# KL and mask, (B, T) each, and the rows' weights in a mean, (B, 1), to F (B, T), nats
Future = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _after(values: torch.Tensor) -> torch.Tensor:
    """The sum over later places, `(B, T)`."""
    return values.flip(1).cumsum(1).flip(1) - values


def whole(kl: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """All that follows, γ = 1: the gradient of the KL of whole completions."""
    return _after(kl * mask) * mask


def nothing(kl: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Nothing, γ = 0."""
    return torch.zeros_like(kl)


def normalised(kl: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The mean of what follows, Σ_{t'>t} KL_t' / (T − t): MiniLLM's length normalisation (arXiv 2306.08543)."""
    return whole(kl, mask, rows) / _after(mask.to(kl)).clamp(min=1)


def window(tokens: int) -> Future:
    """What follows within some tokens, Σ_{t<t'≤t+k} KL_t'."""

    def found(kl: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        # masks have no holes here: a completion is judged up to its end
        padded = torch.nn.functional.pad(whole(kl, mask, rows) + kl * mask, (0, tokens + 1))  # from t on
        count = kl.shape[1]
        return (padded[:, 1 : count + 1] - padded[:, tokens + 1 : count + tokens + 1]) * mask

    return found


def per_token(kl: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """
    What follows, each token less the batch's mean: Σ_{t'>t} (KL_t' − mean).

    The gradient of E[Σ KL] / E[T], nats per token rather than per completion: a completion that stops at once saves
    nothing, unless its tokens are worse than the mean.
    """
    judged = mask.to(kl)
    mean = (rows * kl * judged).sum() / (rows * judged).sum()
    return _after((kl - mean) * judged) * judged


@dataclass(frozen=True)
class Horizon:
    """
    One way of crediting.

    Attributes:
        label (`str`): in the table.
        future (`Callable`): from KL and mask, `(B, T)` each, and the rows' weights in a mean over the batch, `(B, 1)`,
            to what a token answers for, `(B, T)`, nats.
        keeps_stop (`bool`): whether the later KL may not move the stop token: the score function is then that of the
            token given that it is no stop, ∇log (q(y_t) / (1 − q(stop))). The stop token keeps the gradient of γ = 0.
    """

    label: str
    future: Future
    keeps_stop: bool = False


HORIZONS: dict[str, Horizon] = {
    "none": Horizon("γ = 0", nothing),
    "whole": Horizon("γ = 1", whole),
    "normalised": Horizon("mean of what follows (MiniLLM)", normalised),
    "window-4": Horizon("window of 4 tokens", window(4)),
    "window-1": Horizon("window of 1 token", window(1)),
    "keeps-stop": Horizon("γ = 1, the stop token keeps its own", whole, keeps_stop=True),
    "per-token": Horizon("γ = 1, less the mean per token", per_token),
}
