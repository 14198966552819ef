"""Time and memory of an update: ours beside TRL's trainers.

python scripts/benchmark.py --repeats 3
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path[0] = str(Path(__file__).resolve().parents[1])  # the studies are imported as `scripts.studies`

from scripts.studies.startup import prepare_environment  # before the libraries


prepare_environment(HF_HUB_OFFLINE="1")

from scripts.studies.benchmark.run import script


if __name__ == "__main__":
    sys.exit(script())
