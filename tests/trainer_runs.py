"""Runs of tiny models, and what they logged."""

from __future__ import annotations

import torch

from trl_distill import OPDTrainer


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
