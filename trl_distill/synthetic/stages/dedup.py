"""Exact and near duplicates, found in one pass over the rows with the index on disk; the earliest row stays.

Signatures are datasketch's MinHash. They only propose: whether two rows are duplicates is decided by the Jaccard
similarity of their word 3-grams, so that no row is dropped for an error of estimation. What a row's text is, and what
becomes of duplicates, is left to the caller.
"""

from __future__ import annotations

import importlib.util
import sqlite3
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from ..shingles import jaccard, shingles
from ..text import normal, numbers
from ..work_folder import digest


PERMUTATIONS = 128


MISSED = 1e-3  # chance that two rows right at the threshold do not meet


def check_installed(threshold: float) -> None:
    """
    Raises:
        ValueError: near duplicates are to be found, and datasketch is not installed.
    """
    if threshold > 0 and importlib.util.find_spec("datasketch") is None:
        raise ValueError(
            f"`near_duplicates={threshold:g}` needs datasketch: install it with `pip install 'trl_distill[synthetic]'`"
            ", or look for exact duplicates only with `--near_duplicates 0`."
        )


class Seen:
    """
    A set of keys on disk.

    Args:
        path (`Path`): of the database, which is made anew.
    """

    def __init__(self, path: Path):
        path.unlink(missing_ok=True)
        self.db = sqlite3.connect(path, isolation_level=None)
        # nothing to recover: a killed run makes the index anew
        self.db.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-16384;")
        self.db.execute("BEGIN")  # one transaction that is never committed: rows reach the disk when the cache is full
        self.db.execute("CREATE TABLE seen (key BLOB PRIMARY KEY) WITHOUT ROWID")

    def add(self, key: bytes) -> bool:
        """Whether the key is new."""
        return self.db.execute("INSERT OR IGNORE INTO seen VALUES (?)", (key,)).rowcount == 1

    def close(self) -> None:
        self.db.close()


class Duplicates(Seen):
    """
    Says of each row whether an equal or similar one came before.

    Args:
        path (`Path`): of the database, which is made anew.
        threshold (`float`): Jaccard similarity of word 3-grams from which rows are near duplicates; 0 looks for exact
            ones only.
    """

    def __init__(self, path: Path, threshold: float):
        super().__init__(path)
        self.threshold = threshold
        if threshold > 0:
            from datasketch import MinHash  # needs SciPy, which takes a second to load

            self.empty = MinHash(PERMUTATIONS, seed=1, scheme="affine64", hashfunc=int)
            self.rows_per_band = rows_per_band(threshold)
            self.db.execute("CREATE TABLE grams (row INTEGER PRIMARY KEY, hashes BLOB)")
            self.db.execute("CREATE TABLE bands (key INTEGER, row INTEGER, PRIMARY KEY (key, row)) WITHOUT ROWID")

    def fault(self, prompt: str, completion: str, images: Sequence[str] = ()) -> str | None:
        """
        Why a row is dropped, or `None` for a new one, which is remembered.

        Args:
            prompt (`str`): rows whose prompts name different numbers are not near duplicates, however long the text
                around these numbers.
            completion (`str`): or, for a preference pair, both.
            images (`Sequence[str]`): hashes of the prompt's images; rows with others are not duplicates.
        """
        if not self.add(digest(normal(prompt), normal(completion), *images)):
            return "exact duplicate"
        if self.threshold == 0:
            return None
        hashes = shingles(f"{prompt}\n{completion}")
        keys = self._bands(hashes, repr((*numbers(prompt), *images)))
        marks = ",".join("?" * len(keys))
        near = self.db.execute(
            f"SELECT hashes FROM grams WHERE row IN (SELECT row FROM bands WHERE key IN ({marks}))", keys
        )
        if any(jaccard(hashes, np.frombuffer(found, np.uint64)) >= self.threshold for (found,) in near):
            return "near duplicate"
        row = self.db.execute("INSERT INTO grams (hashes) VALUES (?)", (hashes.tobytes(),)).lastrowid
        self.db.executemany("INSERT OR IGNORE INTO bands VALUES (?, ?)", [(key, row) for key in keys])
        return None

    def _bands(self, hashes: np.ndarray, guard: str) -> list[int]:
        """Keys under which rows meet that are likely to be similar; 64 bits, with the prompt's numbers in them."""
        signature = self.empty.copy()
        signature.update_batch(hashes.tolist())
        values, size = signature.digest(), self.rows_per_band
        bands = ((i, values[i : i + size].tobytes()) for i in range(0, PERMUTATIONS - size + 1, size))
        common = guard.encode()
        return [
            int.from_bytes(blake2b(b"%d %b" % (i, band) + common, digest_size=8).digest(), "big", signed=True)
            for i, band in bands
        ]


def rows_per_band(threshold: float) -> int:
    """The most hash values in a band with which two rows right at the threshold meet but for the chance `MISSED`."""
    return next(
        rows
        for rows in range(PERMUTATIONS, 0, -1)
        if rows == 1 or (1 - threshold**rows) ** (PERMUTATIONS // rows) <= MISSED
    )
