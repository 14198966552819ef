"""Comparisons of vocabularies that are kept in files."""

from __future__ import annotations

import pytest
from text_models import MERGES, STUDENT, TEACHER, make_bpe

from trl_distill.alignment import vocabularies
from trl_distill.alignment.kept import cached_file, keep, read
from trl_distill.alignment.text_tokenizer import TextTokenizer


@pytest.fixture
def pair(monkeypatch, tmp_path):
    """Two tokenizers that nothing is known of yet, and a folder of their own for what is kept."""
    monkeypatch.setattr(vocabularies, "_known", {})
    monkeypatch.setattr(vocabularies, "WORTH_KEEPING", 0.0)
    monkeypatch.setattr("trl_distill.alignment.kept.HF_HOME", str(tmp_path))
    return (
        TextTokenizer(make_bpe(STUDENT, MERGES["student"], "<eos>"), "student"),
        TextTokenizer(make_bpe(TEACHER, MERGES["teacher"], "<end>"), "teacher"),
    )


def test_a_second_process_reads_what_the_first_has_found(pair, monkeypatch):
    found = vocabularies.vocabularies(*pair)
    assert found.closed
    assert found.unfinished
    monkeypatch.setattr(vocabularies, "_known", {})
    monkeypatch.setattr(vocabularies, "_compared", lambda *_: pytest.fail("compared again"))
    again = vocabularies.vocabularies(*pair)
    assert vars(again) == vars(found)
    assert list(again.closed) == list(found.closed)


@pytest.mark.parametrize("content", [b"", b"PK no archive"])
def test_a_broken_file_is_not_read(pair, content):
    path = cached_file(pair[0].hash, pair[1].hash)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert read(path) is None
    assert vocabularies.vocabularies(*pair).closed


def test_another_tokenizer_has_another_file(pair):
    vocabularies.vocabularies(*pair)
    assert cached_file(pair[0].hash, pair[1].hash).exists()
    assert not cached_file(pair[1].hash, pair[0].hash).exists()


def test_where_nothing_can_be_written_nothing_is_kept(pair, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("trl_distill.alignment.kept.HF_HOME", str(tmp_path / "file"))
    assert vocabularies.vocabularies(*pair).closed
    keep(cached_file("a", "b"), vars(vocabularies.vocabularies(*pair)))
    assert read(cached_file("a", "b")) is None
