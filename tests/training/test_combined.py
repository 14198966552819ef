"""Reward and teacher in one step: the same meaning of beta under every loss type, baselines, schedules, logs."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import EOS, batch, config, gradients, in_training, make_model, relative_error

from trl_distill import OPDTrainer
from trl_distill.objective.weights import leave_one_out, scheduled_beta


LOSS_TYPES = ["dapo", "dr_grpo", "luspo", "vespo", "cispo", "grpo", "sapo", "bnpo"]


def letters(completions, **_) -> list[float]:
    return [text.count("a") + 0.1 * len(text) for text in completions]


@pytest.fixture
def make(tmp_path, tokenizer, prompts, student, teacher):
    with torch.no_grad():  # stop early now and then, so that completions are ragged
        student.model.embed_tokens.weight[EOS] *= 1.5

    def build(reward_funcs=letters, **changes):
        settings = {"num_generations": 2, "epsilon_high": 5.0, "top_k": 0, **changes} if reward_funcs else changes
        return OPDTrainer(
            model=copy.deepcopy(student),
            teacher_model=copy.deepcopy(teacher),
            reward_funcs=reward_funcs,
            args=config(tmp_path, **settings),
            train_dataset=prompts,
            processing_class=tokenizer,
        )

    return build


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def logged(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


@pytest.mark.parametrize("estimator", ["full", "topk"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches(make, loss_type, estimator):
    """One update from 8 ragged completions, cut into 1, 2 or 4 micro-batches. `bnpo` is TRL's own exception."""
    after, lengths = [], []
    for accumulation in (1, 2, 4):
        trainer = make(
            loss_type=loss_type,
            kl_estimator=estimator,
            kl_top_k=3,
            kl_discount=0.5,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            learning_rate=1.0,
            optim="sgd",
            max_grad_norm=0.0,
        )
        before = parameters(trainer.model)
        trainer.train()
        after.append(parameters(trainer.model) - before)
        row = trainer.state.log_history[0]
        lengths.append((row["completions/min_length"], row["completions/mean_length"], row["reward"]))
        assert row["reward_std"] > 0
    assert lengths[0] == lengths[1] == lengths[2]  # the same rollouts
    assert lengths[0][0] < lengths[0][1]
    errors = [relative_error(update, after[0]) for update in after[1:]]
    assert after[0].norm() > 1e-3
    if loss_type == "bnpo":
        assert max(errors) > 1e-3
    else:
        assert max(errors) < 1e-4


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_unit_of_reward_weighs_as_much_as_a_nat(make, loss_type):
    """On fresh rollouts the policy loss has the gradient of −advantage · log q, summed as the divergence is."""
    trainer = in_training(make(loss_type=loss_type))
    inputs = batch() | {"advantages": torch.tensor([0.7, -0.4, 1.1])}
    trainer.policy_loss(trainer.model, inputs).backward()
    found = gradients(trainer.model)
    trainer.model.zero_grad()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, 3:-1]
    log_q = logits.log_softmax(-1).gather(2, inputs["completion_ids"][..., None])[..., 0]
    expected = trainer.reduce_per_token(-inputs["advantages"][:, None] * log_q, inputs["completion_mask"], inputs)
    expected.backward()
    assert relative_error(found, gradients(trainer.model)) < 1e-4


def test_cispo_that_clips_fresh_rollouts_is_refused(make):
    with pytest.raises(ValueError, match=r"rewards would count only 0\.2 times"):
        make(loss_type="cispo", epsilon_high=None)


def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others():
    rewards = torch.tensor([1.0, 4.0, 7.0, 0.0, 2.0, 9.0])
    valid = torch.tensor([True, True, True, True, False, True])
    means = torch.tensor([4.0, 4.0, 4.0, 4.5, 4.5, 4.5])
    advantages = torch.where(valid, rewards - means, 0.0)
    expected = torch.tensor([1 - 5.5, 4 - 4.0, 7 - 2.5, 0 - 9.0, 0.0, 9 - 0.0])
    torch.testing.assert_close(leave_one_out(advantages, valid, group=3), expected)
    alone = torch.tensor([True, False, False])
    assert torch.equal(leave_one_out(torch.zeros(3), alone, group=3), torch.zeros(3))
    assert torch.equal(leave_one_out(torch.tensor([0.0, 0.0]), torch.tensor([True, True]), group=1), torch.zeros(2))


