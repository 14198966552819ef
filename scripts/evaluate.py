"""How good saved models are: `trl-distill evaluate` as a file.

    python scripts/evaluate.py --model_name_or_path student out --dataset_name test.jsonl \\
        --teacher_model_name_or_path Qwen/Qwen3-4B
"""

from __future__ import annotations

import sys

from trl_distill.cli.__main__ import main


if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
