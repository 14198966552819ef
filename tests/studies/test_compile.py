"""`torch.compile`: losses and gradients are the eager ones, and ragged lengths do not compile again and again."""

from __future__ import annotations

import shutil

import pytest

from scripts.studies.compile.run import WAYS, main


@pytest.mark.slow
def test_compiled_models_train_like_eager_ones():
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a compiler: g++ is not installed")
    ways = [way for way in WAYS if way not in ("eager", "whole", "layers of both, sampling too")]
    assert len(ways) == 3
    for found in main(["--size", "tiny", "--steps", "6", "--ways", *ways])["ways"]:
        assert found["graphs"] > 0, found  # it was compiled
        assert found["graphs_in_later_half"] == 0, found
        assert found["recompile_limit_hits"] == 0, found
        assert found["loss_difference"] < 1e-5, found
        assert found["gradient_difference"] < 1e-4, found
