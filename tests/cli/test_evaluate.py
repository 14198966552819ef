"""`trl-distill evaluate` as a user runs it."""

from __future__ import annotations

import importlib
import json

import pytest
from helpers import VOCAB, make_model, make_tokenizer


@pytest.fixture
def main(monkeypatch, saved, prompts):
    """Runs the script on saved tiny models; returns what the JSON file holds."""
    monkeypatch.chdir(saved)
    (saved / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts["prompt"][:5]))
    (saved / "my_verifier.py").write_text(
        "def short(completions, **kwargs):\n    return [float(len(c) < 6) for c in completions]\n"
    )
    evaluate = importlib.import_module("trl_distill.cli.evaluate")

    def call(*words: str) -> dict:
        usual = "--dataset_name prompts.jsonl --device cpu --max_completion_length 6 --output out/found.json"
        evaluate.main([*usual.split(), *words])
        return json.loads((saved / "out" / "found.json").read_text())

    return call


def test_models_side_by_side(main, capsys, saved):
    words = (
        "--model_name_or_path student teacher --teacher_model_name_or_path teacher "
        "--reward_funcs my_verifier.short --num_generations 4 --k 1 3"
    )
    found = main(*words.split())
    student, teacher = found["models"]["student"]["estimates"], found["models"]["teacher"]["estimates"]
    assert {"avg@4", "pass@1", "pass@3", "kl", "length", "truncated", "distinct-1"} <= set(student)
    assert "pass@2" not in student
    assert student["kl"]["value"] > 1e-3 > abs(teacher["kl"]["value"])
    assert student["avg@4"]["low"] <= student["avg@4"]["value"] <= student["avg@4"]["high"]
    assert "avg@4 − the first's" in teacher
    scores = found["models"]["student"]["scores"]
    assert [len(row) for row in scores] == [4] * 5
    mean = sum(map(sum, scores)) / 20
    assert student["avg@4"]["value"] == pytest.approx(mean)
    said = " ".join(capsys.readouterr().out.split())
    assert "Results are in out/found.json, the table in out/found.md" in said
    table = (saved / "out" / "found.md").read_text()
    assert table.startswith("|  | student | teacher |")
    assert f"{mean:.1%}" in table


def test_numbers_that_are_none_are_null(main, saved):
    """Answers of one token have no pairs of tokens."""
    found = main("--model_name_or_path", "student", "--max_completion_length", "1")
    assert found["models"]["student"]["estimates"]["distinct-2"] == {"value": None, "low": None, "high": None}


def test_a_teacher_with_fewer_ids(main, saved):
    make_model(seed=1, vocab_size=VOCAB + 7).save_pretrained(saved / "student")
    found = main("--model_name_or_path", "student", "--teacher_model_name_or_path", "teacher")
    assert found["models"]["student"]["estimates"]["kl"]["value"] > 0


def test_a_verifier_that_fails_is_named(main, saved):
    (saved / "torn_verifier.py").write_text("def broken(completions, **_):\n    return [{}[0] for c in completions]\n")
    with pytest.raises(SystemExit, match="The reward function 'broken' failed: KeyError"):
        main("--model_name_or_path", "student", "--reward_funcs", "torn_verifier.broken")


def test_an_empty_prompt_is_named(main, saved):
    (saved / "prompts.jsonl").write_text('{"prompt": "a b"}\n{"prompt": ""}\n')
    with pytest.raises(SystemExit, match=r"Row 1 of the dataset has the prompt ''; .* not empty"):
        main("--model_name_or_path", "student")


def test_the_chat_template_is_told_what_it_was_told_in_training(main, saved):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}{% if twice %} {{ messages[0].content }}{% endif %}"
    tokenizer.save_pretrained(saved / "student")
    row = {"prompt": [{"role": "user", "content": "a b c d e f g"}]}
    (saved / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    kwargs = ["--chat_template_kwargs", '{"twice": true}']
    once, twice = (main("--model_name_or_path", "student", "--seed", "3", *words) for words in ([], kwargs))
    assert once["models"]["student"]["estimates"] != twice["models"]["student"]["estimates"]


def test_without_verifier_and_teacher(main):
    found = main("--model_name_or_path", "student")["models"]["student"]["estimates"]
    assert set(found) == {"length", "truncated", "distinct-1", "distinct-2", "distinct-4"}


def test_the_seed_decides(main):
    words = ["--model_name_or_path", "student", "--reward_funcs", "my_verifier.short", "--seed"]
    first, second, other = (main(*words, seed)["models"]["student"] for seed in ("1", "1", "2"))
    assert first["scores"] == second["scores"]
    assert first["estimates"] != other["estimates"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_generations", "2", "--k", "3"], "there are 2 answers per prompt"),
        (["--temperature", "0"], "it must be more than 0"),
        (["--output", "found.txt"], "name a .json file"),
        (["--chat_template_kwargs", "thinking"], "is no JSON object"),
    ],
)
def test_settings_without_a_meaning(main, capsys, words, message):
    with pytest.raises(SystemExit):
        main("--model_name_or_path", "student", *words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model_name_or_path", "nowhere"], "The model 'nowhere' could not be loaded"),
        (["--model_name_or_path", "student", "--reward_funcs", "my_verifier.long"], "could not be imported"),
        (["--model_name_or_path", "student", "--dataset_split", "test"], "has no split 'test'"),
    ],
)
def test_what_is_not_there_is_said_early(main, words, message):
    with pytest.raises(SystemExit) as raised:
        main(*words)
    assert message in str(raised.value)
