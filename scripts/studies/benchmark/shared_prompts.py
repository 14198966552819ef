"""What does a teacher save that reads a prompt once for all of its completions?

    python -m scripts.studies.benchmark.shared_prompts                     # two minutes on a CPU core
    python -m scripts.studies.benchmark.shared_prompts --write_results     # and docs/results/costs/shared_prompts.json

A teacher shaped like SmolLM2-135M, with random weights, scores groups of completions of one prompt: with whole rows,
and with the prompt read once. Both ways take turns. On a CPU the time is that of the processor (of this process, one
thread), so that other processes do not show; on a GPU it is the clock's. The arithmetic is the number of tokens read:
(P + n · C) / (n · (P + C)) for n completions of C tokens after a prompt of P.

The trainer reads the student's prompts whole. What sharing would save there, forward and backward pass together, is the
last line: the gradient passes through the cached keys and values.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

from trl_distill.models.shared_prompts import Prompts, completion_states
from trl_distill.rollouts import Rollouts
from trl_distill.teachers.local import LocalTeacher


RESULTS = Path(__file__).parents[3] / "docs" / "results" / "costs" / "shared_prompts.json"
CELLS = ((8, 1024, 128), (8, 256, 128), (8, 64, 128), (2, 1024, 128), (4, 2048, 512))  # completions, prompt, completion
STUDENT = (8, 512, 128)
BAR = {(8, 1024, 128): 0.35}
SHAPE: dict[str, Any] = {  # of SmolLM2-135M, but for its 30 layers
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
}


def rollouts_of(completions: int, prompt: int, length: int, device: torch.device) -> Rollouts:
    """One group: `completions` rows of one prompt, without padding."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.cat(
        [
            torch.randint(2, SHAPE["vocab_size"], (1, prompt), generator=draw).expand(completions, -1),
            torch.randint(2, SHAPE["vocab_size"], (completions, length), generator=draw),
        ],
        dim=1,
    ).to(device)
    return Rollouts(ids, torch.ones_like(ids), torch.ones_like(ids[:, -length:]).bool())


def seconds(teacher: LocalTeacher, rollouts: Rollouts) -> float:
    """One scoring."""
    on_gpu = rollouts.input_ids.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    start = clock()
    teacher.score(rollouts)
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start


def measure(teacher: LocalTeacher, cell: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Both ways in turns, after one uncounted scoring each; and how far the hidden states are apart."""
    rollouts, sharing = rollouts_of(*cell, teacher.accelerator.device), Prompts.pay
    times: dict[str, list[float]] = {"whole rows": [], "prompt once": []}
    states = {}
    try:
        for turn in range(repeats + 1):
            for name, found in times.items():
                Prompts.pay = sharing if name == "prompt once" else lambda self, columns: False  # type: ignore[method-assign]
                if turn == 0:
                    states[name] = teacher.score(rollouts).hidden.float()
                else:
                    found.append(seconds(teacher, rollouts))
    finally:
        Prompts.pay = sharing  # type: ignore[method-assign]
    apart = (states["prompt once"] - states["whole rows"]).norm() / states["whole rows"].norm()
    count, prompt, length = cell
    medians = [statistics.median(found) for found in times.values()]
    return {
        "completions": count,
        "prompt": prompt,
        "completion": length,
        "seconds": times,
        "ratio": medians[1] / medians[0],
        "arithmetic": (prompt + count * length) / (count * (prompt + length)),
        "bar": BAR.get(cell),
        "difference": apart.item(),
    }


def measure_student(model: Any, cell: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Forward and backward pass of the backbone, with whole rows and with the prompt read once, in turns."""
    count, prompt, length = cell
    rollouts = rollouts_of(*cell, next(model.parameters()).device)
    inputs = {"input_ids": rollouts.input_ids, "attention_mask": rollouts.attention_mask}
    prompts = Prompts.among(rollouts.input_ids, rollouts.attention_mask, length)
    backbone, weight = model.base_model, model.base_model.layers[0].self_attn.q_proj.weight
    model.requires_grad_(True)
    aim = torch.randn(count, length, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(1))

    def gradient(shared: bool) -> torch.Tensor:
        model.zero_grad()
        if shared:
            found = completion_states(backbone, inputs, prompts, count)
            assert found is not None
        else:
            found = backbone(**inputs, use_cache=False).last_hidden_state[:, prompt - 1 : -1]
        (found * aim.to(found)).sum().backward()
        return weight.grad.clone()

    times: dict[str, list[float]] = {"whole rows": [], "prompt once": []}
    gradients = [gradient(shared) for shared in (False, True)]
    for _ in range(repeats):
        for shared, found in enumerate(times.values()):
            start = time.process_time()
            gradient(bool(shared))
            found.append(time.process_time() - start)
    medians = [statistics.median(found) for found in times.values()]
    apart = ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()
    sizes = {"completions": count, "prompt": prompt, "completion": length}
    return {**sizes, "seconds": times, "ratio": medians[1] / medians[0], "difference of gradients": apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10, help="of the teacher")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cells", type=int, default=len(CELLS), help="only the first so many")
    parser.add_argument("--write_results", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    set_seed(0)
    accelerator = Accelerator()
    config = LlamaConfig(**SHAPE, num_hidden_layers=options.layers)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    teacher = LocalTeacher(model, accelerator, SHAPE["vocab_size"])
    found = [measure(teacher, cell, options.repeats) for cell in CELLS[: options.cells]]
    student = measure_student(model, STUDENT, options.repeats) if not torch.cuda.is_available() else None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread, processor time"
    table = Table(title=f"A teacher of {options.layers} layers ({device})")
    for column in (
        "completions",
        "prompt",
        "tokens each",
        "whole rows, s",
        "prompt once, s",
        "ratio",
        "arithmetic",
        "bar",
    ):
        table.add_column(column, justify="right")
    for one in found:
        medians = [f"{statistics.median(times):.3g}" for times in one["seconds"].values()]
        sizes = (f"{one[name]}" for name in ("completions", "prompt", "completion"))
        table.add_row(
            *sizes, *medians, f"{one['ratio']:.2f}", f"{one['arithmetic']:.2f}", f"≤ {one['bar']}" if one["bar"] else ""
        )
    Console().print(table)
    if student is not None:
        print(f"The student, forward and backward, after a prompt of {STUDENT[1]}: {student['ratio']:.2f} of the time.")
    if options.write_results:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        shape = {**SHAPE, "num_hidden_layers": options.layers, "dtype": str(model.dtype)}
        text = json.dumps(
            {"device": device, "torch": torch.__version__, "teacher": shape, "cells": found, "student": student},
            indent=1,
        )
        RESULTS.write_text(text + "\n")
    missed = [one for one in found if one["bar"] and one["ratio"] > one["bar"]]
    if missed:
        raise SystemExit(f"{len(missed)} ratios are above their bar.")


if __name__ == "__main__":
    main()
