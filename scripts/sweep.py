"""A sweep's runs, one after another: `trl-distill sweep` as a file.

python scripts/sweep.py --sweep scripts/sweeps/beta.yaml --output_dir sweeps/beta
"""

from __future__ import annotations

import sys

from trl_distill.cli.__main__ import main


if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
