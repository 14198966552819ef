"""The trainer's own loss, enumerated over every completion, against the gradient of the stated objective.

The oracle differentiates the objective itself, from full logits; `enumeration.py` has the sums over completions.
"""

from __future__ import annotations

import pytest
import torch
from enumeration import (
    COMPLETIONS,
    LENGTH,
    V,
    distributions,
    expected_gradient,
    inputs_of,
    kl,
    log_prob,
    oracle,
    sequence_objective,
    tiny_model,
)
from helpers import config, gradients, in_training, make_tokenizer, relative_error

from trl_distill import OPDTrainer


@pytest.fixture
def models():
    return tiny_model(1), tiny_model(2)


@pytest.fixture
def trainer(tmp_path, prompts, models):
    def build(**changes):
        student, teacher = models
        return in_training(
            OPDTrainer(
                model=student,
                teacher_model=teacher,
                args=config(tmp_path, loss_type="dr_grpo", max_completion_length=LENGTH, **changes),
                train_dataset=prompts,
                processing_class=make_tokenizer(["<pad>", "<eos>", "a", "b", "."]),
            )
        )

    return build


ESTIMATORS = {
    "full": {"kl_estimator": "full"},
    "sampled": {"kl_estimator": "sampled"},
    "top 0": {"kl_estimator": "topk", "kl_top_k": 0},
    "top 2": {"kl_estimator": "topk", "kl_top_k": 2},
    "top all": {"kl_estimator": "topk", "kl_top_k": V},
}


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_expected_gradient_is_that_of_the_objective(trainer, models, estimator, discount):
    found = expected_gradient(trainer(**estimator, kl_discount=discount))
    assert relative_error(found, oracle(*models, discount)) < 1e-4


def test_at_discount_one_the_oracle_is_the_gradient_of_the_sequence_kl(models):
    """By autograd of the enumerated objective, and by finite differences of it along a direction."""
    student, teacher = models
    found = oracle(student, teacher, 1.0)
    student.zero_grad()
    sequence_objective(student, teacher).backward()
    assert relative_error(found, gradients(student)) < 1e-5

    student, teacher = student.double(), teacher.double()
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(len(found), generator=generator, dtype=torch.float64)
    values = []
    for step in (2e-6, -2e-6):
        with torch.no_grad():
            start = torch.nn.utils.parameters_to_vector(student.parameters())
            torch.nn.utils.vector_to_parameters(start + step * direction, student.parameters())
            values.append(sequence_objective(student, teacher).item())
            torch.nn.utils.vector_to_parameters(start, student.parameters())
    assert (values[0] - values[1]) / 4e-6 == pytest.approx((found @ direction).item(), rel=1e-4)


def test_the_oracle_can_fail(trainer, models):
    """Another discount, the other direction of the KL, and k1 as a loss are all told apart."""
    student, teacher = models
    found = expected_gradient(trainer(kl_discount=1.0))
    assert relative_error(found, oracle(student, teacher, 0.0)) > 0.05
    assert relative_error(found, oracle(student, teacher, 0.9)) > 1e-3
    student.zero_grad()
    for y in COMPLETIONS:  # forward KL at each token
        log_q = distributions(student, y)
        with torch.no_grad():
            log_p, weight = distributions(teacher, y), log_prob(log_q, y).sum().exp()
        (weight * kl(log_p, log_q).sum()).backward()
    forward = gradients(student)
    assert relative_error(expected_gradient(trainer()), forward) > 0.05
    student.zero_grad()
    for y in COMPLETIONS:  # k1 as a loss: no gradient in expectation
        log_q = distributions(student, y)
        with torch.no_grad():
            weight = log_prob(log_q, y).sum().exp()
        (weight * log_prob(log_q, y).sum()).backward()
    assert gradients(student).norm() < 1e-5 * forward.norm()


@pytest.mark.parametrize("correction", [None, "token", "sequence"])
@pytest.mark.parametrize("discount", [0.0, 1.0])
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_stale_rollouts(trainer, models, estimator, discount, correction):
    """
    Written by another model: exact parts carry weight 1, score-function parts the token's ratio.

    The ratio may come in two parts, from the old policy and from vLLM's sampler to it, by token or for the sequence.
    """
    student, teacher = models
    writer = tiny_model(5)

    def inputs(y):
        padding = (0, LENGTH - len(y))
        with torch.no_grad():
            old = log_prob(distributions(writer, y), y).float()
            between = 0.5 * old - 0.1  # log-probabilities of a policy between writer and student
        extra = {"old_per_token_logps": old}
        if correction == "token":
            extra = {"old_per_token_logps": between, "importance_sampling_ratio": (between - old).exp()}
        extra = {name: torch.nn.functional.pad(values, padding)[None] for name, values in extra.items()}
        if correction == "sequence":
            extra["importance_sampling_ratio"] = torch.ones(1, 1)
        return inputs_of(y, **extra)

    found = expected_gradient(trainer(**estimator, kl_discount=discount), behaviour=writer, inputs=inputs)
    assert relative_error(found, oracle(student, teacher, discount, behaviour=writer)) < 1e-4


