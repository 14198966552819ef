"""The study that compares a GPU with the CPU, rehearsed with the CPU in the GPU's place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.studies.gpu import run as gpu


FOUND = json.loads((Path(__file__).parents[2] / "docs" / "results" / "gpu" / "checks.json").read_text())


@pytest.mark.parametrize("name", ["exact KL", "reward and exact KL"])
def test_a_way_is_compared_with_itself(name, monkeypatch):
    monkeypatch.setattr(gpu, "PRECISIONS", {"fp32": {}, "bf16": {"bf16": True}})
    found = gpu.compared(name, "cpu")
    assert len(found["fp32"]["steps"]) == gpu.STEPS
    assert found["fp32"]["distance"] == 0.0
    assert found["bf16"]["distance"] > 1e-5  # so a difference would be seen


def test_a_way_that_fails_is_told_and_costs_no_other(monkeypatch):
    monkeypatch.setitem(gpu.WAYS, "broken", {"divergence": "no such thing"})
    found = gpu.compared("broken", "cpu")
    assert "no such thing" in found["fp32"]["failed"]
    assert found["fp32"]["distance"] is None


def test_the_page_tells_what_the_results_hold():
    page = " ".join((Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text().split())
    assert set(FOUND["ways"]) == set(gpu.WAYS)
    largest = max(way["fp32"]["distance"] for way in FOUND["ways"].values())
    assert largest < 6e-5
    assert "differ by at most 6e-5 in fp32" in page
    for way in FOUND["ways"].values():
        first = way["cpu"]["steps"][0]["loss"]
        for precision in ("bf16", "fp16"):
            assert abs(way[precision]["steps"][0]["loss"] - first) < 0.01 * first
