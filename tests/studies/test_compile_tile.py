"""The study of compiled passes over a tile: what it compares is the same mathematics."""

from __future__ import annotations

import torch

from scripts.studies.compile import tile


def test_plain_is_what_the_tile_computes():
    """So that the compiled function and the library's are two ways to one result."""
    torch.manual_seed(0)
    ours, theirs = torch.randn(5, 301), torch.randn(5, 301)
    ids, slope = torch.randint(301, (5, 1)), torch.rand(5, 1)
    for found, expected in zip(
        tile.joined(tile.by_parts(tile.eager, ours, theirs.clone(), ids, slope)),
        tile.plain(ours, theirs, ids, slope),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
