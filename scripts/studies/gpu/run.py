"""The same training on a CPU and on a GPU: losses and gradients of three steps, by kind of teacher and estimator.

The demo's two models with greedy rollouts, which are the same on both. fp32 is compared with the CPU; of bf16 and
fp16 the distance is only told. Needs one GPU; left out: several GPUs, vLLM.

    python -m scripts.studies.gpu.run
"""

from __future__ import annotations

from scripts.studies.startup import ONE_THREAD, prepare_environment  # before the libraries


prepare_environment(HF_HUB_OFFLINE="1", OMP_NUM_THREADS=ONE_THREAD, TOKENIZERS_PARALLELISM="false")

import argparse
import json
import multiprocessing
import platform
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback, set_seed

from scripts.studies.reproduce.models import be_quiet
from scripts.studies.tasks.additions import problems
from scripts.studies.tasks.table import SHIPPED
from trl_distill import OPDConfig, OPDTrainer, foreign_text


RESULTS = Path(__file__).parents[3] / "docs" / "results" / "gpu" / "checks.json"


STEPS, PROMPTS = 3, 16


console = foreign_text.console()


def length(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that differs between completions."""
    return [float(len(ids) % 3) for ids in completion_ids]


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


WAYS: dict[str, dict[str, Any]] = {  # settings; "teacher", "rewards" and "lora" are ours
    "exact KL": {},
    "exact KL, stop tokens not merged": {"merge_stop_tokens": False},
    "TRL's kernel": {"divergence_kernel": "trl"},
    "forward KL": {"divergence": "forward_kl"},
    "forward KL, TRL's kernel": {"divergence": "forward_kl", "divergence_kernel": "trl"},
    "JSD, TRL's kernel": {"divergence": "jsd", "divergence_kernel": "trl"},
    "top-k": {"kl_estimator": "topk", "kl_top_k": 8},
    "sampled": {"kl_estimator": "sampled"},
    "γ = 1": {"kl_discount": 1.0},
    "parked teacher": {"teacher_offload": True},
    "reward and exact KL": {"rewards": True, "num_generations": 4, "beta": 0.3},
    "LoRA": {"lora": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "chunks of a batch": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4},
}


PRECISIONS: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": True}}


class Steps(TrainerCallback):
    """Keeps loss and gradient norm of each step."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.found.append({"loss": logs["loss"], "grad_norm": float(logs["grad_norm"])})


def train(way: dict[str, Any], device: str, precision: str, folder: str) -> dict[str, Any]:
    """Three steps of one way: losses, norms of gradients, and on a GPU the peak memory in MiB."""
    settings = dict(way)
    teacher = settings.pop("teacher", str(SHIPPED / "teacher"))
    rewards, adapter = settings.pop("rewards", False), settings.pop("lora", False)
    set_seed(0)
    student: Any = AutoModelForCausalLM.from_pretrained(SHIPPED / "student", dtype=torch.float32)
    fixed: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": STEPS,
        "per_device_train_batch_size": PROMPTS,
        "max_completion_length": 40,
        "top_k": 1,  # the same rollouts wherever they are made
        "learning_rate": 1e-4,
        "use_cpu": device == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    steps = Steps()
    trainer = OPDTrainer(
        model=student,
        teacher_model=teacher,
        reward_funcs=length if rewards else None,
        args=OPDConfig(**{**fixed, **PRECISIONS[precision], **settings}),
        train_dataset=Dataset.from_list(list(problems(64, 1))).select_columns(["prompt"]),
        processing_class=AutoTokenizer.from_pretrained(SHIPPED / "student"),
        peft_config=lora() if adapter else None,
        callbacks=[steps],
    )
    trainer.remove_callback(PrinterCallback)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    peak = 0.0 if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
    return {"steps": steps.found, "peak_mib": round(peak, 1)}


def distance(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest relative difference of a step's loss or gradient norm."""
    pairs = zip(found["steps"], expected["steps"], strict=True)
    return max(abs(a[name] - b[name]) / max(abs(b[name]), 1e-3) for a, b in pairs for name in ("loss", "grad_norm"))


def attempt(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """One way that fails shall not cost the others."""
    try:
        return call()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def compared(name: str, device: str) -> dict[str, Any]:
    """One way on the CPU, and in each precision on the device, with the distance from the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = False  # fp32 as on the CPU
    with tempfile.TemporaryDirectory() as folder:
        found = {"cpu": attempt(lambda: train(WAYS[name], "cpu", "fp32", folder))}
        for precision in PRECISIONS:
            one = attempt(lambda p=precision: train(WAYS[name], device, p, folder))  # type: ignore[misc]
            problem = found["cpu"].get("failed") or one.get("failed")
            found[precision] = {**one, "distance": None if problem else distance(one, found["cpu"])}
    return found


def _shown(told: dict[str, Any]) -> str:
    return told.get("failed") or format(told["distance"], ".1e")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cuda", help="beside the CPU")
    parser.add_argument("--workers", type=int, default=1, help="ways at once")
    options = parser.parse_args(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("This compares a GPU with the CPU, and PyTorch sees no GPU.")
    be_quiet()
    libraries = ("torch", "transformers", "trl", "peft", "trl_distill")
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else options.device,
        "versions": {"Python": platform.python_version(), **{name: version(name) for name in libraries}},
    }
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn"), be_quiet) as pool:
        found = pool.map(compared, WAYS, [options.device] * len(WAYS))
        report["ways"] = {}
        for name, told in zip(WAYS, found, strict=True):
            report["ways"][name] = told
            console.print(f"{name}: " + ", ".join(f"{p} {_shown(told[p])}" for p in PRECISIONS))
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(report, indent=1) + "\n")
    failed = [
        name for name, of in report["ways"].items() if of["fp32"]["distance"] is None or of["fp32"]["distance"] > 1e-3
    ]
    console.print(
        f"Results are in {options.results}." + (f" Not equal in fp32: {', '.join(failed)}." if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
