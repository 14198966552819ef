"""Means over masks: what counts nowhere is not logged as a zero."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from trl_distill.metrics import means


def test_means_are_over_what_the_mask_marks():
    values, mask = torch.tensor([[1.0, 2.0], [torch.nan, 4.0]]), torch.tensor([[True, True], [False, True]])
    found = means(Accelerator(cpu=True), {"all": (values, mask), "none": (values, torch.zeros_like(mask))})
    assert found == {"all": (1.0 + 2.0 + 4.0) / 3}
