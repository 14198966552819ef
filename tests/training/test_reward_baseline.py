"""Baselines that need no group: the rest of the generation batch, and earlier rewards of the same prompt."""

from __future__ import annotations

import itertools

import pytest
import torch
from datasets import Dataset
from enumeration import COMPLETIONS, LENGTH, distributions, inputs_of, log_prob, tiny_model
from helpers import config, gradients, in_training, make_model, make_tokenizer, relative_error

from trl_distill import OPDTrainer
from trl_distill.objective.weights import mean_of_others
from trl_distill.training.checkpoints import mark_complete
from trl_distill.training.reward_baseline import RewardBaseline, prompt_keys


NAN = float("nan")


def test_a_rows_own_reward_stays_out_of_its_baseline():
    rewards, keys = torch.tensor([1.0, 4.0, NAN, 6.0, 2.0]), torch.tensor([7, 7, 7, -3, 5])
    found = mean_of_others(rewards, keys)
    torch.testing.assert_close(found, torch.tensor([4.0, 1.0, 2.5, NAN, NAN]).double(), equal_nan=True)
    earlier = mean_of_others(rewards, keys, torch.tensor([5.0, 5, 5, 0, 3]), torch.tensor([1, 1, 1, 0, 2]))
    expected = torch.tensor([9 / 2, 6 / 2, 10 / 3, NAN, 3 / 2]).double()
    torch.testing.assert_close(earlier, expected, equal_nan=True)


def test_the_batch_is_the_measure():
    rewards = torch.tensor([1.0, NAN, 3.0, 8.0])
    found = RewardBaseline("batch").advantages(rewards, torch.tensor([1, 2, 3, 4]))
    torch.testing.assert_close(found, torch.tensor([1 - 11 / 2, 0.0, 3 - 9 / 2, 8 - 4 / 2]))
    alone = RewardBaseline("batch").advantages(torch.tensor([5.0, NAN]), torch.tensor([1, 2]))
    assert alone.tolist() == [0.0, 0.0]


def test_a_prompt_is_compared_with_its_own_rewards_and_a_new_one_with_the_batch():
    baseline = RewardBaseline("prompt")
    first = baseline.advantages(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1, 2, 3]))
    torch.testing.assert_close(first, torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5]))  # all are new
    assert baseline.share_known == 0
    second = baseline.advantages(torch.tensor([4.0, NAN, 0.0]), torch.tensor([1, 2, 9]))
    torch.testing.assert_close(second, torch.tensor([4 - 1.0, 0.0, 0 - 4.0]))
    assert baseline.share_known == pytest.approx(2 / 3)
    third = baseline.advantages(torch.tensor([0.0, 3.0, 5.0, 1.0]), torch.tensor([1, 1, 2, 9]))
    expected = [0 - (1 + 4 + 3) / 3, 3 - (1 + 4 + 0) / 3, 5 - 2.0, 1 - 0.0]
    torch.testing.assert_close(third, torch.tensor(expected))


def test_evaluation_neither_uses_nor_keeps_rewards_of_training():
    baseline, keys = RewardBaseline("prompt"), torch.tensor([1, 2])
    baseline.advantages(torch.tensor([10.0, 20.0]), keys)
    seen = baseline.advantages(torch.tensor([0.0, 1.0]), keys, training=False)
    assert seen.tolist() == [-1.0, 1.0]
    assert baseline.advantages(torch.tensor([0.0, 1.0]), keys).tolist() == [-10.0, -19.0]


def test_with_groups_a_new_prompt_has_the_groups_baseline():
    rewards, keys = torch.tensor([1.0, 3.0, 0.0, 8.0]), torch.tensor([5, 5, 6, 6])
    assert RewardBaseline("prompt").advantages(rewards, keys).tolist() == [-2.0, 2.0, -8.0, 8.0]


def test_a_prompts_key_is_that_of_its_tokens_without_padding():
    one = prompt_keys(torch.tensor([[0, 3, 4], [3, 4, 5], [0, 0, 4]]), torch.tensor([[0, 1, 1], [1, 1, 1], [0, 1, 1]]))
    two = prompt_keys(torch.tensor([[0, 0, 3, 4]]), torch.tensor([[0, 0, 1, 1]]))
    assert one[0] == two[0]
    assert len(set(one.tolist())) == 3
    assert one[0].item() == 3356778446654751564  # in every process and every run, unlike Python's `hash`


# -- unbiased: every completion, with every completion of the row that it is compared with -------------------------


