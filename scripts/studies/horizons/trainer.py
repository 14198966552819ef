"""`OPDTrainer` with another horizon: a study's subclass, no setting of the library."""

from __future__ import annotations

from typing import Any

import torch

from scripts.studies.horizons.horizons import HORIZONS
from trl_distill import OPDTrainer
from trl_distill.models.student import DistilledOutput
from trl_distill.objective.terms import term
from trl_distill.rollouts import MicroBatch
from trl_distill.training.loss import DistillationLoss


class HorizonLoss(DistillationLoss):
    """
    The loss with a horizon of `HORIZONS` in place of `kl_discount`.

    Args:
        trainer ([`HorizonTrainer`]): its `horizon` counts.
        setup ([`~trl_distill.training.setup.Setup`]): teachers and estimators.
    """

    def credited(
        self,
        per_token: torch.Tensor,
        weights: torch.Tensor | None,
        output: DistilledOutput,
        batch: MicroBatch,
        spans: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """The term that is minimised, `(B, C)`, for one teacher with the student's tokens, on fresh rollouts."""
        horizon = HORIZONS[self.trainer.horizon]
        if weights is not None:
            per_token = weights * per_token
        _, ratio, _ = self._ratios(output, batch)
        assert ratio is not None  # `kl_discount` is above 0, so that there are log-probabilities
        future = horizon.future(per_token.detach(), batch.mask, torch.ones(len(batch.mask), 1))
        score = ratio - self._log_goes_on(batch) if horizon.keeps_stop else ratio
        return term(per_token, per_token + score * future)

    def _log_goes_on(self, batch: MicroBatch) -> torch.Tensor:
        """log (1 − q(stop)) at each place, `(B, C)`, from a forward pass of its own."""
        trainer, rollouts = self.trainer, batch.rollouts
        model = trainer.accelerator.unwrap_model(trainer.model)
        logits = model(input_ids=rollouts.input_ids, attention_mask=rollouts.attention_mask).logits
        log_q = logits[:, -batch.mask.shape[1] - 1 : -1].float().log_softmax(-1)
        stop = trainer.processing_class.eos_token_id
        others = log_q.masked_fill(torch.arange(log_q.shape[-1]) == stop, -torch.inf)
        return others.logsumexp(-1)


class HorizonTrainer(OPDTrainer):
    """
    `OPDTrainer` whose tokens answer for the later KL as a horizon says. Write `kl_discount=1.0` beside it.

    Attributes:
        horizon (`str`): a key of `HORIZONS`.
    """

    horizon = "whole"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        assert self.setup is not None  # there is a teacher
        self.loss = HorizonLoss(self, self.setup)


def with_horizon(name: str) -> type[HorizonTrainer]:
    """A trainer class with this horizon."""
    return type("HorizonTrainer", (HorizonTrainer,), {"horizon": name})
