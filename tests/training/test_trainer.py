"""The trainer as a whole: what it optimises, logs, evaluates and takes as configuration."""

from __future__ import annotations

import copy
from pathlib import Path

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
from trainer_runs import logged, parameters, run
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

from trl_distill import OPDConfig, OPDTrainer


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


def test_iterations_and_steps_per_generation_reuse_rollouts(tmp_path, tokenizer, prompts, student, teacher):
    args = config(tmp_path, steps_per_generation=2, num_iterations=2, max_steps=8)
    trainer = run(student, teacher, args, prompts, tokenizer)
    assert len(logged(trainer, "loss")) == 8
    assert len(logged(trainer, "completions/mean_length")) == 2  # two generation batches, four steps each


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


def test_a_teacher_of_ones_own_as_documented(tmp_path, tokenizer, prompts, student, teacher, monkeypatch):
    """The class in docs/teachers.md judges as the model does that it is made of, on padded rows."""
    monkeypatch.setattr("trl_distill.models.hidden_states.packs", lambda model: False)
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
