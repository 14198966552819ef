"""A teacher with another tokenizer on the demo's task: ours, TRL's GOLD, SFT on its answers, and the ceiling.

    python -m scripts.studies.cross_tokenizer.make_teacher --output_dir cross_tokenizer_teacher
    python -m scripts.studies.cross_tokenizer.run --teacher cross_tokenizer_teacher --write_results

Each arm starts from the demo's student, in a process of its own, with the same prompts, steps, batch, learning rate and
schedule:

- `ours`: `cross_tokenizer=True`, the reverse KL between texts;
- `gold`: TRL's experimental GOLDTrainer on the student's own answers (`lmbda=1`), with its hybrid loss, the reverse KL
  on tokens that both have, and stop tokens included;
- `gold_plain`: the same with the loss that GOLDTrainer has by default once `use_uld_loss` is set;
- `sft`: the likelihood of as many answers of the teacher, each used once;
- `ceiling`: the demo's own teacher, which has the student's tokenizer, id by id.

Measured on held-out problems: right answers, and the KL of whole answers to the teacher with the other tokenizer, from
the same samples, log q(answer) − log p(its text), computed here from plain logits. CPU seconds are those of the
training process, on one thread; memory is its peak. Left out: several seeds, a search for each arm's best settings, and
anything larger than this task.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed

from scripts.studies.demo.student import sample
from scripts.studies.tasks.additions import MAX_COMPLETION_LENGTH, correct, problems
from scripts.studies.tasks.make_models import answer, as_conversation


DEMO = Path(__file__).parents[1] / "tasks" / "models"
RESULTS = Path(__file__).parents[3] / "docs" / "results" / "cross_tokenizer"
ARMS = ("ours", "gold", "gold_plain", "sft", "ceiling")
BATCH = 64


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What all arms share."""
    return {
        "output_dir": str(options.output_dir / options.arm),
        "max_steps": options.steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "adam_beta2": 0.95,
        "logging_steps": 10,
        "save_strategy": "no",
        "seed": options.seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }


def distilling(options: argparse.Namespace, student: Any, tokenizer: Any, rows: Dataset) -> Any:
    from trl_distill import OPDConfig, OPDTrainer

    ours = options.arm == "ours"
    return OPDTrainer(
        model=student,
        teacher_model=str(options.teacher if ours else DEMO / "teacher"),
        args=OPDConfig(
            **settings(options),
            max_completion_length=MAX_COMPLETION_LENGTH,
            cross_tokenizer=ours,
            token_weighting=None,
        ),
        train_dataset=rows.select_columns("prompt"),
        processing_class=tokenizer,
    )


def gold(options: argparse.Namespace, student: Any, tokenizer: Any, rows: Dataset) -> Any:
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    hybrid: dict[str, Any] = {"uld_use_hybrid_loss": True, "beta": 1.0}
    hybrid |= {"uld_skip_student_eos": False, "uld_skip_teacher_eos": False}
    args = GOLDConfig(
        **settings(options),
        **(hybrid if options.arm == "gold" else {}),
        teacher_tokenizer_name_or_path=str(options.teacher),
        use_uld_loss=True,
        lmbda=1.0,
        temperature=1.0,
        top_p=1.0,
        max_completion_length=MAX_COMPLETION_LENGTH,
        max_length=2 * MAX_COMPLETION_LENGTH,
    )
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher)
    return GOLDTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=as_conversation(rows, list(rows["solution"])),  # its completions are not trained on at lmbda=1
        processing_class=tokenizer,
    )


def sft(options: argparse.Namespace, student: Any, tokenizer: Any, rows: Dataset) -> Any:
    from trl import SFTConfig, SFTTrainer

    teacher, other = (
        AutoModelForCausalLM.from_pretrained(options.teacher),
        AutoTokenizer.from_pretrained(options.teacher),
    )
    written = as_conversation(rows, answer(teacher, other, rows, options.seed))
    return SFTTrainer(
        model=student, args=SFTConfig(**settings(options)), train_dataset=written, processing_class=tokenizer
    )


