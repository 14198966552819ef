"""The study that compares a GPU with the CPU, rehearsed with the CPU in the GPU's place."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from scripts.studies.gpu import run as gpu


DOCS = Path(__file__).parents[2] / "docs"
RESULTS = DOCS / "results" / "gpu"
FOUND = json.loads((RESULTS / "checks.json").read_text())


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
    page = " ".join((DOCS / "benchmarks.md").read_text().split())
    assert set(FOUND["ways"]) == set(gpu.WAYS)
    largest = max(way["fp32"]["distance"] for way in FOUND["ways"].values())
    assert largest < 6e-5
    assert "differ by at most 6e-5 in fp32" in page
    for way in FOUND["ways"].values():
        first = way["cpu"]["steps"][0]["loss"]
        for precision in ("bf16", "fp16"):
            assert abs(way[precision]["steps"][0]["loss"] - first) < 0.01 * first


def test_the_page_tells_how_far_tritons_kernels_are_from_ours():
    page = " ".join((DOCS / "benchmarks.md").read_text().split())
    assert "values to 2e-5 nats, gradients to 8e-6 in fp32 (of the JSD 1e-4" in page
    assert "are off by up to .04 nats" in page
    found = json.loads((RESULTS / "triton.json").read_text())
    assert len(found) == 24
    for name, measured in found.items():
        if name.endswith("float32") and not name.endswith("bfloat16"):
            assert measured["value"] < 2e-5, name
            assert measured["gradient"] < (1e-4 if name.startswith("jsd") else 8e-6), name
        elif name.startswith("log-probabilities"):
            assert measured["value"] < 0.0405, name


def test_the_pages_tell_the_ratios_of_the_benchmark():
    cells = {cell["name"]: cell["contenders"] for cell in json.loads((RESULTS / "benchmark.json").read_text())["cells"]}
    for name, told in (("uniform", "1.05"), ("ragged", "0.42")):
        ours, theirs = (statistics.median(cells[name][who]["update_s"]) for who in ("ours", "distillation"))
        assert f"{ours / theirs:.2f}" == told
    readme = " ".join((DOCS.parent / "README.md").read_text().split())
    assert "takes 1.05 of `DistillationTrainer`'s time with equal lengths and 0.42 with ragged ones" in readme
