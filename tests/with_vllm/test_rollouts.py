"""Rollouts by vLLM inside the training process (`vllm_mode="colocate"`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import EOS, config, gradients, relative_error
from transformers import TrainerCallback
from with_vllm.vllm_server import OTHER_STOP, free_port

from trl_distill import OPDTrainer
from trl_distill.models.properties import unwrap_adapter


STEPS, ACCUMULATION, LENGTH = 3, 2, 12


@pytest.fixture(scope="module")
def engine():
    """
    One engine for all trainers of this file, which push their weights into it before the first rollouts.

    vLLM's linear layers for the CPU keep weights in oneDNN's own layout and drop the originals, into which TRL pushes
    the student's. Without oneDNN they are torch's.
    """
    from trl.generation import vllm_generation
    from vllm import _custom_ops

    make, made = vllm_generation.LLM, []

    def shared(**how: Any) -> Any:
        if not made:
            made.append(make(**how))
        return made[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_custom_ops, "_supports_onednn", False)
        patch.setattr(vllm_generation, "LLM", shared)
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", str(free_port()))  # accelerate would set 29500, which may be taken
        yield


class Gradients(TrainerCallback):
    """The gradient of each optimizer step."""

    def __init__(self):
        self.found: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.found.append(gradients(model))


@pytest.fixture
def make(models, tokenizer, prompts, tmp_path):
    """Makes trainers, three optimizer steps of two micro-batches, with vLLM unless a `rollout_func` is given."""

    def build(rewards: bool = False, rollout_func: Any = None, **changes: Any) -> OPDTrainer:
        with_vllm = {} if rollout_func else {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 64}
        settings = {
            "top_k": 0,
            "max_steps": STEPS,
            "gradient_accumulation_steps": ACCUMULATION,
            "max_completion_length": LENGTH,
            "max_grad_norm": 1e9,
            "kl_top_k": 4,
            "num_generations": 2 if rewards else 1,
        }
        return OPDTrainer(
            model=str(models / "student"),
            teacher_model=str(models / "teacher"),
            reward_funcs=(lambda completions, **_: [float(len(text) % 5) for text in completions]) if rewards else None,
            args=config(tmp_path, **{**settings, **with_vllm, **changes}),
            train_dataset=prompts,
            processing_class=tokenizer,
            rollout_func=rollout_func,
        )

    return build


def recorded(trainer: OPDTrainer) -> list[tuple[list, list]]:
    """The prompts and completions of vLLM, one pair for each generation batch to come."""
    found, generate = [], trainer.vllm_generation.generate

    def generated(*args: Any, **kwargs: Any) -> Any:
        result = generate(*args, **kwargs)
        found.append(result[:2])
        return result

    trainer.vllm_generation.generate = generated
    return found


def trained(trainer: OPDTrainer) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and gradients of all optimizer steps."""
    watch = Gradients()
    trainer.add_callback(watch)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], watch.found


def logged(trainer: OPDTrainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kl_estimator": "sampled", "vllm_importance_sampling_correction": False},
        {"kl_estimator": "topk", "vllm_importance_sampling_correction": False},
        {"rewards": True, "vllm_importance_sampling_correction": False},
    ],
    ids=str,
)
def test_losses_and_gradients_equal_those_of_the_same_rollouts_without_vllm(engine, make, settings):
    trainer = make(**settings)
    rollouts = recorded(trainer)
    losses, found = trained(trainer)
    assert len(rollouts) == STEPS

    def replay(prompts: list, trainer: Any) -> dict[str, Any]:
        prompt_ids, completion_ids = waiting.pop(0)
        assert trainer.token_ids_of(prompts) == prompt_ids
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}

    waiting = list(rollouts)
    expected_losses, expected = trained(make(rollout_func=replay, **settings))
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert len(found) == len(expected) == STEPS
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.norm() > 0
        assert relative_error(ours, theirs) < 1e-4


def test_importance_ratios_are_close_to_one_after_each_update(engine, make):
    """vLLM computes in bfloat16, training in fp32."""
    trainer = make(kl_estimator="sampled")
    trainer.train()
    means = logged(trainer, "sampling/importance_sampling_ratio/mean")
    assert len(means) == STEPS
    assert all(0.9 < ratio < 1.1 for ratio in means)
    assert all(0 < difference < 0.06 for difference in logged(trainer, "sampling/sampling_logp_difference/mean"))


def test_ratios_tell_weights_that_were_not_pushed(engine, make):
    """So the test above can fail."""
    trainer = make(kl_estimator="sampled")
    push, pushed = trainer.vllm_generation.sync_weights, []
    trainer.vllm_generation.sync_weights = lambda: pushed.append(1) or (push() if len(pushed) == 1 else None)
    trainer.train()
    first, *later = logged(trainer, "sampling/sampling_logp_difference/mean")
    assert len(pushed) == STEPS
    assert first < 0.06
    assert all(difference > 0.12 for difference in later)


def test_merged_stop_tokens_end_rollouts(engine, make):
    trainer = make()
    assert sorted(trainer.eos_token_ids) == [EOS, OTHER_STOP]
    rollouts = recorded(trainer)
    trainer.train()
    completions = [ids for _, found in rollouts for ids in found]
    assert len(completions) == STEPS * ACCUMULATION * 4
    stops = {EOS, OTHER_STOP}
    assert {ids[-1] for ids in completions if len(ids) < LENGTH} == stops
    assert not any(stops & set(ids[:-1]) for ids in completions)


@pytest.mark.parametrize(("estimator", "each"), [("full", 1), ("sampled", 2)])
def test_forward_passes_of_the_student(engine, make, estimator, each):
    """Old log-probabilities cost one more, which is run only where the loss reads them."""
    trainer, calls = make(kl_estimator=estimator), []
    unwrap_adapter(trainer.model).base_model.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == each * STEPS * ACCUMULATION
    assert bool(logged(trainer, "sampling/importance_sampling_ratio/mean")) is (each == 2)