def rollout_inputs(trainer):
    """The generation batch as TRL hands it on, before it is shuffled."""
    rows = [{"prompt": "a b"}] * 4 + [{"prompt": "c"}] * 4
    return trainer._generate_and_score_completions(rows)


@pytest.mark.parametrize(
    ("changes", "rescaled"), [({}, True), ({"scale_rewards": "group"}, False), ({"beta": 0.0}, False)]
)
def test_advantages_in_rollouts(make, changes, rescaled):
    values = [1.0, None, 3.0, 0.0, 2.0, 2.0, 5.0, 1.0]
    trainer = in_training(
        make(
            reward_funcs=lambda completions, **_: values,
            num_generations=4,
            per_device_train_batch_size=8,
            scale_rewards=changes.pop("scale_rewards", "none"),
            **changes,
        )
    )
    found = rollout_inputs(trainer)["advantages"]
    if rescaled:
        expected = [1 - 3 / 2, 0.0, 3 - 1 / 2, 0 - 4 / 2, 2 - 8 / 3, 2 - 8 / 3, 5 - 5 / 3, 1 - 9 / 3]
        torch.testing.assert_close(found, torch.tensor(expected))
    elif trainer.args.scale_rewards == "group":
        first, second = torch.tensor([1.0, 3.0, 0.0]), torch.tensor([2.0, 2.0, 5.0, 1.0])
        scaled = [(group - group.mean()) / (group.std() + 1e-4) for group in (first, second)]
        torch.testing.assert_close(found, torch.cat([scaled[0][:1], torch.zeros(1), scaled[0][1:], scaled[1]]))
    else:
        expected = [1 - 4 / 3, 0.0, 3 - 4 / 3, 0 - 4 / 3, 2 - 2.5, 2 - 2.5, 5 - 2.5, 1 - 2.5]
        torch.testing.assert_close(found, torch.tensor(expected))
    assert not found.requires_grad


def test_one_generation_in_evaluation_is_not_rescaled(make, prompts):
    trainer = make(num_generations_eval=1, per_device_eval_batch_size=4)
    metrics = trainer.evaluate(eval_dataset=prompts.select(range(8)))
    assert metrics["eval_reward"] > 0
    assert all(value == value for value in metrics.values())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0] * 5),
        ("linear", [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("cosine", [1.0, 0.8535534, 0.5, 0.1464466, 0.0]),
        ("step", [1.0, 1.0, 1.0, 1.0, 0.0]),
    ],
)
def test_schedules(schedule, expected):
    assert [scheduled_beta(schedule, 1.0, 0.0, step, 4) for step in range(5)] == pytest.approx(expected)
    assert scheduled_beta(schedule, 1.0, 0.0, 99, 4) == expected[-1]


def test_rows_without_a_reward_have_no_objective(make):
    values = [1.0, None, 3.0, 0.0]
    trainer = make(reward_funcs=lambda completions, **_: values, num_generations=4, max_steps=1, beta=1e-6)
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["reward"] == pytest.approx(4 / 3)
    assert row["objective"] == pytest.approx(4 / 3, abs=1e-3)  # 1.0 if the row counted as a reward of zero


