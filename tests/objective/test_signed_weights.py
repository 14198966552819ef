"""Teachers with negative weights: the target is the geometric mixture ∏ p_i^{w_i} / Z."""

from __future__ import annotations

import copy

import pytest
import torch
from enumeration import (
    COMPLETIONS,
    LENGTH,
    distributions,
    expected_gradient,
    inputs_of,
    kl,
    log_prob,
    tiny_model,
)
from helpers import config, gradients, in_training, make_tokenizer, relative_error

from trl_distill import OPDTrainer
from trl_distill.objective.weights import check_teacher_weights
from trl_distill.rollouts import MicroBatch


WEIGHTS = {"teacher": 1.25, "ref": -0.25}


@pytest.fixture
def models():
    """Student, teacher and reference."""
    return {name: tiny_model(seed) for name, seed in (("student", 1), ("teacher", 2), ("ref", 3))}


@pytest.fixture
def trainer(tmp_path, prompts, models):
    def build(column=None, **changes):
        return in_training(
            OPDTrainer(
                model=models["student"],
                teacher_model={name: copy.deepcopy(models[name]) for name in WEIGHTS},
                args=config(tmp_path, loss_type="dr_grpo", max_completion_length=LENGTH, **changes),
                train_dataset=prompts if column is None else prompts.add_column("teacher", [column] * len(prompts)),
                processing_class=make_tokenizer(["<pad>", "<eos>", "a", "b", "."]),
            )
        )

    return build


def scored_inputs(trainer, row):
    """As in training: rows get their weights and, where the teachers are parked, their signals ahead of the loss."""

    def build(y):
        inputs = inputs_of(y)
        inputs |= trainer.pool.assign([row], torch.device("cpu"))
        trainer.pool.score_ahead(MicroBatch.from_inputs(inputs), training=True)
        return inputs

    return build


def log_mixture(models, y) -> torch.Tensor:
    """log ∏ p_i^{w_i} at each position, not normalised: `(T, V)`."""
    with torch.no_grad():
        return sum(weight * distributions(models[name], y) for name, weight in WEIGHTS.items())


def gradient_of_the_token_mixture(models) -> torch.Tensor:
    """∇KL(q ‖ ∏ p_i^{w_i} / Z) at each prefix, the mixture normalised there, averaged over completions."""
    student = models["student"]
    student.zero_grad()
    for y in COMPLETIONS:
        log_q, log_p = distributions(student, y), log_mixture(models, y).log_softmax(-1)
        weight = log_prob(log_q, y).sum().exp().detach()
        (weight * kl(log_q, log_p).sum()).backward()
    return gradients(student)


def gradient_of_the_sequence_mixture(models) -> torch.Tensor:
    """∇KL(q ‖ ∏ p_i^{w_i} / Z), the mixture normalised over all completions."""
    student = models["student"]
    student.zero_grad()
    log_p = torch.stack([log_prob(log_mixture(models, y), y).sum() for y in COMPLETIONS]).log_softmax(0)
    log_q = torch.stack([log_prob(distributions(student, y), y).sum() for y in COMPLETIONS])
    kl(log_q, log_p).backward()
    return gradients(student)


ESTIMATORS = {
    "full": {"kl_estimator": "full"},
    "sampled": {"kl_estimator": "sampled"},
    "top 2": {"kl_estimator": "topk", "kl_top_k": 2},
}


@pytest.mark.parametrize("parked", [False, True], ids=["resident", "parked"])
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_the_gradient_is_that_of_the_geometric_mixture(trainer, models, estimator, discount, parked):
    """At γ = 0 the mixture is normalised at each token, at γ = 1 over whole completions."""
    judge = trainer(**estimator, kl_discount=discount, teacher_offload=parked, teacher_weights=WEIGHTS)
    found = expected_gradient(judge, inputs=scored_inputs(judge, {"prompt": "a b"}))
    of_mixture = gradient_of_the_sequence_mixture if discount else gradient_of_the_token_mixture
    assert relative_error(found, of_mixture(models)) < 1e-4


def test_the_comparison_can_fail(trainer, models):
    """Without the reference, with its weight turned round, or normalised elsewhere, the gradient is another."""
    found = gradient_of_the_token_mixture(models)
    assert relative_error(gradient_of_the_sequence_mixture(models), found) > 0.05
    for weights in ({"teacher": 1.0}, {"teacher": 1.25, "ref": 0.25}):
        judge = trainer(column={"teacher": 1.0, "ref": 0.0})
        inputs = scored_inputs(judge, {"prompt": "a b", "teacher": weights})
        assert relative_error(expected_gradient(judge, inputs=inputs), found) > 0.05


