"""Curves of runs: `trl-distill plot` as a file.

python scripts/plot.py out
"""

from __future__ import annotations

import sys

from trl_distill.cli.__main__ import main


if __name__ == "__main__":
    sys.exit(main(["plot", *sys.argv[1:]]))
