"""Measures of variety: known values, sets of different size that compare, and planted collapse."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest

from trl_distill.synthetic.output.diversity import (
    SAMPLE,
    WORDS,
    Sample,
    by_round,
    compare,
    compression_ratio,
    cut_words,
    distinct,
    falls,
    measures,
    nearest,
    self_bleu,
)
from trl_distill.synthetic.shingles import jaccard, shingles


def varied(count: int, seed: int = 0, vocabulary: int = 300, length: int = 20) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(vocabulary)}" for _ in range(length)) for _ in range(count)]


def test_distinct_counts_different_n_grams():
    assert distinct(["a b a b"], 1) == 2 / 4
    assert distinct(["a b a b", "b a"], 2) == 2 / 4
    assert distinct(["a"], 3) == 1.0


def naive_bleu(text: list[str], others: list[list[str]]) -> float:
    logs = []
    for n in range(1, 5):
        grams = Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))
        if not grams:
            continue
        counts = [Counter(tuple(o[i : i + n]) for i in range(len(o) - n + 1)) for o in others]
        matched = sum(min(times, max(count[gram] for count in counts)) for gram, times in grams.items())
        logs.append(math.log((matched or 0.1) / grams.total()))
    closest = min((abs(len(o) - len(text)), len(o)) for o in others)[1]
    return min(1.0, math.exp(1 - closest / len(text))) * math.exp(sum(logs) / len(logs))


def test_self_bleu_is_the_mean_of_bleu_with_the_others_as_references():
    draw = random.Random(1)
    texts = [" ".join(draw.choice("abcd") for _ in range(draw.randrange(1, 12))) for _ in range(15)]
    split = [text.split() for text in texts]
    expected = [naive_bleu(text, [*split[:i], *split[i + 1 :]]) for i, text in enumerate(split)]
    assert self_bleu(texts) == pytest.approx(sum(expected) / len(expected))
    assert self_bleu(["a b c d e"] * 4) == pytest.approx(1.0)
    assert self_bleu(["a b c d"]) == 0.0


def test_nearest_is_the_exact_jaccard_similarity():
    texts = [*varied(12, vocabulary=4, length=9), "one two three four"]
    others = varied(9, seed=3, vocabulary=4, length=9)
    for found, text in zip(nearest(texts, others), texts, strict=True):
        assert found == pytest.approx(max(jaccard(shingles(text), shingles(other)) for other in others))
    for i, (found, text) in enumerate(zip(nearest(texts), texts, strict=True)):
        rest = [*texts[:i], *texts[i + 1 :]]
        assert found == pytest.approx(max(jaccard(shingles(text), shingles(other)) for other in rest))
    assert nearest(["same words here now"] * 2) == [1.0, 1.0]
    assert nearest(["alone"]) == [0.0]


def test_repetition_compresses():
    assert compression_ratio(["the same again"] * 50) > 3 * compression_ratio(varied(50))
    assert compression_ratio([]) == 1.0


def test_sets_of_different_size_compare():
    """The same source gives the same values, however many texts there are and however long each is."""
    sets = compare({"few": varied(40), "many": varied(400, seed=1, length=WORDS * 3), "none": []})
    assert sets.keys() == {"few", "many"}
    assert {found["texts"] for found in sets.values()} == {40}
    assert sets["many"]["words"]["50%"] == WORDS * 3
    few, many = compare({"few": varied(40, length=WORDS), "many": varied(400, seed=1, length=WORDS * 3)}).values()
    for name in ("distinct_1", "distinct_2", "self_bleu"):
        assert few[name] == pytest.approx(many[name], abs=0.03), name
    copied = compare({"seeds": varied(50), "set": varied(50)}, near="seeds")
    assert copied["set"]["nearest of seeds"] == 1.0
    assert "nearest of seeds" not in copied["seeds"]


def test_collapse_shows_in_every_measure():
    collapsed = [f"please write a short story about the number {i % 5} and its friends" for i in range(60)]
    good, bad = measures(varied(60)), measures(collapsed)
    for n in (1, 2, 3):
        assert bad[f"distinct_{n}"] < good[f"distinct_{n}"] / 4
    assert bad["self_bleu"] > good["self_bleu"] + 0.5
    assert bad["compression_ratio"] > 3 * good["compression_ratio"]
    assert bad["nearest other"] > good["nearest other"] + 0.5


def test_planted_collapse_is_told_and_noise_is_not():
    for seed in range(20):
        steady = {f"round {i}": varied(30, seed=50 * seed + i, vocabulary=60) for i in range(6)}
        assert falls(by_round(steady)) == []
    fading = {f"round {i}": varied(30, seed=i, vocabulary=60 // (i + 1)) for i in range(4)}
    (told,) = [text for text in falls(by_round(fading)) if "distinct-2" in text]
    assert "(round 0)" in told
    assert "(round 3)" in told
    alike = {"seeds": varied(30), "round 1": [f"{varied(1)[0]} number {i}" for i in range(30)]}
    assert any("more alike" in text and "(round 1)" in text for text in falls(by_round(alike)))
    assert falls(by_round({**steady, "round 6": ["same"] * 5})) == []  # too few to judge
    assert falls(by_round({"only": varied(30)})) == []


def test_a_sample_is_even_seeded_and_bounded():
    hits = np.zeros(100)
    for seed in range(400):
        sample = Sample(seed, size=10)
        for i in range(100):
            sample.add(str(i))
        assert len(set(sample.texts)) == 10
        hits[[int(text) for text in sample.texts[:5]]] += 1
    assert hits.sum() == 2000
    assert abs(hits - 20).max() < 22  # 5 standard deviations of a binomial
    two = [Sample(3), Sample(3)]
    for sample, i in itertools.product(two, range(2 * SAMPLE)):
        sample.add(f"text {i}")
    assert two[0].texts == two[1].texts
    assert two[0].seen == 2 * SAMPLE
    assert cut_words("A b  c") == "a b c"
