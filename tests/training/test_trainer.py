"""The trainer as a whole: what it loads, calls, optimises, logs, saves and resumes."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset
from helpers import (
    EOS,
    TOOL_TEMPLATE,
    VOCAB,
    batch,
    config,
    gradients,
    in_training,
    make_model,
    make_tokenizer,
    relative_error,
)
from safetensors.torch import load_file
from torch.utils._pytree import tree_flatten
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

from trl_distill import OPDConfig, OPDTrainer
from trl_distill.models.properties import unwrap_adapter
from trl_distill.models.student import RecordedStudent


def run(student, teacher, args, prompts, tokenizer, resume=None, **kwargs):
    trainer = OPDTrainer(
        model=student, teacher_model=teacher, args=args, train_dataset=prompts, processing_class=tokenizer, **kwargs
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("beta", "divergence"), [(1.0, "reverse_kl"), (0.5, "jsd"), (0.0, "forward_kl")])
def test_losses_and_gradient_norms_equal_those_of_trls_distillation_trainer(
    tmp_path, tokenizer, prompts, student, teacher, beta, divergence, accumulation
):
    with torch.no_grad():  # stop now and then, so that lengths are ragged and the normaliser matters
        student.model.embed_tokens.weight[EOS] *= 1.5
    shared = {"gradient_accumulation_steps": accumulation, "max_steps": 5, "max_grad_norm": 1e9}
    args = config(tmp_path, divergence=divergence, **shared)
    ours = run(copy.deepcopy(student), copy.deepcopy(teacher), args, prompts, tokenizer)
    theirs_config = DistillationConfig(
        output_dir=str(tmp_path),
        beta=beta,
        per_device_train_batch_size=4,
        max_completion_length=8,
        learning_rate=1e-2,
        top_k=1,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        **shared,
    )
    theirs = DistillationTrainer(
        model=student, teacher_model=teacher, args=theirs_config, train_dataset=prompts, processing_class=tokenizer
    )
    theirs.train()
    assert logged(ours, "completions/mean_length") == logged(theirs, "completions/mean_length")
    assert len(set(logged(ours, "completions/mean_length"))) > 1
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-5)
    assert logged(ours, "grad_norm") == pytest.approx(logged(theirs, "grad_norm"), rel=1e-5)
    if accumulation == 1:  # the log has the mean of micro-batches' means, and ours hold other rows together
        assert logged(ours, "entropy") == pytest.approx(logged(theirs, "entropy"), rel=1e-5)
    assert len(logged(ours, "loss")) == 5
    assert relative_error(parameters(ours.model), parameters(theirs.model)) < 1e-5


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo", "grpo", "luspo"])
def test_micro_batches_do_not_change_the_update(tmp_path, tokenizer, prompts, student, teacher, loss_type):
    after = []
    for accumulation in (1, 2, 4):
        args = config(
            tmp_path,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            loss_type=loss_type,
        )
        trainer = run(copy.deepcopy(student), copy.deepcopy(teacher), args, prompts, tokenizer)
        after.append(parameters(trainer.model))
    assert relative_error(after[1], after[0]) < 1e-5
    assert relative_error(after[2], after[0]) < 1e-5
    assert relative_error(after[0], parameters(student)) > 1e-2


def test_distillation_lowers_the_divergence(tmp_path, tokenizer, prompts, student, teacher):
    args = config(tmp_path, max_steps=60, top_k=0, per_device_train_batch_size=16, max_completion_length=4)
    kl = logged(run(student, teacher, args, prompts, tokenizer), "distill/reverse_kl")
    assert sum(kl[-5:]) < 0.6 * sum(kl[:5])


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


def test_iterations_and_steps_per_generation_reuse_rollouts(tmp_path, tokenizer, prompts, student, teacher):
    args = config(tmp_path, steps_per_generation=2, num_iterations=2, max_steps=8)
    trainer = run(student, teacher, args, prompts, tokenizer)
    assert len(logged(trainer, "loss")) == 8
    assert len(logged(trainer, "completions/mean_length")) == 2  # two generation batches, four steps each


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


def test_rollouts_stay_inside_a_smaller_teacher_vocabulary(tmp_path, tokenizer, prompts, teacher):
    student = make_model(seed=1, vocab_size=VOCAB + 50)
    with torch.no_grad():  # the student would rather say nothing but padding ids
        student.model.embed_tokens.weight[VOCAB:] *= 20
    args = config(tmp_path, top_k=0, max_completion_length=20)
    trainer = OPDTrainer(
        model=student, teacher_model=teacher, args=args, train_dataset=prompts, processing_class=tokenizer
    )
    written = []
    original = trainer.rollout_loss
    trainer.rollout_loss = lambda model, inputs: (written.append(inputs["completion_ids"]), original(model, inputs))[1]
    trainer.train()
    assert max(ids.max().item() for ids in written) < VOCAB
    inputs = batch()
    inputs["completion_ids"][0, 0] = VOCAB + 3
    with pytest.raises(
        ValueError, match=f"has the token id {VOCAB + 3}, but the teacher's vocabulary ends at {VOCAB - 1}"
    ):
        trainer.rollout_loss(trainer.model, inputs)


def test_evaluation_measures_the_divergence(tmp_path, tokenizer, prompts, student, teacher):
    args = config(tmp_path, per_device_eval_batch_size=4, eval_strategy="steps", eval_steps=1)
    trainer = run(student, teacher, args, prompts, tokenizer, eval_dataset=prompts.select(range(8)))
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_distill/reverse_kl"], rel=0.2)
    assert len(logged(trainer, "eval_distill/reverse_kl")) == 3


def test_logs_of_pure_distillation_hold_no_rewards(tmp_path, tokenizer, prompts, student, teacher):
    args = config(tmp_path, log_completions=True, num_completions_to_print=1)
    trainer = run(student, teacher, args, prompts, tokenizer)
    keys = {key for row in trainer.state.log_history for key in row}
    assert not [key for key in keys if "reward" in key]
    assert {"distill/reverse_kl", "entropy", "completions/mean_length"} <= keys
    import pandas as pd

    table = pd.read_parquet(next((tmp_path / "completions").glob("*.parquet")))
    assert "no_reward" not in table.columns


def test_mask_truncated_completions_leaves_them_out(tmp_path, tokenizer, prompts, student, teacher):
    args = config(tmp_path, mask_truncated_completions=True, max_completion_length=3)
    trainer = OPDTrainer(
        model=student, teacher_model=teacher, args=args, train_dataset=prompts, processing_class=tokenizer
    )
    seen = []
    original = trainer.teacher.score
    trainer.teacher.score = lambda rollouts: (seen.append(rollouts), original(rollouts))[1]
    trainer.train()
    truncated = 0
    for rollouts in seen:
        completions = rollouts.input_ids[:, -rollouts.mask.shape[1] :]
        unfinished = ~(completions == EOS).any(-1)
        truncated += unfinished.sum().item()
        assert not rollouts.mask[unfinished].any()
    assert truncated > 0


def test_a_teacher_of_ones_own_as_documented(tmp_path, tokenizer, prompts, student, teacher):
    """The class in docs/teachers.md judges as the model does that it is made of."""
    page = (Path(__file__).parents[2] / "docs" / "teachers.md").read_text()
    namespace = {}
    exec(next(code for code in page.split("```python\n") if "class MyTeacher" in code).split("```")[0], namespace)
    other = next(code for code in page.split("```python\n") if "class MyOtherTeacher" in code).split("```")[0]
    exec(other.replace("topk(16)", f"topk({VOCAB})"), namespace)
    losses = []
    for judge in (copy.deepcopy(teacher), namespace["MyTeacher"](teacher)):
        trainer = in_training(
            OPDTrainer(
                model=copy.deepcopy(student),
                teacher_model=judge,
                args=config(tmp_path),
                train_dataset=prompts,
                processing_class=tokenizer,
            )
        )
        losses.append(trainer.rollout_loss(trainer.model, batch()))
    assert torch.equal(*losses)
    by_log_probs = OPDTrainer(
        model=copy.deepcopy(student),
        teacher_model=namespace["MyOtherTeacher"](teacher),
        args=config(tmp_path, kl_estimator="topk", kl_top_k=VOCAB),
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    torch.testing.assert_close(in_training(by_log_probs).rollout_loss(by_log_probs.model, batch()), losses[0])


def test_reward_and_teacher_add_up(tmp_path, tokenizer, prompts, student, teacher):
    """With rewards the loss is TRL's policy loss plus beta times the divergence, from one forward."""
    inputs = batch()
    inputs["advantages"] = torch.tensor([0.5, -1.0, 0.25])
    reward = {"reward_funcs": lambda completions, **_: [0.0] * len(completions), "train_dataset": prompts}
    grads = {}
    for name, beta, judge in (("both", 0.7, teacher), ("policy", 0.0, None)):
        trainer = in_training(
            OPDTrainer(
                model=copy.deepcopy(student),
                teacher_model=copy.deepcopy(judge),
                args=config(tmp_path, beta=beta, num_generations=2),
                processing_class=tokenizer,
                **reward,
            )
        )
        trainer.rollout_loss(trainer.model, inputs).backward()
        grads[name] = gradients(trainer.model)
    pure = in_training(
        OPDTrainer(
            model=copy.deepcopy(student),
            teacher_model=copy.deepcopy(teacher),
            args=config(tmp_path),
            train_dataset=prompts,
            processing_class=tokenizer,
        )
    )
    pure.rollout_loss(pure.model, inputs).backward()
    assert relative_error(grads["both"], grads["policy"] + 0.7 * gradients(pure.model)) < 1e-5


