"""The study of horizons: what each credits a token with, its gradient by enumeration, its fixed points, the table."""

from __future__ import annotations

import json

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
    oracle,
    tiny_model,
)
from helpers import EOS, config, gradients, in_training, make_tokenizer, relative_error

from scripts.studies.horizons import late, run
from scripts.studies.horizons.horizons import HORIZONS
from scripts.studies.horizons.trainer import with_horizon


def test_what_a_token_answers_for():
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 7.0, 9.0, 9.0]])  # the second row has two tokens
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    rows = torch.ones(2, 1)
    found = {name: horizon.future(values, mask, rows).tolist() for name, horizon in HORIZONS.items()}
    assert found["none"] == [[0, 0, 0, 0]] * 2
    assert found["whole"] == found["keeps-stop"] == [[9, 7, 4, 0], [7, 0, 0, 0]]
    assert found["normalised"] == [[3, 3.5, 4, 0], [7, 0, 0, 0]]
    assert found["window-1"] == [[2, 3, 4, 0], [7, 0, 0, 0]]
    assert found["window-4"] == found["whole"]
    mean = 22 / 6
    assert torch.tensor(found["per-token"]).allclose(
        torch.tensor([[9 - 3 * mean, 7 - 2 * mean, 4 - mean, 0], [7 - mean, 0, 0, 0]])
    )


@pytest.fixture
def models():
    return tiny_model(1), tiny_model(2)


@pytest.fixture
def judge(tmp_path, prompts, models):
    def build(name):
        student, teacher = models
        return in_training(
            with_horizon(name)(
                model=student,
                teacher_model=teacher,
                args=config(tmp_path, loss_type="dr_grpo", max_completion_length=LENGTH, kl_discount=1.0),
                train_dataset=prompts,
                processing_class=make_tokenizer(["<pad>", "<eos>", "a", "b", "."]),
            )
        )

    return build


@pytest.mark.parametrize(("name", "discount"), [("none", 0.0), ("whole", 1.0)])
def test_the_study_has_the_library_s_horizons(judge, models, name, discount):
    found = expected_gradient(judge(name), inputs=inputs_of)
    assert relative_error(found, oracle(*models, discount)) < 1e-4


def test_the_later_kl_does_not_move_the_stop_token(judge, models):
    """Naively: the later KL moves the probabilities of the other tokens given that none stops."""
    student, teacher = models
    found = expected_gradient(judge("keeps-stop"), inputs=inputs_of)
    student.zero_grad()
    for y in COMPLETIONS:
        log_q = distributions(student, y)
        with torch.no_grad():
            log_p, weight = distributions(teacher, y), log_prob(log_q, y).sum().exp()
        own = kl(log_q, log_p)
        others = log_q.exp()[:, [v for v in range(log_q.shape[1]) if v != EOS]].sum(-1).log()
        score = log_prob(log_q, y) - others
        later = [own[t + 1 :].sum().detach() for t in range(len(y))]
        (weight * (own.sum() + sum(s * f for s, f in zip(score, later, strict=True)))).backward()
    assert relative_error(found, gradients(student)) < 1e-4
    assert relative_error(oracle(student, teacher, 1.0), found) > 0.05


def test_fixed_points_of_a_late_reward():
    """γ = 1 is the gradient of the objective and ends at its optimum; γ = 0 ends farther away than the teacher is."""
    tree = late.Tree(3)
    assert tree.probabilities(tree.teacher).sum() == pytest.approx(1)
    assert tree.reward.sum() == 1
    optimum = tree.optimum(late.BETA)
    away = {}
    for name in ("none", "whole"):
        ends = tree.probabilities(late.fixed_point(tree, HORIZONS[name], late.BETA))
        assert ends.sum() == pytest.approx(1)
        away[name] = 0.5 * (ends - optimum).abs().sum().item()
    teacher = 0.5 * (tree.probabilities(tree.teacher) - optimum).abs().sum().item()
    assert away["whole"] < 1e-6
    assert away["none"] > teacher > 0.05


@pytest.mark.slow
def test_a_run_leaves_its_numbers(tmp_path):
    run.train("normalised", 0, tmp_path / "normalised-0.json", steps=2)
    found = json.loads((tmp_path / "normalised-0.json").read_text())
    assert found["horizon"] == HORIZONS["normalised"].label
    assert 0 < found["kl_per_token"] < 2
    assert len(found["curve"]) == 3


def test_the_page_has_what_was_found():
    """Table and files agree, and every arm with a number has a file."""
    assert run.table(run.RESULTS) in (run.ROOT / "docs" / "results.md").read_text()
