"""Runs `trl-distill train` again and again in processes that are killed with SIGKILL, as `test_survival.py` asks.

    python tests/cli/survivor.py FOLDER KILLS STEPS

FOLDER holds `student`, `teacher` and `prompts.jsonl`. Writes `FOLDER/report.json`: where each attempt began. Processes
are forked from one that has imported everything, so that an attempt takes a second.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from pathlib import Path


ARGUMENTS = (
    "--model_name_or_path student --teacher_model_name_or_path teacher --dataset_name prompts.jsonl --use_cpu "
    "--per_device_train_batch_size 4 --max_completion_length 6 --bf16 false --gradient_checkpointing false "
    "--report_to none --learning_rate 0.01 --save_strategy steps --save_steps 1 --save_total_limit 2 "
    "--disable_tqdm true --logging_strategy no --resume_from_checkpoint auto"
)


def train(output_dir: str, steps: int) -> None:
    import torch

    from trl_distill.cli import train as opd

    torch.set_num_threads(1)

    class Say(opd.StopOnSigterm):  # the one callback that the script adds
        def on_step_begin(self, args, state, control, **kwargs):
            Path(output_dir, "begun").write_text(str(state.global_step))
            with Path(output_dir, "times").open("a") as file:
                file.write(f"{time.time()}\n")
            super().on_step_begin(args, state, control, **kwargs)

    opd.StopOnSigterm = Say
    opd.main(*opd.parsed([*ARGUMENTS.split(), "--output_dir", output_dir, "--max_steps", str(steps)]))


def attempt(context, output_dir: str, steps: int, place: float | None = None, step_time: float = 0.0) -> int:
    """
    One process; returns the step at which it began.

    It is killed after `place` steps: whole ones are counted as it begins them, however long each takes on a busy
    machine, and the rest is a share of `step_time`.
    """
    from trl_distill.training.checkpoints import last_complete

    begun = Path(output_dir, "begun")
    begun.unlink(missing_ok=True)
    found = last_complete(output_dir)
    process = context.Process(target=train, args=(output_dir, steps))
    process.start()
    while process.is_alive() and not (begun.exists() and begun.read_text()):
        time.sleep(0.005)
    if not begun.exists():
        raise SystemExit(f"There was nothing left to do after {found}; give the run more steps.")
    first = int(begun.read_text())
    if first != (int(found.rpartition("-")[2]) if found else 0):
        raise SystemExit(f"Began at step {first}, but the last complete checkpoint is {found}.")
    if place is None:
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"The last attempt ended with {process.exitcode}.")
    else:
        while process.is_alive() and int(begun.read_text() or first) < first + int(place):
            time.sleep(0.005)
        process.join(place % 1 * step_time)
        process.kill()
        process.join()
    return first


def main(folder: Path, kills: int, steps: int) -> None:
    os.chdir(folder)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trl_distill.cli.train"])
    for name in ("whole", "killed"):
        os.makedirs(name, exist_ok=True)
    attempt(context, "whole", steps)
    times = [float(line) for line in Path("whole", "times").read_text().split()]
    step_time = statistics.median(b - a for a, b in itertools.pairwise(times))  # writing a checkpoint included
    longest = (steps - 2) / kills  # all kills together leave something to do
    draw = random.Random(0)
    begun = []
    while len(begun) < kills:
        begun.append(attempt(context, "killed", steps, draw.uniform(0, longest), step_time))
    begun.append(attempt(context, "killed", steps))
    Path("report.json").write_text(json.dumps({"begun": begun, "step_time": step_time}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
