"""A teacher that is offloaded, asked once or in parts, against the resident one; loading and parking."""

from __future__ import annotations

import pytest
import torch
from helpers import config
from teacher_runs import ESTIMATORS, trained

from trl_distill import OPDTrainer


@pytest.mark.parametrize(("estimator", "discount"), ESTIMATORS)
def test_an_offloaded_teacher_trains_as_a_resident_one(make, estimator, discount):
    """Up to rounding: it judges rows of like length together, a resident one those of each micro-batch."""
    settings = {
        "kl_estimator": estimator,
        "kl_discount": discount,
        "kl_top_k": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
    }
    (resident, expected), (offloaded, found) = (
        trained(make(**settings)),
        trained(make(teacher_offload=True, **settings)),
    )
    for ours, theirs in zip(offloaded, resident, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_an_offloaded_teacher_visits_once_per_generation_batch_and_leaves_its_head(make, monkeypatch):
    """On the CPU both places are the same device, so a visitor's weights are made copies, which tells them apart."""
    trainer = make(teacher_offload=True, gradient_accumulation_steps=2, num_iterations=2, max_steps=4)
    teacher, visits, updates = trainer.teacher, [], []
    score, loss = teacher.score, trainer.rollout_loss
    monkeypatch.setattr(teacher, "score", lambda rollouts: (visits.append(len(rollouts)), score(rollouts))[1])

    def rollout_loss(model, inputs):
        updates.append([parameter.data_ptr() == home.data_ptr() for parameter, home in teacher._offloaded])
        return loss(model, inputs)

    def copied(home):
        copies.append(home.clone())
        return copies[-1]

    copies: list = []
    monkeypatch.setattr(teacher, "_on_accelerator", copied)
    monkeypatch.setattr(trainer, "rollout_loss", rollout_loss)
    trainer.train()
    assert len(copies) == 2 * len(teacher._offloaded)
    assert visits == [8, 8]  # 4 optimizer steps, two for each generation batch of 8 rows
    assert len(updates) == 8
    assert all(all(home) for home in updates)
    names = {id(parameter): name for name, parameter in teacher.model.named_parameters()}
    offloaded = {names[id(parameter)] for parameter, _ in teacher._offloaded}
    assert set(names.values()) - offloaded == {"model.embed_tokens.weight"}  # tied: it is the LM head
    assert all(not waiting for waiting in trainer.pool._waiting)  # nothing is kept after its last use


def test_iterations_ask_a_resident_teacher_once(make, monkeypatch):
    trainer = make(num_iterations=3, gradient_accumulation_steps=2, max_steps=3)
    asked = []
    score = trainer.teacher.score
    monkeypatch.setattr(trainer.teacher, "score", lambda rollouts: (asked.append(len(rollouts)), score(rollouts))[1])
    trainer.train()
    assert asked == [8]


def test_evaluation_inside_training_leaves_what_is_waiting(make, prompts, tmp_path, student, teacher, tokenizer):
    trainer = OPDTrainer(
        model=student,
        teacher_model=teacher,
        args=config(
            tmp_path,
            teacher_offload=True,
            num_iterations=2,
            max_steps=2,
            eval_strategy="steps",
            eval_steps=1,
            per_device_eval_batch_size=4,
        ),
        train_dataset=prompts,
        eval_dataset=prompts.select(range(4)),
        processing_class=tokenizer,
    )
    trainer.train()
    assert sum("eval_distill/reverse_kl" in row for row in trainer.state.log_history) == 2


def test_scoring_in_parts_changes_nothing(make):
    whole, parts = trained(make())[0], trained(make(teacher_batch_size=3))[0]
    for a, b in zip(whole, parts, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize("offload", [False, True])
def test_loading_settings_reach_the_loader(make, saved, monkeypatch, offload):
    """Quantisation and the like are the loader's business; what is given arrives, and the dtype is the checkpoint's."""
    from trl_distill.teachers import spec as teachers

    seen = {}
    load = teachers.create_model_from_path

    def loader(path, **kwargs):
        seen.update(kwargs)
        return load(path, dtype=kwargs["dtype"], output_loading_info=kwargs["output_loading_info"])

    monkeypatch.setattr(teachers, "create_model_from_path", loader)
    given = {"quantization_config": {"load_in_4bit": True}, "attn_implementation": "eager"}
    path = str(saved / "teacher")
    make(teacher_model=path, teacher_model_init_kwargs=given, teacher_model_revision="main", teacher_offload=offload)
    expected = {"dtype": "auto", "revision": "main", "trust_remote_code": False, "output_loading_info": True, **given}
    assert seen == (expected | {"device_map": None} if offload else expected)


def test_a_device_map_places_the_teacher(make, saved):
    trainer = make(teacher_model=str(saved / "teacher"), teacher_model_init_kwargs={"device_map": {"": "cpu"}})
    assert {p.device for p in trainer.teacher.model.parameters()} == {torch.device("cpu")}
    for a, b in zip(trained(make(teacher_model=str(saved / "teacher")))[0], trained(trainer)[0], strict=True):
        assert a == pytest.approx(b, rel=1e-5)  # how a file lies in memory shows in the last bits


@pytest.mark.parametrize("attribute", ["is_quantized", "hf_device_map"])
def test_parking_what_cannot_be_moved(make, teacher, attribute):
    setattr(teacher, attribute, {"": "cpu"} if attribute == "hf_device_map" else True)
    with pytest.raises(ValueError, match="not possible if it is quantised or has a `device_map`"):
        make(teacher_model=teacher, teacher_offload=True)
