"""Where masks are set: the same as by a boolean index, also after the mask has been written to."""

from __future__ import annotations

import gc

import pytest
import torch
from synchronisations import Synchronisations

from trl_distill import places


def some_mask(seed: int = 0, rows: int = 4, columns: int = 7) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.4


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
@pytest.mark.parametrize("shape", [(4, 7), (4, 7, 3)])
def test_take_is_a_boolean_index(dtype, shape):
    mask = some_mask()
    values = torch.randn(shape, requires_grad=True)
    expected = values[mask]
    found = places.take(values, mask.to(dtype))
    assert torch.equal(found, expected)
    weights = torch.randn(expected.shape)
    gradients = [torch.autograd.grad((x * weights).sum(), values)[0] for x in (found, expected)]
    assert torch.equal(*gradients)


def test_what_is_known_of_a_mask():
    mask = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 0, 0, 0]])
    found = places.places(mask)
    assert (found.counts, found.total, found.first, found.end) == ([2, 1], 3, 1, 4)
    assert found.at.tolist() == [2, 3, 6]
    nothing = places.places(torch.zeros(2, 5))
    assert (nothing.counts, nothing.total, nothing.first, nothing.end) == ([0, 0], 0, 5, 0)
    assert places.take(torch.ones(2, 5), torch.zeros(2, 5)).shape == (0,)


def test_masks_are_counted_together_and_once():
    masks = [some_mask(seed, columns=5 + seed) for seed in range(3)]
    with Synchronisations("/places.py") as mode:
        places.count(masks)
        places.count(masks)
    assert mode.found["places.py count: cpu"] == 1
    with Synchronisations("/places.py") as mode:
        for mask in masks:
            places.take(mask.float(), mask)
    assert not mode.found


def test_a_mask_that_is_written_to_is_counted_again():
    mask = some_mask()
    before = places.places(mask).total
    mask.logical_not_()
    assert places.places(mask).total == mask.numel() - before


def test_masks_are_let_go():
    places.places(some_mask())
    gc.collect()
    known = len(places._counted)
    kept = some_mask(1)
    places.places(kept)
    assert len(places._counted) == known + 1
    del kept
    gc.collect()
    assert len(places._counted) == known


def test_masks_made_in_inference_mode():
    with torch.inference_mode():
        mask = some_mask()
        assert torch.equal(places.take(mask.float(), mask), mask.float()[mask])
