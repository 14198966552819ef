"""Contamination: texts that share an n-gram of words with a benchmark, as in GPT-3's appendix C (arXiv 2005.14165).

Only hashes of the benchmarks' n-grams are held, 12 bytes each, so that a benchmark of a million n-grams takes 12 MB.
Unlike there, one shared n-gram is enough, however common it is, and the whole row is dropped instead of its
surroundings. Benchmarks are read in `benchmarks.py`; what is looked at, and when, is left to the caller.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from ...server_urls import without_login
from ..text import Text, flat, words


SHORTEST = 8  # words of a benchmark's text from which it counts when wholly contained; the least n in GPT-3's appendix


@dataclass(frozen=True)
class Overlap:
    """
    Words that a text shares with a benchmark.

    Attributes:
        benchmark (`str`): as the settings name it.
        row (`int`): of the benchmark, counted from 1.
        words (`str`): the n-gram after normalisation.
    """

    benchmark: str
    row: int
    words: str

    @property
    def reason(self) -> str:
        """As it is counted."""
        return f"shares {len(self.words.split())} words with a benchmark"

    @property
    def detail(self) -> str:
        """As it is listed."""
        return f"shares with row {self.row} of {without_login(self.benchmark)}: {self.words!r}"


def normalised(text: str) -> list[str]:
    """
    Words without case, punctuation and symbols: "What's 3.5 + 2?" gives `whats`, `35`, `2`.

    Scripts without spaces have a word for each sign, as in [`~trl_distill.synthetic.text.words`].
    """
    bare = "".join(sign for sign in text if unicodedata.category(sign)[0] not in "PS")
    return words(bare)


class Benchmarks:
    """
    The n-grams of benchmarks.

    Args:
        n (`int`): words of an n-gram.
        texts (iterator of `(str, int, str)`): the benchmark's name, the row's number and its text.
    """

    def __init__(self, n: int, texts: Iterator[tuple[str, int, str]]):
        self.n, self.names = n, list[str]()
        self.short = min(SHORTEST, n)
        self.used, self.too_short = 0, 0
        self._rows: list[tuple[int, int]] = []  # number of the benchmark and of its row
        hashes, rows, lengths = list[np.ndarray](), list[np.ndarray](), set[int]()
        for name, number, text in texts:
            found = normalised(text)
            if len(found) < self.short:
                self.too_short += 1
                continue
            if name not in self.names:
                self.names.append(name)
            length = min(n, len(found))
            lengths.add(length)
            grams = np.unique(_hashes(found, length))
            hashes.append(grams)
            rows.append(np.full(len(grams), self.used, np.uint32))
            self._rows.append((self.names.index(name), number))
            self.used += 1
        self.lengths = sorted(lengths, reverse=True)
        every = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
        self._hashes, first = np.unique(every, return_index=True)
        self._owner = np.concatenate(rows)[first] if rows else np.empty(0, np.uint32)

    def overlap(self, text: Text) -> Overlap | None:
        """The first n-gram that a text shares with a benchmark, or `None`."""
        found = normalised(flat(text))
        for length in self.lengths:
            if len(found) < length:
                continue
            grams = _hashes(found, length)
            at = np.searchsorted(self._hashes, grams)
            hits = np.flatnonzero(self._hashes[np.minimum(at, len(self._hashes) - 1)] == grams)
            if len(hits):
                place = int(hits[0])
                name, row = self._rows[int(self._owner[at[place]])]
                return Overlap(self.names[name], row, " ".join(found[place : place + length]))
        return None


def _hashes(found: list[str], length: int) -> np.ndarray:
    """A 64-bit hash of each n-gram, in their order. Shape `(len(found) - length + 1,)`."""
    grams = (" ".join(found[i : i + length]) for i in range(len(found) - length + 1))
    hashed = [blake2b(gram.encode(errors="replace"), digest_size=8).digest() for gram in grams]
    return np.frombuffer(b"".join(hashed), np.uint64)
