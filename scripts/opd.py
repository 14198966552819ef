"""Distil a teacher into a student: `trl-distill train` as a file, for launchers that name one.

    accelerate launch scripts/opd.py --model_name_or_path Qwen/Qwen3-0.6B \\
        --teacher_model_name_or_path Qwen/Qwen3-4B --dataset_name prompts.jsonl --output_dir out
"""

from __future__ import annotations

import sys

from trl_distill.cli.__main__ import main


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
