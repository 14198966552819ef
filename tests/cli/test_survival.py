"""A run that is killed again and again ends with the parameters of the run that is not."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from processes import succeeds
from safetensors.torch import load_file


HERE = Path(__file__).parent


@pytest.mark.parametrize(("kills", "steps"), [(3, 8), pytest.param(20, 40, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments(saved, prompts, kills, steps):
    (saved / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts["prompt"]))
    words = [sys.executable, HERE / "survivor.py", saved, str(kills), str(steps)]
    succeeds(words, env={**os.environ, "OMP_NUM_THREADS": "1"})
    report = json.loads((saved / "report.json").read_text())
    assert len(report["begun"]) == kills + 1
    assert report["begun"] == sorted(report["begun"])  # nothing is done twice that was complete
    assert report["begun"][-1] > 0
    whole, killed = (load_file(saved / name / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all((whole[name] == killed[name]).all() for name in whole)