def test_beta_zero_is_plain_grpo(tmp_path, tokenizer, prompts, student, monkeypatch):
    """Same losses, same parameters after ten steps, and a teacher that is named is not even looked for."""

    def reward(completions, **_):
        return [float(text.count("a") + 0.1 * len(text)) for text in completions]

    settings = {"num_generations": 4, "max_steps": 10, "top_k": 0, "temperature": 1.0}
    ours = run(
        copy.deepcopy(student),
        "a/teacher/that/does/not/exist",
        config(tmp_path, beta=0.0, **settings),
        prompts,
        tokenizer,
        reward_funcs=reward,
    )
    args = config(tmp_path, beta=0.0, **settings)
    theirs_args = GRPOConfig(
        **{
            key: getattr(args, key)
            for key in (*settings, "output_dir", "per_device_train_batch_size", "max_completion_length")
        },
        learning_rate=1e-2,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    theirs = GRPOTrainer(
        model=student, reward_funcs=reward, args=theirs_args, train_dataset=prompts, processing_class=tokenizer
    )
    theirs.train()
    assert ours.teacher is None
    assert logged(ours, "loss") == logged(theirs, "loss")
    assert logged(ours, "reward") == logged(theirs, "reward")
    assert torch.equal(parameters(ours.model), parameters(theirs.model))
    assert len(set(logged(ours, "reward"))) > 1


def test_a_grpo_config_is_taken_as_it_is(tmp_path, tokenizer, prompts, student):
    args = GRPOConfig(output_dir=str(tmp_path), num_generations=4, bf16=False, use_cpu=True, report_to="none")
    trainer = OPDTrainer(
        model=student,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    assert isinstance(trainer.args, OPDConfig)
    assert trainer.args.num_generations == 4
    assert trainer.args.scale_rewards == "group"
    assert trainer.teacher is None


@pytest.mark.parametrize("kind", ["class", "function", "several"])
def test_environments_are_made_once_and_bring_their_reward(tmp_path, prompts, student, teacher, kind):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    made = []

    class Environment:
        def __init__(self):
            made.append(self)

        def reset(self, **_):
            return None

        def get_reward(self) -> float:
            return 1.0

    factory = {"class": Environment, "function": lambda: Environment(), "several": {"one": lambda: Environment()}}[kind]
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts["prompt"]]
    dataset = Dataset.from_dict({"prompt": conversations, "environment": ["one"] * len(conversations)})
    trainer = OPDTrainer(
        model=student,
        teacher_model=teacher,
        args=config(tmp_path, num_generations=2),
        train_dataset=dataset,
        processing_class=tokenizer,
        environment_factory=factory,
    )
    assert trainer.has_rewards
    assert trainer.reward_func_names == ["Environment"]
    assert len(made) == 1


@pytest.mark.parametrize(("changes", "key"), [({}, "entropy"), ({"kl_temperature": 3.0}, "distill/entropy")])
def test_entropy_of_another_temperature_has_a_key_of_its_own(
    tmp_path, tokenizer, prompts, student, teacher, changes, key
):
    trainer = run(student, teacher, config(tmp_path, **changes), prompts, tokenizer)
    assert [name for name in ("entropy", "distill/entropy") if logged(trainer, name)] == [key]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(tmp_path, tokenizer, prompts, student, teacher, use_reentrant):
    plain = run(copy.deepcopy(student), copy.deepcopy(teacher), config(tmp_path), prompts, tokenizer)
    args = config(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    checkpointed = run(student, teacher, args, prompts, tokenizer)
    assert logged(checkpointed, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-6)
    assert logged(checkpointed, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-5)


def test_evaluation_before_the_first_step(tmp_path, tokenizer, prompts, student, teacher):
    args = config(tmp_path, eval_strategy="steps", eval_steps=2, eval_on_start=True, loss_type="grpo")
    trainer = run(student, teacher, args, prompts, tokenizer, eval_dataset=prompts.select(range(8)))
    assert trainer.state.log_history[0]["step"] == 0
    assert len(logged(trainer, "eval_loss")) == 2


def test_streaming_dataset_leaves_the_users_settings_alone(tmp_path, tokenizer, prompts, student, teacher):
    args = config(tmp_path)
    trainer = run(student, teacher, args, prompts.to_iterable_dataset(), tokenizer)
    assert len(logged(trainer, "loss")) == 2
    assert args.accelerator_config.dispatch_batches is None


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
