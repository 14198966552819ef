"""The studies of teachers with another tokenizer: what the docs say is what the result files hold."""

from __future__ import annotations

import json
from pathlib import Path

from scripts.studies.cross_tokenizer.real_tokenizers import RESULTS, table
from scripts.studies.cross_tokenizer.texts import texts


DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_of_real_tokenizers_is_that_of_the_result_file():
    result = json.loads((RESULTS / "real_tokenizers.json").read_text())
    assert table(result) in (DOCS / "teachers.md").read_text()
    of_all = [one for of_student in result["pairs"].values() for one in of_student.values()]
    assert len(of_all) == 20
    assert all(0 <= kind["exact"] <= 1 for one in of_all for kind in one["texts"].values())


def test_the_texts_are_of_four_kinds():
    found = texts()
    assert list(found) == ["prose", "code", "arithmetic", "languages"]
    assert len(found["languages"]) == 23
    assert all(pieces for pieces in found.values())


def test_the_docs_give_the_numbers_of_the_study():
    result = json.loads((RESULTS / "beside_gold.json").read_text())
    text = (DOCS / "teachers.md").read_text()
    assert f"({result['teacher_accuracy']:.1%} right)" in text
    for found in (result["before"], *result["arms"].values()):
        assert f"| {found['accuracy']:.1%} |" in text
    for found in result["arms"].values():
        assert f"| {found['cpu_seconds']:.0f} | {found['peak_memory_mib']} MiB |" in text
    assert f"({result['arms']['ours']['last_logged']['distill/exact_tokens']:.1%} of" in " ".join(text.split())
