"""A pruned language model is healed: four ways of distillation at equal cost, on a model that somebody trained.

The teacher is SmolLM2-135M-Instruct, the student the same without nine of its thirty layers (`models.py`).

    python -m scripts.studies.pretrained.run --prepare    # models and prompts only
    python -m scripts.studies.pretrained.run              # all arms, one seed; on-policy takes 20 minutes of one core
    python -m scripts.studies.pretrained.run --device cuda  # the same on a GPU, two minutes an arm
    python -m scripts.studies.pretrained.run --seeds 0 1 2
    python -m scripts.studies.pretrained.run --report     # tables and picture from finished runs

Every finished run leaves a file in docs/results/pretrained/; if interrupted, rerun the command to resume. Two processes
may be started with different `--arms`.
"""

from __future__ import annotations

from scripts.studies.startup import ONE_THREAD, prepare_environment  # before the libraries


prepare_environment(OMP_NUM_THREADS=ONE_THREAD, TOKENIZERS_PARALLELISM="false")

import argparse
import functools
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from rich.progress import track
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from scripts.studies.pretrained import report
from scripts.studies.pretrained.measure import BATCH, LIMIT, TOGETHER, Written, accuracy, compare, write
from scripts.studies.pretrained.models import load, make_student, make_teacher
from scripts.studies.pretrained.prompts import VERIFIED, capitals, held_out, training_prompts
from trl_distill import OPDConfig, OPDTrainer, foreign_text


DOCS = Path(__file__).parents[3] / "docs"


STEPS = 80  # of 16 answers


MOMENTS = 4  # measurements during a run


console = foreign_text.console()


@dataclass(frozen=True)
class Arm:
    """
    A way to spend the same number of answers.

    Attributes:
        label (`str`): as tables show it.
        parts (`tuple[str, ...]`): kinds of training, one after the other, with equal numbers of steps.
    """

    label: str
    parts: tuple[str, ...]


ARMS = {
    "on-policy": Arm("on-policy", ("on-policy",)),
    "distributions": Arm("the teacher's distributions on its answers (`lmbda=0`)", ("distributions",)),
    "sft": Arm("SFT on the teacher's answers", ("sft",)),
    "distributions-first": Arm("its distributions, then on-policy", ("distributions", "on-policy")),
    "sft-first": Arm("SFT, then on-policy", ("sft", "on-policy")),
}


RATES = {"on-policy": 2e-4, "distributions": 4e-4, "sft": 4e-4}  # peaks; from the sweep, SFT's is that of distributions