@pytest.mark.parametrize("estimator", ["topk", "sampled"])
def test_estimates_in_bf16(tmp_path, tokenizer, prompts, estimator):
    """Under autocast a head's probabilities add up to 1 at most, and the value is near that in fp32."""
    pair = [make_model("untied", seed=seed, initializer_range=1.0) for seed in (1, 2)]
    values, measured = {}, {}
    for in_bf16 in (False, True):
        trainer = in_training(
            OPDTrainer(
                model=copy.deepcopy(pair[0]),
                teacher_model=copy.deepcopy(pair[1]),
                args=config(tmp_path, bf16=in_bf16, kl_estimator=estimator, kl_top_k=29),
                train_dataset=prompts,
                processing_class=tokenizer,
            )
        )
        term = trainer.estimator.term
        trainer.estimator.term = lambda m, *rest, term=term: (measured.update(vars(m)), term(m, *rest))[1]
        values[in_bf16] = trainer.rollout_loss(trainer.model, batch()).item()
    assert abs(values[False]) > 0.1
    assert values[True] == pytest.approx(values[False], rel=0.05)
    if estimator == "topk":  # the head is the whole vocabulary
        mass = measured["head_log_q"].exp().sum(-1)[batch()["completion_mask"].bool()]
        assert mass.max() < 1.01
        assert mass.min() > 0.99


def test_before_training_a_schedule_is_at_its_start(make, prompts):
    trainer = make(beta_schedule="linear", beta_end=0.0, per_device_eval_batch_size=4)
    metrics = trainer.evaluate(eval_dataset=prompts.select(range(4)))
    assert metrics["eval_distill/beta"] == 1.0


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"kl_estimator": "sampled", "top_p": 0.9}, True),
        ({"kl_discount": 0.5, "top_k": 20}, True),
        ({"top_p": 0.9, "top_k": 20}, False),
        ({"kl_estimator": "sampled"}, False),
    ],
)
def test_truncated_sampling_and_score_functions(make, caplog, changes, warned):
    make(reward_funcs=None, **{"top_k": 0, **changes})
    assert ("changes the distribution that rollouts are sampled from" in caplog.text) is warned


def test_tokens_that_are_not_judged_cannot_overflow(make):
    """A tool token that the old policy found impossible leaves loss and gradient finite."""
    trainer = in_training(make(reward_funcs=None, kl_estimator="sampled", kl_discount=1.0))
    inputs = batch()
    inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
    inputs["tool_mask"][1, 2] = 0
    inputs["old_per_token_logps"] = -torch.ones(inputs["completion_mask"].shape)
    inputs["old_per_token_logps"][1, 2] = -1e4
    loss = trainer.rollout_loss(trainer.model, inputs)
    loss.backward()
    assert loss.isfinite()
    assert gradients(trainer.model).isfinite().all()


def test_the_teacher_rests_while_its_weight_is_zero(make):
    trainer = make(beta_schedule="step", beta_end=0.0, beta_schedule_steps=2, max_steps=4, num_iterations=2)
    calls = []
    score = trainer.teacher.score
    trainer.teacher.score = lambda rollouts: (calls.append(trainer.state.global_step), score(rollouts))[1]
    trainer.train()
    assert calls == [0]  # for both iterations over the first generation batch
    assert logged(trainer, "distill/beta") == [1.0, 1.0, 0.0, 0.0]


