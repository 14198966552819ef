"""A run that is resumed with another objective says so; the same objective and older checkpoints are taken silently."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from helpers import config

from trl_distill import OPDConfig, OPDTrainer
from trl_distill.training.checkpoints import mark_complete
from trl_distill.training.objective_record import objective_of


@pytest.fixture
def make(tmp_path, tokenizer, prompts, student, teacher):
    def build(**changes):
        return OPDTrainer(
            model=copy.deepcopy(student),
            teacher_model=copy.deepcopy(teacher),
            args=config(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, **changes),
            train_dataset=prompts,
            processing_class=tokenizer,
        )

    return build


@pytest.fixture
def checkpoint(make, tmp_path) -> str:
    make().train()
    return str(tmp_path / "checkpoint-1")


def warnings(caplog) -> list[str]:
    return [record.message for record in caplog.records if "another objective" in record.message]


def test_what_changed_is_named(make, checkpoint, caplog):
    trainer = make(divergence="jsd", beta=0.5)
    trainer.train(resume_from_checkpoint=checkpoint)
    (warning,) = warnings(caplog)
    assert "goes on from step 1" in warning
    assert "`beta` was 1, now 0.5; `divergence` was reverse_kl, now jsd" in warning
    assert trainer.state.global_step == 2
    # the next checkpoint has the objective of now
    caplog.clear()
    (Path(checkpoint).parent / "checkpoint-2").rename(Path(checkpoint).parent / "checkpoint-1b")
    make(divergence="jsd", beta=0.5, max_grad_norm=3.0).train(
        resume_from_checkpoint=str(Path(checkpoint).parent / "checkpoint-1b")
    )
    assert not warnings(caplog)


def test_the_same_objective_is_no_news(make, checkpoint, caplog):
    make(beta=1).train(resume_from_checkpoint=checkpoint)  # an integer is the same number
    assert not warnings(caplog)


def test_a_checkpoint_without_a_record_is_resumed_and_the_next_one_has_it(make, checkpoint, tmp_path, caplog):
    path = Path(checkpoint, "trainer_state.json")
    state = json.loads(path.read_text())
    assert state["stateful_callbacks"].pop("ObjectiveRecord")["args"]["objective"]["divergence"] == "reverse_kl"
    path.write_text(json.dumps(state))
    mark_complete(checkpoint)
    make(divergence="jsd").train(resume_from_checkpoint=checkpoint)
    assert not warnings(caplog)
    after = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert after["stateful_callbacks"]["ObjectiveRecord"]["args"]["objective"]["divergence"] == "jsd"


def test_folders_may_move_and_logins_are_not_written(tmp_path):
    args = OPDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False).resolved(False)
    here, there = (objective_of(args, {"t": f"/{place}/models/big"}, []) for place in ("a", "b"))
    assert here == there != objective_of(args, {"t": "/a/models/small"}, [])
    assert "sesame" not in str(objective_of(args, {"t": "http://user:sesame@host"}, ["f"]))
