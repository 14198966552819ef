"""The kernels that GPUs take, in Triton's interpreter: a path that users run is tested, if not at their speed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from processes import succeeds


TRITON = Path(__file__).parents[2] / ".venv-triton"  # apart, since TRL looks for Triton when it is imported


@pytest.mark.slow
def test_trls_kernels_in_triton_agree_with_ours():
    if not (TRITON / "triton").exists():
        pytest.skip("Triton is not installed: `make test-slow` does that")
    script = Path(__file__).with_name("triton_kernels.py")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(TRITON), "OMP_NUM_THREADS": "1"}
    output = succeeds([sys.executable, script], env=env)
    results = json.loads(output.strip().splitlines()[-1])
    assert len(results) == 24
    for name, found in results.items():
        rounds = name.startswith("log-probabilities") and "bfloat16" in name  # TRL's own: it rounds logits to 16 bits
        gradient = 1e-3 if name.startswith("jsd") else 1e-2 if "bfloat16" in name else 1e-5  # with large logits theirs
        assert found["value"] < (0.1 if rounds else 5e-5), (name, found)  # of a JSD is off by 1.5e-4, and ours by 2e-5
        assert found["entropy"] < (0.1 if rounds else 5e-5), (name, found)
        assert found["gradient"] < gradient, (name, found)
