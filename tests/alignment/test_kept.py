"""Comparisons of vocabularies that are kept in files."""

from __future__ import annotations

import os

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
def test_a_broken_file_is_not_read_but_replaced(pair, content):
    path = cached_file(pair[0].hash, pair[1].hash)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert read(path) is None
    found = vocabularies.vocabularies(*pair)
    assert found.closed
    again = read(path)
    assert again is not None
    assert again["closed"] == found.closed


def test_another_tokenizer_has_another_file(pair):
    vocabularies.vocabularies(*pair)
    assert cached_file(pair[0].hash, pair[1].hash).exists()
    assert not cached_file(pair[1].hash, pair[0].hash).exists()


def test_a_disk_that_is_full_keeps_no_part_of_a_file(pair, monkeypatch):
    def full(file, **arrays):
        file.write(b"PK")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trl_distill.alignment.kept.np.savez", full)
    assert vocabularies.vocabularies(*pair).closed
    path = cached_file(pair[0].hash, pair[1].hash)
    assert list(path.parent.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_others_may_read_the_file_as_far_as_the_umask_says(pair):
    old = os.umask(0o022)
    try:
        vocabularies.vocabularies(*pair)
    finally:
        os.umask(old)
    assert cached_file(pair[0].hash, pair[1].hash).stat().st_mode & 0o777 == 0o644


def test_where_nothing_can_be_written_nothing_is_kept(pair, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("trl_distill.alignment.kept.HF_HOME", str(tmp_path / "file"))
    assert vocabularies.vocabularies(*pair).closed
    keep(cached_file("a", "b"), vars(vocabularies.vocabularies(*pair)))
    assert read(cached_file("a", "b")) is None
