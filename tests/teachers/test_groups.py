"""Completions of one prompt: every kind of teacher reads it once, and trains as one that reads whole rows."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from helpers import EOS, config, make_model
from peft import LoraConfig
from transformers import AutoModelForCausalLM, MistralConfig, set_seed

from trl_distill import OPDTrainer
from trl_distill.models import shared_prompts
from trl_distill.models.properties import backbone_of, unwrap_adapter
from trl_distill.models.shared_prompts import Prompts


GROUP = 4


@pytest.fixture
def long_prompts() -> Dataset:
    """Eight prompts of 12 to 19 tokens, some with a longer one for the teacher."""
    words = ["a", "b", "c", "d", "e", "f", "g", "h"]
    prompts = [" ".join((words[i:] + words) * 3)[: 2 * (12 + i) - 1] for i in range(8)]
    return Dataset.from_dict({"prompt": prompts})


@pytest.fixture
def make(tmp_path, tokenizer, long_prompts, student, teacher):
    with torch.no_grad():  # stop early now and then, so that completions are ragged
        student.model.embed_tokens.weight[EOS] *= 1.5

    def build(**changes):
        given = {
            name: changes.pop(name) for name in ("peft_config", "reward_funcs", "train_dataset") if name in changes
        }
        settings = {
            "num_generations": GROUP,
            "gradient_accumulation_steps": 2,
            "max_steps": 3,
            "top_k": 0,
            "seed": 3,
            **changes,
        }
        judge = settings.pop("teacher_model", teacher)
        return OPDTrainer(
            model=copy.deepcopy(student),
            teacher_model=copy.deepcopy(judge),
            args=config(tmp_path, **settings),
            processing_class=tokenizer,
            **{"train_dataset": long_prompts, **given},
        )

    return build


def trained(trainer) -> tuple[list[dict], torch.Tensor]:
    trainer.train()
    names = ("loss", "grad_norm", "distill/reverse_kl", "reward")
    log = [{k: row[k] for k in names if k in row} for row in trainer.state.log_history if "loss" in row]
    return log, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def assert_equal(found, expected) -> None:
    assert len(found[0]) == 3
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-5)


def whole_rows(make, monkeypatch, **changes):
    with monkeypatch.context() as patch:
        patch.setattr(Prompts, "pay", lambda self, columns: False)
        return trained(make(**changes))


def windowed(seed: int = 2):
    sizes = {**make_model().config.to_dict(), "hidden_size": 24}
    wanted = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    set_seed(seed)
    return AutoModelForCausalLM.from_config(
        MistralConfig(
            **{name: sizes[name] for name in wanted},
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=6,
            initializer_range=0.3,
            pad_token_id=0,
            eos_token_id=EOS,
            bos_token_id=None,
        )
    )


def letters(completions, **_):
    return [float(len(text) % 3) for text in completions]


def lora():
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)


KINDS = {
    "resident": {},
    "in parts": {"teacher_batch_size": 3},
    "offloaded": {"teacher_offload": True},
    "iterations": {"num_iterations": 2, "max_steps": 3},
    "moving average": {"teacher_model": None, "teacher_ema": 0.5, "reward_funcs": letters},
    "adapter off": {"teacher_model": "adapter-off", "peft_config": lora()},
    "rewards": {"reward_funcs": letters},
    "sampled": {"kl_estimator": "sampled"},
    "topk": {"kl_estimator": "topk", "kl_top_k": 4},
    "discounted": {"kl_discount": 1.0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same(make, monkeypatch, kind):
    expected = whole_rows(make, monkeypatch, **KINDS[kind])
    read = []
    among = shared_prompts.completion_states
    monkeypatch.setattr(shared_prompts, "completion_states", lambda *a: (read.append(len(a[2].first)), among(*a))[1])
    assert_equal(trained(make(**KINDS[kind])), expected)
    assert read


def test_sliding_windows(make, monkeypatch):
    """Longer prompts than the window, of unequal length."""
    assert_equal(trained(make(teacher_model=windowed())), whole_rows(make, monkeypatch, teacher_model=windowed()))


def test_merged_stop_tokens(make, monkeypatch, teacher):
    """The teacher ends with another token than the student."""
    teacher.generation_config.eos_token_id = [EOS, 28]
    settings = {"teacher_model": teacher}
    trainer = make(**settings)
    assert set(trainer.eos_token_ids) == {EOS, 28}
    assert_equal(trained(trainer), whole_rows(make, monkeypatch, **settings))


def test_several_teachers_with_prompts_of_their_own(make, monkeypatch, long_prompts):
    rows = long_prompts.to_list()
    for i, row in enumerate(rows):
        row["teacher"] = [{"a": 1.0}, {"b": 1.0}, {"a": 0.5, "b": 0.5}][i % 3]
        row["teacher"] = {"a": 0.0, "b": 0.0, **row["teacher"]}
        row["teacher_prompt"] = None if i % 2 else "h h h " + row["prompt"]
    settings = {
        "teacher_model": {"a": make_model(seed=2, hidden_size=24), "b": windowed(3)},
        "train_dataset": Dataset.from_list(rows),
    }
    assert_equal(trained(make(**settings)), whole_rows(make, monkeypatch, **settings))


def test_a_resident_teacher_reads_each_prompt_of_a_generation_batch_once(make, monkeypatch):
    """Though micro-batches scatter a group; nothing is kept after its last use."""
    trainer = make(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=2)
    backbone, read = backbone_of(trainer.teacher.module), []
    run = backbone.forward
    monkeypatch.setattr(backbone, "forward", lambda **k: (read.append(k["input_ids"].shape), run(**k))[1])
    trainer.train()
    prompts = [rows for rows, columns in read if columns >= 12]
    assert prompts == [2, 1, 1, 1, 1, 1]  # two whole rows and their prompt to compare, then four prompts
    assert all(not waiting for waiting in trainer.pool._waiting)


def test_a_moving_average_that_moves_within_a_generation_batch_is_asked_each_time(make, monkeypatch):
    """Two optimizer steps use one generation batch; the second must meet the average after the first."""
    settings = {"teacher_model": None, "teacher_ema": 0.5, "reward_funcs": letters, "steps_per_generation": 4}
    trainer = make(**settings)
    assert not trainer.pool._may_share(trainer.teacher)
    assert_equal(trained(trainer), whole_rows(make, monkeypatch, **settings))


def test_short_prompts_are_not_waited_for(make, monkeypatch, prompts):
    trainer = make(train_dataset=prompts, max_completion_length=64, max_steps=1)
    trainer.train()
    assert trainer.pool._early == [False]


def test_the_student_may_be_packed_all_the_same(make):
    """Sharing is the teacher's; the student's model is not touched by it."""
    trainer = make(max_steps=1)
    trainer.train()
    assert not hasattr(unwrap_adapter(trainer.model), shared_prompts._VERDICT)
    assert getattr(trainer.teacher.module, shared_prompts._VERDICT) > 0


def test_off_policy_batches_between_others(make, monkeypatch, long_prompts):
    """A batch of the dataset's completions, whose prompts are not shared, between those of the student's groups."""
    rows = [{**row, "completion": " c d" * (1 + i % 3)} for i, row in enumerate(long_prompts.to_list())]
    settings = {"train_dataset": Dataset.from_list(rows), "lmbda": 0.5, "max_steps": 6}

    def run():
        trainer = make(**settings)
        seen, score_ahead = [], trainer.pool.score_ahead
        monkeypatch.setattr(
            trainer.pool,
            "score_ahead",
            lambda batch, training: (
                score_ahead(batch, training),
                seen.append((batch.is_off_policy, trainer.pool._early[0])),
            ),
        )
        trainer.train()
        return seen, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    with monkeypatch.context() as patch:
        patch.setattr(Prompts, "pay", lambda self, columns: False)
        expected = run()
    found = run()
    assert {off for off, _ in found[0]} == {False, True}
    assert any(early for _, early in found[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-5)


def test_states_that_are_too_large_to_keep_are_not_made_ahead(make, monkeypatch):
    kept = make()
    expected = trained(kept)
    assert kept.pool._early == [True]
    monkeypatch.setattr("trl_distill.teachers.pool.KEPT_AHEAD", 100)
    one_by_one = make()
    assert_equal(trained(one_by_one), expected)
    assert one_by_one.pool._early == [False]


def test_a_failure_to_compare_prompts_is_raised_by_all_processes(make, monkeypatch):
    """Else those that succeed would wait for the one that has failed."""

    def fails(rollouts):
        raise RuntimeError("no memory for this")

    trainer = make()
    monkeypatch.setattr("trl_distill.teachers.pool._prompts_pay", fails)
    with pytest.raises(RuntimeError, match="no memory for this"):
        trainer.train()
    assert trainer.pool.failed_everywhere
