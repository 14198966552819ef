"""What all runs of `scripts/reproduce.py` share, and what differs between small models and those from the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


BATCH = 64  # answers per optimizer step


@dataclass(frozen=True)
class Preset:
    """
    What all runs share.

    Attributes:
        tasks (`dict[str, str]`): which of `TASKS` has "one" right answer to a problem, and which has "many".
        rates (`dict[str, float]`): learning rate of each kind of training.
        training (`dict[str, Any]`): settings of every trainer, beside those of `training.settings`.
        small (`bool`): whether models are small enough for one CPU core each, and come with the repository or are
            made on the spot. Else they come from the hub and need a GPU, one run at a time. docs/results.md shows
            small ones.
        device (`str`): where models measure and write.
        claims (`tuple[str, ...]`): that can be tried; all if empty.
    """

    tasks: dict[str, str]
    rates: dict[str, float]
    training: dict[str, Any]
    small: bool
    device: str
    claims: tuple[str, ...] = ()


PRESETS = {
    "cpu": Preset(
        {"one": "additions", "many": "orders"},
        {"SFT": 1e-3, "on-policy": 1.5e-3, "after SFT": 5e-4, "reward": 5e-5, "estimates": 3e-4, "many": 4e-3},
        {"bf16": False, "gradient_checkpointing": False, "per_device_train_batch_size": BATCH},
        small=True,
        device="cpu",
    ),
    "gpu": Preset(
        {"one": "gsm8k", "many": "gsm8k"},
        {"SFT": 1e-5, "on-policy": 1e-5, "after SFT": 5e-6, "reward": 1e-6, "estimates": 2e-6, "many": 1e-5},
        {"bf16": True, "per_device_train_batch_size": 8, "gradient_accumulation_steps": BATCH // 8},
        small=False,
        device="cuda",
        claims=("gap", "diversity", "rewards", "estimators", "controls"),
    ),
}


@dataclass(frozen=True)
class RunContext:
    """
    Where runs keep what they make, and with what they are made.

    Attributes:
        folder (`Path`): of all runs of a preset.
        preset ([`Preset`]): of these runs.
    """

    folder: Path
    preset: Preset
