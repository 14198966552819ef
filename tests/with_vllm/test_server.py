"""A teacher behind vLLM's own server, and rollouts by it."""

from __future__ import annotations

import copy
import re
import threading
from typing import Any

import psutil
import pytest
import torch
from helpers import VOCAB, batch, config, gradients, in_training, relative_error
from transformers import AutoModelForCausalLM, TrainerCallback
from with_vllm.vllm_server import Server

from trl_distill import OPDTrainer, ServedTeacher, TeacherAnswerError, TeacherUnavailable
from trl_distill.rollouts import Rollouts


@pytest.fixture(scope="module")
def student(models):
    return AutoModelForCausalLM.from_pretrained(models / "student", dtype=torch.float32)


@pytest.fixture(scope="module")
def teacher(models):
    return AutoModelForCausalLM.from_pretrained(models / "teacher", dtype=torch.float32).eval()


@pytest.fixture
def make(student, teacher, tokenizer, prompts, tmp_path):
    def build(teacher_model: Any = None, model: Any = None, **changes: Any) -> OPDTrainer:
        return OPDTrainer(
            model=model or copy.deepcopy(student),
            teacher_model=teacher_model or copy.deepcopy(teacher),
            args=config(tmp_path, **{"merge_stop_tokens": False, **changes}),
            train_dataset=prompts,
            processing_class=tokenizer,
        )

    return build


