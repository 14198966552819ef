"""Does a run take as much memory as `trl-distill check` says? Peaks of short runs on a CPU, beside the formula.

    python -m scripts.studies.benchmark.memory                    # five minutes
    python -m scripts.studies.benchmark.memory --write_results    # and docs/results/costs/memory.json
    python -m scripts.studies.benchmark.memory --formulas         # the formula again, beside what was measured

Each run is a process of its own, with random weights: two optimizer steps, all completions at their full length, since
that is what the formula counts. Its peak is the largest resident size, less that before models were made and after a
run of a tiny model, which loads the libraries.

The formula counts what is asked of the allocator. So it is held against runs in which glibc returns every large block
that is freed (`MALLOC_MMAP_THRESHOLD_`). As usual it keeps some of them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from scripts.studies.benchmark.clocks import CLEAR, _kib
from trl_distill import OPDConfig, OPDTrainer
from trl_distill.checks.memory import Memory, estimate, sizes_of
from trl_distill.checks.prompts import Prompts
from trl_distill.heads.tiles import release_memory


ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "docs" / "results" / "costs" / "memory.json"
BAR = 0.15


@dataclass(frozen=True)
class Cell:
    """
    A run: sizes of both models, words of a prompt, tokens of a completion, and settings besides the ordinary ones.

    Many words are two tokens: "w17" is split, since "w1" is the stop token. So tokens are counted.
    """

    name: str
    student: tuple[int, int] = (384, 6)  # hidden size, layers
    teacher: tuple[int, int] = (512, 8)
    vocabulary: int = 16_000
    prompt: int = 64
    completion: int = 128
    rows: int = 8
    family: str = "llama"
    lora: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


CELLS = (
    Cell("ordinary"),
    Cell("qwen, large vocabulary", vocabulary=64_000, family="qwen3", rows=4),
    Cell("long rows", completion=512, rows=4, student=(256, 8)),
    Cell("large teacher", teacher=(1024, 12)),
    Cell("accumulation", settings={"gradient_accumulation_steps": 4}),
    Cell("checkpointing", completion=384, settings={"gradient_checkpointing": True}),
    Cell("LoRA", student=(512, 8), lora=True),
    Cell("groups, long prompts", prompt=512, settings={"num_generations": 8, "gradient_accumulation_steps": 2}),
)


def model(family: str, size: tuple[int, int], vocabulary: int) -> Any:
    hidden, layers = size
    classes: Any = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[family]
    config = classes[0](
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return classes[1](config)


def tokenizer_of(cell: Cell) -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(cell.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w1", unk_token="w2")


def prompts_of(cell: Cell) -> list[str]:
    return [" ".join(f"w{3 + (i + j) % 900}" for j in range(cell.prompt)) for i in range(64)]


def counted(cell: Cell) -> list[Prompts]:
    """What the formula is told of the prompts."""
    lengths = [len(ids) for ids in tokenizer_of(cell)(prompts_of(cell))["input_ids"]]
    return [Prompts("the training dataset", "prompt", len(lengths), len(lengths), longest=max(lengths))]


def arguments_of(cell: Cell, folder: str) -> OPDConfig:
    """Two steps."""
    settings: dict[str, Any] = {"gradient_accumulation_steps": 1, "gradient_checkpointing": False, **cell.settings}
    return OPDConfig(
        output_dir=folder,
        max_steps=2,
        per_device_train_batch_size=cell.rows,
        max_completion_length=cell.completion,
        generation_kwargs={"min_new_tokens": cell.completion},
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        **settings,
    )


def trainer_of(cell: Cell, folder: str) -> OPDTrainer:
    """Ready to train for two steps."""
    return OPDTrainer(
        model=model(cell.family, cell.student, cell.vocabulary),
        teacher_model=model(cell.family, cell.teacher, cell.vocabulary),
        args=arguments_of(cell, folder),
        train_dataset=Dataset.from_dict({"prompt": prompts_of(cell)}),
        processing_class=tokenizer_of(cell),
        peft_config=LoraConfig(target_modules="all-linear") if cell.lora else None,
    )


def run(cell: Cell) -> dict[str, Any]:
    """Two steps of a cell, in this process: what the formula says, and what it took, in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        trainer_of(
            replace(cell, student=(128, 1), teacher=(128, 1), vocabulary=1000, prompt=4, completion=4), folder
        ).train()
    release_memory()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")  # the peak so far is forgotten
    before = _kib("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(cell, folder)
        teachers: list[Any] = [teacher.module for teacher, _ in trainer.pool.members] if trainer.pool else []
        memory: Memory = estimate(trainer.model, teachers, sizes_of(trainer, counted(cell)))
        trainer.train()
    return {"name": cell.name, "measured": (_kib("VmHWM") - before) / 2**10, **in_mib(memory, cell)}


def in_mib(memory: Memory, cell: Cell) -> dict[str, Any]:
    """What the formula says, and the tokens of the longest prompt."""
    return {
        "prompt": counted(cell)[0].longest,
        "formula": memory.peak / 2**20,
        "phase": memory.largest,
        "common": {part: size / 2**20 for part, size in memory.common.items()},
        "phases": {name: {part: size / 2**20 for part, size in added.items()} for name, added in memory.phases.items()},
    }


def formula(cell: Cell, folder: str) -> Memory:
    """What the formula says, without a trainer: of a run with one resident teacher and no adapter."""
    student, teacher = (model(cell.family, size, cell.vocabulary) for size in (cell.student, cell.teacher))
    member = SimpleNamespace(per_generation=False, prompts_once=True)
    run = SimpleNamespace(
        args=arguments_of(cell, folder),
        pool=SimpleNamespace(members=[(member, [0])]),
        use_vllm=False,
        model=student,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )
    return estimate(student, [teacher], sizes_of(run, counted(cell)))


def formulas() -> None:
    """The formula again for every run that was measured without an adapter."""
    known = {one["name"]: one for one in json.loads(RESULTS.read_text())["runs"]}
    with tempfile.TemporaryDirectory() as folder:
        again = [
            known[cell.name] | in_mib(formula(cell, folder), cell)
            for cell in CELLS
            if cell.name in known and not cell.lora
        ]
    write(again)
    for one in again:
        print(
            f"{one['name']}: {one['formula']:.0f} of {one['measured']:.0f} MiB, {one['formula'] / one['measured']:.2f}"
        )


def write(found: list[dict[str, Any]]) -> None:
    """Put runs into the file, in the order of `CELLS`; what it has of others stays."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    by_name = {one["name"]: one for one in (*known, *found)}
    runs = [by_name[cell.name] for cell in CELLS if cell.name in by_name]
    RESULTS.write_text(json.dumps({"bar": BAR, "torch": torch.__version__, "runs": runs}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", type=int, help="run this cell here, and print what was found")
    parser.add_argument("--cells", type=int, nargs="+", default=list(range(len(CELLS))), help="only these")
    parser.add_argument("--write_results", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--formulas", action="store_true", help="measure nothing: the formula beside what is known")
    options = parser.parse_args()
    if options.formulas:
        formulas()
        return
    if options.one is not None:
        torch.set_num_threads(1)
        print(json.dumps(run(CELLS[options.one])))
        return
    found = []
    for number in options.cells:
        command = [sys.executable, "-m", "scripts.studies.benchmark.memory", "--one", str(number)]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
        how: Any = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
        output = subprocess.run(command, check=True, **how).stdout
        found.append(json.loads(output.splitlines()[-1]))
        if options.write_results:
            write(found)
    table = Table(title="Peak memory of a run, MiB above the libraries (CPU, fp32)")
    for column in ("run", "formula", "measured", "formula / measured", "phase"):
        table.add_column(column, justify="left" if column in ("run", "phase") else "right")
    for one in found:
        ratio = one["formula"] / one["measured"]
        sizes = (f"{one[name]:.0f}" for name in ("formula", "measured"))
        table.add_row(one["name"], *sizes, f"{ratio:.2f}", one["phase"])
    Console().print(table)
    missed = [one["name"] for one in found if abs(one["formula"] / one["measured"] - 1) > BAR]
    if missed:
        raise SystemExit(f"Further off than {BAR:.0%}: {', '.join(missed)}.")


if __name__ == "__main__":
    main()
