"""Several teachers: which rows go to which, and how mixtures add up."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import gradients, relative_error
from peft import LoraConfig
from teacher_runs import ESTIMATORS, generated, trained

from trl_distill.rollouts import MicroBatch
from trl_distill.teachers.pool import weights_of


def loss_and_gradient(trainer, rows):
    torch.manual_seed(0)
    batch = generated(trainer, rows)
    trainer.model.zero_grad()
    loss = trainer.rollout_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), gradients(trainer.model)


@pytest.mark.parametrize(("estimator", "discount"), ESTIMATORS)
def test_rows_go_to_the_teacher_that_they_name_and_mixtures_add_up(make, pair, prompts, estimator, discount):
    """By hand: the loss of each row under each teacher alone, weighted."""
    settings = {"kl_estimator": estimator, "kl_discount": discount, "kl_top_k": 4, "loss_type": "luspo"}
    named = ["math", "code", {"math": 0.7, "code": 0.3}, {"code": 2.0, "math": None}, {"math": 1.25, "code": -0.25}]
    texts = ["a b", "c", "d e f", "g h", "a"]
    rows = [{"prompt": text, "teacher": name} for text, name in zip(texts, named, strict=True)]
    column = prompts.add_column("teacher", ["math"] * len(prompts))
    trainer = make(teacher_model=copy.deepcopy(pair), train_dataset=column, **settings)
    loss, gradient = loss_and_gradient(trainer, rows)
    expected_loss, expected = 0.0, torch.zeros_like(gradient)
    for i, name in enumerate(("math", "code")):
        alone = make(teacher_model=copy.deepcopy(pair[name]), **settings)
        for row in rows:
            weight = weights_of(row["teacher"], ["math", "code"], "")[i]
            if weight != 0:
                found, direction = loss_and_gradient(alone, [{"prompt": row["prompt"]}])
                expected_loss += weight * found / len(rows)
                expected += weight * direction / len(rows)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert relative_error(gradient, expected) < 1e-5


@pytest.mark.parametrize("offload", [False, True])
def test_several_teachers_train_and_log_by_name(make, pair, prompts, offload):
    column = prompts.add_column("teacher", (["math", "code", "math", "math"] * 8))
    trainer = make(teacher_model=pair, train_dataset=column, teacher_offload=offload, max_steps=3)
    trainer.train()
    for row in trainer.state.log_history[:-1]:
        assert row["distill/reverse_kl/math"] > 0
    assert any(row["distill/reverse_kl/code"] > 0 for row in trainer.state.log_history[:-1])


def test_offloaded_and_resident_teachers_route_alike(make, pair, prompts):
    column = prompts.add_column("teacher", (["math", "code", "math", "math"] * 8))
    runs = [
        trained(
            make(
                teacher_model=copy.deepcopy(pair),
                train_dataset=column,
                teacher_offload=offload,
                gradient_accumulation_steps=2,
            )
        )
        for offload in (False, True)
    ]
    for a, b in zip(*(run[0] for run in runs), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_a_checkpoint_with_two_names_is_loaded_once(make, saved, prompts):
    path = str(saved / "teacher")
    column = prompts.add_column("teacher", ["one", "two"] * 16)
    trainer = make(teacher_model={"one": path, "two": path}, train_dataset=column)
    assert len(trainer.pool.members) == 1
    trainer.train()
    assert all(f"distill/reverse_kl/{name}" in trainer.state.log_history[0] for name in ("one", "two"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("physics", "names the teacher 'physics', which does not exist. Name one of 'math', 'code'"),
        (None, "Name one of 'math', 'code'"),
        ({"math": -1.0}, "must add up to 1"),
        ({"math": 1.5, "code": -0.4}, "must add up to 1"),
        ({"math": float("nan")}, "must be finite numbers"),
        ({"math": 0.0}, "not all of them 0"),
    ],
    ids=str,
)
def test_a_row_without_a_known_teacher(value, message):
    with pytest.raises(ValueError, match=message):
        weights_of(value, ["math", "code"], "Row 1")


def test_unknown_teachers_are_found_before_training(make, pair, prompts):
    with pytest.raises(ValueError, match="no `teacher` column"):
        make(teacher_model=pair)
    with pytest.raises(ValueError, match=r"Row 5 of the training dataset names the teacher 'art'"):
        make(teacher_model=pair, train_dataset=prompts.add_column("teacher", ["math"] * 5 + ["art"] * 27))
    with pytest.raises(ValueError, match="empty dictionary"):
        make(teacher_model={})


def test_a_mixture_of_two_equal_teachers_is_one(make, prompts, teacher):
    """A weighted sum of KLs: 0.7 and 0.3 of the same teacher are the teacher."""
    twins = {"a": copy.deepcopy(teacher), "b": copy.deepcopy(teacher)}
    column = prompts.add_column("teacher", [{"a": 0.7, "b": 0.3}] * len(prompts))
    mixed, alone = trained(make(teacher_model=twins, train_dataset=column))[0], trained(make())[0]
    for a, b in zip(mixed, alone, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_names_of_one_teacher_whose_weights_cancel_take_no_part(make, saved, prompts, student):
    """Weights 1 and -1 of one checkpoint leave the other alone, and no metric counts the rows for it."""
    same, other = str(saved / "teacher"), copy.deepcopy(student)
    weights = {"up": 1.0, "down": -1.0, "other": 1.0}
    trainer = make(teacher_model={"up": same, "down": same, "other": other}, teacher_weights=weights)
    batch = generated(trainer, [{"prompt": "a b"}, {"prompt": "c"}])
    (score,) = trainer.pool.score(MicroBatch.from_inputs(batch), training=True)
    assert list(score.rows) == ["other"]
    trained(trainer)
    assert "distill/reverse_kl/up" not in trainer.state.log_history[0]


@pytest.mark.parametrize("offload", [False, True], ids=["resident", "parked"])
@pytest.mark.parametrize("kind", ["adapter off", "its folder"])
def test_away_from_the_students_own_start(make, saved, kind, offload):
    """At first the reference is the student: it pulls at nothing. Then the student is driven away from it."""
    path, adapter = str(saved / "student"), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "mlp.down_proj"])
    student = {"model": path} | ({"peft_config": adapter} if kind == "adapter off" else {})
    settings = {"max_steps": 4, "learning_rate": 3e-2, "teacher_offload": offload, **student}
    teacher, ref = str(saved / "teacher"), "adapter-off" if kind == "adapter off" else path
    weights = {"teacher": 1.25, "ref": -0.25}
    beyond = make(teacher_model={"teacher": teacher, "ref": ref}, teacher_weights=weights, **settings)
    alone = make(teacher_model=teacher, **settings)
    (found, _), (expected, _) = trained(beyond), trained(alone)
    log = beyond.state.log_history
    assert log[0]["distill/reverse_kl/ref"] == pytest.approx(0, abs=1e-5)
    assert log[3]["distill/reverse_kl/ref"] > 1e-3
    assert found[0]["loss"] == pytest.approx(1.25 * expected[0]["loss"], rel=1e-4)
    assert found[0]["grad_norm"] == pytest.approx(1.25 * expected[0]["grad_norm"], rel=1e-3)
    by_name = [1.25 * log[3]["distill/reverse_kl/teacher"], -0.25 * log[3]["distill/reverse_kl/ref"]]
    assert found[3]["distill/reverse_kl"] == pytest.approx(sum(by_name), rel=1e-4)


def test_a_reference_is_not_compared_with_the_student(make, saved, student):
    """Agreement with the teacher is not mixed with that of a model that the student is to leave."""
    ref, teacher = str(saved / "student"), str(saved / "teacher")
    rows = []
    for model, weights in (
        ({"teacher": teacher, "ref": ref}, {"teacher": 1.25, "ref": -0.25}),
        (teacher, None),
    ):
        trainer = make(model=ref, teacher_model=model, teacher_weights=weights, max_steps=1)
        trainer.train()
        rows.append(trainer.state.log_history[0])
    for key in ("distill/top1_agreement", "distill/forward_kl", "distill/compared_tokens"):
        assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-5), key
    assert rows[0]["distill/top1_agreement"] < 0.9  # 1 with the reference, which is the student


def test_weights_for_all_rows(make, pair, prompts, teacher):
    with pytest.raises(ValueError, match=r"there is only one teacher. Set `beta`"):
        make(teacher_weights={"teacher": 2.0})
    with pytest.raises(ValueError, match=r"`teacher_weights` names the teacher 'art', which does not exist"):
        make(teacher_model=pair, teacher_weights={"art": 1.0})
    (weighted, _), (written, _) = (
        trained(make(teacher_model=copy.deepcopy(pair), **changes))
        for changes in (
            {"teacher_weights": {"math": 1.5, "code": -0.5}},
            {"train_dataset": prompts.add_column("teacher", [{"math": 1.5, "code": -0.5}] * len(prompts))},
        )
    )
    for a, b in zip(weighted, written, strict=True):
        assert a == pytest.approx(b, rel=1e-6)
