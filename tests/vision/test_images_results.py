"""The miniature with images: the models that are shipped, what it promises, and what its page says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from processes import succeeds
from transformers import AutoModelForImageTextToText, AutoProcessor

from scripts.studies.images.make_models import make_processor
from scripts.studies.images.reader import MODELS


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "images"
PAGE = ROOT / "docs" / "images.md"


def test_shipped_models_are_small_and_share_the_processor_that_the_script_makes():
    expected = make_processor()
    for name in ("teacher", "student"):
        shipped = AutoProcessor.from_pretrained(MODELS / name)
        assert shipped.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
        assert shipped.image_processor.to_dict() == expected.image_processor.to_dict()
        assert shipped.chat_template == expected.chat_template
    assert sum(file.stat().st_size for file in MODELS.rglob("*") if file.is_file()) < 1_000_000


def keeps_the_promise(summary):
    """At least 80 % of a gap of 20 points or more is closed, and the student is never far below its start."""
    steps, accuracy = zip(*summary["curve"], strict=True)
    assert steps == tuple(range(0, summary["settings"]["steps"] + 1, 25))
    assert min(accuracy) >= accuracy[0] - 0.05
    gap = summary["teacher_accuracy"] - summary["student_accuracy_before"]
    assert gap >= 0.2
    assert summary["student_accuracy_after"] - summary["student_accuracy_before"] >= 0.8 * gap
    assert summary["recovered"] >= 0.8
    assert summary["reverse_kl_after"] < 0.5 * summary["reverse_kl_before"]


@pytest.mark.slow
def test_a_second_seed_recovers_most_of_the_gap(tmp_path):
    words = [sys.executable, "-m", "scripts.studies.images.run", "--seed", "1", "--output_dir", tmp_path / "out"]
    said = succeeds(words, cwd=ROOT)
    assert "Results are in" in said  # the last line, or lines: a long path is wrapped
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    keeps_the_promise(summary)
    assert summary["settings"]["seed"] == 1
    for picture in ("training.png", "examples.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 10_000
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "student")


def shipped_runs():
    return {int(path.stem.removeprefix("seed-")): json.loads(path.read_text()) for path in RESULTS.glob("seed-*.json")}


def test_shipped_runs_keep_the_promise_and_the_page_has_their_numbers():
    page, runs = PAGE.read_text(), shipped_runs()
    assert runs
    for seed, summary in runs.items():
        keeps_the_promise(summary)
        shares = [summary[name] for name in ("teacher_accuracy", "student_accuracy_before", "student_accuracy_after")]
        kls = [summary[name] for name in ("reverse_kl_before", "reverse_kl_after")]
        cells = [f"{share:.1%}" for share in (*shares, summary["recovered"])] + [f"{kl:.3f}" for kl in kls]
        assert f"| {seed} | {' | '.join(cells)} |" in page
    sizes = runs[0]["parameters"]
    assert f"({sizes['teacher']:,} parameters)" in page
    assert f"({sizes['student']:,})" in page
