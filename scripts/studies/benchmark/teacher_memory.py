"""What does an offloaded teacher save? Peak memory of the same training steps with a resident and an offloaded one.

    python -m scripts.studies.benchmark.teacher_memory                      # on a GPU, if there is one
    python -m scripts.studies.benchmark.teacher_memory --hidden_size 2048   # a larger teacher

Random weights, since only their size matters; each run is a process of its own. On a GPU the numbers are what PyTorch
allocated there, while the teacher judges and while the student is updated. On a CPU both teachers lie in the same
memory, so the peak of the whole process says what offloading costs there: the cache of hidden states.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_distill import OPDConfig, OPDTrainer


ROOT = Path(__file__).parents[3]


def model(hidden_size: int, layers: int, vocab_size: int) -> LlamaForCausalLM:
    heads = max(hidden_size // 64, 1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )


def run(options: argparse.Namespace, offloaded: bool) -> dict[str, float]:
    """Two optimizer steps; peaks in MiB by phase, and the size of the teacher."""
    words = {f"w{i}": i for i in range(options.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w1", unk_token="w2")
    teacher = model(options.hidden_size, options.layers, options.vocab_size)
    on_gpu, peaks = torch.cuda.is_available(), {"judging": 0.0, "update": 0.0}

    def peak_of(phase: str, call: Any) -> Any:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        result = call()
        peak = (
            torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        peaks[phase] = max(peaks[phase], peak / 2**20)
        return result

    class Measured(OPDTrainer):
        def on_rollouts(self, rows: list, batch: dict) -> None:
            peak_of("judging", lambda: OPDTrainer.on_rollouts(self, rows, batch))

        def rollout_loss(self, *args: Any) -> Any:
            return peak_of("update", lambda: OPDTrainer.rollout_loss(self, *args))

    with tempfile.TemporaryDirectory() as folder:
        args = OPDConfig(
            output_dir=folder,
            teacher_offload=offloaded,
            max_steps=2,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=2,
            max_completion_length=options.tokens,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not on_gpu,
            bf16=on_gpu,
        )
        prompts = Dataset.from_dict({"prompt": ["w3 w4 w5"] * 16 * options.batch_size})
        student = model(options.hidden_size // 4, 2, options.vocab_size)
        Measured(model=student, teacher_model=teacher, args=args, train_dataset=prompts, processing_class=fast).train()
    return {**peaks, "teacher": sum(p.numel() * p.element_size() for p in teacher.parameters()) / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=1024, help="of the teacher")
    parser.add_argument("--layers", type=int, default=8, help="of the teacher")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="per completion")
    parser.add_argument("--one", choices=["resident", "offloaded"], help="run this one here, and print its numbers")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(options, options.one == "offloaded")))
        return
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, whole process"
    table = Table(title=f"Peak memory, MiB ({place})")
    for column in ("", "while the teacher judges", "while the student is updated"):
        table.add_column(column, justify="left" if not column else "right")
    size = 0.0
    for kind in ("resident", "offloaded"):
        command = [sys.executable, "-m", "scripts.studies.benchmark.teacher_memory", *sys.argv[1:], "--one", kind]
        output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        size = found["teacher"]
        table.add_row(kind, f"{found['judging']:.0f}", f"{found['update']:.0f}")
    table.caption = f"The teacher's weights are {size:.0f} MiB."
    Console().print(table)


if __name__ == "__main__":
    main()
