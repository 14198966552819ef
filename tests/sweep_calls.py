"""Calls of `trl-distill sweep` with a stand-in for opd.py, and what they left behind."""

from __future__ import annotations

import csv
from pathlib import Path


# Stands for opd.py: logs a KL that falls and a reward that rises with beta's fall, each step a checkpoint
PROGRAM = """
import json, os, pathlib, sys, time
given = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
out = pathlib.Path(given["output_dir"])
out.mkdir(parents=True, exist_ok=True)
with open("starts", "a") as starts:
    starts.write(out.parent.name + " " + given["resume_from_checkpoint"] + "\\n")
beta = float(given["beta"])
if given.get("fail_at") == given["beta"]:
    sys.exit("it went wrong at beta " + given["beta"])
for step in range(int(given.get("steps", 3))):
    (out / "step.new").write_text(str(step))
    os.replace(out / "step.new", out / "step")  # whole, whenever the run is killed
    while pathlib.Path("hold-" + out.parent.name).exists():
        time.sleep(0.05)
    print({"reward": "%.3g" % (1 - beta)}, flush=True)
log = [{"step": s, "reward": 1 - beta + s, "distill/reverse_kl": 1 / beta, "note": "x"} for s in (0, 1, 2)]
(out / "trainer_state.json").write_text(json.dumps({"log_history": log}))
"""


UNIFORM = {"beta": {"distribution": "log_uniform_values", "min": 0.01, "max": 1.0}, "steps": {"value": 2}}


def call(*arguments: str) -> int:
    from trl_distill.cli import sweep

    return sweep.main(["--sweep", "sweep.yaml", "--output_dir", "out", *arguments])


def results() -> list[dict[str, str]]:
    with Path("out/results.csv").open() as file:
        return list(csv.DictReader(file))


def starts() -> list[str]:
    return Path("starts").read_text().splitlines()
