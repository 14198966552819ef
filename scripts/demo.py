"""On-policy distillation in miniature, in four minutes on a CPU: `make demo`.

python scripts/demo.py
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path[0] = str(Path(__file__).resolve().parents[1])  # the studies are imported as `scripts.studies`

from scripts.studies.startup import ONE_THREAD, prepare_environment  # before the libraries


prepare_environment(HF_HUB_OFFLINE="1", OMP_NUM_THREADS=ONE_THREAD)

from scripts.studies.demo.run import main


if __name__ == "__main__":
    main()
