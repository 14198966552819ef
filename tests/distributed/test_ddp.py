"""Two processes over gloo train as one process does on the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


WORKER = Path(__file__).with_name("worker.py")


def launch(folder: Path, processes: int, per_device_batch: int) -> list[dict]:
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)),
            *(str(WORKER), str(folder), str(per_device_batch)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.slow
def test_ddp_equals_one_process(saved):
    (single,) = launch(saved, 1, 8)
    first, second = launch(saved, 2, 4)
    assert (first["distributed_type"], first["processes"]) == ("MULTI_CPU", 2)
    assert first["weights"] == second["weights"]
    for ours, theirs in zip(first["steps"], single["steps"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert first["weights"] == pytest.approx(single["weights"], rel=1e-4, abs=1e-6)
