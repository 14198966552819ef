"""How varied texts are, from samples of equal size, and whether variety falls from round to round.

Every measure is taken on the same number of texts, each cut to its first `WORDS` words: distinct-n falls and
compression rises with the amount of text, so that sets of different size would not compare. Pure functions; which
texts are compared is left to `stages/variety.py`.
"""

from __future__ import annotations

import math
import random
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..shingles import shingles
from ..text import words


SAMPLE = 500  # texts of a set that are held in memory


WORDS = 100  # of each text that are measured


CHARACTERS = 20_000  # of each text that are held in memory


FEWEST = 20  # texts of a round, from which its variety is compared with others


FALL = 0.15  # share of distinct-2 by which a round must fall behind the first one before that is said


RISE = 0.15  # of the mean similarity to the nearest text, likewise


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Sample:
    """
    An even sample of texts that come one by one (reservoir sampling), in random order.

    Args:
        seed (`int`): the same texts in the same order with the same seed give the same sample.
        size (`int`): texts that are held, each with its first `CHARACTERS`.
    """

    def __init__(self, seed: int, size: int = SAMPLE):
        self.seed, self.draw, self.size, self.seen = seed, random.Random(seed), size, 0
        self._held: list[str] = []

    def add(self, text: str) -> None:
        """One more text."""
        place = self.seen if self.seen < self.size else self.draw.randrange(self.seen + 1)
        self.seen += 1
        if len(self._held) < self.size:
            self._held.append(text[:CHARACTERS])
        elif place < self.size:
            self._held[place] = text[:CHARACTERS]

    @property
    def texts(self) -> list[str]:
        """The sample. Its first texts are an even sample, too."""
        shuffled = list(self._held)
        random.Random(self.seed + 1).shuffle(shuffled)
        return shuffled


def compare(sets: Mapping[str, Sequence[str]], near: str | None = None) -> dict[str, dict[str, Any]]:
    """
    The measures of several sets, on as many texts of each as the smallest has; sets without a text are left out.

    Args:
        sets (`dict[str, list[str]]`): texts in random order, by the set's name.
        near (`str`, *optional*): a set to which the others' similarity is measured, too.
    """
    filled = {name: texts for name, texts in sets.items() if texts}
    size = min((len(texts) for texts in filled.values()), default=0)
    cut = {name: [cut_words(text) for text in texts[:size]] for name, texts in filled.items()}
    found = {}
    for name, texts in cut.items():
        found[name] = {
            "texts": size,
            "words": quantiles([len(words(text)) for text in filled[name]]),
            **measures(texts),
        }
        if near in cut and name != near:
            found[name][f"nearest of {near}"] = _mean(nearest(texts, cut[near]))
    return found


def measures(texts: Sequence[str]) -> dict[str, float]:
    """
    Distinct-1, -2 and -3, self-BLEU, compression ratio and the mean similarity to the nearest other text.

    Each is a number whose meaning does not depend on the set: more variety is more distinct n-grams (up to 1), a lower
    self-BLEU, a lower compression ratio and a lower similarity.
    """
    found = {f"distinct_{n}": round(distinct(texts, n), 4) for n in (1, 2, 3)}
    found["self_bleu"] = round(self_bleu(texts), 4)
    found["compression_ratio"] = round(compression_ratio(texts), 2)
    found["nearest other"] = _mean(nearest(texts))
    return found


