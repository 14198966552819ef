"""`trl-distill evaluate --judge`: scores, win rates and their control of length."""

from __future__ import annotations

import importlib
import json
import re

import numpy as np
import pytest
from chat_server import ChatServer

from trl_distill.reporting.win_rates import Compared, win_rates


@pytest.fixture
def main(monkeypatch, saved, prompts):
    monkeypatch.chdir(saved)
    (saved / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts["prompt"][:5]))
    evaluate = importlib.import_module("trl_distill.cli.evaluate")

    def call(*words: str) -> dict:
        usual = "--dataset_name prompts.jsonl --device cpu --max_completion_length 6 --output out/found.json"
        evaluate.main([*usual.split(), *words])
        return json.loads((saved / "out" / "found.json").read_text(), parse_constant=pytest.fail)

    return call


MODELS = ["--model_name_or_path", "student", "teacher", "--num_generations", "2"]


def test_a_judge_is_the_verifier(main, saved):
    with ChatServer(lambda text, seed: f"Score: {float(len(text) % 2)}") as server:
        found = main(*MODELS, "--judge", f"{server.url}#m")
        assert len(server.asked) == 20
    scores = found["models"]["student"]["scores"]
    assert {score for row in scores for score in row} <= {0.0, 1.0}
    assert found["models"]["student"]["estimates"]["avg@2"]["value"] == pytest.approx(np.mean(scores))
    assert "avg@2 − the first's" in found["models"]["teacher"]["estimates"]


def test_a_judge_beside_reward_functions(main, saved, monkeypatch):
    (saved / "beside_verifier.py").write_text("def all_right(completions, **_):\n    return [1.0] * len(completions)\n")
    said = iter([1, 1, 0, 0, 1, 1, 1, 1, "none", 0])
    with ChatServer(lambda text, seed: f"Score: {next(said)}") as server:
        words = ["--model_name_or_path", "student", "--num_generations", "2"]
        found = main(*words, "--judge", f"{server.url}#m", "--reward_funcs", "beside_verifier.all_right")
    student = found["models"]["student"]
    assert student["estimates"]["avg@2"]["value"] == 1.0
    assert student["judge_gave_no_score"] == {"judge gave no score": 1}
    assert student["estimates"]["judge agrees"]["value"] == student["estimates"]["judge avg@2"]["value"]


def first_place(text, seed):
    return "Verdict: 1"


def longer(text, seed):
    a, b = (re.findall(rf"<answer_{i}>\n(.*?)\n</answer_{i}>", text, re.DOTALL)[0] for i in (1, 2))
    return f"Verdict: {'tie' if len(a) == len(b) else 1 if len(a) > len(b) else 2}"


def test_models_are_compared_in_both_orders(main, saved):
    with ChatServer(first_place) as server:
        found = main(*MODELS, "--judge", f"{server.url}#m", "--judge_mode", "pairwise")["models"]
    compared = found["teacher"]["comparisons"]
    assert "comparisons" not in found["student"]
    assert (compared["against"], compared["comparisons"]) == ("student", 10)
    assert compared["contradictions"] == 10 - compared["equal_texts"]
    assert compared["first_place"]["value"] == 1.0
    assert compared["outcomes"] == [[0.5, 0.5]] * 5
    assert found["teacher"]["estimates"]["win rate against student"]["value"] == 0.5
    assert "win rate against student" in (saved / "out" / "found.md").read_text()


def test_a_named_baseline_is_evaluated_too(main):
    with ChatServer(longer) as server:
        words = ["--model_name_or_path", "student", "--against", "teacher", "--judge_mode", "pairwise"]
        found = main(*words, "--judge", f"{server.url}#m", "--num_generations", "2")["models"]
    rates = found["student"]["estimates"]
    assert list(found) == ["student", "teacher"]
    assert rates["win rate against teacher"]["value"] == rates["longer than teacher"]["value"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--judge_mode", "pairwise"], "there is no --judge"),
        (["--against", "teacher"], "there is no --judge"),
        (["--judge", "http://h#m", "--against", "teacher"], "add --judge_mode pairwise"),
        (["--judge", "http://h#m", "--judge_mode", "pairwise"], "there is one"),
    ],
)
def test_settings_without_a_meaning(main, capsys, words, message):
    with pytest.raises(SystemExit):
        main("--model_name_or_path", "student", *words)
    assert message in capsys.readouterr().err


def test_a_question_that_asks_for_a_missing_column_is_refused_early(main, saved, monkeypatch):
    (saved / "question.txt").write_text("{completion} {gold}")
    monkeypatch.setattr("trl_distill.cli.evaluate.load", pytest.fail)
    with pytest.raises(SystemExit, match="asks for 'gold'"):
        main("--model_name_or_path", "student", "--judge", "http://h#m", "--judge_prompt", "question.txt")


def planted(quality: float, follows_length: float, longer: float, n: int = 4000) -> list[Compared]:
    """Comparisons by a judge whose log-odds are quality + follows_length · tanh(d / std(d))."""
    random = np.random.default_rng(0)
    d = np.where(random.random(n) < longer, 1, -1) * random.integers(10, 200, n)
    p = 1 / (1 + np.exp(-(quality + follows_length * np.tanh(d / d.std()))))
    won = random.random(n) < p
    return [Compared(i // 2, float(won[i]), int(d[i])) for i in range(n)]


@pytest.mark.parametrize("quality", [0.0, 0.8])
def test_a_planted_bias_to_length_is_taken_out(quality):
    found = win_rates(planted(quality, 2.0, longer=0.8), "b")
    true = 1 / (1 + np.exp(-quality))
    controlled = found["length-controlled against b"]
    assert found["win rate against b"].value > true + 0.1
    assert controlled.low < true < controlled.high
    assert abs(controlled.value - true) < 0.04


def test_without_differences_of_length_the_control_changes_nothing():
    outcomes = [1.0, 1.0, 0.5, 0.0, None]
    found = win_rates([Compared(i, won, 0) for i, won in enumerate(outcomes)], "b")
    assert found["win rate against b"].value == pytest.approx(2.5 / 4)
    assert found["length-controlled against b"].value == pytest.approx(2.5 / 4, abs=0.005)
    assert found["longer than b"].value == 0.5
    all_won = win_rates([Compared(i, 1.0, i) for i in range(20)], "b")["length-controlled against b"]
    assert 0.9 < all_won.low <= all_won.value < 1
