"""Less padding, the same update."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import EOS, batch, config, in_training, relative_error
from transformers import set_seed

from trl_distill import OPDTrainer
from trl_distill.rollouts import Rollouts
from trl_distill.training.micro_batches import by_length, trimmed


@pytest.fixture
def make(tmp_path, tokenizer, prompts, student, teacher):
    with torch.no_grad():  # stop early now and then, so that completions are ragged
        student.model.embed_tokens.weight[EOS] *= 1.5

    def build(saves_padding=True, reward_funcs=None, **changes):
        trainer = OPDTrainer(
            model=copy.deepcopy(student),
            teacher_model=copy.deepcopy(teacher),
            reward_funcs=reward_funcs,
            args=config(tmp_path, **{"per_device_train_batch_size": 2, "max_completion_length": 16, **changes}),
            train_dataset=prompts,
            processing_class=tokenizer,
        )
        assert trainer.saves_padding
        trainer.saves_padding = saves_padding
        return trainer

    return build


def length(completions, **_):
    return [float(len(text)) for text in completions]


def watched(trainer) -> list[dict]:
    """The micro-batches of a run."""
    seen, loss = [], trainer.rollout_loss
    trainer.rollout_loss = lambda model, inputs: (seen.append(inputs), loss(model, inputs))[1]
    set_seed(0)  # TRL shuffles each generation batch
    trainer.train()
    return seen


def parameters(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_columns_that_are_padding_in_every_row_are_cut():
    inputs = batch(rows=2, prompt=6, completion=9) | {"old_per_token_logps": torch.rand(2, 9), "extra": torch.rand(2)}
    inputs["prompt_mask"][:, :3] = 0
    inputs["completion_mask"][:, 5:] = 0
    inputs["importance_sampling_ratio"] = torch.rand(2, 1)
    shorter = trimmed(inputs)
    assert torch.equal(shorter["prompt_ids"], inputs["prompt_ids"][:, 3:])
    assert torch.equal(shorter["completion_ids"], inputs["completion_ids"][:, :5])
    assert torch.equal(shorter["old_per_token_logps"], inputs["old_per_token_logps"][:, :5])
    assert all(shorter[name] is inputs[name] for name in ("extra", "num_items_in_batch"))
    assert torch.equal(shorter["importance_sampling_ratio"], inputs["importance_sampling_ratio"])
    assert trimmed(inputs, prompts=False)["prompt_ids"].shape == (2, 6)
    inputs["completion_mask"][:] = 0  # all truncated, and masked for that
    assert trimmed(inputs)["completion_ids"].shape == (2, 1)


def test_rows_of_like_length_come_together_and_nothing_gets_lost():
    batches = [
        {
            "prompt_ids": torch.tensor([[10 * i + j] for j in range(3)]),
            "prompt_mask": torch.ones(3, 1).long(),
            "completion_ids": torch.arange(5).expand(3, 5) + i,
            "completion_mask": (torch.arange(5) < torch.tensor([[1 + (i + 2 * j) % 5] for j in range(3)])).long(),
            "num_items_in_batch": torch.tensor(7),
        }
        for i in range(4)
    ]
    for alike in (2, 4):
        arranged = by_length(batches, alike)
        for start in range(0, 4, alike):
            found = torch.cat([b["completion_mask"].sum(1) for b in arranged[start : start + alike]])
            assert found.tolist() == sorted(found.tolist(), reverse=True)
            rows = [torch.cat([b["prompt_ids"] for b in some[start : start + alike]]) for some in (batches, arranged)]
            assert sorted(rows[0].flatten().tolist()) == sorted(rows[1].flatten().tolist())
        for b in arranged:  # what belongs to a row stays with it
            assert torch.equal(b["completion_ids"][:, 0], b["prompt_ids"][:, 0] // 10)
            assert b["num_items_in_batch"] == 7
    assert by_length(batches, 1) is batches


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo", "grpo", "bnpo"])
@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 4},
        {"gradient_accumulation_steps": 2, "generation_batch_size": 8},
        {"gradient_accumulation_steps": 4, "kl_estimator": "topk", "kl_top_k": 4},
        {"gradient_accumulation_steps": 4, "num_generations": 2, "reward_funcs": [length]},
        {"gradient_accumulation_steps": 4, "num_generations": 2, "reward_funcs": [length], "num_iterations": 2},
    ],
    ids=["pure", "two steps a generation", "topk", "rewards", "stale"],
)
def test_the_update_is_that_with_all_the_padding(make, changes, loss_type):
    with_padding, without = (make(saves, loss_type=loss_type, max_steps=3, **changes) for saves in (False, True))
    long, short = watched(with_padding), watched(without)
    assert relative_error(parameters(without), parameters(with_padding)) < 1e-5
    positions = [sum(i["prompt_ids"].numel() + i["completion_ids"].numel() for i in seen) for seen in (long, short)]
    assert positions[1] < positions[0]


def test_rows_stay_in_their_optimizer_step(make):
    """A generation batch of two steps: rows change places within each, not between them."""
    runs = [
        watched(make(s, gradient_accumulation_steps=2, generation_batch_size=8, max_steps=2)) for s in (False, True)
    ]
    for step in (slice(0, 2), slice(2, 4)):
        rows = [
            sorted(
                row[mask.bool()].tolist()
                for inputs in run[step]
                for row, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)
            )
            for run in runs
        ]
        assert rows[0] == rows[1]


@pytest.mark.parametrize("changes", [{"loss_type": "bnpo"}, {"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}])
def test_where_micro_batches_matter_their_rows_stay(make, changes):
    given = {
        "reward_funcs": [length],
        "num_generations": 2,
        "gradient_accumulation_steps": 4,
        "max_steps": 1,
        **changes,
    }
    assert make(**given).micro_batches_alike == 1
    assert make(gradient_accumulation_steps=4).micro_batches_alike == 4


def test_prompts_of_a_model_with_absolute_positions_are_not_cut(tmp_path, tokenizer, prompts, teacher):
    """GPT-2 counts positions from the left end of the padding."""
    from transformers import AutoModelForCausalLM, GPT2Config

    sizes = {"vocab_size": 29, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    student = AutoModelForCausalLM.from_config(GPT2Config(**sizes, pad_token_id=0, eos_token_id=EOS, bos_token_id=None))
    args = config(tmp_path, gradient_accumulation_steps=2, max_steps=1)
    trainer = OPDTrainer(
        model=student, teacher_model=teacher, args=args, train_dataset=prompts, processing_class=tokenizer
    )
    assert not trainer.trims_prompts
    widths = [inputs["prompt_ids"].shape[1] for inputs in watched(trainer)]
    assert len(set(widths)) == 1


def test_the_teacher_reads_no_padding(make):
    """In parts of like length, each cut to its longest row; the signal stays in the rollouts' order."""
    trainer = in_training(make(teacher_batch_size=2))
    rollouts = Rollouts.from_inputs(batch(rows=5, prompt=4, completion=9))
    seen, forward = [], trainer.teacher.model.forward
    trainer.teacher.model.forward = lambda *a, **k: (seen.append(k["input_ids"].shape), forward(*a, **k))[1]
    found = trainer.teacher.score(rollouts).hidden
    trainer.teacher.model.forward, trainer.teacher.batch_size = forward, None
    torch.testing.assert_close(found, trainer.teacher.score(rollouts).hidden, rtol=1e-4, atol=1e-5)
    assert [shape[0] for shape in seen] == [2, 2, 1]
    assert sum(shape.numel() for shape in seen) < rollouts.input_ids.numel()


