"""The loss of one micro-batch: TRL's policy loss plus beta times the divergence, from one forward pass of the student.

The parts are computed here; `step_metrics.py` turns them into metrics.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..estimators.base import Estimator
from ..models.student import DistilledOutput, ForwardPlan, RecordedStudent
from ..objective import terms
from ..objective.weighting import make_weighting
from ..rollouts import MicroBatch
from ..signals import TeacherScore
from .loss_weighting import LossWeighting
from .setup import Setup


@dataclass(frozen=True)
class LossParts:
    """
    The parts of one micro-batch's loss.

    Attributes:
        batch ([`~trl_distill.rollouts.MicroBatch`]): the micro-batch.
        scores (`list` of [`~trl_distill.signals.TeacherScore`]): the teachers' scores of it.
        output ([`~trl_distill.models.student.DistilledOutput`]): of the student's forward pass.
        beta (`float`): weight of the divergence, reward per nat.
        per_token (`torch.Tensor` of shape `(B, C)`): the teachers' term, with its value in nats and the objective's
            gradient; before token weights.
        by_teacher (`dict`): with several teachers, by name: its own term `(B, C)` and the mask of its tokens `(B, C)`.
        divergence (`torch.Tensor`, scalar): beta times the weighted `per_token`, reduced as TRL reduces its loss.
        policy (`torch.Tensor`, scalar, *optional*): TRL's own loss; `None` without a reward or side term.
        token_weights (`torch.Tensor` of shape `(B, C)`, *optional*): weights of the tokens in the divergence.
    """

    batch: MicroBatch
    scores: list[TeacherScore]
    output: DistilledOutput
    beta: float
    per_token: torch.Tensor
    by_teacher: dict[str, tuple[torch.Tensor, torch.Tensor]]
    divergence: torch.Tensor
    policy: torch.Tensor | None = None
    token_weights: torch.Tensor | None = None

    @property
    def total(self) -> torch.Tensor:
        return self.divergence if self.policy is None else self.policy + self.divergence


class DistillationLoss:
    """
    Computes [`LossParts`] for micro-batches of rollouts (`__call__`) and of the dataset's completions (`off_policy`).

    Args:
        trainer ([`~trl_distill.training.grpo_hooks.GRPOHooks`]): its policy loss and normaliser are used.
        setup ([`~trl_distill.training.setup.Setup`]): teachers and estimators.
    """

    def __init__(self, trainer: Any, setup: Setup):
        self.trainer, self.setup, self.args = trainer, setup, trainer.args
        self.weighting: LossWeighting | None = None
        if self.args.token_weighting is not None:
            weighting = make_weighting(self.args.token_weighting, self.args.token_weighting_kwargs)
            self.weighting = LossWeighting(weighting, trainer.accelerator, setup.pool.teachers)

    def __call__(self, model: Any, batch: MicroBatch, beta: float, rewarded: bool = True) -> LossParts:
        """
        The loss of rollouts of the student.

        Args:
            model: the student, as wrapped by the engine.
            batch ([`~trl_distill.rollouts.MicroBatch`]): the rollouts.
            beta (`float`): weight of the divergence, reward per nat.
            rewarded (`bool`): whether the reward has weight at this step.
        """
        trainer, estimator = self.trainer, self.setup.estimator
        scores = self.setup.pool.score(batch, trainer.mode == "train")
        for_policy = batch if rewarded or not trainer.has_rewards else batch.without_advantages()
        student = RecordedStudent(model, batch.rollouts, scores, self.forward_plan(for_policy, scores, beta))
        policy = None
        if rewarded or trainer.has_side_terms:
            policy = trainer.policy_loss(student, for_policy.inputs)
        else:
            self._call(student, self._student_inputs(batch))
        return self._parts(estimator, student.output, scores, batch, beta, policy)

    def off_policy(self, model: Any, batch: MicroBatch, beta: float) -> LossParts:
        """Beta times the divergence on the dataset's completions, without rewards, entropy bonus or MoE loss."""
        estimator = self.setup.off_policy_estimator
        scores = self.setup.pool.score(batch, training=True)
        slopes = self._divergence_slopes(scores, batch, beta)
        plan = ForwardPlan(estimator, divergence_slopes=slopes, start=self._start)
        student = RecordedStudent(model, batch.rollouts, scores, plan)
        self._call(student, batch.rollouts.arguments)
        return self._parts(estimator, student.output, scores, batch, beta)

    def _parts(
        self,
        estimator: Estimator,
        output: DistilledOutput,
        scores: list[TeacherScore],
        batch: MicroBatch,
        beta: float,
        policy: torch.Tensor | None = None,
    ) -> LossParts:
        """The parts of the loss from the student's output."""
        per_token, by_teacher, weights, spans = self.kl_term(estimator, output, scores, batch)
        divergence = beta * self.reduced(self.credited(per_token, weights, output, batch, spans), batch)
        return LossParts(batch, scores, output, beta, per_token, by_teacher, divergence, policy, weights)

    def _call(self, student: RecordedStudent, inputs: dict[str, Any]) -> None:
        with self.trainer.accelerator.autocast():
            student(**inputs)

    def reduced(self, per_token: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """Reduce to a scalar as TRL does; a row that stands for a group of equal rows has the weight of the group."""
        trainer = self.trainer
        if batch.row_weight is None:
            return trainer.reduce_per_token(per_token, batch.mask, batch.inputs)
        if trainer.averages_over_rows:
            per_token = per_token * batch.row_weight[:, None]
        # "bnpo" divides by the micro-batch's own tokens, and all of its rows may be masked
        kind = "dapo" if trainer.loss_type == "bnpo" else trainer.loss_type
        return trainer.reduce_per_token(per_token, batch.mask, batch.inputs, kind)

    def expected_slope(self, batch: MicroBatch) -> torch.Tensor:
        """Derivative of TRL's reduction by each token's value, `(B, C)`; known before the forward pass."""
        with torch.enable_grad():
            value = torch.zeros(batch.mask.shape, device=batch.mask.device, requires_grad=True)
            (slope,) = torch.autograd.grad(self.reduced(value, batch), value)
        return slope

    def _divergence_slopes(self, scores: list[TeacherScore], batch: MicroBatch, beta: float) -> list[torch.Tensor]:
        """Expected derivatives by the divergence from each teacher; none where token weights are not known yet."""
        slope = self.expected_slope(batch)
        if self.weighting is not None:
            weights = self.weighting.known_ahead(batch.mask)
            if weights is None:
                return []
            slope = slope * weights
        return [beta * score.weight[:, None] * slope for score in scores]

    @property
    def _start(self) -> int:
        """Decides at which tokens the models are compared: another number in each step, and known without the GPU."""
        return self.trainer.state.global_step * 40_507  # shares no factor with a distance between compared tokens

    def forward_plan(self, batch: MicroBatch, scores: list[TeacherScore], beta: float) -> ForwardPlan:
        """How to run the student's forward pass with as few projections as these rollouts allow."""
        estimator = self.setup.estimator
        plan = ForwardPlan(estimator, start=self._start)
        if not (estimator.needs_log_probs and self.args.kl_discount > 0):  # later tokens are part of such a slope
            plan = replace(plan, divergence_slopes=self._divergence_slopes(scores, batch, beta))
        # ratios to TRL's log-probabilities need TRL's own values, rounded the same way; side terms need TRL's outputs
        if self.trainer.has_side_terms or batch.needs_trl_log_probs:
            return plan
        whole = len(scores) == 1 and scores[0].scores_all(batch.mask)
        if whole and self.setup.same_vocabulary and estimator.shares_logits(batch.mask.device):
            # on fresh rollouts the policy loss is -A log q; where it is not, the backward pass corrects the difference
            assert batch.advantages is not None
            slope = self.expected_slope(batch)
            policy_slope = -batch.advantages.view(len(slope), -1) * slope
            return replace(plan, log_probs="shared", policy_slope=policy_slope)
        return replace(plan, log_probs="here", temperature=self.args.temperature)

    def _student_inputs(self, batch: MicroBatch) -> dict[str, Any]:
        """Arguments for the student's forward pass when there is no policy loss to call it."""
        rollouts = batch.rollouts
        inputs: dict[str, Any] = rollouts.arguments
        if self.setup.estimator.needs_log_probs or self.args.kl_discount > 0:
            labels = torch.full_like(rollouts.input_ids, -100)
            completion = slice(-batch.mask.shape[1], None)
            labels[:, completion] = rollouts.input_ids[:, completion].masked_fill(~batch.mask, -100)
            inputs |= {"labels": labels, "fused_lm_head": True}
        return inputs

    def kl_term(
        self, estimator: Estimator, output: DistilledOutput, scores: list[TeacherScore], batch: MicroBatch
    ) -> tuple[
        torch.Tensor,
        dict[str, tuple[torch.Tensor, torch.Tensor]],
        torch.Tensor | None,
        list[tuple[torch.Tensor, torch.Tensor]],
    ]:
        """
        The teachers' term for each completion token, `(B, C)`: value in nats, gradient of the divergence.

        With several teachers it is the sum of their terms, weighted row by row. The second result is
        `LossParts.by_teacher`, the third the token weights, the fourth those parts of the sum whose values stand at the
        starts of spans, with the starts.
        """
        pool, device, mask = self.setup.pool, self.trainer.accelerator.device, batch.mask
        assert output.measured is not None
        log_q, ratio, weight = self._ratios(output, batch)
        per_token = torch.zeros(mask.shape, device=device)
        by_teacher = {name: (per_token, torch.zeros_like(mask)) for name in pool.names if pool.several}
        measured = [found.map(lambda values: values.to(device)) for found in output.measured]
        spans = []
        for score, measures in zip(scores, measured, strict=True):
            alone = estimator.term(measures, log_q, ratio, weight) * score.mask
            weighted = score.weight[:, None] * alone
            per_token = per_token + weighted
            if measures.starts is not None:
                spans.append((weighted, measures.starts))
            by_teacher |= {name: (alone, mask & rows[:, None]) for name, rows in score.rows.items()}
        weights = None
        if self.weighting is not None:
            training = self.trainer.mode == "train"
            weights = self.weighting(measured, scores, batch, self.trainer.state.global_step, training)
        return per_token, by_teacher, weights, spans

    def credited(
        self,
        per_token: torch.Tensor,
        weights: torch.Tensor | None,
        output: DistilledOutput,
        batch: MicroBatch,
        spans: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """
        The term that is minimised, `(B, C)`: weighted, and credited with the later KL by `kl_discount`.

        Weights come first. So the later KL is weighted, too, and at γ = 1 the gradient is that of the sum of weighted
        KLs, with the weights held fixed. The discount counts tokens, and spans in those parts of the sum that have any.
        """
        if weights is not None:
            per_token = weights * per_token
        if self.args.kl_discount > 0 and not batch.is_off_policy:
            _, ratio, _ = self._ratios(output, batch)
            assert ratio is not None
            discount = self.args.kl_discount
            of_tokens = per_token - sum(part for part, _ in spans) if spans else per_token
            per_token = terms.sequence_term(of_tokens, batch.mask, ratio, discount)
            for part, starts in spans:  # token weights are for teachers with the student's tokens alone
                per_token = per_token + terms.sequence_term(part, batch.mask, ratio, discount, starts)
        return per_token

    def _ratios(self, output: DistilledOutput, batch: MicroBatch) -> tuple[torch.Tensor | None, ...]:
        """
        The student's log-probabilities, the importance ratio to the policy that wrote the rollouts (with gradient), and
        the weight of a token's score function (without), each `(B, C)`; `None` without log-probabilities.
        """
        if output.log_probs is None:
            return None, None, None
        mask = batch.mask
        log_q = output.log_probs[:, -mask.shape[1] :].to(self.trainer.accelerator.device)
        change = log_q - (log_q.detach() if batch.old_log_q is None else batch.old_log_q)
        ratio = torch.where(mask, change, 0.0).exp()  # masked before exp: only judged tokens count, others may overflow
        weight = ratio.detach()
        if batch.sampler_ratio is not None:
            correction = batch.sampler_ratio
            ratio = ratio * correction
            weight = weight * correction if correction.shape[1] == mask.shape[1] else weight
        return log_q, ratio, weight
