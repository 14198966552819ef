"""`evaluate`, `report` and `generate` with a teacher that has another tokenizer."""

from __future__ import annotations

import json
import re

import pytest
from helpers import make_model
from text_models import make_bpe, make_pair

from trl_distill.cli import evaluate, report


def save(folder, model, tokenizer) -> None:
    model.config._name_or_path = ""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def folders(tmp_path):
    """Student, and a teacher with another tokenizer; a second student, and a teacher with its tokenizer; prompts."""
    student, own, teacher, other = make_pair(tmp_path / "unused")
    save(tmp_path / "own", student, own)
    save(tmp_path / "other", teacher, other)
    letters = make_bpe(["<pad>", "<eos>", "a", "b"], [], "<eos>")  # nothing to merge: all ids are closed
    for name, seed in (("letters", 1), ("same", 2)):
        save(tmp_path / name, make_model("untied", seed=seed, vocab_size=4, hidden_size=8, head_dim=4), letters)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("ab", "ba", "aab", "b")))
    return tmp_path


def words(folders, teacher: str, *more: str) -> list[str]:
    student = folders / ("letters" if teacher == "same" else "own")
    return [
        *("--model_name_or_path", str(student), "--teacher_model_name_or_path", str(folders / teacher)),
        *("--dataset_name", str(folders / "prompts.jsonl"), "--max_completion_length", "6", "--device", "cpu", *more),
    ]


def evaluated(folders, teacher: str, *more: str) -> dict:
    path = folders / "evaluation.json"
    evaluate.main(words(folders, teacher, "--num_generations", "4", "--output", str(path), *more))
    return json.loads(path.read_text())


def reported(folders, teacher: str, *more: str) -> dict:
    path = folders / "report.html"
    report.main(words(folders, teacher, "--output", str(path), *more))
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(found[1])


def kl_of(found: dict) -> float:
    (model,) = found["models"].values()
    return model["estimates"]["kl"]["value"]


def test_without_being_asked_for_it_is_refused_and_the_message_says_how(folders):
    for command in (evaluated, reported):
        with pytest.raises(SystemExit, match="--cross_tokenizer"):
            command(folders, "other")


def test_the_same_tokenizer_as_another_gives_the_same_numbers(folders, monkeypatch):
    plain, page = evaluated(folders, "same"), reported(folders, "same")
    monkeypatch.setattr("trl_distill.cli.models.has_another", lambda *_: True)
    found, as_texts = evaluated(folders, "same", "--cross_tokenizer"), reported(folders, "same", "--cross_tokenizer")
    assert kl_of(found) == pytest.approx(kl_of(plain), rel=1e-4)
    for row, expected in zip(as_texts["rows"], page["rows"], strict=True):
        assert row["ids"] == expected["ids"]
        assert all(exact for *_, exact, _ in row["spans"])
        whole = slice(row["spans"][-1][1] if row["spans"] else 0)
        assert row["views"][0]["kl"][whole] == pytest.approx(expected["views"][0]["kl"][whole], abs=2e-3)


def test_the_report_shows_both_spellings_and_what_was_exact(folders):
    data = reported(folders, "other", "--cross_tokenizer", "--num_generations", "4")
    spans = [span for row in data["rows"] for span in row["spans"]]
    assert any(exact for *_, exact, _ in spans)
    assert any(not exact for *_, exact, _ in spans)
    for row in data["rows"]:
        covered = [i for start, stop, *_ in row["spans"] for i in range(start, stop)]
        assert covered == list(range(len(covered)))
        assert len(covered) == len(row["ids"]) or row["truncated"]
        for start, stop, ours, theirs, _, charged in row["spans"]:
            assert charged or ours.replace(" | ", "") == theirs.replace(" | ", "") or stop > start + 1
        starts = {span[0] for span in row["spans"]}
        for i, top in enumerate(row["teacher"]["top"]):
            assert bool(top[0]) == (i in starts) or row["truncated"]
            assert all(data["labels"][str(i)] for i in top[0])
    assert any(" | " in theirs for _, _, _, theirs, _, _ in spans)


def test_evaluate_measures_the_kl_between_texts(folders):
    found = kl_of(evaluated(folders, "other", "--cross_tokenizer"))
    assert 0 < found < 20


def test_a_second_student_is_compared_too(folders):
    data = reported(folders, "other", "--cross_tokenizer", "--compare_with", str(folders / "own"))
    for row in data["rows"]:
        assert row["views"][0]["kl"] == row["views"][1]["kl"]
