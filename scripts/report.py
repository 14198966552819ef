"""A page of completions, token by token: `trl-distill report` as a file.

    python scripts/report.py --model_name_or_path out --teacher_model_name_or_path Qwen/Qwen3-4B \\
        --dataset_name prompts.jsonl
"""

from __future__ import annotations

import sys

from trl_distill.cli.__main__ import main


if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