@pytest.mark.parametrize("shape", [(1, LENGTH), (1, 1)], ids=["token", "sequence"])
def test_sampler_correction_applies_to_score_functions(trainer, shape):
    """vLLM's ratio, truncated by TRL, multiplies the sampled token's gradient and not the exact one's."""
    y = COMPLETIONS[-1]
    grads, losses = {}, {}
    for name in ("sampled", "full"):
        judge = trainer(kl_estimator=name)
        for weight in (1.0, 0.25):
            judge.model.zero_grad()
            loss = judge.rollout_loss(judge.model, inputs_of(y, importance_sampling_ratio=torch.full(shape, weight)))
            loss.backward()
            grads[name, weight], losses[name, weight] = gradients(judge.model), loss.item()
    assert relative_error(grads["sampled", 0.25], 0.25 * grads["sampled", 1.0]) < 1e-5
    assert relative_error(grads["full", 0.25], grads["full", 1.0]) < 1e-6
    of_value = 0.25 if shape[1] > 1 else 1.0  # a factor of the whole sequence does not weigh each token's KL
    assert losses["sampled", 0.25] == pytest.approx(of_value * losses["sampled", 1.0], rel=1e-5)


def test_tool_tokens_are_skipped_by_the_discount(trainer):
    """A token that is not judged, between two that are, adds nothing and discounts nothing."""
    y = next(y for y in COMPLETIONS if len(y) == 3)
    judge = trainer(kl_discount=0.5)
    judge.rollout_loss(judge.model, inputs_of(y, tool_mask=torch.tensor([[1, 0, 1]]))).backward()
    found = gradients(judge.model) * LENGTH
    student, teacher = judge.model, judge.teacher.model
    student.zero_grad()
    log_q = distributions(student, y)
    with torch.no_grad():
        log_p = distributions(teacher, y)
    per_token, score = kl(log_q, log_p), log_prob(log_q, y)
    (per_token[0] + per_token[2] + 0.5 * score[0] * per_token[2].detach()).backward()
    assert relative_error(found, gradients(student)) < 1e-4


@pytest.mark.parametrize("estimator", ["topk", "sampled"])
def test_temperature(trainer, models, estimator):
    """Sampling and divergence at temperature 2, as the objective of the heated models."""
    student, teacher = models
    found = expected_gradient_heated(trainer(kl_estimator=estimator, kl_top_k=2, temperature=2.0), student)
    student.zero_grad()
    for y in COMPLETIONS:
        log_q = (2.0**-1 * distributions(student, y)).log_softmax(-1)
        with torch.no_grad():
            log_p = (2.0**-1 * distributions(teacher, y)).log_softmax(-1)
            weight = log_prob(log_q, y).sum().exp()
        (weight * kl(log_q, log_p).sum()).backward()
    assert relative_error(found, gradients(student)) < 1e-4


def expected_gradient_heated(trainer, student) -> torch.Tensor:
    with torch.no_grad():
        weights = [log_prob((0.5 * distributions(student, y)).log_softmax(-1), y).sum().exp() for y in COMPLETIONS]
    trainer.model.zero_grad()
    for y, weight in zip(COMPLETIONS, weights, strict=True):
        (trainer.rollout_loss(trainer.model, inputs_of(y)) * LENGTH * weight.float()).backward()
    return gradients(trainer.model)


@pytest.mark.parametrize("beta", [0.2, 1.0])
@pytest.mark.parametrize("estimator", ["full", "topk", "sampled"])
def test_reward_and_teacher_together(trainer, models, estimator, beta):
    """The expected gradient of the whole loss is that of −(E[r] − β KL), with the reward as advantage."""
    student, teacher = models
    rewards = {tuple(y): (y[0] == 2) + 0.5 * (len(y) > 1 and y[1] == 3) for y in COMPLETIONS}
    judge = trainer(kl_estimator=estimator, kl_top_k=2, kl_discount=1.0, beta=beta, num_generations=2)
    judge.has_rewards = True

    def inputs(y):
        return inputs_of(y, advantages=torch.tensor([float(rewards[tuple(y)])]))

    found = expected_gradient(judge, inputs=inputs)
    student.zero_grad()
    reward = sum(log_prob(distributions(student, y), y).sum().exp() * rewards[tuple(y)] for y in COMPLETIONS)
    (beta * sequence_objective(student, teacher) - reward).backward()
    assert relative_error(found, gradients(student)) < 1e-4


@pytest.mark.parametrize(("k", "same"), [(V, "full"), (0, "sampled")])
def test_topk_meets_full_and_sampled_on_every_completion(trainer, k, same):
    pairs = []
    for settings in ({"kl_estimator": "topk", "kl_top_k": k}, {"kl_estimator": same}):
        judge = trainer(**settings)
        grads = []
        for y in COMPLETIONS[::7]:
            judge.model.zero_grad()
            loss = judge.rollout_loss(judge.model, inputs_of(y))
            loss.backward()
            grads.append(torch.cat([gradients(judge.model), loss.detach().double()[None]]))
        pairs.append(torch.stack(grads))
    assert relative_error(*pairs) < 1e-5
