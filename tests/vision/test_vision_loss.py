"""Losses and gradients with images: beside full logits of each row read alone, and beside TRL's own distillation."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig
from trl import DistillationConfig, DistillationTrainer
from vision_models import FAMILIES, vision_model, vision_pair
from vision_runs import compare, config, make, rows

from trl_distill import OPDTrainer


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_full_logits_with_images_in_some_rows(tmp_path, family):
    dataset = rows()
    trainer = make(tmp_path, family, dataset)
    student, processor = vision_pair(family, seed=0)
    compare(trainer, dataset, student, vision_model(family, seed=1), processor)
    tower = [p.grad for name, p in trainer.model.named_parameters() if "vision" in name or "visual" in name]
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in tower)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "idefics3"])
def test_a_teacher_whose_processor_makes_another_number_of_tokens(tmp_path, family):
    """The same images at twice the resolution: 16 tokens for the teacher, where the student reads 4."""
    student, processor = vision_pair(family, seed=0)
    teacher, theirs = vision_pair(family, seed=1, resolution=32)
    folder = tmp_path / "teacher"
    teacher.save_pretrained(folder)
    theirs.save_pretrained(folder)
    dataset = rows()
    trainer = make(tmp_path, family, dataset, teacher=str(folder))
    assert "process images differently" in str(trainer.preflight)
    compare(trainer, dataset, student, vision_model(family, seed=1, resolution=32), processor, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_equal_those_of_trls_distillation_trainer(tmp_path, family):
    dataset = rows((1, 2, 1, 1))
    student, processor = vision_pair(family, seed=0)
    ours = make(tmp_path, family, dataset, student=copy.deepcopy(student), max_grad_norm=1e9, top_k=1)  # both greedy
    ours.train()
    args = config(tmp_path)
    names = ("bf16", "use_cpu", "gradient_checkpointing", "report_to", "logging_steps", "save_strategy", "disable_tqdm")
    names += ("output_dir", "per_device_train_batch_size", "max_completion_length", "learning_rate", "max_steps")
    theirs = DistillationTrainer(
        model=student,
        teacher_model=vision_model(family, seed=1),
        args=DistillationConfig(**{name: getattr(args, name) for name in names}, beta=1.0, top_k=1, max_grad_norm=1e9),
        train_dataset=dataset,
        processing_class=processor,
    )
    theirs.train()
    for name in ("loss", "grad_norm"):
        found = [[log[name] for log in trainer.state.log_history if name in log] for trainer in (ours, theirs)]
        assert len(found[0]) == 2
        assert found[0] == pytest.approx(found[1], rel=1e-4)


def reward(completions, **_):
    return [float(len(completion[0]["content"]) % 3) for completion in completions]


WAYS = {
    "rewards": {"reward_funcs": [reward], "num_generations": 2},
    "rewards, no groups": {"reward_funcs": [reward], "reward_baseline": "batch"},
    "prompts' own mean": {"reward_funcs": [reward], "reward_baseline": "prompt"},
    "topk": {"kl_estimator": "topk", "kl_top_k": 8},
    "sampled": {"kl_estimator": "sampled"},
    "forward KL": {"divergence": "forward_kl"},
    "off-policy": {"lmbda": 0.0},
    "half and half": {"lmbda": 0.5, "num_generations": 2},
    "gamma 1": {"kl_discount": 1.0},
    "parked": {"teacher_offload": True},
    "used twice": {"num_iterations": 2},
    "small steps": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "misaligned": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "steps_per_generation": 2},
    "moving average": {"teacher": "ema", "teacher_ema": 0.9},
    "adapter off": {"teacher": "adapter-off"},
    "LoRA": {"lora": True},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "family", ["qwen2_5_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("idefics3", "gemma3"))]
)
def test_every_way_of_training_takes_images(tmp_path, family, way):
    changes = dict(WAYS[way])
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    if changes.pop("lora", False) or way == "adapter off":
        changes["peft_config"] = lora
    if changes.get("teacher") == "ema":
        del changes["teacher"]
        model, processor = vision_pair(family, seed=0)
        kwargs = {"args": config(tmp_path, assume_different_teacher=True, **changes), "train_dataset": rows(repeat=2)}
        trainer = OPDTrainer(model=model, processing_class=processor, **kwargs)
    elif way == "adapter off":
        trainer = make(tmp_path, family, rows(repeat=2), assume_different_teacher=True, **changes)
    else:
        trainer = make(tmp_path, family, rows(repeat=2), **changes)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 2
    assert all(torch.isfinite(torch.tensor(losses)))
    if way not in ("moving average", "adapter off"):
        changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
        assert any("vision" in name or "visual" in name or "lora" in name for name in changed)
