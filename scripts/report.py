"""A page of completions, token by token: `trl-distill report` as a file.

python scripts/report.py --model out --teacher Qwen/Qwen3-4B --prompts prompts.jsonl
"""

from __future__ import annotations

import sys

from trl_distill.cli.__main__ import main


if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
