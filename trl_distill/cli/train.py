"""Distil a teacher into a student on the student's own rollouts, with or without rewards.

    accelerate launch scripts/opd.py \
        --model_name_or_path Qwen/Qwen3-0.6B --teacher_model_name_or_path Qwen/Qwen3-4B \
        --dataset_name prompts.jsonl --learning_rate 1e-5 --max_completion_length 1024 --output_dir out

`--dataset_name` is a name on the hub, a local folder or a `.jsonl` file, with a "prompt" column (text or messages).
Arguments are TRL's own: those of `ScriptArguments`, `ModelConfig` (`--use_peft`, `--lora_r`, `--dtype` ...) and
`OPDConfig`, which holds all of `GRPOConfig`; they may also stand in a YAML file given as `--config`. Rewards come by
import path: `--reward_funcs my_module.my_reward` (importable from here), or a name from `trl.rewards`.
`--resume_from_checkpoint auto` goes on from the last complete checkpoint in `--output_dir`, if there is one. SIGTERM
saves a checkpoint after the current step and exits with status 75. In `--output_dir`, `$NAME` is an environment
variable (`$WANDB_RUN_ID` in a sweep); `--together="--a 1 --b 2"` is several arguments in one, for sweeps. Without a GPU
add `--use_cpu --bf16 false`. `--check_only` compares teacher and student, prints a table and stops.

Other teachers: `--teacher_models '{"math": "a", "code": "b"}'`, `--teacher_server_urls http://...`,
`--teacher_ema 0.99`, `--teacher_model_name_or_path adapter-off`; see docs/teachers.md.

Left out on purpose: data preparation, and any default that differs from `OPDConfig`'s.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from .. import OPDConfig, OPDTrainer, TeacherAnswerError, TeacherUnavailable
from ..checks.findings import Finding, PreflightError, Report
from ..data.datasets import load_splits, take_split
from ..data.rewards import import_reward
from ..errors import CheckpointError, NonFiniteLossError, RunawayError, StoppedBySignal
from ..training.checkpoints import last_complete
from ..training.deepspeed_ops import build_ops
from ..training.interrupts import EXIT_STOPPED, StopOnSigterm
from ..training.process_group import distributed_main
from .arguments import errors_without_traceback, expand_together, with_environment


@dataclass
class OPDScriptArguments(ScriptArguments):
    """
    Arguments of this script beside the model's and the trainer's.

    Args:
        reward_funcs (`list[str]`, *optional*):
            Import paths of reward functions, `package.module.function`, or names from `trl.rewards`.
        check_only (`bool`, *optional*, defaults to `False`):
            Load everything, compare teacher and student, print what was found, and stop.
    """

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Rewards: import paths (`module.function`) or names from trl.rewards."},
    )
    check_only: bool = field(
        default=False, metadata={"help": "Compare teacher and student, print what was found, and stop."}
    )


def show(report: Report, error: Exception | None = None) -> None:
    """Print the preflight as a table, and leave: with status 1 where the run could not begin."""
    if error is not None and not isinstance(error, PreflightError):
        report.add(Finding("settings", "error", str(error)))
    if int(os.environ.get("RANK", "0")) == 0:
        chosen = sys.stdout.isatty() or "COLUMNS" in os.environ
        Console(width=None if chosen else 140).print(report.table())
    sys.exit(1 if report.count("error") else 0)


@distributed_main
def main(script_args: OPDScriptArguments, args: OPDConfig, model_args: ModelConfig) -> None:
    if model_args.model_name_or_path is None:
        sys.exit("There is no student. Name it with `--model_name_or_path`.")
    if script_args.dataset_name is None:
        sys.exit("There is no dataset. Name it with `--dataset_name`: a hub name, a folder or a `.jsonl` file.")
    with errors_without_traceback():
        args.output_dir = with_environment(args.output_dir or "")
        rewards = [import_reward(path) for path in script_args.reward_funcs or []]
        splits = load_splits(script_args.dataset_name, script_args.dataset_config, script_args.dataset_streaming)
        train = take_split(splits, script_args.dataset_train_split, "training")
        evaluate = None
        if args.eval_strategy != "no":
            evaluate = take_split(splits, script_args.dataset_test_split, "evaluation")
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),  # type: ignore[dict-item]
    }

    stop = StopOnSigterm()
    try:
        trainer = OPDTrainer(
            model=model_args.model_name_or_path,
            reward_funcs=rewards or None,
            args=args,
            train_dataset=train,
            eval_dataset=evaluate,
            callbacks=[stop],
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    except (TeacherAnswerError, TeacherUnavailable, ValueError) as error:
        if not script_args.check_only:
            sys.exit(f"{error}")  # it says what to change; a traceback would hide that
        show(getattr(error, "report", Report()), error)
    if script_args.check_only:
        show(getattr(trainer, "preflight", Report()))  # without a teacher there is nothing to compare
    resume = args.resume_from_checkpoint
    if resume in ("auto", "True", "true"):
        resume = last_complete(args.output_dir)
        trainer.accelerator.print(f"Going on from {resume}" if resume else f"No checkpoint in {args.output_dir}: anew")
    elif resume not in (None, "", "False", "false") and not Path(resume).is_dir():
        sys.exit(f"There is no checkpoint {resume!r}. Name a folder, or write `--resume_from_checkpoint auto`.")
    try:
        with stop.listening(interrupt=True):
            trainer.train(resume_from_checkpoint=resume)
    except StoppedBySignal as error:
        trainer.accelerator.print(f"{error}")
        sys.exit(EXIT_STOPPED)
    except (CheckpointError, NonFiniteLossError, RunawayError, TeacherAnswerError, TeacherUnavailable) as error:
        sys.exit(f"{error}")
    trainer.save_model(args.output_dir)
    trainer.save_state()  # the log, beside the model
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    what = "The adapter" if model_args.use_peft else "The model"
    trainer.accelerator.print(f"Done after {trainer.state.global_step} steps. {what} is in {args.output_dir}")


def parsed(arguments: list[str]) -> tuple[OPDScriptArguments, OPDConfig, ModelConfig]:
    """The command line's, and a YAML file's that it names."""
    parser = TrlParser([OPDScriptArguments, OPDConfig, ModelConfig])  # type: ignore[list-item]
    with errors_without_traceback():
        return parser.parse_args_and_config(expand_together(arguments))  # type: ignore[return-value]


def run(arguments: list[str]) -> None:
    """The command: its arguments, or a YAML file's that they name."""
    build_ops()  # before DeepSpeed does so in silence
    main(*parsed(arguments))
