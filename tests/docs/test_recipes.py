"""The commands of docs/recipes.md, each as it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM


ROOT = Path(__file__).parents[2]
COMMANDS = [
    block.removeprefix("$ ")
    for block in re.findall(
        r"<!-- run -->\n```console\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(), re.DOTALL
    )
]


@pytest.mark.slow
def test_every_command_of_the_recipes_runs(tmp_path):
    """In order, in an empty folder beside the scripts; the student ends nearer to its teacher than it began."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / "recipe").mkdir()
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    assert len(COMMANDS) == 6
    for command in COMMANDS:
        run = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900, check=False
        )
        assert run.returncode == 0, f"{command}\n{run.stdout[-2000:]}\n{run.stderr[-3000:]}"
    counts = json.loads((tmp_path / "recipe" / "data" / "counts.json").read_text())
    assert 1900 < counts["rows"] <= 2000
    kl = {}
    for name in ("opd", "mixed", "combined"):
        log = json.loads((tmp_path / "recipe" / name / "trainer_state.json").read_text())["log_history"]
        kl[name] = [row["distill/reverse_kl"] for row in log if "distill/reverse_kl" in row]
        AutoModelForCausalLM.from_pretrained(tmp_path / "recipe" / name)
    assert kl["mixed"][-1] < 0.5 * kl["mixed"][0]
    assert kl["opd"][-1] < kl["mixed"][0]
    assert kl["combined"][-1] < kl["mixed"][0]
