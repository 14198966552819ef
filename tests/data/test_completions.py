"""Off-policy batches: when it is their turn, what they hold, and that their gradient is that of distillation."""

from __future__ import annotations

import copy
import math

import pandas as pd
import pytest
import torch
from datasets import Dataset
from helpers import EOS, config, gradients, in_training, make_tokenizer, relative_error
from hypothesis import given
from hypothesis import strategies as st

from trl_distill import OPDTrainer
from trl_distill.data.completions import is_on_policy, token_ids
from trl_distill.data.datasets import with_prompts


TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} <eos> . {% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)


@pytest.fixture
def rows() -> Dataset:
    """32 prompts with completions of unequal length."""
    letters = "abcdefghijklmnop"
    return Dataset.from_dict(
        {
            "prompt": [" ".join(letters[i % 8 :][: 1 + i % 3]) for i in range(32)],
            "completion": [" ".join(letters[i % 5 :][: 1 + i % 6]) for i in range(32)],
        }
    )


@pytest.fixture
def make(tmp_path, tokenizer, rows, student, teacher):
    def build(reward_funcs=None, train_dataset=rows, processing_class=tokenizer, **changes):
        return OPDTrainer(
            model=copy.deepcopy(student),
            teacher_model=copy.deepcopy(teacher),
            reward_funcs=reward_funcs,
            args=config(tmp_path, **{"lmbda": 0.0, **changes}),
            train_dataset=train_dataset,
            processing_class=processing_class,
        )

    return build


# -- when ------------------------------------------------------------------------------------------------------------


@given(st.fractions(0, 1, max_denominator=1000), st.integers(0, 500))
def test_of_the_first_n_batches_the_stated_share_is_on_policy(share, n):
    found = sum(is_on_policy(i, float(share)) for i in range(n))
    assert found == math.floor(share * n)


def test_half_of_the_batches_are_written_and_rewarded(make):
    """Over a long run: the share, no generation and no reward in the others, and both divergences in the log."""
    rewarded = []

    def reward(completions, **_):
        rewarded.append(len(completions))
        return [float(len(c)) for c in completions]

    trainer = make([reward], lmbda=0.5, max_steps=20, num_generations=2)
    generated, write = [], trainer.model.generate
    trainer.model.generate = lambda *args, **kwargs: (
        generated.append(trainer.state.global_step) or write(*args, **kwargs)
    )
    trainer.train()
    assert generated == list(range(1, 20, 2))
    assert rewarded == [4] * 10
    logs = [row for row in trainer.state.log_history if "distill/on_policy" in row]
    assert [row["distill/on_policy"] for row in logs] == [0.0, 1.0] * 10
    for row in logs:
        written = row["distill/on_policy"] == 1
        assert ("distill/reverse_kl" in row) is written
        assert ("distill/off_policy/forward_kl" in row) is not written
        assert ("reward" in row) is written


def test_a_resumed_run_goes_on_with_the_batch_that_is_due(make, tmp_path):
    settings = {"lmbda": 0.5, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make(**settings)
    whole.train()
    resumed = make(**settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [row.get("distill/on_policy") for row in resumed.state.log_history[:6]] == [0.0, 1.0] * 3
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("accumulation", "generation", "iterations"), [(4, None, 1), (4, 4, 1), (1, 8, 2)])
def test_batches_take_turns_whatever_their_size(make, accumulation, generation, iterations):
    trainer = make(
        lmbda=0.5,
        max_steps=8,
        gradient_accumulation_steps=accumulation,
        generation_batch_size=generation,
        num_iterations=iterations,
    )
    seen, dataset_batch = [], trainer.dataset_batch

    def watched(rows):
        batch = dataset_batch(rows)
        seen.append(batch is None)
        return batch

    trainer.dataset_batch = watched
    trainer.train()
    assert len(seen) == 8 * accumulation // trainer.args.micro_steps_per_generation
    assert seen == [i % 2 == 1 for i in range(len(seen))]


# -- what ------------------------------------------------------------------------------------------------------------


def ids(row: dict, limit: int | None = 20, template: str | None = None) -> tuple[str, str]:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tuple(" ".join(tokenizer.convert_ids_to_tokens(part)) for part in token_ids(row, tokenizer, [EOS], limit))


def test_a_completion_ends_with_its_stop_token_and_is_cut_like_a_rollout():
    row = {"prompt": "x y", "completion": "a b c"}
    assert ids(row) == ("x y", "a b c <eos>")
    assert ids({**row, "completion": "a b <eos>"}) == ("x y", "a b <eos>")
    assert ids({**row, "completion": "a <eos> c"}) == ("x y", "a <eos>")
    assert ids(row, limit=4) == ("x y", "a b c <eos>")
    assert ids(row, limit=3) == ("x y", "a b c")
    assert ids(row, limit=None) == ("x y", "a b c <eos>")


def test_messages_go_through_the_template_and_end_where_the_turn_ends():
    row = {
        "prompt": [{"role": "user", "content": "x y"}],
        "completion": [{"role": "assistant", "content": "b c"}],
    }
    assert ids(row, template=TEMPLATE) == ("u x y <eos> . a", "b c <eos>")


THINKING = (  # opens a thought for generation, and drops thoughts of turns that are over
    "{% for m in messages %}{{ m['role'][0] }} {{ m['content'].split('t ')[-1] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}a t {% endif %}"
)


@pytest.mark.parametrize("template", [TEMPLATE, THINKING], ids=["plain", "thinking"])
@pytest.mark.parametrize("roles", [["user"], ["system"], ["user", "assistant", "user"]], ids="-".join)
def test_the_prompt_is_the_one_that_a_rollout_gets(make, template, roles):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    prompt = [{"role": role, "content": "x y"} for role in roles]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "b c"}]}
    trainer = make(processing_class=tokenizer, lmbda=1.0)
    asked, completion = token_ids(row, tokenizer, [EOS], None)
    assert asked == trainer.token_ids_of([prompt])[0]
    assert " ".join(tokenizer.convert_ids_to_tokens(completion)) == "b c <eos>"


