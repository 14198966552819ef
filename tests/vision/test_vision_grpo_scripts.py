"""What a GRPO script for vision-language models sets keeps working with our trainer, alone and beside a teacher."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer
from vision_models import FAMILIES, picture, vision_model, vision_pair
from vision_runs import rows

from trl_distill import OPDTrainer


def length(completions, **_):
    return [float(len(completion[0]["content"]) % 5) for completion in completions]


def sees(completions, images, **_):
    """A reward that gets the images of its row."""
    texts = [completion[0]["content"] for completion in completions]
    return [len(of_row) + float(len(set(text))) for text, of_row in zip(texts, images, strict=True)]


def settings(tmp_path, **changes):
    given = {
        "output_dir": str(tmp_path),
        "learning_rate": 0.1,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 5,
        "max_steps": 2,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return GRPOConfig(**given | changes)


@pytest.fixture(params=["grpo", "beside a teacher"])
def train(request, tmp_path):
    """Trains as a GRPO script would, and checks that every trained parameter that takes part has changed."""

    def run(family, dataset=None, reward=length, extra=None, **changes):
        model, processor = vision_pair(family, seed=0)
        beta = 0.5 if request.param == "beside a teacher" else 0.0
        trainer = OPDTrainer(
            model=model,
            teacher_model=vision_model(family, seed=1) if beta else None,
            reward_funcs=reward,
            args=settings(tmp_path, beta=beta, **changes),
            train_dataset=rows() if dataset is None else dataset,
            processing_class=processor,
            **(extra or {}),
        )
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
        assert trainer.state.log_history[-1]["train_loss"] is not None
        after = dict(trainer.model.named_parameters())
        return trainer, {name for name in before if not torch.equal(before[name], after[name])}

    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_language_and_vision_are_trained(train, family):
    trainer, changed = train(family, rows((1, 1, 1, 1)))
    assert any("vision" in name or "visual" in name for name in changed)
    assert any("language" in name or "text" in name for name in changed)
    assert trainer.state.log_history[0]["reward"] >= 0


@pytest.mark.parametrize("family", FAMILIES)
def test_several_images_and_none(train, family):
    """In one batch: TRL's own trainer ends here with a TypeError of the processor."""
    train(family, rows((2, 0, 1, 2)))


@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone(train, family):
    text = Dataset.from_list([{"prompt": row["prompt"]} for row in rows()])
    _, changed = train(family, text)
    assert not any("vision" in name or "visual" in name for name in changed)


def test_an_image_column(train):
    dataset = Dataset.from_list([{"prompt": row["prompt"], "image": picture(i)} for i, row in enumerate(rows())])
    train("idefics3", dataset)


def test_rewards_get_the_images(train):
    trainer, _ = train("gemma3", reward=sees)
    assert trainer.state.log_history[0]["rewards/sees/mean"] > 0


def test_an_adapter(train):
    extra = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}
    _, changed = train("qwen2_5_vl", extra=extra)
    assert changed
    assert all("lora" in name for name in changed)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "grpo"},
        {"loss_type": "dr_grpo"},
        {"loss_type": "bnpo"},
        {"importance_sampling_level": "sequence"},
        {"num_iterations": 2},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True},
        {"mask_truncated_completions": True},
        {"log_completions": True},
        {"top_entropy_quantile": 0.5},
        {"shuffle_dataset": False},
    ],
    ids=str,
)
def test_settings(train, changes):
    train("gemma3", rows((1, 0, 2, 1)), **changes)


def test_alone_it_is_trls_trainer(tmp_path):
    """Bit for bit, where TRL's own trainer runs: images in all rows."""
    losses, weights = [], []
    for trainer_class in (GRPOTrainer, OPDTrainer):
        model, processor = vision_pair("qwen2_5_vl", seed=0)
        trainer = trainer_class(
            model=copy.deepcopy(model),
            reward_funcs=length,
            args=settings(tmp_path, beta=0.0),
            train_dataset=rows((1, 2, 1, 1)),
            processing_class=processor,
        )
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert losses[0] == losses[1]
    assert torch.equal(*weights)
