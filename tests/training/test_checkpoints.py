"""Which checkpoints may be resumed from, and what a failure to write one leaves behind."""

from __future__ import annotations

import copy
import json
import resource
from pathlib import Path

import pytest
import torch
from helpers import config

from trl_distill import CheckpointError, OPDTrainer
from trl_distill.training.checkpoints import MARKER, last_complete, mark_complete, unmark, what_is_missing


@pytest.fixture
def make(tmp_path, tokenizer, prompts, student, teacher):
    def build(**changes):
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, **changes}
        return OPDTrainer(
            model=copy.deepcopy(student),
            teacher_model=copy.deepcopy(teacher),
            args=config(tmp_path, **settings),
            train_dataset=prompts,
            processing_class=tokenizer,
        )

    return build


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "checkpoint-3"
    (folder / "inner").mkdir(parents=True)
    (folder / "weights").write_bytes(b"12345")
    (folder / "inner" / "rest").write_bytes(b"1")
    mark_complete(folder)
    return folder


def test_a_checkpoint_is_complete_while_its_files_are_as_they_were(folder):
    assert what_is_missing(folder) is None
    assert json.loads((folder / MARKER).read_text()) == {"inner/rest": 1, "weights": 5}
    mark_complete(folder)
    assert what_is_missing(folder) is None
    (folder / "weights").write_bytes(b"1234")
    assert what_is_missing(folder) == "weights has 4 bytes instead of 5"
    (folder / "weights").unlink()
    assert what_is_missing(folder) == "weights is missing"
    (folder / MARKER).write_text("{")
    assert what_is_missing(folder) == f"its {MARKER} cannot be read"
    (folder / MARKER).write_text("[]")
    assert what_is_missing(folder) == f"its {MARKER} cannot be read"
    unmark(folder)
    assert "which is written last" in what_is_missing(folder)


def test_the_last_complete_one_is_found_by_step_and_others_are_said(tmp_path, folder, caplog):
    assert last_complete(tmp_path / "nowhere") is None
    assert last_complete(None) is None
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-10").mkdir()
    mark_complete(tmp_path / "checkpoint-10")
    assert last_complete(tmp_path) == str(tmp_path / "checkpoint-10")
    assert "checkpoint-20 is skipped" in caplog.text
    unmark(tmp_path / "checkpoint-10")
    assert last_complete(tmp_path) == str(folder)


def test_a_half_written_checkpoint_is_passed_over_when_resuming(make, tmp_path, caplog):
    whole = make()
    whole.train()
    expected = weights(whole)
    for step in (3, 4):  # killed while the last one was written, and a bad copy of the one before
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"half")
    unmark(tmp_path / "checkpoint-4")
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-4 is skipped" in caplog.text
    assert "checkpoint-3 is skipped: optimizer.pt has 4 bytes" in caplog.text
    assert torch.equal(weights(resumed), expected)


BROKEN = {
    "state of zeros": ("trainer_state.json", lambda content: bytes(len(content))),
    "half a state": ("trainer_state.json", lambda content: content[:50].ljust(len(content))),
    "a state that is no state": ("trainer_state.json", lambda content: b'{"a": 1}'.ljust(len(content))),
    "a state that is a list": ("trainer_state.json", lambda content: b"[]".ljust(len(content))),
    "half a configuration": ("config.json", lambda content: content[:9].ljust(len(content))),
    "an optimizer of zeros": ("optimizer.pt", lambda content: bytes(len(content))),
    "weights of zeros": ("model.safetensors", lambda content: bytes(len(content))),
}