def test_prompts_that_cannot_be_gone_on_from(make):
    prefill = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    answer = [{"role": "assistant", "content": "a"}]
    dataset = Dataset.from_dict({"prompt": [prefill] * 8, "completion": [answer] * 8})
    with pytest.raises(ValueError, match=r"Row 0 .* ends with an assistant message"):
        make(train_dataset=dataset)
    with pytest.raises(ValueError, match="ends with an assistant message"):
        ids({"prompt": prefill, "completion": answer}, template=TEMPLATE)
    with pytest.raises(ValueError, match="has no tokens"):
        ids({"prompt": " ", "completion": "a"})


def test_whole_conversations_are_split_before_the_last_answer(make, rows):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    turns = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": c}]
        for p, c in zip(*rows[:].values(), strict=True)
    ]
    open_ended = with_prompts(Dataset.from_dict({"messages": [turns[0][:1], turns[0]]}))
    assert open_ended[:] == {"prompt": [turns[0][:1]] * 2, "completion": [None, turns[0][1:]]}
    losses = []
    for dataset in (
        Dataset.from_dict({"messages": turns}),
        Dataset.from_dict({"messages": turns}).to_iterable_dataset(),
        Dataset.from_dict({"prompt": [t[:1] for t in turns], "completion": [t[1:] for t in turns]}),
    ):
        trainer = make(train_dataset=dataset, shuffle_dataset=False, processing_class=tokenizer)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == losses[1] == losses[2]


# -- the gradient ----------------------------------------------------------------------------------------------------


