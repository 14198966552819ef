"""`trl-distill evaluate` as a user runs it."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
from helpers import VOCAB, WORDS, make_model, make_tokenizer


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
        return json.loads((saved / "out" / "found.json").read_text(), parse_constant=pytest.fail)

    yield call
    for name in ("my_verifier", "torn_verifier"):
        sys.modules.pop(name, None)


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


VERIFIERS = """
import math

import numpy as np
import torch

async def later(completions, **_):
    return np.array([len(text) < 6 for text in completions])

class Later:
    async def __call__(self, completions, **_):
        return torch.tensor([len(text) < 6 for text in completions])

made = Later()

def odd(completions, **_):
    return [[math.nan, None, math.inf, "right", True][i % 5] for i in range(len(completions))]

def huge(completions, **_):
    return [1.7e308 for _ in completions]
"""


@pytest.mark.parametrize("name", ["later", "Later", "made"])
def test_async_verifiers_that_return_arrays(main, saved, name):
    plain = main("--model_name_or_path", "student", "--reward_funcs", "my_verifier.short")
    (saved / "torn_verifier.py").write_text(VERIFIERS)
    found = main("--model_name_or_path", "student", "--reward_funcs", f"torn_verifier.{name}")
    assert found["models"]["student"]["scores"] == plain["models"]["student"]["scores"]


def test_what_is_no_number_counts_as_no_score(main, saved):
    (saved / "torn_verifier.py").write_text(VERIFIERS)
    words = "--model_name_or_path student teacher --num_generations 5 --batch_size 5 --reward_funcs torn_verifier."
    found = main(*f"{words}odd".split())["models"]["student"]
    assert found["scores"] == [[None, None, None, None, 1.0]] * 5
    assert found["estimates"]["avg@5"]["value"] == 1.0
    found = main(*f"{words}huge torn_verifier.huge".split())["models"]["student"]
    assert found["scores"] == [[None] * 5] * 5
    assert "avg@5" not in found["estimates"]


def test_a_model_without_scores_has_a_dash_in_the_table(main, saved, capsys):
    (saved / "torn_verifier.py").write_text(
        "calls = []\ndef first(completions, **_):\n    calls.append(1)\n"
        "    return [1.0 if len(calls) == 1 else None for _ in completions]\n"
    )
    main(*["--model_name_or_path", "student", "teacher", "--reward_funcs", "torn_verifier.first"])
    row = next(line for line in (saved / "out" / "found.md").read_text().splitlines() if "the first's" in line)
    assert row.split("|")[2:4] == ["  ", " – "]


def test_thoughts_reach_the_verifier(main, saved):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": WORDS[2:]})
    tokenizer.save_pretrained(saved / "student")
    (saved / "torn_verifier.py").write_text(
        "def whole(completions, completion_ids, **_):\n"
        "    return [len(c.split()) == sum(i > 1 for i in ids) > 0 for c, ids in zip(completions, completion_ids)]\n"
    )
    found = main("--model_name_or_path", "student", "--num_generations", "2", "--reward_funcs", "torn_verifier.whole")
    scores = [score for row in found["models"]["student"]["scores"] for score in row]
    assert scores.count(1.0) > 5


@pytest.mark.parametrize("name", ["[/INST]", "[red]x", ":smile:", "$x^$", "a|b", "{x}"])
def test_names_are_shown_as_they_are_written(main, saved, capsys, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for whose, seed in (("student", 1), ("teacher", 2)):
        make_model(seed=seed, vocab_size=VOCAB + 1).save_pretrained(saved / name / whose)
    make_tokenizer().save_pretrained(saved / name / "student")
    make_tokenizer([*WORDS, name]).save_pretrained(saved / name / "teacher")  # a warning that shows the token
    student, teacher = f"{name}/student", f"{name}/teacher"
    (saved / "data.jsonl").write_text(json.dumps({"prompt": f"a {name} b"}) + "\n")
    output = saved / f"out {name}" / "found.json"
    words = ["--dataset_name", "data.jsonl", "--teacher_model_name_or_path", teacher, "--output", str(output)]
    evaluate = importlib.import_module("trl_distill.cli.evaluate")
    evaluate.main(["--model_name_or_path", student, teacher, *words, "--device", "cpu", "--max_completion_length", "4"])
    said = capsys.readouterr().out
    assert f"ids exist in only one of the two tokenizers; all others agree. The first: 29: {name!r}" in " ".join(
        said.split()
    )
    assert said.count(student) >= 2  # bar and table
    assert f"Results are in {output}" in said
    head, rule, *_ = output.with_suffix(".md").read_text().splitlines()
    assert head.replace(r"\|", "").count("|") == rule.count("|") == 4


@pytest.mark.parametrize("short", ["student", "teacher"])
def test_prompts_that_do_not_fit_are_refused_before_anything_is_sampled(main, saved, short, monkeypatch):
    (saved / "prompts.jsonl").write_text('{"prompt": "a b"}\n{"prompt": "a b c d e"}\n')
    make_model(hidden_size=16, max_position_embeddings=10).save_pretrained(saved / short)
    words = ["--model_name_or_path", "student", "--teacher_model_name_or_path", "teacher"]
    message = (
        r"longest prompt has 5 tokens and completions up to 6, but the (model|teacher) has 10 positions.* row 1 of"
    )
    with monkeypatch.context() as patch:
        patch.setattr("trl_distill.reporting.evaluation.sample_completions", pytest.fail)
        with pytest.raises(SystemExit, match=message):
            main(*words)
    main(*words, "--max_completion_length", "5")


def test_the_last_model_s_context_is_checked_before_the_first_is_loaded(main, saved, monkeypatch):
    make_model(max_position_embeddings=8).save_pretrained(saved / "teacher")
    monkeypatch.setattr("trl_distill.cli.evaluate.load", pytest.fail)
    with pytest.raises(SystemExit, match="has 8 positions"):
        main("--model_name_or_path", "student", "teacher")


def test_a_prompt_without_tokens_is_named(main, saved):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content if messages[0].content != 'b' }}"
    tokenizer.save_pretrained(saved / "student")
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("a", "b")]
    (saved / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match="prompt of row 1 of the dataset has no tokens"):
        main("--model_name_or_path", "student")


def test_the_teacher_reads_its_own_prompts(main, saved):
    def kl(**columns: str) -> float:
        (saved / "prompts.jsonl").write_text(json.dumps({"prompt": "a b", **columns}) + "\n")
        found = main(*["--model_name_or_path", "student", "--teacher_model_name_or_path", "teacher"])
        return found["models"]["student"]["estimates"]["kl"]["value"]

    assert kl() == kl(teacher_prompt="a b") != kl(teacher_prompt="x y z a b")
    make_model(hidden_size=24, seed=2, max_position_embeddings=10).save_pretrained(saved / "teacher")
    with pytest.raises(SystemExit, match=r"longest prompt has 5 tokens .* the teacher has 10 positions"):
        kl(teacher_prompt="x y z a b")


def test_without_verifier_and_teacher(main):
    found = main("--model_name_or_path", "student")["models"]["student"]["estimates"]
    assert set(found) == {"length", "truncated", "distinct-1", "distinct-2", "distinct-4"}


def test_greedy_answers(main):
    """One to each prompt, whatever the seed; the KL is that of the whole distributions."""
    words = ["--model_name_or_path", "student", "--teacher_model_name_or_path", "teacher", "--temperature", "0"]
    words += ["--reward_funcs", "my_verifier.short", "--seed"]
    first, second = (main(*words, seed)["models"]["student"] for seed in ("1", "2"))
    assert [len(row) for row in first["scores"]] == [1] * 5
    assert first["scores"] == second["scores"]
    assert first["estimates"]["kl"] == second["estimates"]["kl"]
    assert first["estimates"]["kl"]["value"] > 1e-3


def test_the_seed_decides(main):
    words = ["--model_name_or_path", "student", "--reward_funcs", "my_verifier.short", "--seed"]
    first, second, other = (main(*words, seed)["models"]["student"] for seed in ("1", "1", "2"))
    assert first["scores"] == second["scores"]
    assert first["estimates"] != other["estimates"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_generations", "2", "--k", "3"], "there are 2 answers per prompt"),
        (["--temperature", "0", "--num_generations", "4"], "all completions of a prompt are the same"),
        (["--temperature", "-1"], "it must be 0, for the likeliest tokens, or more"),
        (["--output", "found.txt"], "name a .json file"),
        (["--temperature", "nan"], "is not a finite number"),
        (["--correct_from", "inf"], "is not a finite number"),
        (["--chat_template_kwargs", "thinking"], "is no JSON object"),
        (["--chat_template_kwargs", '{"budget": NaN}'], "is no JSON object"),
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