def test_a_file_of_the_right_size_that_cannot_be_read(make, tmp_path, caplog):
    """It is named, and the checkpoint before is used. One that is asked for by name is refused, listed or not."""
    make(max_steps=3).train()
    last = tmp_path / "checkpoint-3"
    for name, broken in BROKEN.values():
        whole = (last / name).read_bytes()
        (last / name).write_bytes(broken(whole))
        assert f"{name} cannot be read" in what_is_missing(last), broken(whole)
        assert last_complete(tmp_path) == str(tmp_path / "checkpoint-2")
        (last / name).write_bytes(whole)
    assert what_is_missing(last) is None
    (last / "trainer_state.json").write_bytes(bytes((last / "trainer_state.json").stat().st_size))
    for listed in (True, False):
        if not listed:
            unmark(last)
        with pytest.raises(ValueError, match=r"checkpoint-3 is not complete: trainer_state\.json cannot be read"):
            make().train(resume_from_checkpoint=str(last))
    caplog.clear()
    mark_complete(last)
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert "checkpoint-3 is skipped: trainer_state.json cannot be read" in caplog.text


def test_nothing_to_resume_from(make):
    with pytest.raises(ValueError, match="no complete checkpoint"):
        make().train(resume_from_checkpoint=True)


def test_older_checkpoints_are_deleted_when_the_new_one_is_complete(make, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "trl_distill.training.grpo_hooks.mark_complete",
        lambda folder: (seen.append(sorted(p.name for p in tmp_path.glob("checkpoint-*"))), mark_complete(folder)),
    )
    make(save_total_limit=1, max_steps=3).train()
    assert seen == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"], ["checkpoint-2", "checkpoint-3"]]
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_full_disk_leaves_the_earlier_checkpoint(make, tmp_path):
    """From the third step on no file may grow to the size of the weights."""
    trainer = make()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    step = trainer.training_step

    def limited(*args, **kwargs):
        if trainer.state.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, limits[1]))
        return step(*args, **kwargs)

    trainer.training_step = limited
    try:
        with pytest.raises(CheckpointError, match=r"step 3 could not be written.*last complete one is .*checkpoint-2"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    whole = make(save_strategy="no")
    whole.train()
    assert torch.equal(weights(resumed), weights(whole))


def test_what_is_saved_of_the_settings_is_what_was_set(make, tmp_path):
    make(save_total_limit=2, max_steps=1).train()
    saved = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == 2


def test_a_named_checkpoint_that_is_not_complete(make, tmp_path):
    make(max_steps=2).train()
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2 is not complete: optimizer\.pt is missing"):
        make().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_what_fails_after_the_checkpoint_leaves_it(make, tmp_path, monkeypatch):
    """Such as a push to the hub."""
    trainer = make(max_steps=1)
    monkeypatch.setattr(trainer, "checkpoint_written", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert (tmp_path / "checkpoint-1" / "trainer_state.json").is_file()


def test_a_finished_run_is_not_trained_on(make, tmp_path, caplog):
    whole = make(max_steps=3)
    whole.train()
    again = make(max_steps=3)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert torch.equal(weights(again), weights(whole))
    assert "finished already, after step 3" in caplog.text


def test_processes_resume_from_the_same_step_or_all_stop(make, tmp_path, monkeypatch):
    """Nodes that share no folder find different checkpoints; one that finds none must not leave the others waiting."""
    trainer = make(max_steps=1)
    gathered = []

    def gather(tensor):
        gathered.append(tensor.item())
        return torch.tensor([tensor.item(), 7])  # the other process goes on from step 7

    monkeypatch.setattr(trainer.accelerator, "gather", gather)
    with pytest.raises(ValueError, match=r"different checkpoints \(steps \[-1, 7\]"):
        trainer.safeguards._checkpoint(None)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        trainer.safeguards._checkpoint(True)
    assert gathered == [-1, -2]


def test_a_checkpoint_that_fails_while_stopping_is_one_process_alone(make, monkeypatch):
    trainer = make(max_steps=3)
    error = OSError("no space left")
    monkeypatch.setattr(trainer, "save_now", lambda: (_ for _ in ()).throw(error))
    with pytest.raises(OSError, match="no space left"):
        trainer.safeguards._save()
    assert error.on_all_processes is False