def first_batch(trainer, size: int = 4) -> dict:
    in_training(trainer)
    rows = [trainer.train_dataset[i] for i in range(size // trainer.num_generations)]
    return trainer._generate_and_score_completions([row for row in rows for _ in range(trainer.num_generations)])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_lmbda_0_it_is_knowledge_distillation_with_soft_targets(make, temperature):
    """Hinton et al. (arXiv 1503.02531): cross-entropy to the teacher's softened distribution, up to its entropy."""
    trainer = make(kl_temperature=temperature, num_generations=1)
    inputs = first_batch(trainer)
    loss = trainer.rollout_loss(trainer.model, inputs)
    loss.backward()
    found = gradients(trainer.model)
    trainer.model.zero_grad()
    token_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    seen = {
        "input_ids": token_ids,
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
    }
    places, mask = slice(inputs["prompt_ids"].shape[1] - 1, -1), inputs["completion_mask"].bool()
    logits = trainer.model(**seen).logits[:, places][mask]
    with torch.no_grad():
        targets = (trainer.teacher.model(**seen).logits[:, places][mask] / temperature).softmax(-1)
    soft = torch.nn.functional.cross_entropy(logits / temperature, targets)
    soft.backward()
    assert relative_error(found, gradients(trainer.model)) < 1e-5
    entropy = -(targets * targets.log()).sum(-1).mean()
    torch.testing.assert_close(loss, soft - entropy, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows_at_a_time", [1, 4])
@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo", "grpo", "luspo", "bnpo", "cispo", "sapo", "vespo"])
def test_each_completion_is_trained_once_whatever_the_number_of_generations(make, loss_type, rows_at_a_time):
    """However micro-batches fall: with one row each, most hold nothing but a row that stands for another."""
    found = {}
    for group in (1, 4):
        changes = {
            "per_device_train_batch_size": rows_at_a_time,
            "gradient_accumulation_steps": 4 * group // rows_at_a_time,
        }
        trainer = make(num_generations=group, loss_type=loss_type, epsilon_high=5.0, **changes)
        inputs = first_batch(trainer, size=4 * group)
        trainer.current_gradient_accumulation_steps = 4 * group // rows_at_a_time
        assert inputs["completion_mask"].any(1).sum() == 4
        for start in range(0, 4 * group, rows_at_a_time):
            part = {k: v[start : start + rows_at_a_time] if v.dim() else v for k, v in inputs.items()}
            trainer.rollout_loss(trainer.model, part).backward()
        found[group] = gradients(trainer.model)
    assert relative_error(found[4], found[1]) < 1e-5


def test_a_cut_completion_counts_unless_it_is_masked(make):
    inputs = {
        masked: first_batch(make(max_completion_length=3, mask_truncated_completions=masked))
        for masked in (False, True)
    }
    assert inputs[False]["completion_mask"].sum(1).tolist() == [2, 3, 3, 3]
    assert inputs[True]["completion_mask"].sum(1).tolist() == [2, 3, 0, 0]


def test_the_student_learns_from_completions(make):
    trainer = make(max_steps=30, learning_rate=3e-3)
    trainer.train()
    kl = [row["distill/off_policy/forward_kl"] for row in trainer.state.log_history if "loss" in row]
    assert sum(kl[-5:]) < 0.6 * sum(kl[:5])


def test_the_completions_table_shows_rollouts_of_its_step_alone(make, tmp_path):
    make(lmbda=0.5, log_completions=True, max_steps=3).train()
    tables = [pd.read_parquet(tmp_path / "completions" / f"completions_{step:05}.parquet") for step in (1, 2, 3)]
    assert [len(table) for table in tables] == [0, 4, 0]


def test_a_partial_step_at_the_end_of_an_epoch_does_not_shift_the_turns(make, rows, tmp_path):
    """Nine generation batches an epoch, two in a step: the last step of an epoch has one."""
    settings = {
        **{"lmbda": 0.5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 8},
        **{"generation_batch_size": 2, "train_dataset": rows.select(range(18)), "save_strategy": "steps"},
        **{"save_steps": 5, "num_generations": 1},
    }

    def turns(trainer, **kwargs):
        seen, dataset_batch = [], trainer.dataset_batch
        trainer.dataset_batch = lambda batch: (seen.append(dataset_batch(batch)), seen[-1])[1]
        trainer.train(**kwargs)
        return [batch is None for batch in seen]

    whole = turns(make(**settings))
    rest = turns(make(**settings), resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert rest == whole[-len(rest) :]


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lmbda": 1.5}, "it is a share"),
        ({"kl_estimator": "sampled"}, "kl_estimator='full' with kl_discount=0"),
        ({"kl_estimator": "topk"}, "kl_estimator='full' with kl_discount=0"),
        ({"kl_discount": 0.5}, "kl_estimator='full' with kl_discount=0"),
        ({"beta": 0.0}, "no teacher to learn from"),
        ({"off_policy_divergence": "backward_kl"}, "`off_policy_divergence` is 'backward_kl'; this version has"),
        ({"divergence_alpha": 0.3}, "has no parameter"),
        ({"remove_unused_columns": True}, "drops the column `completion`"),
    ],
    ids=str,
)
def test_settings_that_are_refused(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_alpha_is_that_of_the_divergence_that_has_one(make):
    trainer = make(off_policy_divergence="jsd", divergence_alpha=0.3, lmbda=0.5)
    assert (trainer.estimator.alpha, trainer.setup.off_policy_estimator.alpha) == (0.0, 0.3)


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ("", "Row 5 .* the completion ''"),
        (None, "Row 5 .* the completion None"),
    ],
)
def test_a_row_without_a_completion_is_named(make, rows, completion, message):
    bad = [completion if i == 5 else text for i, text in enumerate(rows["completion"])]
    dataset = rows.remove_columns("completion").add_column("completion", bad)
    with pytest.raises(ValueError, match=message):
        make(train_dataset=dataset)
    trainer = make(train_dataset=dataset.to_iterable_dataset(), shuffle_dataset=False)
    with pytest.raises(ValueError, match="A row has the completion"):
        trainer.train()


def test_a_dataset_without_completions(make, rows):
    with pytest.raises(ValueError, match=r"`completion` column, but the training dataset has only \['prompt'\]"):
        make(train_dataset=rows.remove_columns("completion"))


def test_a_completion_of_several_messages(make):
    turns = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": "x"}]] * 8, "completion": [turns] * 8})
    with pytest.raises(ValueError, match="earlier turns belong in the prompt"):
        make(train_dataset=dataset)


def test_a_completion_that_is_cut_is_said_beforehand(make):
    (finding,) = [f for f in make(max_completion_length=3).preflight.findings if f.check == "completions"]
    assert finding.level == "warning"
    assert "20 of all 32 completions" in finding.found
