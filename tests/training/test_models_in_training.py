"""What the trainer does with its models: loads, freezes, calls, saves and resumes them."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from helpers import (
    batch,
    config,
    in_training,
    relative_error,
)
from safetensors.torch import load_file
from torch.utils._pytree import tree_flatten
from trainer_runs import logged, parameters, run
from transformers import AutoModelForCausalLM, PreTrainedModel

from trl_distill import OPDTrainer
from trl_distill.models.properties import unwrap_adapter
from trl_distill.models.student import RecordedStudent


def test_one_load_besides_the_student_and_no_reference(tmp_path, saved, prompts, monkeypatch):
    loaded = []
    original = PreTrainedModel.from_pretrained.__func__
    monkeypatch.setattr(
        PreTrainedModel,
        "from_pretrained",
        classmethod(lambda cls, name, *a, **kw: (loaded.append(Path(name).name), original(cls, name, *a, **kw))[1]),
    )
    trainer = run(str(saved / "student"), str(saved / "teacher"), config(tmp_path), prompts, None)
    assert loaded == ["student", "teacher"]
    assert trainer.ref_model is trainer.teacher.model
    assert trainer.beta == 0  # TRL's own KL stays off
    assert trainer.args.beta == trainer.beta_at(0) == 1.0


def test_teacher_is_frozen_in_eval_mode_and_unchanged(tmp_path, tokenizer, prompts, student, teacher):
    teacher.train()
    before = parameters(teacher).clone()
    trainer = run(student, teacher, config(tmp_path), prompts, tokenizer)
    assert not trainer.teacher.model.training
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert torch.equal(parameters(teacher), before)


@pytest.mark.parametrize(("asked", "expected"), [({}, torch.bfloat16), ({"dtype": "float32"}, torch.float32)])
def test_teacher_keeps_the_dtype_of_its_checkpoint(tmp_path, saved, prompts, asked, expected):
    AutoModelForCausalLM.from_pretrained(saved / "teacher").to(torch.bfloat16).save_pretrained(saved / "teacher")
    args = config(tmp_path, teacher_model_init_kwargs=asked or None)
    trainer = run(str(saved / "student"), str(saved / "teacher"), args, prompts, None)
    assert trainer.teacher.model.dtype == expected
    assert trainer.model.dtype == torch.float32


@contextlib.contextmanager
def backbone_calls(model):
    calls = []
    hook = unwrap_adapter(model).base_model.register_forward_hook(
        lambda _m, _a, output: calls.append(output.last_hidden_state.dtype)
    )
    yield calls
    hook.remove()


@pytest.mark.parametrize("rewards", [False, True])
def test_one_backbone_call_per_micro_step(tmp_path, tokenizer, prompts, student, teacher, rewards):
    trainer = in_training(
        OPDTrainer(
            model=student,
            teacher_model=teacher,
            reward_funcs=(lambda completions, **_: [0.5] * len(completions)) if rewards else None,
            args=config(tmp_path, num_generations=2 if rewards else 1),
            train_dataset=prompts,
            processing_class=tokenizer,
        )
    )
    with backbone_calls(student) as of_student, backbone_calls(teacher) as of_teacher:
        trainer.rollout_loss(trainer.model, batch()).backward()
    assert len(of_student) == len(of_teacher) == 1


def test_both_forwards_run_in_bf16(tmp_path, tokenizer, prompts, student, teacher):
    seen = {"student": set(), "teacher": set()}
    for name, model in (("student", student), ("teacher", teacher)):
        model.base_model.layers[0].mlp.down_proj.register_forward_hook(
            lambda module, _a, output, name=name: seen[name].add((module.training, output.dtype))
        )
    trainer = run(student, teacher, config(tmp_path, bf16=True), prompts, tokenizer)
    assert (True, torch.bfloat16) in seen["student"]  # training mode: the update, not generation
    assert {dtype for training, dtype in seen["student"] if training} == {torch.bfloat16}
    assert seen["teacher"] == {(False, torch.bfloat16)}
    assert all(loss > 0 for loss in logged(trainer, "loss"))
    trainer.save_model(str(tmp_path / "saved"))
    assert (
        relative_error(parameters(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), parameters(student)) < 1e-6
    )


@pytest.mark.parametrize("resume_at", [2, 4, 6])
def test_resuming_on_a_generation_boundary_repeats_the_run(tmp_path, tokenizer, prompts, student, teacher, resume_at):
    """Step 4 is also the end of an epoch, step 6 lies within the second."""
    changes = {
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 2,
        "top_k": 0,
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "cosine",
    }
    whole = run(
        copy.deepcopy(student), copy.deepcopy(teacher), config(tmp_path / "whole", **changes), prompts, tokenizer
    )
    resumed = run(
        copy.deepcopy(student),
        copy.deepcopy(teacher),
        config(tmp_path / "resumed", **changes),
        prompts,
        tokenizer,
        resume=str(tmp_path / "whole" / f"checkpoint-{resume_at}"),
    )
    assert torch.equal(parameters(resumed.model), parameters(whole.model))
    assert logged(resumed, "loss")[-1] == logged(whole, "loss")[-1]


def test_save_steps_inside_a_generation_batch_warn(tmp_path, tokenizer, prompts, student, teacher, caplog):
    for save_steps, warned in ((2, False), (3, True)):
        caplog.clear()
        args = config(tmp_path, save_strategy="steps", save_steps=save_steps, num_iterations=2)
        OPDTrainer(
            model=copy.deepcopy(student),
            teacher_model=copy.deepcopy(teacher),
            args=args,
            train_dataset=prompts,
            processing_class=tokenizer,
        )
        assert ("does not fall at the end of a generation batch" in caplog.text) is warned


def test_saved_models_hold_the_student_alone(tmp_path, tokenizer, prompts, student, teacher):
    args = config(tmp_path, save_strategy="steps", save_steps=2)
    trainer = run(student, teacher, args, prompts, tokenizer)
    folder = tmp_path / "checkpoint-2"
    assert sum(t.numel() for t in load_file(folder / "model.safetensors").values()) == student.num_parameters()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(parameters(loaded), parameters(trainer.model))
    card = (tmp_path / "README.md").read_text()
    for word in ("On-Policy Distillation", "2306.13649", "2306.08543", "trl_distill"):
        assert word in card


@pytest.mark.parametrize("passed_as", ["config", "model"])
def test_peft_student_with_a_separate_teacher(tmp_path, tokenizer, prompts, student, teacher, passed_as):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    base_before = student.model.layers[0].self_attn.q_proj.weight.clone()
    args = config(tmp_path, max_steps=3, save_strategy="steps", save_steps=3)
    if passed_as == "config":
        trainer = run(student, teacher, args, prompts, tokenizer, peft_config=lora)
    else:
        trainer = run(get_peft_model(student, lora), teacher, args, prompts, tokenizer)
    assert list(trainer.model.peft_config) == ["default"]  # no "ref" adapter
    assert torch.equal(student.model.layers[0].self_attn.q_proj.base_layer.weight, base_before)
    assert any(p.abs().sum() > 0 for n, p in trainer.model.named_parameters() if "lora_B" in n)
    kl = logged(trainer, "distill/reverse_kl")
    assert kl[-1] != kl[0]
    names = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    assert names
    assert all("lora_" in name for name in names)


def test_peft_teacher(tmp_path, tokenizer, prompts, student, teacher):
    """A teacher with an adapter of its own judges with that adapter."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        copy.deepcopy(teacher), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    merged = copy.deepcopy(adapted).merge_and_unload()
    losses = []
    for judge in (teacher, adapted, merged):
        args = {"args": config(tmp_path), "train_dataset": prompts, "processing_class": tokenizer}
        trainer = in_training(OPDTrainer(model=copy.deepcopy(student), teacher_model=judge, **args))
        losses.append(trainer.rollout_loss(trainer.model, batch()).item())
    assert losses[1] == pytest.approx(losses[2], rel=1e-4)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(tmp_path, tokenizer, prompts, student, teacher, use_reentrant):
    plain = run(copy.deepcopy(student), copy.deepcopy(teacher), config(tmp_path), prompts, tokenizer)
    args = config(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    checkpointed = run(student, teacher, args, prompts, tokenizer)
    assert logged(checkpointed, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-6)
    assert logged(checkpointed, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-5)


def test_arguments_survive_a_checkpoint(tmp_path, tokenizer, prompts, student, teacher):
    run(student, teacher, config(tmp_path, save_strategy="steps", save_steps=2, beta=0.5), prompts, tokenizer)
    args = torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert args.beta == 0.5
    assert json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2


def test_engines_find_what_was_measured_in_the_output(tmp_path, tokenizer, prompts, student, teacher):
    """ZeRO-3 and DDP look for tensors in the output's dictionaries, lists and tuples, to attach their hooks."""
    trainer = in_training(
        OPDTrainer(
            model=student,
            teacher_model=teacher,
            args=config(tmp_path),
            train_dataset=prompts,
            processing_class=tokenizer,
        )
    )
    outputs = []
    original = RecordedStudent.__call__

    def call(self, **inputs):
        outputs.append([leaf for leaf in tree_flatten(dict(self._model(**inputs)))[0] if torch.is_tensor(leaf)])
        return original(self, **inputs)

    with patch.object(RecordedStudent, "__call__", call):
        trainer.rollout_loss(trainer.model, batch())
    assert any(leaf.requires_grad and leaf.shape == batch()["completion_mask"].shape for leaf in outputs[0])
