"""What `torch.compile` brings: losses and gradients beside eager ones, graphs that were compiled, seconds per step.

Random models, ragged rollouts. Left out: generation with static caches, several processes, GPUs.

    python -m scripts.studies.compile.run                      # five minutes on two CPU cores
    python -m scripts.studies.compile.run --ways eager whole   # `torch_compile=True`: further minutes of compiling
"""

from __future__ import annotations

from scripts.studies.startup import ONE_THREAD, prepare_environment  # before the libraries


prepare_environment(HF_HUB_OFFLINE="1", OMP_NUM_THREADS=ONE_THREAD)

import argparse
import json
import logging
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo as dynamo
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, TrainerCallback, set_seed

from trl_distill import OPDConfig, OPDTrainer


WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(2046))]
SIZES = {  # hidden size, layers, batch, longest completion
    "small": {"student": (256, 4), "teacher": (384, 8), "batch": 16, "completion": 128},
    "tiny": {"student": (32, 1), "teacher": (32, 1), "batch": 4, "completion": 12},
}


def make_model(seed: int, hidden: int, layers: int) -> Any:
    set_seed(seed)
    return AutoModelForCausalLM.from_config(
        Qwen3Config(
            vocab_size=len(WORDS),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 32,
            head_dim=32,
            max_position_embeddings=512,
            pad_token_id=0,
            eos_token_id=1,
            initializer_range=0.1,
        )
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def compile_layers(model: Any) -> None:
    """Compile the decoder layers, except for sampling, whose growing caches would soon hit the recompile limit."""
    for layer in model.model.layers:
        layer.forward = without_cache(torch.compile(layer.forward, dynamic=True), layer.forward)


def without_cache(compiled: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if kwargs.get("past_key_values") is None else eager)(*args, **kwargs)

    return forward


def compile_layers_always(model: Any) -> None:
    """Compile the decoder layers in place, as one would at first: sampling is compiled, too."""
    for layer in model.model.layers:
        layer.compile(dynamic=True)


def compile_backbone(model: Any) -> None:
    model.model.compile(dynamic=True)


def unchanged(_model: Any) -> None:
    """Leave the model as it is."""


# by name: what is done to the student, to the teacher, and further settings
WAYS: dict[str, tuple[Callable[[Any], None], Callable[[Any], None], dict[str, Any]]] = {
    "eager": (unchanged, unchanged, {}),
    "teacher's backbone": (unchanged, compile_backbone, {}),
    "teacher's layers": (unchanged, compile_layers, {}),
    "layers of both": (compile_layers, compile_layers, {}),
    "layers of both, sampling too": (compile_layers_always, compile_layers_always, {}),
    "whole": (unchanged, unchanged, {"torch_compile": True}),
}


class LimitHits(logging.Handler):
    """Counts functions that were recompiled too often, and run eagerly from then on."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "recompile_limit" in record.getMessage() and "hit" in record.getMessage()


def ragged(batch: int, longest: int, steps: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A stand-in for sampling: completions of random tokens and of other lengths in every step, the same every time."""
    draw = random.Random(0)
    lengths = [[draw.randint(longest // 8, longest - step) for _ in range(batch)] for step in range(steps + 1)]

    def completions(prompts: torch.Tensor) -> torch.Tensor:
        drawn = lengths.pop(0)
        ids = torch.zeros(len(prompts), max(drawn), dtype=torch.long)
        for row, length in enumerate(drawn[: len(prompts)]):
            ids[row, : length - 1] = torch.tensor([draw.randrange(2, len(WORDS)) for _ in range(length - 1)])
            ids[row, length - 1] = 1
        return torch.cat([prompts, ids], dim=1)

    return completions


class Clock(TrainerCallback):
    """Of each step: seconds, graphs compiled so far, and the gradient."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.graphs: list[int] = []
        self.gradients: list[torch.Tensor] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)
        self.graphs.append(dynamo.utils.counters["stats"]["unique_graphs"])


def run(way: str, size: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train with the rollouts of [`ragged`]: losses, gradients, seconds and graphs by step, and all seconds."""
    of_student, of_teacher, settings = WAYS[way]
    dynamo.reset()
    dynamo.utils.counters.clear()
    hits, logger = LimitHits(), logging.getLogger("torch._dynamo.convert_frame")
    logger.addHandler(hits)
    began = time.perf_counter()
    student, teacher, clock = make_model(1, *size["student"]), make_model(2, *size["teacher"]), Clock()
    of_student(student)
    of_teacher(teacher)
    prompts = Dataset.from_dict({"prompt": [" ".join(WORDS[2 + i : 6 + i + i % 5]) for i in range(256)]})
    with tempfile.TemporaryDirectory() as folder:
        trainer = OPDTrainer(
            model=student,
            teacher_model=teacher,
            args=OPDConfig(
                output_dir=folder,
                per_device_train_batch_size=size["batch"],
                max_completion_length=size["completion"],
                max_steps=steps,
                learning_rate=1e-4,
                max_grad_norm=0.0,
                bf16=False,
                use_cpu=True,
                gradient_checkpointing=False,
                report_to="none",
                save_strategy="no",
                logging_steps=1,
                disable_tqdm=True,
                **settings,
            ),
            train_dataset=prompts,
            processing_class=make_tokenizer(),
            callbacks=[clock],
        )
        sample = ragged(size["batch"], size["completion"], steps)
        student.generate = lambda input_ids, **_: sample(input_ids)
        trainer.train()
    logger.removeHandler(hits)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": losses,
        "gradients": clock.gradients,
        "seconds": clock.seconds,
        "graphs": clock.graphs,
        "limit_hits": hits.count,
        "whole": time.perf_counter() - began,
    }


def summary(way: str, found: dict[str, Any], eager: dict[str, Any]) -> dict[str, Any]:
    """Largest relative differences from eager, graphs, seconds of the whole run, and per step of its later half."""
    half = len(found["seconds"]) // 2
    pairs = list(zip(found["gradients"], eager["gradients"], strict=True))
    losses = list(zip(found["losses"], eager["losses"], strict=True))
    return {
        "way": way,
        "loss_difference": max(abs(ours - theirs) / abs(theirs) for ours, theirs in losses),
        "gradient_difference": max(((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in pairs),
        "graphs": found["graphs"][-1],
        "graphs_in_later_half": found["graphs"][-1] - found["graphs"][half - 1],
        "recompile_limit_hits": found["limit_hits"],
        "seconds_of_run": found["whole"],
        "seconds_per_step": statistics.median(found["seconds"][half:]),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[way for way in WAYS if way != "whole"])
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args(arguments)
    eager = run("eager", SIZES[args.size], args.steps)
    rows = []
    for way in args.ways:
        rows.append(summary(way, eager if way == "eager" else run(way, SIZES[args.size], args.steps), eager))
        print(json.dumps(rows[-1]), flush=True)
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line).split(": ")[1]
    machine = {"cpu": cpu, "threads": torch.get_num_threads(), "python": platform.python_version()}
    results = {"size": args.size, "steps": args.steps, "torch": torch.__version__, **machine, "ways": rows}
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