def test_a_schedule_needs_no_state_to_resume(make, tmp_path):
    changes = {"beta_schedule": "linear", "beta_end": 0.2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make(**changes)
    whole.train()
    resumed = make(**changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed, "distill/beta") == logged(whole, "distill/beta") == pytest.approx([1.0, 0.8, 0.6, 0.4])
    assert torch.equal(parameters(resumed.model), parameters(whole.model))


def test_rewards_wait_for_their_step(make):
    """Before it the update is that of the teacher alone; rewards are logged all the same."""
    settings = {"max_steps": 3, "num_generations": 2, "top_k": 0, "optim": "sgd", "learning_rate": 0.1}
    settings |= {"kl_estimator": "topk", "kl_top_k": 4}
    states, rewards = {}, {}
    for name, changes in (("waiting", {"reward_start_step": 2}), ("alone", {"reward_funcs": None})):
        trainer, states[name] = make(**changes, **settings), []  # made here: construction sets the seed
        loss = trainer.rollout_loss
        trainer.rollout_loss = lambda model, inputs, name=name, loss=loss: (
            states[name].append(parameters(model)),
            loss(model, inputs),
        )[1]
        trainer.train()
        states[name].append(parameters(trainer.model))
        rewards[name] = logged(trainer, "reward")
        assert len(logged(trainer, "entropy")) == 3
        if name == "waiting":
            disagreement = logged(trainer, "distill/disagreement")
            assert len(disagreement) == 3
            assert max(disagreement[:2]) > 0  # taken from the rewards, although they have no weight yet
    for step in range(3):
        torch.testing.assert_close(states["waiting"][step], states["alone"][step])
    assert relative_error(states["waiting"][3], states["alone"][3]) > 1e-4
    assert {name: len(values) for name, values in rewards.items()} == {"waiting": 3, "alone": 0}


def test_log_of_both_forces(make):
    trainer = make(beta=0.3, kl_estimator="full")
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["distill/beta"] == 0.3
    assert row["objective"] == pytest.approx(row["reward"] - 0.3 * row["distill/sequence_kl"], rel=1e-4)
    assert row["loss"] == pytest.approx(row["policy_loss"] + row["distill/loss"], abs=1e-4)
    assert row["distill/loss"] == pytest.approx(0.3 * row["distill/reverse_kl"], rel=1e-4)
    assert 0 < row["distill/disagreement"] < 1


@pytest.mark.parametrize("estimator", ["topk", "sampled"])
def test_pure_distillation_by_estimate(make, estimator):
    trainer = make(
        reward_funcs=None, kl_estimator=estimator, kl_top_k=4, max_steps=60, top_k=0, max_completion_length=4
    )
    trainer.train()
    kl = logged(trainer, "distill/reverse_kl")
    assert sum(kl[-15:]) < 0.8 * sum(kl[:15])
    assert len(logged(trainer, "entropy")) == 60
    assert not [key for row in trainer.state.log_history for key in row if "reward" in key]


def test_buffered_rollouts_are_not_changed(make):
    trainer = make(num_iterations=2, max_steps=2, kl_estimator="topk", kl_discount=1.0, reward_start_step=1)
    seen = []
    loss = trainer.rollout_loss

    def watched(model, inputs):
        before = {key: value.clone() for key, value in inputs.items() if isinstance(value, torch.Tensor)}
        result = loss(model, inputs)
        assert set(before) == {key for key, value in inputs.items() if isinstance(value, torch.Tensor)}
        assert all(torch.equal(before[key], inputs[key]) for key in before)
        assert not any(value.requires_grad for value in before.values())
        seen.append(before["completion_ids"])
        return result

    trainer.rollout_loss = watched
    trainer.train()
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_top_k": -1}, "it counts ids"),
        ({"kl_discount": 1.5}, r"it is a discount, in \[0, 1\]"),
        ({"kl_estimator": "sampled", "kl_temperature": 2.0}, "learns from the sampled token"),
        ({"beta_schedule": "linear"}, "a schedule needs an end value"),
        ({"beta_end": 0.1}, "Set both or neither"),
        ({"beta": 0.0, "beta_schedule": "linear", "beta_end": 1.0}, "the start must not be 0"),
        ({"beta_schedule": "linear", "beta_end": -1.0}, "must not be negative"),
        ({"reward_start_step": -1}, "counts optimizer steps"),
        ({"beta_schedule": "step", "beta_end": 0.0}, "which is not set"),
        ({"beta_schedule_steps": 3}, "Set both or neither"),
        ({"beta": 0.0, "reward_start_step": 5}, "nothing would be learnt before it"),
        ({"beta_schedule": "sudden"}, "this version has constant, linear"),
    ],
)
def test_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_estimates_need_the_whole_vocabulary(tmp_path, tokenizer, prompts, teacher):
    with pytest.raises(
        ValueError, match="only kl_estimator='full' with kl_discount=0 and without `cross_tokenizer` can renormalise"
    ):
        OPDTrainer(
            model=make_model(seed=1, vocab_size=40),
            teacher_model=teacher,
            args=config(tmp_path, kl_estimator="topk"),
            train_dataset=prompts,
            processing_class=tokenizer,
        )
