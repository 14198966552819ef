"""The demo: its task, the models that are shipped, and what it promises, on a second seed."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
from processes import succeeds
from transformers import AutoModelForCausalLM, AutoTokenizer


SCRIPTS = Path(__file__).parents[2] / "scripts"
MODELS = SCRIPTS / "studies" / "tasks" / "models"


def test_solutions_satisfy_the_verifier():
    from scripts.studies.tasks.additions import correct, problems, solution

    rows = problems(200, seed=5)
    assert correct(list(rows["solution"]), list(rows["answer"])) == [1.0] * 200
    assert solution("2390", "6915") == "0+5+0=05 9+1+0=10 3+9+1=13 2+6+1=09 answer 9305"
    for wrong in ("answer 9306", "9305", "answer 9305 or so", "", "answer "):
        assert correct([[{"role": "assistant", "content": wrong}]], ["9305"]) == [0.0]


def test_the_brief_reward_pays_for_every_character_left_out():
    from scripts.studies.tasks.additions import brief, solution

    whole = solution("2390", "6915")
    paid = brief([whole, whole[:20], [{"role": "assistant", "content": ""}]])
    assert paid == sorted(paid)
    assert 0 < paid[0] < paid[1] < paid[2] == 1


def test_problems_repeat_with_the_seed_alone():
    from scripts.studies.tasks.additions import problems

    assert problems(20, seed=5)["answer"] == problems(30, seed=5)["answer"][:20]
    assert problems(20, seed=5)["answer"] != problems(20, seed=6)["answer"]


def test_shipped_models_are_small_and_share_the_tokenizer_that_the_script_makes():
    from scripts.studies.tasks.make_models import make_tokenizer

    expected = make_tokenizer().get_vocab()
    for name in ("teacher", "student"):
        assert AutoTokenizer.from_pretrained(MODELS / name).get_vocab() == expected
        assert AutoModelForCausalLM.from_pretrained(MODELS / name).num_parameters() < 1_000_000
    assert sum(file.stat().st_size for file in MODELS.rglob("*") if file.is_file()) < 5_000_000


@pytest.mark.parametrize(("given", "threads"), [(None, "1"), ("2", "2")])
@pytest.mark.parametrize("script", ["demo.py", "reproduce.py"])
def test_one_thread_unless_the_user_says_otherwise(script, given, threads):
    """Two threads that wait for each other take many times as long where another program is busy."""
    code = f"import runpy; runpy.run_path({str(SCRIPTS / script)!r}); import torch; print(torch.get_num_threads())"
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    env |= {} if given is None else {"OMP_NUM_THREADS": given}
    assert succeeds([sys.executable, "-c", code], env=env).split() == [threads]


@pytest.mark.slow
def test_models_can_be_made_again(tmp_path):
    """The whole way with very few steps: what comes out knows nothing, but loads and has the shipped sizes."""
    steps = ("--teacher_steps", "2", "--sft_steps", "2", "--sft_samples", "60")
    succeeds(
        [sys.executable, "-m", "scripts.studies.tasks.make_models", "--output_dir", tmp_path, *steps],
        cwd=SCRIPTS.parent,
    )
    for name in ("teacher", "student"):
        made, shipped = (AutoModelForCausalLM.from_pretrained(folder / name) for folder in (tmp_path, MODELS))
        assert made.config.to_dict().keys() == shipped.config.to_dict().keys()
        assert made.num_parameters() == shipped.num_parameters()


def keeps_the_promise(summary):
    """A run of the demo never falls more than 5 points below its start, and closes at least 80 % of the gap."""
    steps, accuracy = zip(*summary["curve"], strict=True)
    assert steps == tuple(range(0, 301, 25))
    assert min(accuracy) >= accuracy[0] - 0.05  # the student gets no worse before it gets better
    gap = summary["teacher_accuracy"] - summary["student_accuracy_before"]
    assert gap >= 0.2
    assert summary["student_accuracy_after"] - summary["student_accuracy_before"] >= 0.8 * gap


def test_three_shipped_runs_keep_the_promise():
    """What docs/results.md says of them is in the files."""
    root = SCRIPTS.parent
    runs = {
        seed: json.loads((root / "docs" / "results" / "demo" / f"seed-{seed}.json").read_text()) for seed in range(3)
    }
    page = (root / "docs" / "results.md").read_text()
    for seed, summary in runs.items():
        keeps_the_promise(summary)
        accuracy = [right for _, right in summary["curve"]]
        ends = summary["student_accuracy_before"], summary["student_accuracy_after"], summary["teacher_accuracy"]
        row = [accuracy[0], min(accuracy), *ends]
        assert f"| {seed} | {' | '.join(f'{share:.1%}' for share in row)} |" in page


@pytest.mark.slow
def test_a_second_seed_recovers_most_of_the_gap(tmp_path):
    succeeds([sys.executable, SCRIPTS / "demo.py", "--seed", "1", "--output_dir", tmp_path / "out"])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary) == {
        *("teacher_accuracy", "student_accuracy_before", "student_accuracy_after"),
        *("reverse_kl_before", "reverse_kl_after", "curve", "seconds"),
    }
    keeps_the_promise(summary)
    assert summary["reverse_kl_after"] < 0.5 * summary["reverse_kl_before"]
    assert (tmp_path / "out" / "training.png").stat().st_size > 10_000
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "student")


@pytest.mark.slow
def test_recipes_are_compared_and_a_second_call_goes_on(tmp_path, monkeypatch, capsys):
    """With very few steps: every recipe runs, the table names them, and what has been run is not run again."""
    from scripts.studies.demo import rewards as demo_rewards
    from scripts.studies.demo.student import Setting

    monkeypatch.setattr(demo_rewards, "SEEDS", (0,))
    setting = Setting(MODELS, tmp_path, steps=2, learning_rate=1e-3, held_out=50, seed=0)
    demo_rewards.compare(setting)
    first = capsys.readouterr().out
    assert all(
        name in first
        for name in ("teacher", "student before", *(recipe.label for recipe in demo_rewards.recipes(2).values()))
    )
    assert (tmp_path / "rewards" / "rewards.png").stat().st_size > 10_000
    summary = json.loads((tmp_path / "rewards" / "summary.json").read_text())
    assert all(len(row["accuracy"]) == 1 for row in summary.values())
    monkeypatch.setattr(demo_rewards, "train", None)  # calling it would fail
    (tmp_path / "rewards" / "summary.json").unlink()
    demo_rewards.compare(setting)
    assert json.loads((tmp_path / "rewards" / "summary.json").read_text()) == summary
    with pytest.raises(TypeError):  # other options are another run
        demo_rewards.compare(dataclasses.replace(setting, learning_rate=1e-2))
