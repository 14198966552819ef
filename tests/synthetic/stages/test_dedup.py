"""Duplicates: all that are similar enough and none that are not, the earliest stays."""

from __future__ import annotations

import importlib.util
import random

import numpy as np
import pytest

from trl_distill.synthetic.stages.dedup import (
    PERMUTATIONS,
    Duplicates,
    check_installed,
    jaccard,
    rows_per_band,
    shingles,
)


TEXT = "the quick brown fox jumps over the lazy dog while seven small birds watch from the old oak tree nearby"


@pytest.fixture
def index(tmp_path):
    made = Duplicates(tmp_path / "index.db", 0.8)
    yield made
    made.close()


def test_exact_but_for_white_space(index):
    assert index.fault("a  question", "an answer") is None
    assert index.fault("a question ", "an\nanswer") == "exact duplicate"
    assert index.fault("a question", "another") is None


def test_prompt_and_completion_are_not_run_together(tmp_path):
    index = Duplicates(tmp_path / "exact.db", 0)
    assert index.fault("a b", "c") is None
    assert index.fault("a", "b c") is None


def test_near_duplicates(index):
    assert index.fault("Tell me.", TEXT) is None
    assert index.fault("Tell me.", TEXT + " today") == "near duplicate"
    assert index.fault("Tell me.", TEXT.upper()) == "near duplicate"
    assert index.fault("Tell me.", " ".join(reversed(TEXT.split()))) is None


def test_prompts_with_other_numbers_are_other_problems(index):
    assert index.fault(f"{TEXT}: 12 and 34", "so it is") is None
    assert index.fault(f"{TEXT}: 12 and 35", "so it is") is None
    assert index.fault(f"please, {TEXT}: 12 and 34", "so it is") == "near duplicate"


def test_prompts_with_other_images_are_other_questions(index):
    assert index.fault(TEXT, "so it is", ["red"]) is None
    assert index.fault(TEXT, "so it is", ["blue"]) is None
    assert index.fault(TEXT, "so it is") is None
    assert index.fault(TEXT, "so it is", ["red", "blue"]) is None
    assert index.fault(TEXT, "so it is", ["red"]) == "exact duplicate"
    assert index.fault(f"please, {TEXT}", "so it is", ["blue"]) == "near duplicate"
    assert index.fault(f"please, {TEXT}", "so it is", ["green"]) is None


def test_zero_looks_for_exact_ones_only(tmp_path):
    index = Duplicates(tmp_path / "exact.db", 0)
    assert [index.fault("Tell me.", t) for t in (TEXT, TEXT + " today", TEXT)] == [None, None, "exact duplicate"]


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.8, 0.95, 1.0])
def test_same_rows_as_comparing_all_pairs(tmp_path, threshold):
    """The index proposes candidates with high probability; the decision is the true similarity."""
    draw = random.Random(0)
    vocabulary = [f"w{chr(97 + i)}" for i in range(26)]
    texts = []
    for _ in range(60):
        base = draw.choices(vocabulary, k=draw.randint(1, 60))
        for changes in (0, 1, 2, 5, 10):
            other = list(base)
            for place in draw.sample(range(len(base)), min(changes, len(base))):
                other[place] = draw.choice(vocabulary)
            texts.append(" ".join(other))
    index = Duplicates(tmp_path / "index.db", threshold)
    kept: list[np.ndarray] = []
    seen = set()
    for text in texts:
        hashes = shingles(f"\n{text}")
        expected = text in seen or any(jaccard(hashes, other) >= threshold for other in kept)
        assert (index.fault("", text) is not None) == expected
        seen.add(text)
        if not expected:
            kept.append(hashes)


def test_a_missing_library_is_said_early(monkeypatch):
    check_installed(0.8)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_installed(0)
    with pytest.raises(ValueError, match=r"trl_distill\[synthetic\].*--near_duplicates 0"):
        check_installed(0.8)


def test_bands_find_pairs_at_the_threshold():
    for threshold in np.linspace(0.05, 1.0, 20):
        rows = rows_per_band(threshold)
        missed = (1 - threshold**rows) ** (PERMUTATIONS // rows)
        assert missed <= 1e-3 or rows == 1


def test_jaccard_of_shingles():
    a, b = shingles("a b c d"), shingles("a b c e")
    assert jaccard(a, a) == 1.0
    assert jaccard(a, b) == pytest.approx(1 / 3)
    assert len(shingles("one")) == len(shingles("")) == 1
