"""What the tests of sweeps share: a sweep for a stand-in of opd.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from sweep_calls import PROGRAM


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Writes a sweep over beta for the stand-in program, in a folder of its own; returns its configuration."""
    monkeypatch.chdir(tmp_path)
    Path("program.py").write_text(PROGRAM)

    def make(method: str = "grid", parameters: dict | None = None, **changes) -> dict:
        config = {
            "program": "program.py",
            "method": method,
            "metric": {"name": "train/reward", "goal": "maximize"},
            "parameters": parameters or {"beta": {"values": [0.1, 0.5, 1.0]}},
            "command": ["${interpreter}", "${program}", "${args}"],
            **changes,
        }
        Path("sweep.yaml").write_text(yaml.safe_dump(config))
        return config

    return make