def gradient_with_token_weights(models, weigh, discount: float) -> torch.Tensor:
    """
    w_t Σ_i w_i ∇KL_i at each prefix, plus ∇log q(y_t) times the discounted later w Σ_i w_i KL_i, over all completions.

    `weigh` is given Σ_i w_i KL_i and Σ_i w_i H_i, what the teachers' mean is by their signed weights.
    """
    student = models["student"]
    student.zero_grad()
    for y in COMPLETIONS:
        log_q = distributions(student, y)
        value, entropy = torch.zeros(len(y)).double(), torch.zeros(len(y)).double()
        for name, weight in WEIGHTS.items():
            with torch.no_grad():
                log_p = distributions(models[name], y)
            value = value + weight * kl(log_q, log_p)
            entropy = entropy - weight * (log_p.exp() * log_p).sum(-1)
        cost = weigh(value.detach(), entropy) * value
        score, chance = log_prob(log_q, y), log_prob(log_q, y).sum().exp().detach()
        later = [sum(discount ** (s - t) * cost[s].detach() for s in range(t + 1, len(y))) for t in range(len(y))]
        (chance * (cost.sum() + sum(a * b for a, b in zip(score, later, strict=True)))).backward()
    return gradients(student)


TOKEN_WEIGHTS = {
    "cap": ({"token_weighting_kwargs": {"nats": 0.3}}, lambda value, _: torch.where(value > 0.3, 0.3 / value, 1.0)),
    "teacher_entropy": ({}, lambda _, entropy: (-entropy).exp()),
    "position": ({"token_weighting_kwargs": {"tokens": 2}}, lambda value, _: (torch.arange(len(value)) < 2).double()),
}


@pytest.mark.parametrize("parked", [False, True], ids=["resident", "parked"])
@pytest.mark.parametrize("discount", [0.0, 1.0])
@pytest.mark.parametrize("name", TOKEN_WEIGHTS)
def test_token_weights_multiply_the_signed_sum(trainer, models, name, discount, parked):
    parameters, weigh = TOKEN_WEIGHTS[name]
    settings = {"token_weighting": name, **parameters, "teacher_weights": WEIGHTS, "teacher_offload": parked}
    judge = trainer(kl_discount=discount, **settings)
    found = expected_gradient(judge, inputs=scored_inputs(judge, {"prompt": "a b"}))
    expected = gradient_with_token_weights(models, weigh, discount)
    assert relative_error(found, expected) < 1e-4
    plain = gradient_with_token_weights(models, lambda value, _: torch.ones_like(value), discount)
    assert relative_error(plain, expected) > 0.05  # the weights change the gradient


def test_a_row_has_its_own_weights_before_those_of_all(trainer):
    judge = trainer(column=None, teacher_weights=WEIGHTS)
    rows = [{"teacher": "ref"}, {"teacher": {"teacher": 2.0, "ref": -1.0}}, {"teacher": None}, {}]
    weights = judge.pool.assign(rows, torch.device("cpu"))["teacher_weights"]
    assert weights.tolist() == [[0.0, 1.0], [2.0, -1.0], [1.25, -0.25], [1.25, -0.25]]


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 0.5}, {"a": 0.0, "b": 0.2}, {"a": 2.0, "b": -1.0}, {"a": 1}])
def test_weights_that_mean_something(weights):
    check_teacher_weights(weights, "Row 0 has")


FORWARD = ["forward_kl", "jsd", "mixed", "skewed_forward_kl", "skewed_reverse_kl"]


@pytest.mark.parametrize(
    ("weights", "divergences", "message"),
    [
        ({"a": 1.0, "b": -0.5}, ["reverse_kl"], r"add up to 0\.5\. With a negative one they must add up to 1"),
        ({"a": 1.0, "b": -1.0}, ["reverse_kl"], r"add up to 0\. With"),
        ({"a": "1"}, ["reverse_kl"], "must be finite numbers"),
        ({}, ["reverse_kl"], "not all of them 0"),
        *(({"a": 1.5, "b": -0.5}, [name], f"minimises '{name}'") for name in FORWARD),
        ({"a": 1.5, "b": -0.5}, ["reverse_kl", "forward_kl"], "off_policy_divergence='reverse_kl'"),
    ],
)
def test_weights_without_a_meaning(weights, divergences, message):
    with pytest.raises(ValueError, match=message):
        check_teacher_weights(weights, "Row 0 has", divergences)


def unbounded(log_q, log_p):
    return (log_q.exp() - log_p.exp()).square()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divergence": "forward_kl"}, "minimises 'forward_kl'"),
        ({"divergence": unbounded}, "a negative weight needs the reverse KL"),
        ({"lmbda": 0.5}, "minimises 'forward_kl'"),  # of off-policy batches
    ],
)
def test_settings_refuse_them_at_once(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, teacher_weights=WEIGHTS, **changes)
    config(tmp_path, teacher_weights={"teacher": 1.25, "ref": 0.25}, **changes)


def test_weights_from_a_command_line(tmp_path):
    assert config(tmp_path, teacher_weights='{"teacher": 1.25, "ref": -0.25}').teacher_weights == WEIGHTS
    with pytest.raises(ValueError, match=r"add up to 1\.5"):
        config(tmp_path, teacher_weights='{"teacher": 1.75, "ref": -0.25}')


def test_a_row_that_a_forward_form_cannot_have_is_found_before_training(trainer):
    with pytest.raises(ValueError, match=r"Row 0 of the training dataset has .* minimises 'jsd'"):
        trainer(column={"teacher": 1.25, "ref": -0.25}, divergence="jsd")
    with pytest.raises(ValueError, match="names the teacher 'base', which does not exist"):
        trainer(teacher_weights={"teacher": 1.25, "base": -0.25})