def cut_words(text: str) -> str:
    """The first `WORDS` words, as [`~trl_distill.synthetic.text.words`] counts them."""
    return " ".join(words(text)[:WORDS])


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """The quantiles `QUANTILES`, by their percentage."""
    return {f"{q:.0%}": float(np.quantile(values, q)) for q in QUANTILES} if values else {}


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct-n (arXiv 1510.03055): different word n-grams by all word n-grams of all texts; 1 if there are none."""
    grams = [gram for text in texts for gram in _grams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else 1.0


def compression_ratio(texts: Sequence[str]) -> float:
    """Bytes of all texts by their bytes after zlib (arXiv 2403.00553); its window of 32 KiB bounds what it sees."""
    joined = "\n".join(texts).encode(errors="replace")
    return len(joined) / len(zlib.compress(joined, 9)) if joined else 1.0


def self_bleu(texts: Sequence[str], orders: int = 4) -> float:
    """
    Self-BLEU (arXiv 1802.01886): the mean BLEU-4 of each text with all others as references.

    With uniform weights, the length of the nearest reference in the brevity penalty, and 0.1 matches where there are
    none. Texts shorter than four words are scored by the orders that they have. 0 for fewer than two texts.
    """
    found = [words(text) for text in texts]
    if len(found) < 2:
        return 0.0
    logs, used = [0.0] * len(found), [0] * len(found)
    for n in range(1, orders + 1):
        counts = [Counter(_grams(text, n)) for text in found]
        best: dict[tuple[str, ...], tuple[int, int, int]] = {}  # highest count, its text, highest of the others
        for i, count in enumerate(counts):
            for gram, times in count.items():
                first, owner, second = best.get(gram, (0, -1, 0))
                best[gram] = (times, i, first) if times > first else (first, owner, max(second, times))
        for i, count in enumerate(counts):
            if total := count.total():
                others = ((times, best[gram]) for gram, times in count.items())
                matched = sum(min(times, b[2] if b[1] == i else b[0]) for times, b in others)
                logs[i] += math.log((matched or 0.1) / total)
                used[i] += 1
    lengths = Counter(map(len, found))
    scores = [_penalty(len(text), lengths) * math.exp(logs[i] / used[i]) for i, text in enumerate(found) if used[i]]
    return sum(scores) / len(scores) if scores else 0.0


def nearest(texts: Sequence[str], others: Sequence[str] | None = None) -> list[float]:
    """
    The Jaccard similarity of word 3-grams of each text to the nearest of `others`, or else to the nearest other text.

    Exact, through an index of 3-grams: a sample is small enough to do without MinHash's estimate.
    """
    ours = [shingles(text) for text in texts]
    theirs = ours if others is None else [shingles(text) for text in others]
    places: dict[int, list[int]] = {}
    for i, grams in enumerate(theirs):
        for gram in grams.tolist():
            places.setdefault(gram, []).append(i)
    sizes = np.array([len(grams) for grams in theirs])
    found = []
    for i, grams in enumerate(ours):
        hits = [place for gram in grams.tolist() for place in places.get(gram, ())]
        shared = np.bincount(np.array(hits, np.int64), minlength=len(theirs))
        similar = shared / (len(grams) + sizes - shared)
        if others is None:
            similar[i] = 0.0
        found.append(float(similar.max()) if len(similar) else 0.0)
    return found


def by_round(rounds: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    """
    Distinct-2 and the mean similarity to the nearest other text of each round with `FEWEST` texts or more, all on the
    same number of texts. Texts are in random order.
    """
    filled = {name: texts for name, texts in rounds.items() if len(texts) >= FEWEST}
    size = min((len(texts) for texts in filled.values()), default=0)
    found = {}
    for name, texts in filled.items():
        cut = [cut_words(text) for text in texts[:size]]
        found[name] = {"texts": size, "distinct_2": round(distinct(cut, 2), 4), "nearest other": _mean(nearest(cut))}
    return found


def falls(rounds: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Warnings about rounds that are less varied than the first one by more than `FALL` or `RISE`; the worst one."""
    if len(rounds) < 2:
        return []
    (first, start), *later = rounds.items()
    told = []
    name, worst = min(later, key=lambda one: one[1]["distinct_2"])
    if worst["distinct_2"] < (1 - FALL) * start["distinct_2"]:
        told.append(
            f"Prompts become less varied: distinct-2 falls from {start['distinct_2']:.2f} ({first}) to "
            f"{worst['distinct_2']:.2f} ({name}). Use fewer rounds, more seeds, or a higher temperature."
        )
    name, worst = max(later, key=lambda one: one[1]["nearest other"])
    if worst["nearest other"] > start["nearest other"] + RISE:
        told.append(
            f"Prompts become more alike: the mean similarity to the nearest other rises from "
            f"{start['nearest other']:.2f} ({first}) to {worst['nearest other']:.2f} ({name}). Use fewer rounds, more "
            "seeds, or a lower `near_duplicates`."
        )
    return told


def _grams(found: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]


def _penalty(length: int, lengths: Counter[int]) -> float:
    """BLEU's brevity penalty, of a text among others of these lengths."""
    others = [other for other, count in lengths.items() if other != length or count > 1]
    closest = min(others, key=lambda other: (abs(other - length), other))
    return 1.0 if length >= closest else math.exp(1 - closest / length)


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4) if values else 0.0
