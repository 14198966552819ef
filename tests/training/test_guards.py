"""What ends a run early, and what it leaves."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import threading

import pytest
import torch
from helpers import config

from trl_distill import NonFiniteLossError, OPDTrainer, RunawayError, StopOnSigterm, StoppedBySignal
from trl_distill.training.checkpoints import last_complete
from trl_distill.training.runaway import Guard, repetition, written


@pytest.fixture
def make(tmp_path, tokenizer, prompts, student, teacher):
    def build(reward_funcs=None, callbacks=None, eval_dataset=None, **changes):
        return OPDTrainer(
            model=copy.deepcopy(student),
            teacher_model=copy.deepcopy(teacher) if changes.get("beta") != 0 else None,
            reward_funcs=reward_funcs,
            args=config(tmp_path, **changes),
            train_dataset=prompts,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
        )

    return build


def length(completions, **_) -> list[float]:
    return [float(len(text)) for text in completions]


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("beta", [1.0, 0.0])
def test_a_loss_that_is_no_number_stops_the_run_with_evidence(make, tmp_path, beta):
    """The policy loss is infinite from the third step on: nothing is trained on it."""
    seen = []
    trainer = make([length], max_steps=5, num_generations=2, beta=beta)
    policy_loss = trainer.policy_loss

    def broken(model, inputs):
        seen.append(weights(trainer).clone())
        return policy_loss(model, inputs) * (float("inf") if len(seen) > 2 else 1.0) + 0.0

    trainer.policy_loss = broken
    with pytest.raises(NonFiniteLossError, match=r"step 2 is NaN or infinite on 1 of 1 .*There is no checkpoint yet"):
        trainer.train()
    assert torch.equal(weights(trainer), seen[2])
    evidence = json.loads((tmp_path / "nonfinite-after-step-2" / "process-0.json").read_text())
    assert evidence["step"] == 2
    assert not math.isfinite(float(evidence["terms"]["loss"]))
    if beta:
        assert not math.isfinite(float(evidence["terms"]["policy_loss"]))
        assert isinstance(evidence["terms"]["distill/loss"], float)
    assert len(evidence["rows"]) == 4
    assert all(row["prompt"] and row["completion"] for row in evidence["rows"])


def test_repetition_is_the_share_of_grams_that_stood_before():
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 1, 2, 1, 2, 1, 2], [9] * 8, [9] * 8, [1] * 8])
    mask = torch.ones_like(ids)
    mask[3, 5:] = 0  # two windows, the same
    mask[4, 3:] = 0  # none
    assert repetition(ids, mask).tolist() == pytest.approx([0, 3 / 5, 4 / 5, 1 / 2, 0])
    assert repetition(ids[:, :3], mask[:, :3]).tolist() == [0] * 5


def test_a_completion_that_was_cut_is_looked_at_although_it_is_not_trained_on():
    ids = torch.tensor([[5] * 8, [2, 3, 4, 5, 6, 1, 0, 0], [7, 7, 7, 7, 7, 7, 0, 0]])
    mask = torch.tensor([[0] * 8, [1] * 6 + [0] * 2, [0] * 8])
    batch = {"completion_ids": ids, "completion_mask": mask}
    assert written(batch, pad=0).sum(1).tolist() == [8, 6, 6]
    batch["tool_mask"] = torch.ones_like(ids)
    batch["tool_mask"][1, 2:4] = 0
    assert written(batch, pad=0).sum(1).tolist() == [8, 4, 6]


def test_loops_are_seen_where_cut_completions_are_masked(make, tmp_path, student):
    """A student that writes one token for ever."""
    with torch.no_grad():
        student.model.embed_tokens.weight[5] *= 30
    trainer = make(max_steps=6, mask_truncated_completions=True, stop_above_repetition=0.5, max_completion_length=16)
    with pytest.raises(RunawayError, match="repeat earlier ones"):
        trainer.train()


def test_a_guard_counts_batches_in_a_row():
    guard = Guard("the completions are cut", 0.5, "Do something.")
    for value in (0.6, 0.6, 0.5, 0.6, 0.6):
        guard.check(value)
    with pytest.raises(RunawayError, match=r"70% of the completions are cut, more than 50% .* Do something\."):
        guard.check(0.7)
    off = Guard("", None, "")
    for _ in range(9):
        off.check(1.0)


@pytest.mark.parametrize("name", ["stop_above_truncation", "stop_above_repetition"])
def test_runaway_completions_stop_the_run_with_a_checkpoint(make, tmp_path, name):
    """A tiny random student decodes greedily in circles and never stops."""
    make(max_steps=4).train()
    trainer = make(max_steps=8, **{name: 0.0})
    with pytest.raises(RunawayError, match=r"stopped after step 2\. Everything so far is in .*checkpoint-2"):
        trainer.train()
    assert last_complete(tmp_path) == str(tmp_path / "checkpoint-2")
    assert all(0 <= row["distill/repetition"] <= 1 for row in trainer.state.log_history if "loss" in row)


@pytest.mark.parametrize(
    "saving",
    [
        {},
        {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1},
        {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_reward"},
        {
            **{"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "load_best_model_at_end": True},
            **{"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_reward"},
        },
    ],
    ids=["no saving", "limit", "best", "best at the end"],
)
def test_sigterm_ends_the_run_after_the_step_with_a_checkpoint(make, tmp_path, prompts, saving):
    stop, before = StopOnSigterm(), signal.getsignal(signal.SIGTERM)

    def reward(completions, **_):
        if trainer.state.global_step == 2 and trainer.model.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return length(completions)

    settings = {"max_steps": 5, "num_generations": 2, "per_device_eval_batch_size": 32, **saving}
    trainer = make([reward], [stop], eval_dataset=prompts, **settings)
    with (
        pytest.raises(StoppedBySignal, match=r"after step 3\. Everything so far is in .*checkpoint-3"),
        stop.listening(),
    ):
        trainer.train()
    assert trainer.state.global_step == 3
    assert last_complete(tmp_path) == str(tmp_path / "checkpoint-3")
    assert signal.getsignal(signal.SIGTERM) is before
    if "load_best_model_at_end" in saving:
        return  # what is compared below is not the last step's model
    resumed = make([length], eval_dataset=prompts, **settings)
    resumed.train(resume_from_checkpoint=True)
    whole = make([length], eval_dataset=prompts, **settings)
    whole.train()
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=1e-5, atol=1e-7)


def test_outside_of_the_main_thread_there_is_nothing_to_listen_to():
    entered = []

    def listen():
        with StopOnSigterm().listening():
            entered.append(True)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert entered == [True]


@pytest.mark.parametrize("name", ["stop_above_truncation", "stop_above_repetition"])
def test_a_limit_is_a_share(make, name):
    with pytest.raises(ValueError, match=f"`{name}` is 1; it is a share"):
        make(**{name: 1})


def test_ctrl_c_once_ends_the_step_and_twice_the_run(capfd):
    stop = StopOnSigterm()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
    try:
        with stop.listening(interrupt=True):
            os.kill(os.getpid(), signal.SIGINT)
            assert stop._signalled
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Ctrl-C again stops at once" in capfd.readouterr().err
