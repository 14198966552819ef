"""Texts as sets of hashed word 3-grams, and how similar two such sets are."""

from __future__ import annotations

import numpy as np

from .text import words
from .work_folder import digest


SHINGLE = 3  # words


def shingles(text: str) -> np.ndarray:
    """Hashes of a text's different word 3-grams, sorted; a shorter text is one shingle. Shape `(S,)`, uint64."""
    found = words(text)
    grams = {tuple(found[i : i + SHINGLE]) for i in range(max(len(found) - SHINGLE + 1, 1))}
    return np.sort(np.array([int.from_bytes(digest(gram, size=8)) for gram in grams], dtype=np.uint64))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Shared elements by all elements, of two sorted arrays without repetitions."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)
