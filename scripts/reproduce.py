"""What the literature claims, as experiments that can be resumed.

python scripts/reproduce.py gap
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path[0] = str(Path(__file__).resolve().parents[1])  # the studies are imported as `scripts.studies`

from scripts.studies.startup import ONE_THREAD, prepare_environment  # before the libraries


prepare_environment(OMP_NUM_THREADS=ONE_THREAD)

from scripts.studies.reproduce.run import script


if __name__ == "__main__":
    sys.exit(script())