@pytest.fixture
def judge(tmp_path, prompts):
    trainer = in_training(
        OPDTrainer(
            model=tiny_model(1),
            teacher_model=tiny_model(2),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config(
                tmp_path, loss_type="dr_grpo", max_completion_length=LENGTH, num_generations=1, reward_baseline="batch"
            ),
            train_dataset=prompts,
            processing_class=make_tokenizer(["<pad>", "<eos>", "a", "b", "."]),
        )
    )
    return trainer


def reward_of(y: list[int]) -> float:
    return 3.0 + (y[0] == 2) + 0.5 * (len(y) > 1 and y[1] == 3)


def policy_gradient(trainer, advantages: list[float]) -> torch.Tensor:
    """Σ_y probability(y) · ∇ of TRL's policy loss, with these advantages."""
    trainer.model.zero_grad()
    for y, advantage in zip(COMPLETIONS, advantages, strict=True):
        with torch.no_grad():
            weight = log_prob(distributions(trainer.model, y), y).sum().exp().float()
        inputs = inputs_of(y, advantages=torch.tensor([advantage]))
        (trainer.policy_loss(trainer.model, inputs) * LENGTH * weight).backward()
    return gradients(trainer.model)


def mean_advantages(trainer, baseline, rewards: torch.Tensor, keys: list[int]) -> list[float]:
    """Of each completion as the first of two rows, the mean over all completions that the second may be."""
    with torch.no_grad():
        weights = torch.stack([log_prob(distributions(trainer.model, y), y).sum().exp() for y in COMPLETIONS])
    found = torch.zeros(len(COMPLETIONS), dtype=torch.float64)
    for i, j in itertools.product(range(len(COMPLETIONS)), repeat=2):
        pair = torch.stack([rewards[i], rewards[j]])
        found[i] += weights[j] * baseline(pair, torch.tensor(keys))[0].double()
    return found.tolist()


def test_the_expected_gradient_is_that_of_the_reward(judge):
    rewards = torch.tensor([reward_of(y) for y in COMPLETIONS])
    expected = policy_gradient(judge, rewards.tolist())  # without any baseline
    model = judge.model
    model.zero_grad()
    objective = sum(
        log_prob(distributions(model, y), y).sum().exp() * r for y, r in zip(COMPLETIONS, rewards, strict=True)
    )
    (-objective).backward()
    assert relative_error(expected, gradients(model)) < 1e-4

    known = RewardBaseline("prompt")
    known.advantages(torch.tensor([3.0, 4.5, 3.5]), torch.tensor([1, 1, 2]))
    known.save(str(judge.args.output_dir), under_way=False)

    def with_history(pair, keys):
        history = RewardBaseline("prompt")
        history.load(str(judge.args.output_dir))
        return history.advantages(pair, keys)

    def own_included(pair, keys):
        return pair - pair.mean()

    kinds = {
        "batch": (RewardBaseline("batch").advantages, [1, 2]),
        "a prompt that was seen": (with_history, [1, 2]),
        "a prompt that was seen, twice": (with_history, [1, 1]),
        "a new prompt": (with_history, [8, 2]),
    }
    for name, (baseline, keys) in kinds.items():
        found = policy_gradient(judge, mean_advantages(judge, baseline, rewards, keys))
        assert relative_error(found, expected) < 1e-4, name
    shrunk = policy_gradient(judge, mean_advantages(judge, own_included, rewards, [1, 2]))
    assert relative_error(shrunk, expected) > 0.4  # halved: the row's own reward is in its baseline


# -- through the trainer -----------------------------------------------------------------------------------------


def letters(completions, **_) -> list[float]:
    return [text.count("a") + 0.1 * len(text) for text in completions]


@pytest.fixture
def make(tmp_path, tokenizer):
    def build(reward_funcs=letters, output_dir=None, dataset=None, **changes):
        settings = {"num_generations": 1, "top_k": 0, "reward_baseline": "batch", **changes}
        return OPDTrainer(
            model=make_model(seed=1),
            teacher_model=None if settings.get("beta") == 0 else make_model(seed=2, hidden_size=24),
            reward_funcs=reward_funcs,
            args=config(output_dir or tmp_path, **settings),
            train_dataset=dataset or Dataset.from_dict({"prompt": ["a b", "c", "d e f", "g"]}),
            processing_class=tokenizer,
        )

    return build