def test_a_trimmed_batch_gives_the_loss_of_the_whole(make):
    trainer = in_training(make())
    inputs = batch(rows=3, prompt=4, completion=6)
    wide = {
        "prompt_ids": torch.nn.functional.pad(inputs["prompt_ids"], (5, 0)),
        "prompt_mask": torch.nn.functional.pad(inputs["prompt_mask"], (5, 0)),
        "completion_ids": torch.nn.functional.pad(inputs["completion_ids"], (0, 7)),
        "completion_mask": torch.nn.functional.pad(inputs["completion_mask"], (0, 7)),
    }
    losses = [trainer.rollout_loss(trainer.model, {**inputs, **given}) for given in ({}, wide, trimmed(wide))]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("changes", [{}, {"kl_estimator": "sampled"}, {"reward_funcs": [length], "num_generations": 2}])
def test_packed_rows_give_the_same_update(make, monkeypatch, changes):
    """As with a kernel for rows of any length; here through a mask that transformers makes of the positions."""
    monkeypatch.setattr("trl_distill.models.hidden_states.packs", lambda model: False)
    padded = make(max_steps=2, gradient_accumulation_steps=2, **changes)
    watched(padded)
    packed, seen = make(max_steps=2, gradient_accumulation_steps=2, **changes), []
    monkeypatch.setattr("trl_distill.models.hidden_states.packs", lambda model: True)
    monkeypatch.setattr("trl_distill.models.packing.takes_any_length", lambda model: True)
    for model in (packed.model, packed.teacher.model):
        backbone = model.base_model.forward
        model.base_model.forward = lambda *a, f=backbone, **k: (seen.append(k["input_ids"].shape[0]), f(*a, **k))[1]
    watched(packed)
    assert seen.count(1) > 2  # the first batch of each model is computed both ways
    assert relative_error(parameters(packed), parameters(padded)) < 1e-5
