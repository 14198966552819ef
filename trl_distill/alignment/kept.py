"""Comparisons of vocabularies in files, so that a pair of tokenizers is compared once on a machine.

They lie in `trl_distill/vocabularies` of Hugging Face's cache folder (`HF_HOME`). A file that is missing, broken or
cannot be written costs time, nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.constants import HF_HOME


VERSION = 1  # raised whenever a comparison may come out differently


def cached_file(student: str, teacher: str) -> Path:
    """The file for two tokenizers, by their hashes."""
    name = hashlib.sha256(f"{VERSION} {student} {teacher}".encode()).hexdigest()[:32]
    return Path(HF_HOME, "trl_distill", "vocabularies", f"{name}.npz")


def read(path: Path) -> dict[str, Any] | None:
    """What [`keep`] has written; `None` if there is nothing that can be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("shared", "closed", "changed", "tokens", "counts")}
            ends = [0, *itertools.accumulate(arrays["counts"].tolist())]
            tokens = arrays["tokens"].tolist()
            return {
                "shared": {v: w for v, w in arrays["shared"].tolist()},  # noqa: C416 (a dict of ints from pairs)
                "closed": {v: w for v, w in arrays["closed"].tolist()},  # noqa: C416
                "unfinished": frozenset(tuple(tokens[start:stop]) for start, stop in itertools.pairwise(ends)),
                "changed": tuple(arrays["changed"].tolist()),
            }
    except Exception:  # a file that somebody else has written, or broken
        return None


def keep(path: Path, found: dict[str, Any]) -> None:
    """Write a comparison, in one operation, in place of what cannot be read; if the folder can be written to."""
    tails = sorted(found["unfinished"])
    arrays = {
        "shared": np.array(list(found["shared"].items()), dtype=np.int64).reshape(-1, 2),
        "closed": np.array(list(found["closed"].items()), dtype=np.int64).reshape(-1, 2),
        "changed": np.array(found["changed"], dtype=np.int64),
        "tokens": np.array(list(itertools.chain.from_iterable(tails)), dtype=np.int64),
        "counts": np.array([len(tail) for tail in tails], dtype=np.int64),
    }
    partial = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.partial")  # a name that no other process has
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "xb") as file:  # with the permissions of other files, since users may share the folder
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