class Study:
    """
    Models, prompts and the teacher's answers, made in `folder` unless they are there.

    Args:
        folder (`Path`): for what is too large for the results.
        hub (`str`, *optional*): the teacher's name on the model hub; without one it comes from PyPI.
        seed (`int`): of prompts and answers.
        steps (`int`): of a whole run.
        device (`str`): where models are trained and measured: "cpu" or "cuda".
    """

    def __init__(self, folder: Path, hub: str | None, seed: int, steps: int, device: str = "cpu"):
        self.folder, self.seed, self.steps, self.device = folder, seed, steps, device
        folder.mkdir(parents=True, exist_ok=True)
        self.teacher_path = make_teacher(folder, hub)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.teacher_path)
        self.teacher = load(self.teacher_path, device).eval()
        first = training_prompts(self.tokenizer, 24, seed=7)
        written = functools.partial(write, self.teacher, self.tokenizer, list(first), 7)
        self.student_path = make_student(folder, self.teacher_path, written)
        self.held_out = list(held_out(self.tokenizer, 96))
        self.verified = [*held_out(self.tokenizer, 96, VERIFIED), *capitals()]
        self.answers = self._kept("held-out", lambda: self._write_all(self.held_out, 1))

    def _write_all(self, rows: list[dict[str, Any]], seed: int) -> Written:
        made: Written = []
        for start in track(range(0, len(rows), TOGETHER), "the teacher writes", console=console, transient=True):
            made += write(self.teacher, self.tokenizer, rows[start : start + TOGETHER], seed + start)
            if not console.is_terminal and start // TOGETHER % 10 == 9:  # where bars are drawn only at the end
                console.print(f"the teacher has written {len(made)} of {len(rows)} answers")
        return made

    def _kept(self, name: str, make: Any) -> Any:
        path = self.folder / f"{name}.json"
        if not path.exists():
            part = path.with_suffix(".part")
            part.write_text(json.dumps(make()))
            part.replace(path)
        return json.loads(path.read_text())

    def rows(self) -> Dataset:
        """
        Training prompts with the teacher's answer in the column "completion".

        Only those that the teacher answered within the limit: the first ones in the order of the seed, so all arms
        train on the same prompts.
        """
        wanted = self.steps * BATCH
        asked = training_prompts(self.tokenizer, 2 * wanted, self.seed)
        written = self._kept(
            f"answers-{self.seed}-{wanted}", lambda: self._write_all(list(asked), 1000 * (1 + self.seed))
        )
        whole = [
            {**row, "completion": [{"role": "assistant", "content": self.tokenizer.decode(ids[:-1])}]}
            for row, (_, ids) in zip(asked, written, strict=True)
            if ids[-1] == self.tokenizer.eos_token_id
        ]
        if len(whole) < wanted:
            raise SystemExit(f"The teacher ended only {len(whole)} of {len(asked)} answers; {wanted} are needed.")
        return Dataset.from_list(whole[:wanted])

    def glance(self, model: Any) -> float:
        """KL to the teacher on a quarter of the held-out prompts."""
        return compare(model, self.teacher, write(model, self.tokenizer, self.held_out[:24], 3))["reverse_kl"]

    def measure(self, model: Any) -> dict[str, Any]:
        """All that the tables show of a model."""
        model.eval()
        own = write(model, self.tokenizer, self.held_out, 2)
        on_own, on_teachers = compare(model, self.teacher, own), compare(model, self.teacher, self.answers)
        greedy = write(model, self.tokenizer, self.held_out[: len(report.SHOWN)], 0, temperature=0)
        return {
            "reverse_kl": on_own["reverse_kl"],
            "teacher_nll_of_own": on_own["teacher_nll"],
            "own_nll": on_own["student_nll"],
            "forward_kl": on_teachers["forward_kl"],
            "agreement": on_teachers["agreement"],
            "length": sum(len(ids) for _, ids in own) / len(own),
            "accuracy": accuracy(model, self.tokenizer, self.verified),
            "samples": [self.tokenizer.decode(ids, skip_special_tokens=True) for _, ids in greedy],
        }