@torch.no_grad()
def measure(student: Any, tokenizer: Any, options: argparse.Namespace, batch_size: int = 250) -> dict[str, float]:
    """Share of right answers, and nats per answer to the teacher with the other tokenizer, on sampled answers."""
    teacher, other = (
        AutoModelForCausalLM.from_pretrained(options.teacher),
        AutoTokenizer.from_pretrained(options.teacher),
    )
    student.eval()
    rows = problems(options.held_out, seed=10_000 + options.seed)
    set_seed(options.seed)
    right, nats, ended = 0.0, 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        ids, attended, completions, mask = sample(student, tokenizer, batch["prompt"])
        log_q = student(input_ids=ids, attention_mask=attended).logits.log_softmax(-1)
        log_q = log_q[:, -completions.shape[1] - 1 : -1].gather(2, completions[:, :, None])[:, :, 0] * mask
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        right += sum(correct(texts, batch["answer"]))
        for prompt, text, own, end in zip(
            batch["prompt"], texts, log_q.sum(1).tolist(), (completions == tokenizer.eos_token_id).any(1), strict=True
        ):
            if not end:
                continue
            read = other.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
            theirs = [*other(text, add_special_tokens=False)["input_ids"], other.eos_token_id]
            log_p = teacher(input_ids=torch.tensor([[*read, *theirs]])).logits[0, len(read) - 1 : -1].log_softmax(-1)
            nats += own - log_p.gather(1, torch.tensor(theirs)[:, None]).sum().item()
            ended += 1
    return {
        "accuracy": right / len(rows),
        "kl_per_answer": nats / max(ended, 1),
        "ended": ended / len(rows),
    }


def run_arm(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "student")
    student = AutoModelForCausalLM.from_pretrained(DEMO / "student")
    student.generation_config.pad_token_id = tokenizer.pad_token_id
    before = measure(student, tokenizer, options) if options.arm == "sft" else None
    student.train()
    rows = problems(BATCH * options.steps, seed=30_000 + options.seed)
    build = {"ours": distilling, "ceiling": distilling, "gold": gold, "gold_plain": gold, "sft": sft}[options.arm]
    trainer = build(options, student, tokenizer, rows)
    trainer.remove_callback(PrinterCallback)
    begun, wall = time.process_time(), time.perf_counter()
    trainer.train()
    found: dict[str, Any] = {
        "cpu_seconds": round(time.process_time() - begun, 1),
        "wall_seconds": round(time.perf_counter() - wall, 1),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    names = ("distill/exact_tokens", "distill/non_canonical", "distill/reverse_kl", "loss")
    logs = [{}, *(row for row in trainer.state.log_history if "loss" in row)]
    found["last_logged"] = {name: logs[-1][name] for name in names if name in logs[-1]}
    found |= measure(student, tokenizer, options)
    return found if before is None else {**found, "before": before}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=Path("cross_tokenizer_teacher"))
    parser.add_argument("--output_dir", type=Path, default=Path("cross_tokenizer_output"))
    parser.add_argument("--arm", choices=ARMS, help="one alone; all, each in a process of its own, unless given")
    parser.add_argument("--steps", type=int, default=200, help=f"optimizer steps of {BATCH} answers")
    parser.add_argument("--learning_rate", type=float, default=6e-4, help="of all arms, at its peak")
    parser.add_argument("--held_out", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--write_results", action="store_true", help=f"to {RESULTS.relative_to(Path(__file__).parents[3])}"
    )
    parser.add_argument("--collect", action="store_true", help="run nothing: what has been measured so far")
    options = parser.parse_args(words)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    if options.arm:
        (options.output_dir / f"{options.arm}.json").write_text(json.dumps(run_arm(options), indent=2) + "\n")
        return
    given = words if words is not None else sys.argv[1:]
    for arm in () if options.collect else ARMS:
        if not (options.output_dir / f"{arm}.json").exists():
            subprocess.run([sys.executable, "-m", __spec__.name, *given, "--arm", arm], check=True)
    files = {arm: options.output_dir / f"{arm}.json" for arm in ARMS}
    arms = {arm: json.loads(path.read_text()) for arm, path in files.items() if path.exists()}
    torch.set_num_threads(1)
    other, teacher = (
        AutoTokenizer.from_pretrained(options.teacher),
        AutoModelForCausalLM.from_pretrained(options.teacher),
    )
    rows = problems(options.held_out, seed=10_000 + options.seed)
    of_teacher = correct(answer(teacher, other, rows, options.seed), rows["answer"])
    result = {
        "steps": options.steps,
        "batch": BATCH,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
        "held_out": options.held_out,
        "teacher_accuracy": sum(of_teacher) / len(of_teacher),
        "before": arms.get("sft", {}).pop("before", None),
        "arms": arms,
    }
    where = RESULTS if options.write_results else options.output_dir
    where.mkdir(parents=True, exist_ok=True)
    (where / "beside_gold.json").write_text(json.dumps(result, indent=2) + "\n")
    for arm, found in arms.items():
        print(f"{arm:8} accuracy {found['accuracy']:.3f}, {found['kl_per_answer']:.2f} nats per answer")


if __name__ == "__main__":
    main()
