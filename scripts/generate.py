"""A dataset of teachers' completions: `trl-distill generate` as a file.

    python scripts/generate.py --teacher_model_name_or_path Qwen/Qwen3-8B \\
        --dataset_name prompts.jsonl --output_dir data
"""

from __future__ import annotations

import sys

from trl_distill.cli.__main__ import main


if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