class Log(TrainerCallback):
    """Keeps what a trainer logs, counts tokens, and looks at the model now and then."""

    def __init__(self, study: Study, first: int, every: int):
        self.study, self.first, self.every = study, first, every
        self.lines: list[dict[str, float]] = []
        self.curve: list[tuple[int, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not self.first:
            self.curve.append((0, self.study.glance(model)))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            kept = {name: round(value, 5) for name, value in logs.items() if _is_told(name, value)}
            self.lines.append({"step": self.first + state.global_step, **kept})

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        step = self.first + state.global_step
        if step % self.every == 0:
            self.curve.append((step, self.study.glance(model)))
            console.print(f"step {step}: KL to the teacher {self.curve[-1][1]:.3f}")


def _is_told(name: str, value: Any) -> bool:
    told = ("loss", "grad_norm", "learning_rate", "completions/mean_length", "completions/clipped_ratio", "entropy")
    return isinstance(value, float) and (name in told or name.startswith("distill/"))


def trained(study: Study, model: Any, kind: str, rows: Dataset, log: Log, rates: dict[str, float]) -> None:
    """One part of a run, in place."""
    settings: dict[str, Any] = {
        "output_dir": str(study.folder / "scratch"),
        "max_steps": len(rows) // BATCH,
        "per_device_train_batch_size": BATCH,
        "learning_rate": rates[kind],
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": study.seed,
        "use_cpu": study.device == "cpu",
        "bf16": True,  # autocast: products in bf16, weights and optimizer in fp32
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    shared: dict[str, Any] = {"model": model, "processing_class": study.tokenizer, "callbacks": [log]}
    if kind == "sft":
        rows = rows.select_columns(["prompt", "completion"])
        trainer: Any = SFTTrainer(args=SFTConfig(**settings), train_dataset=rows, **shared)
    else:
        lmbda = {"on-policy": 1.0, "distributions": 0.0}[kind]
        args = OPDConfig(**settings, max_completion_length=LIMIT, lmbda=lmbda)
        trainer = OPDTrainer(args=args, teacher_model=str(study.teacher_path), train_dataset=rows, **shared)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def run(study: Study, arm: str) -> dict[str, Any]:
    """One arm, from the student to its numbers."""
    model, rows = load(study.student_path, study.device), study.rows()
    log = Log(study, 0, study.steps // MOMENTS)
    clock = time.process_time if study.device == "cpu" else time.perf_counter  # of one core, whatever else runs
    begun, share = clock(), study.steps // len(ARMS[arm].parts)
    for part, kind in enumerate(ARMS[arm].parts):
        log.first = part * share
        these = rows.select(range(part * share * BATCH, (part + 1) * share * BATCH))
        trained(study, model, kind, these, log, RATES)
    seconds = round(clock() - begun)
    machine = "one core" if study.device == "cpu" else torch.cuda.get_device_name()
    found = {"final": study.measure(model), "curve": log.curve, "log": log.lines}
    return {**found, "seconds": seconds, "machine": machine}


def save(name: str, found: dict[str, Any], folder: Path) -> None:
    """Write a result that is either whole or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{name}.part"
    part.write_text(json.dumps(found, indent=None) + "\n")
    part.replace(folder / f"{name}.json")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("pretrained_output"), help="models and answers")
    parser.add_argument(
        "--results", type=Path, default=DOCS / "results" / "pretrained", help="a file for each finished run"
    )
    parser.add_argument(
        "--hub", help="the teacher's name on the model hub, such as HuggingFaceTB/SmolLM2-135M-Instruct"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of 16 answers; a multiple of 4")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train and measure")
    parser.add_argument("--recorded_layers", action="store_true", help="leave out the layers that were found before")
    parser.add_argument("--prepare", action="store_true", help="make models and prompts, and stop")
    parser.add_argument("--report", action="store_true", help="run nothing; write tables and picture")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    logging.getLogger("trl_distill").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    disable_progress_bar()
    if options.report:
        labels = {name: arm.label for name, arm in ARMS.items()}
        return report.write(options.results, labels, DOCS / "pretrained.md", DOCS / "images" / "pretrained.png")
    if options.recorded_layers:
        recorded = json.loads((DOCS / "results" / "pretrained" / "before.json").read_text())["pruning"]
        save("pruning", recorded, options.output_dir)
    for seed in options.seeds:
        study = Study(options.output_dir, options.hub, seed, options.steps, options.device)
        if options.prepare:
            prepare_files(study)
            continue
        if not (options.results / "before.json").exists():
            models = {"student": load(study.student_path, study.device), "teacher": study.teacher}
            pruning = json.loads((options.output_dir / "pruning.json").read_text())
            measured = {name: study.measure(model) for name, model in models.items()}
            prompts = [row["prompt"][0]["content"] for row in study.held_out[: len(report.SHOWN)]]
            save("before", {**measured, "pruning": pruning, "prompts": prompts}, options.results)
        for arm in options.arms:
            name = f"{arm}-{seed}"
            if not (options.results / f"{name}.json").exists():
                console.print(f"{ARMS[arm].label}, seed {seed}")
                found = run(study, arm)
                rates = {kind: RATES[kind] for kind in ARMS[arm].parts}
                save(name, {"arm": arm, "seed": seed, "steps": options.steps, "rates": rates, **found}, options.results)
    console.print(f"Results are in {options.output_dir if options.prepare else options.results}.")


def prepare_files(study: Study) -> None:
    """Prompts with the teacher's answers as a dataset, for the commands of the tutorial and the sweep."""
    folder = study.folder / "prompts"
    folder.mkdir(exist_ok=True)
    study.rows().to_json(str(folder / "train.jsonl"))
    answers = [[{"role": "assistant", "content": study.tokenizer.decode(ids[:-1])}] for _, ids in study.answers]
    tested = [{**row, "completion": answer} for row, answer in zip(study.held_out, answers, strict=True)]
    Dataset.from_list(tested[:32]).to_json(str(folder / "test.jsonl"))
    Dataset.from_list(study.verified).to_json(str(study.folder / "verified.jsonl"))


if __name__ == "__main__":
    main()
