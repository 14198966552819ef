"""Contamination: shared n-grams after normalisation, short texts wholly contained, and where they are listed."""

from __future__ import annotations

import json

import pytest

from trl_distill.synthetic import GenerateConfig
from trl_distill.synthetic.stages.benchmarks import benchmarks_digest, load_benchmarks
from trl_distill.synthetic.stages.contamination import Benchmarks, normalised


LONG = "A farmer has 17 sheep, and all but nine of them run away. How many sheep does he have left now?"  # 20 words
SHORT = "What is the capital city of the Netherlands?"  # 8 words


def index(*texts: str, n: int = 13) -> Benchmarks:
    return Benchmarks(n, (("bench.jsonl", i, text) for i, text in enumerate(texts, start=1)))


def test_normalisation_leaves_words_without_case_and_punctuation():
    assert normalised("What's 3.5 + 2?  It’s\n“five”—and…") == ["whats", "35", "2", "its", "fiveand"]
    assert normalised("日本の") == ["日", "本", "の"]
    assert normalised("?!") == []


def test_thirteen_shared_words_are_found_and_twelve_are_not():
    found = index("one two", LONG)
    words = LONG.split()
    hit = found.overlap("Please tell me: " + " ".join(words[4:17]).upper() + "!!")
    assert hit is not None
    assert (hit.benchmark, hit.row) == ("bench.jsonl", 2)
    assert hit.words == " ".join(normalised(" ".join(words[4:17])))
    assert hit.reason == "shares 13 words with a benchmark"
    assert "row 2 of bench.jsonl" in hit.detail
    assert found.overlap("Please tell me: " + " ".join(words[4:16]) + " indeed") is None
    assert found.overlap("short") is None
    assert found.overlap([{"role": "system", "content": "Hi."}, {"role": "user", "content": LONG}]) is not None


def test_a_shorter_text_counts_when_it_is_wholly_contained_from_eight_words():
    found = index(SHORT, "only seven words are in this text")
    assert (found.used, found.too_short) == (1, 1)
    hit = found.overlap(f"Answer at once. {SHORT.lower()} Thanks.")
    assert hit is not None
    assert hit.words == "what is the capital city of the netherlands"
    assert found.overlap("Tell me what is the capital city of the Nether regions") is None
    assert found.overlap("only seven words are in this text") is None


def test_another_length():
    assert index(LONG, n=5).overlap("he said all but nine of them stayed") is not None
    assert index(LONG, n=6).overlap("he said all but nine of us stayed") is None
    assert index().overlap(LONG) is None


def test_benchmarks_are_read_like_prompts_and_by_other_columns(tmp_path):
    rows = [{"question": LONG, "answer": "9"}, {"prompt": SHORT}, {"messages": [{"role": "user", "content": "b " * 9}]}]
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    config = GenerateConfig(dataset_name="p", output_dir="o", teacher_model_name_or_path="t", benchmarks=[str(path)])
    found = load_benchmarks(config)
    assert found is not None
    assert [found.overlap(text).row for text in (LONG, SHORT, "b " * 9)] == [1, 2, 3]
    before = benchmarks_digest(config)
    path.write_text(json.dumps({"prompt": LONG}) + "\n")
    assert benchmarks_digest(config) != before
    path.write_text('{"other": "column"}\n')
    with pytest.raises(ValueError, match="no text of 8 words or more"):
        load_benchmarks(config)
    config.benchmarks = None
    assert load_benchmarks(config) is benchmarks_digest(config) is None
