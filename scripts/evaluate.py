"""How good saved models are: `trl-distill evaluate` as a file.

python scripts/evaluate.py --models student out --teacher Qwen/Qwen3-4B --prompts test.jsonl
"""

from __future__ import annotations

import sys

from trl_distill.cli.__main__ import main


if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