def weights(trainer: OPDTrainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize("top_k", [0, 5, VOCAB])
def test_log_probabilities_are_those_of_the_resident_teacher(server, teacher, top_k):
    rollouts = Rollouts.from_inputs(batch(rows=7))
    found = ServedTeacher(server.url, "teacher", top_k).score(rollouts)
    length = rollouts.mask.shape[1]
    with torch.no_grad():
        logits = teacher(input_ids=rollouts.input_ids, attention_mask=rollouts.attention_mask).logits
    log_p = logits[:, -length - 1 : -1].log_softmax(-1)[rollouts.mask]  # (N, V)
    tokens = rollouts.input_ids[:, -length:][rollouts.mask]  # (N,)
    torch.testing.assert_close(found.log_p, log_p.gather(1, tokens[:, None])[:, 0], rtol=1e-4, atol=1e-4)
    top = log_p.topk(top_k)
    torch.testing.assert_close(found.top_log_p, top.values, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.top_ids, top.indices)


@pytest.mark.parametrize(
    ("settings", "local"),
    [
        ({"kl_estimator": "sampled"}, {"kl_estimator": "sampled"}),
        ({"kl_estimator": "topk", "kl_top_k": VOCAB}, {"kl_estimator": "full"}),  # exact with all ids
        ({"kl_estimator": "topk", "kl_top_k": 4, "divergence": "forward_kl"}, None),
    ],
    ids=str,
)
def test_losses_and_gradients_are_those_of_the_resident_teacher(server, make, teacher, settings, local):
    """The last has no resident counterpart: the teacher's top k with all else as one class, against autograd."""
    served = ServedTeacher(server.url, "teacher", settings.get("kl_top_k", 0))
    rows = [{"prompt": text} for text in ("a b c", "d", "e f", "g h a b")]
    found = []
    for changes, teacher_model in ((settings, served), *([(local, None)] if local else [])):
        trainer = in_training(make(teacher_model, **changes))
        inputs = trainer._prepare_inputs(rows)
        loss = trainer.rollout_loss(trainer.model, inputs)
        loss.backward()
        found.append((loss.item(), gradients(trainer.model)))
    if local is None:
        found.append(_forward_kl(trainer, teacher, inputs, settings["kl_top_k"]))
    (loss, gradient), (expected_loss, expected) = found
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert expected.norm() > 0
    assert relative_error(gradient, expected) < 1e-3


def _forward_kl(trainer: OPDTrainer, teacher: Any, inputs: dict[str, Any], k: int) -> tuple[float, torch.Tensor]:
    """KL(teacher ‖ student) over the teacher's k likeliest ids and the rest as one, averaged over tokens."""
    rollouts = Rollouts.from_inputs(inputs)
    length = rollouts.mask.shape[1]
    log_probs = []
    for model in (teacher, trainer.model):
        logits = model(input_ids=rollouts.input_ids, attention_mask=rollouts.attention_mask).logits
        log_probs.append(logits[:, -length - 1 : -1].log_softmax(-1)[rollouts.mask])
    log_p, log_q = log_probs
    ids = log_p.topk(k).indices
    p, q = log_p.detach().exp().gather(1, ids), log_q.exp().gather(1, ids)
    p, q = torch.cat([p, 1 - p.sum(1, keepdim=True)], 1), torch.cat([q, 1 - q.sum(1, keepdim=True)], 1)
    trainer.model.zero_grad()
    loss = (p * (p / q).log()).sum(1).mean()
    loss.backward()
    return loss.item(), gradients(trainer.model)


def test_what_the_server_refuses_is_said_with_what_to_change(server):
    ServedTeacher(server.url, "teacher", VOCAB).check()
    with pytest.raises(ValueError, match=r"does not serve `model='x'` but \['teacher'\]"):
        ServedTeacher(server.url, "x").check()
    with pytest.raises(TeacherAnswerError, match=r"HTTP 400.*40.*Start the server with `--max-logprobs`"):
        ServedTeacher(server.url, "teacher", 40).check()
    long = Rollouts.from_inputs(batch(rows=2, prompt=40, completion=30) | {"prompt_mask": torch.ones(2, 40).long()})
    with pytest.raises(TeacherAnswerError, match=r"HTTP 400.*Start the server with a larger `--max-model-len`"):
        ServedTeacher(server.url, "teacher").score(long)


def processes_of(server: Server) -> list[psutil.Process]:
    """It and all that it has started."""
    main = psutil.Process(server.process.pid)
    return [main, *main.children(recursive=True)]


class AfterStep(TrainerCallback):
    def __init__(self, step: int, action: Any):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.action()


def test_a_server_that_is_killed_and_started_again(server, make, tmp_path):
    """One run ends with a checkpoint; resumed, it waits out a restart, and ends with the weights of a run without."""

    def of_run(**how: Any) -> OPDTrainer:
        return make(ServedTeacher(server.url, "teacher", 4, **how), kl_estimator="topk", kl_top_k=4, max_steps=4)

    whole = of_run()
    whole.train()
    broken = of_run(retries=1, backoff=0.1)
    broken.add_callback(AfterStep(1, server.kill))
    killed = processes_of(server)
    assert len(killed) > 1
    with pytest.raises(TeacherUnavailable) as stopped:
        broken.train()
    assert not [process for process in killed if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert re.search(r"Training stopped after step 1\. Everything so far is in .*checkpoint-1", str(stopped.value))

    server.start()
    server.wait()
    resumed = of_run(retries=100)

    def restart() -> None:
        server.kill()
        threading.Timer(3.0, server.start).start()

    resumed.add_callback(AfterStep(2, restart))
    try:
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    finally:
        server.wait()
    assert resumed.state.global_step == 4
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=1e-4, atol=1e-5)


def test_rollouts_in_server_mode_but_for_the_push_of_weights(server, make, models, student, monkeypatch):
    """
    TRL pushes weights to a server with NCCL, so on a CPU it refuses. All else runs: here the student is what the server
    serves, and does not learn.
    """
    from trl.generation.vllm_client import VLLMClient

    settings = {
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_server_base_url": server.url,
        "kl_estimator": "sampled",
        "learning_rate": 0.0,
        "top_k": 0,
        "max_steps": 3,
    }
    served = AutoModelForCausalLM.from_pretrained(models / "teacher", dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="NCCL weight-transfer engine, which needs a CUDA device"):
        make(copy.deepcopy(student), served, **settings)
    monkeypatch.setattr(VLLMClient, "init_communicator", lambda *_, **__: None)
    monkeypatch.setattr(VLLMClient, "update_named_params", lambda *_, **__: None)
    trainer = make(copy.deepcopy(student), served, **settings)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 3
    assert all(row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3) for row in rows)
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-3 for row in rows)
    assert max(row["completions/max_length"] for row in rows) > 1
