"""Compare student, teacher, data and settings before a run, print what was found, and train nothing.

    trl-distill check --model_name_or_path Qwen/Qwen3-0.6B --teacher_model_name_or_path Qwen/Qwen3-4B \\
        --dataset_name prompts.jsonl --output_dir out

Takes the arguments of `trl-distill train`. Status 1 where a run could not begin.
"""

from __future__ import annotations

from . import train


def run(arguments: list[str]) -> None:
    """The command."""
    train.run(arguments, "check", __doc__)
