"""Shared by tests of training with images: rows, settings, a trainer, the loss by full logits of rows read alone."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from vision_models import picture, vision_model, vision_pair

from trl_distill import OPDConfig, OPDTrainer


COUNTS = (1, 0, 2, 1)  # images of the rows
TEXTS = ("What is this?", "Say something.", "Which of the two?", "And here, what is to be seen?")


def rows(counts=COUNTS, repeat: int = 1):
    """Rows with so many images each, of different sizes."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": text}],
                "images": [picture(10 * i + j, side=20 + 8 * j) for j in range(count)],
                "completion": [{"role": "assistant", "content": "It is red."[: 4 + i]}],
            }
            for i, (count, text) in enumerate(zip(counts, TEXTS, strict=True))
        ]
        * repeat
    )


def config(tmp_path, **changes):
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_generations": 1,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "max_steps": 2,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return OPDConfig(**settings | changes)


def make(tmp_path, family, dataset=None, teacher=None, student=None, **changes):
    model, processor = vision_pair(family, seed=0)
    kwargs = {name: changes.pop(name) for name in ("reward_funcs", "peft_config") if name in changes}
    return OPDTrainer(
        model=student or model,
        teacher_model=teacher or vision_model(family, seed=1),
        args=config(tmp_path, **changes),
        train_dataset=rows() if dataset is None else dataset,
        processing_class=processor,
        **kwargs,
    )


def judged_alone(model, processor, row, completion):
    """Log-probabilities `(C, V)` of a model at a completion, from its own logits; the row is read by itself."""
    content = [*({"type": "image", "image": image} for image in row["images"]), {"type": "text", "text": ""}]
    content[-1]["text"] = row["prompt"][0]["content"]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    inputs["input_ids"] = torch.cat([inputs["input_ids"], completion[None]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, len(completion)))
    return model(**inputs).logits[0, -len(completion) - 1 : -1].log_softmax(-1)


def oracle(student, teacher, processor, dataset, batch, theirs=None):
    """The mean reverse KL per token of a batch, in the order of the dataset's rows, and the student's gradients."""
    total = 0.0
    for row, ids, mask in zip(dataset, batch["completion_ids"], batch["completion_mask"].bool(), strict=True):
        log_q = judged_alone(student, processor, row, ids[mask])
        with torch.no_grad():
            log_p = judged_alone(teacher, theirs or processor, row, ids[mask])
        total = total + (log_q.exp() * (log_q - log_p)).sum()
    loss = total / batch["completion_mask"].sum()
    parameters = [p for p in student.parameters() if p.requires_grad]
    return loss.item(), torch.autograd.grad(loss, parameters, allow_unused=True)


def compare(trainer, dataset, student, teacher, processor, theirs=None):
    """Loss and gradients of the trainer, on a batch in the order of the dataset, beside the oracle's."""
    trainer.model.eval()  # TRL then keeps the order of rows
    batch = trainer._prepare_inputs(list(dataset))
    expected, slopes = oracle(student, teacher, processor, dataset, batch, theirs)
    loss = trainer.rollout_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    found = [p.grad for p in trainer.model.parameters() if p.requires_grad]
    assert len(found) == len(slopes)
    assert any(slope is not None and slope.abs().max() > 0 for slope in slopes)
    size = max(slope.abs().max().item() for slope in slopes if slope is not None)
    for ours, naive in zip(found, slopes, strict=True):
        if ours is None or naive is None:
            assert ours is None or ours.abs().max() <= 1e-7 * size
            assert naive is None or naive.abs().max() <= 1e-7 * size
        else:
            torch.testing.assert_close(ours, naive, rtol=2e-3, atol=2e-5 * size)
