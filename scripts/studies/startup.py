"""What must be set before the libraries are imported."""

from __future__ import annotations

import os
import warnings


def prepare_environment(**changes: str) -> None:
    """
    No warnings of the libraries about each other.

    Args:
        changes: further environment variables, set where they are not set yet.
    """
    for name, value in {
        **changes,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "DS_ACCELERATOR": "cpu",  # where DeepSpeed is installed, it would look for one and warn
    }.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
