"""Environment variables that must be set before the libraries are imported."""

from __future__ import annotations

import os
import warnings


ONE_THREAD = "1"  # two threads of PyTorch wait for each other at every operation: beside a busy program, for minutes


def prepare_environment(**changes: str) -> None:
    """
    Hide the libraries' warnings about each other, and set defaults. Variables that the user has set are kept.

    Args:
        changes: further environment variables, such as `OMP_NUM_THREADS`.
    """
    for name, value in {
        **changes,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "DS_ACCELERATOR": "cpu",  # if DeepSpeed is installed, it would look for a GPU and warn
    }.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