ROWS = [{"prompt": text} for text in ("a b", "c", "d e f", "a b")]


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_advantages_in_rollouts_with_one_completion_per_prompt(make, beta):
    first, second = [1.0, None, 3.0, 0.0], [2.0, 1.0, 1.0, 1.0]
    weighted = [lambda completions, **_: first, lambda completions, **_: second]
    trainer = in_training(make(weighted, reward_weights=[1.0, 2.0], beta=beta))
    total = torch.tensor([5.0, 2.0, 5.0, 2.0])
    batch = trainer._generate_and_score_completions(ROWS)
    assert torch.equal(batch["rewards"], total)
    torch.testing.assert_close(batch["advantages"], total - (14 - total) / 3)
    assert list(trainer._logs["advantages"]) == batch["advantages"].tolist()


def test_a_row_without_a_reward_is_nobodys_measure(make):
    trainer = in_training(make(lambda completions, **_: [1.0, None, 4.0, 0.0], reward_baseline="prompt"))
    found = [trainer._generate_and_score_completions(ROWS)["advantages"] for _ in range(2)]
    torch.testing.assert_close(found[0], torch.tensor([1 - 0.0, 0.0, 4 - 1 / 2, 0 - 1.0]))
    torch.testing.assert_close(found[1], torch.tensor([1 - 1 / 3, 0.0, 4 - 4.0, 0 - 2 / 3]))
    assert trainer._metrics["train"]["distill/known_prompts"] == [0.0, 0.75]
    trainer.model.eval()
    trainer._generate_and_score_completions(ROWS)
    assert "distill/known_prompts" not in trainer._metrics["eval"]


def parameters(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_knows_its_prompts(make, tmp_path, accumulation, caplog):
    """It ends with the same weights and means; without the file it ends elsewhere, and says so."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "reward_baseline": "prompt"}
    settings |= {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    whole = make(output_dir=tmp_path / "run", **settings)
    whole.train()
    assert [row["distill/known_prompts"] for row in whole.state.log_history if "loss" in row] == [0, 1, 1, 1]
    checkpoint = tmp_path / "run" / "checkpoint-2"
    resumed = make(output_dir=tmp_path / "again", **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(parameters(resumed), parameters(whole))
    assert resumed.baseline._seen == whole.baseline._seen
    assert "prompts count as new" not in " ".join(caplog.text.split())
    (checkpoint / RewardBaseline.FILE).unlink()
    mark_complete(checkpoint)
    forgetful = make(output_dir=tmp_path / "third", **settings)
    forgetful.train(resume_from_checkpoint=str(checkpoint))
    assert not torch.equal(parameters(forgetful), parameters(whole))
    assert "All prompts count as new" in " ".join(caplog.text.split())


def test_a_batch_that_is_under_way_is_not_in_its_checkpoint(tmp_path):
    baseline, keys = RewardBaseline("prompt"), torch.tensor([1, 2])
    baseline.advantages(torch.tensor([1.0, 2.0]), keys)
    baseline.advantages(torch.tensor([5.0, 6.0]), keys)
    baseline.save(str(tmp_path), under_way=True)
    resumed = RewardBaseline("prompt")
    resumed.load(str(tmp_path))
    assert resumed._seen == {1: (1.0, 1), 2: (2.0, 1)}
    baseline.save(str(tmp_path), under_way=False)
    resumed.load(str(tmp_path))
    assert resumed._seen == {1: (6.0, 2), 2: (8.0, 2)}
    again = RewardBaseline("prompt")
    again.save(str(tmp_path), under_way=False)  # before any batch
    again.load(str(tmp_path))
    assert again._seen == {}


def test_trls_metrics_without_groups(make):
    trainer = make(max_steps=1, reward_funcs=lambda completions, **_: [0.0, 1.0, 2.0, 5.0])
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["reward"] == pytest.approx(2.0)
    assert row["reward_std"] == pytest.approx(torch.tensor([0.0, 1.0, 2.0, 5.0]).std().item())
    assert row["frac_reward_zero_std"] == 1.0  # a group of one has no spread
    assert row["policy_loss"] != 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_baseline": "value"}, "this version has group, batch, prompt"),
        ({"reward_baseline": "group"}, "Set `reward_baseline='batch'`"),
        ({"scale_rewards": "group"}, "a group of one completion has none"),
        ({"scale_rewards": True, "reward_baseline": "prompt"}, "`scale_rewards` is 'group'"),
        ({"scale_rewards": "batch"}, "dividing them by a standard deviation changes the optimum"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "compares their weighted sum as it is"),
        ({"per_device_train_batch_size": 1}, "it holds one completion"),
    ],
)
def test_what_a_baseline_cannot_be_combined_with(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)
