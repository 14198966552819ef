"""Distil a teacher into a student on the student's own rollouts, with or without rewards.

    trl-distill train --model_name_or_path Qwen/Qwen3-0.6B --teacher_model_name_or_path Qwen/Qwen3-4B \\
        --dataset_name prompts.jsonl --learning_rate 5e-5 --max_completion_length 1024 --output_dir out

Several devices: `--accelerate_config zero3`, or `accelerate launch -m trl_distill.cli train ...`. No GPU: `--use_cpu
--bf16 false`. Fits the teacher the student? `trl-distill check`, with the same arguments.

`--dataset_name` is a name on the hub, a local folder or a `.jsonl` file, with a "prompt" column (text or messages).
Rewards come by import path: `--reward_funcs my_module.my_reward` (importable from here), or a name from `trl.rewards`.
Other teachers: `--teacher_models '{"math": "a", "code": "b"}'`, `--teacher_server_urls http://...`,
`--teacher_ema 0.99`, `--teacher_model_name_or_path adapter-off`; see docs/teachers.md.

All arguments of TRL's `ScriptArguments`, `ModelConfig` and `GRPOConfig` are there; they may also stand in a YAML file,
`--config FILE`. SIGTERM saves a checkpoint after the current step and ends with status 75; `--resume_from_checkpoint
auto` goes on from the last complete one. In `--output_dir`, `$NAME` is an environment variable (`$WANDB_RUN_ID` in a
sweep); `--together="--a 1 --b 2"` is several arguments in one, for sweeps.

Left out on purpose: data preparation, and any default that differs from `OPDConfig`'s.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from .. import OPDConfig, OPDTrainer, TeacherAnswerError, TeacherUnavailable, foreign_text
from ..checks import memory
from ..checks.findings import Finding, PreflightError, Report
from ..data.datasets import load_splits, take_split
from ..data.rewards import import_reward
from ..errors import CheckpointError, NonFiniteLossError, RunawayError, StoppedBySignal
from ..training.checkpoints import last_complete
from ..training.deepspeed_ops import build_ops
from ..training.interrupts import EXIT_STOPPED, StopOnSigterm
from ..training.process_group import distributed_main
from ..training.setup import facts_of
from .arguments import errors_without_traceback, expand_together, with_environment
from .dataclass_parser import DataclassParser
from .launch import LaunchArguments, become, launch_command
from .log_line import show_lines


MOST_USED = (  # what `--help` shows first
    *("model_name_or_path", "teacher_model_name_or_path", "dataset_name", "reward_funcs", "output_dir"),
    *("learning_rate", "max_steps", "per_device_train_batch_size", "num_generations", "max_completion_length"),
    *("use_peft", "resume_from_checkpoint", "accelerate_config"),
)


@dataclass
class OPDScriptArguments(ScriptArguments):
    """
    Arguments of this script beside the model's and the trainer's.

    Args:
        reward_funcs (`list[str]`, *optional*):
            Import paths of reward functions, `package.module.function`, or names from `trl.rewards`.
        check_only (`bool`, *optional*, defaults to `False`):
            Load everything, compare teacher and student, print what was found, and stop.
        log_format (`str`, *optional*, defaults to `"line"`):
            What a terminal shows of each log: one `"line"`, or all of it (`"full"`), as where there is no terminal.
    """

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Rewards: import paths (`module.function`) or names from trl.rewards."},
    )
    check_only: bool = field(
        default=False, metadata={"help": "Compare teacher and student, print what was found, and stop."}
    )
    log_format: Literal["line", "full"] = field(
        default="line",
        metadata={"help": "Of each log: one line on a terminal, or everything (as where there is no terminal)."},
    )


def show(report: Report, error: Exception | None = None) -> None:
    """Print the preflight as a table, and leave: with status 1 where the run could not begin."""
    if error is not None and not isinstance(error, PreflightError):
        report.add(Finding("settings", "error", str(error)))
    if int(os.environ.get("RANK", "0")) == 0:
        chosen = sys.stdout.isatty() or "COLUMNS" in os.environ
        foreign_text.console(width=None if chosen else 140).print(report.table())
    sys.exit(1 if report.count("error") else 0)


def data_of(script_args: OPDScriptArguments, args: OPDConfig) -> tuple[Any, Any]:
    """The datasets for training and, where it is asked for, evaluation."""
    splits = load_splits(str(script_args.dataset_name), script_args.dataset_config, script_args.dataset_streaming)
    train = take_split(splits, script_args.dataset_train_split, "training")
    if args.eval_strategy == "no":
        return train, None
    return train, take_split(splits, script_args.dataset_test_split, "evaluation")


def checkpoint_of(trainer: OPDTrainer) -> str | None:
    """What `--resume_from_checkpoint` means: a folder, or `None` for a run from the beginning."""
    resume = trainer.args.resume_from_checkpoint
    if resume in ("auto", "True", "true"):
        found = last_complete(trainer.args.output_dir)
        where = f"Going on from {found}" if found else f"No checkpoint in {trainer.args.output_dir}: anew"
        trainer.accelerator.print(where)
        return found
    if resume in (None, "", "False", "false"):
        return None
    if not Path(resume).is_dir():
        sys.exit(f"There is no checkpoint {resume!r}. Name a folder, or write `--resume_from_checkpoint auto`.")
    return resume


@distributed_main
def main(script_args: OPDScriptArguments, args: OPDConfig, model_args: ModelConfig) -> None:
    if model_args.model_name_or_path is None:
        sys.exit("There is no student. Name it with `--model_name_or_path`.")
    if script_args.dataset_name is None:
        sys.exit("There is no dataset. Name it with `--dataset_name`: a hub name, a folder or a `.jsonl` file.")
    with errors_without_traceback():
        args.output_dir = with_environment(args.output_dir or "")
        rewards = [import_reward(path) for path in script_args.reward_funcs or []]
        train, evaluate = data_of(script_args, args)
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
        report = getattr(trainer, "preflight", Report())  # without a teacher there is nothing to compare
        if trainer.pool is not None:
            report.add(memory.of_run(trainer, facts_of(trainer).counted_prompts()))
        show(report)
    if script_args.log_format == "line" and sys.stdout.isatty():
        show_lines(trainer)
    resume = checkpoint_of(trainer)
    try:
        with stop.listening(interrupt=True):
            trainer.train(resume_from_checkpoint=resume)
    except StoppedBySignal as error:
        trainer.accelerator.print(f"{error}")
        sys.exit(EXIT_STOPPED)
    except (CheckpointError, NonFiniteLossError, RunawayError, TeacherAnswerError, TeacherUnavailable) as error:
        sys.exit(f"{error}")
    save(trainer, script_args, model_args)


def save(trainer: OPDTrainer, script_args: OPDScriptArguments, model_args: ModelConfig) -> None:
    """The model and the log, in `--output_dir` and perhaps on the hub."""
    args = trainer.args
    trainer.save_model(args.output_dir)
    trainer.save_state()  # the log, beside the model
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    what = "The adapter" if model_args.use_peft else "The model"
    trainer.accelerator.print(f"Done after {trainer.state.global_step} steps. {what} is in {args.output_dir}")


def make_parser(command: str = "train", text: str | None = __doc__) -> DataclassParser:
    """The parser; `trl-distill check` has it under its own name."""
    types = [OPDScriptArguments, OPDConfig, ModelConfig, LaunchArguments]
    return DataclassParser(types, command=command, text=text, first=MOST_USED)


def parsed(
    arguments: list[str], parser: DataclassParser | None = None
) -> tuple[OPDScriptArguments, OPDConfig, ModelConfig]:
    """The command line's, and a YAML file's that it names."""
    parser = parser or make_parser()
    with errors_without_traceback():
        script_args, args, model_args, _ = parser.parse_args_and_config(expand_together(arguments))
    return script_args, args, model_args


def run(arguments: list[str], command: str = "train", text: str | None = __doc__) -> None:
    """The command: its arguments, or a YAML file's that they name."""
    parser = make_parser(command, text)
    with errors_without_traceback():
        line = launch_command(parser.options(expand_together(arguments)), command, arguments, os.environ)
    if line:
        become(line)
    build_ops()  # before DeepSpeed does so in silence
    script_args, args, model_args = parsed(arguments, parser)
    script_args.check_only = script_args.check_only or command == "check"
    main(script_args, args, model_args)
