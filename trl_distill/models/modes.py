"""Models computed as in evaluation, in the middle of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """
    Context in which no module of the models is in training, and after which each one is as it was.

    `train` and `eval` are not called: models override them, to merge adapters or to choose kernels. The trainer would
    not undo that, since it calls `train` only where `training` is false.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
