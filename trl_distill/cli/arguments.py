"""What the commands share in reading their arguments."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import string
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def prepare_environment() -> None:
    """What must be set before the libraries are imported: no warnings of theirs about each other, no idle looking."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error" if "RANK" not in os.environ else "warning")
    if not os.path.exists("/dev/nvidiactl") and "RANK" not in os.environ:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # where DeepSpeed is installed, it would look for one and warn


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A page of help with every default."""


def template_kwargs(text: str) -> dict[str, Any]:
    """What `--chat_template_kwargs` says."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object; write '{{\"enable_thinking\": false}}'")
    return found


def expand_together(arguments: list[str]) -> list[str]:
    """`--together="--a 1 --b 2"` as its parts: a grid combines all with all, and not all combinations exist."""
    flag = "--together="
    words = [shlex.split(word.removeprefix(flag)) if word.startswith(flag) else [word] for word in arguments]
    return [part for parts in words for part in parts]


def with_environment(output_dir: str) -> str:
    """The folder's name with its `$NAME` replaced: nothing may be written to one that is called "$WANDB_RUN_ID"."""
    try:
        return string.Template(output_dir).substitute(os.environ)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"`--output_dir` is {output_dir!r}, but the environment does not say what to write there ({error}). Set "
            "the variable (`wandb agent` sets WANDB_RUN_ID), give another folder, or write `$$` for a dollar sign."
        ) from None


@contextmanager
def errors_without_traceback() -> Iterator[None]:
    """What is wrong with the arguments is said without a traceback, which would hide it."""
    try:
        yield
    except ValueError as error:
        sys.exit(f"{error}")
