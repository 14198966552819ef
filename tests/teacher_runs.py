"""Runs of tiny models, for the tests of all kinds of teachers."""

from __future__ import annotations

import torch
from helpers import in_training
from peft import LoraConfig


def trained(trainer) -> tuple[list[dict], torch.Tensor]:
    trainer.train()
    rows = [
        {k: row[k] for k in ("loss", "grad_norm", "distill/reverse_kl")}
        for row in trainer.state.log_history
        if "loss" in row
    ]
    return rows, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def generated(trainer, rows) -> dict:
    """A generation batch as TRL hands it on, before it is shuffled."""
    in_training(trainer)
    return trainer._generate_and_score_completions(rows)


ESTIMATORS = [("full", 0.0), ("topk", 0.0), ("sampled", 0.0), ("full", 1.0)]


def lora():
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
