"""How long until something happens: `--help`, the arguments of a command, and the first step of a run.

    python -m scripts.studies.benchmark.start_up                    # a minute on an idle machine
    python -m scripts.studies.benchmark.start_up --write_results    # and docs/results/costs/start_up.json

Each line is a process of its own, run several times; what counts is the fastest, since all else is other processes.
`processor` is the time that its threads computed, `clock` that of the wall. The bar is for the former: on an idle
machine both are the same, up to what is read from the disk. The first step is that of the demo's
models (`scripts/studies/tasks/models`) on 8 additions; what a run takes beyond it (the second step, saving) is not in.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.studies.startup import ONE_THREAD


ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "docs" / "results" / "costs" / "start_up.json"
MODELS = ROOT / "scripts" / "studies" / "tasks" / "models"
BAR = 0.5  # seconds for `--help`
CLI = [sys.executable, "-m", "trl_distill.cli"]
FIRST_STEP = "first step, demo's models"


def commands(folder: Path) -> dict[str, list[str]]:
    """By name; those that begin with "import" are what the others cannot do without."""
    data = folder / "prompts.jsonl"
    rows = ({"prompt": [{"role": "user", "content": f"{n}+{n + 7}"}]} for n in range(11, 43))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {
        "model_name_or_path": str(MODELS / "student"),
        "teacher_model_name_or_path": str(MODELS / "teacher"),
        "dataset_name": str(data),
        "output_dir": str(folder / "out"),
        "max_steps": "1",
        "per_device_train_batch_size": "8",
        "max_completion_length": "32",
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": "true",
        "bf16": "false",
        "logging_steps": "1",
    }
    return {
        "trl-distill --help": [*CLI, "--help"],
        "trl-distill train --help": [*CLI, "train", "--help"],
        "import torch": [sys.executable, "-c", "import torch"],
        "import TRL's trainer": [sys.executable, "-c", "from trl import GRPOConfig, GRPOTrainer"],
        "import ours": [sys.executable, "-c", "from trl_distill import OPDConfig, OPDTrainer"],
        FIRST_STEP: [*CLI, "train", *(part for name, value in train.items() for part in (f"--{name}", value))],
    }


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds of clock and processor that a command takes. Raises `CalledProcessError` if it fails."""
    environment = {"OMP_NUM_THREADS": ONE_THREAD, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True, capture_output=True)
    clock, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return clock, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="these lines alone; the file keeps what it has of the others")
    parser.add_argument("--write_results", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(RESULTS.read_text())["seconds"] if options.only and RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name, command in commands(Path(folder)).items():
            if options.only and name not in options.only:
                continue
            runs = [timed(command) for _ in range(options.repeats)]
            found[name] = {"clock": [clock for clock, _ in runs], "processor": [spent for _, spent in runs]}
    table = Table(title="Seconds until it is done, the fastest of several")
    for column in ("", "clock", "processor", "bar"):
        table.add_column(column, justify="right" if column else "left")
    for name, times in found.items():
        bar = f"≤ {BAR}" if name == "trl-distill --help" else ""
        table.add_row(name, f"{min(times['clock']):.2f}", f"{min(times['processor']):.2f}", bar)
    Console().print(table)
    if options.write_results:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps({"bar": BAR, "seconds": found}, indent=1) + "\n")
    if min(found["trl-distill --help"]["processor"]) > BAR:
        raise SystemExit("`--help` takes longer than asked.")


if __name__ == "__main__":
    main()
