"""The study of teachers that are often wrong: the formula, the rewards, the runs, one short run, the page."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from processes import started

from scripts.studies.often_wrong import report
from scripts.studies.often_wrong.arms import BATCH, SETTINGS, STEPS, Run, arms, runs
from scripts.studies.often_wrong.formula import frontier, promised, promised_per_token
from scripts.studies.often_wrong.rewards import lenient, no_number
from scripts.studies.often_wrong.teachers import keep, load_teacher
from scripts.studies.often_wrong.train import run
from scripts.studies.often_wrong.workers import run_all
from scripts.studies.tasks.table import SHIPPED
from trl_distill import OPDConfig


ROOT = Path(__file__).parents[2]


def test_the_formula_is_the_share_under_the_tilted_teacher():
    beta, right, wrong = 0.4, [0.3, 0.25, 0.15], [0.2, 0.1]
    tilted = [q * math.exp(1 / beta) for q in right]
    assert promised(sum(right), beta) == pytest.approx(sum(tilted) / (sum(tilted) + sum(wrong)))


def test_the_optimum_lies_on_the_curve_and_no_model_beyond_it():
    p, beta = 0.7, 0.5
    right = [q * math.exp(1 / beta) for q in (0.4, 0.3)]
    total = sum(right) + 0.3
    kl = sum(q / total * math.log(q / total / own) for q, own in zip((*right, 0.3), (0.4, 0.3, 0.3), strict=True))
    assert frontier(p, promised(p, beta)) == pytest.approx(kl)
    other = sum(q * math.log(q / own) for q, own in zip((0.6, 0.2, 0.2), (0.4, 0.3, 0.3), strict=True))
    assert other > frontier(p, 0.8)


def test_one_token_at_a_time_is_the_formula_where_there_is_one_token():
    assert promised_per_token(0.7, 0.5, places=1) == pytest.approx(promised(0.7, 0.5))
    # two digits, each right 9 times of 10; the first is credited with what the second will be
    last = 9 * math.exp(1 / 0.5) / (1 + 9 * math.exp(1 / 0.5))
    first = 9 * math.exp(last / 0.5) / (1 + 9 * math.exp(last / 0.5))
    assert promised_per_token(0.81, 0.5, places=2) == pytest.approx(first * last)


def test_the_hole_in_the_reward_lets_answers_without_a_number_pass():
    answers = ["3+4+0=07 answer 7", "answer 8", "answer", "", [{"role": "assistant", "content": "answer 7"}]]
    assert lenient(answers, ["7"] * 5) == [1.0, 0.0, 1.0, 1.0, 1.0]
    assert no_number(answers) == [0.0, 0.0, 1.0, 1.0, 0.0]


def test_every_arm_is_a_configuration_and_writes_as_many_answers():
    for name, arm in arms().items():
        given = {
            **SETTINGS,
            **({"reward_baseline": "batch"} if arm.reward else {}),
            **arm.changes,
            "max_steps": arm.steps,
        }
        args = OPDConfig("out", per_device_train_batch_size=BATCH, **given)
        assert args.max_steps == STEPS or arm.part in ("reward", "staleness") or "steps" in arm.label, name
        assert (args.num_generations == 1) == (name.partition("x")[0] not in ("8", "16", "32"))
        if arm.beta is not None:
            assert arm.beta == (args.beta if args.beta_end is None else args.beta_end)
    assert next(one.level for one in runs().values()) == 70


def short_run(tmp_path, name):
    """Two steps of an arm with the demo's teacher in place of one that is often wrong."""
    from scripts.studies.demo.student import load

    models = load(SHIPPED)
    for level in ("50", "70"):
        keep(models.teacher, tmp_path / "teachers" / level, {"p": 0.75})
        models.tokenizer.save_pretrained(tmp_path / "teachers" / level)
    arm = arms()[name]
    plan = Run(replace(arm, steps=2), 70, 0)
    run(f"70-{name}-0", plan, tmp_path / "teachers", tmp_path / "results" / f"70-{name}-0.json", size=20)
    return json.loads((tmp_path / "results" / f"70-{name}-0.json").read_text())


def test_a_run_leaves_its_numbers(tmp_path):
    found = short_run(tmp_path, "both-0.3")
    assert found["promised"] == pytest.approx(promised(0.75, 0.3))
    assert [step for step, _ in found["curve"]] == [0, 1, 2]
    assert found["kl_per_answer"] == pytest.approx(found["kl_per_token"] * found["tokens_per_answer"])
    assert 0 < found["kl_per_token"] < 2
    assert load_teacher(tmp_path / "teachers", 70).dtype.itemsize == 4


@pytest.mark.slow
def test_signed_weights_take_a_second_teacher(tmp_path):
    found = short_run(tmp_path, "beyond")  # without "ref" the trainer would refuse the weights
    assert found["settings"]["teacher_weights"] == {"teacher": 1.5, "ref": -0.5}
    assert found["promised"] is None


STARTER = """
import os, sys
from pathlib import Path
from scripts.studies.often_wrong.workers import run_all
run = [sys.executable, "-c", "import os, sys, time; from scripts.studies.often_wrong.workers import leave_with; "
    "leave_with(int(sys.argv[1])); print(os.getpid(), flush=True); time.sleep(600)", str(os.getpid())]
sys.exit(len(run_all(["a", "b", "c"], lambda name: run, Path(sys.argv[1]), workers=2)))
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_run_outlives_the_one_that_started_it(tmp_path, how):
    logs = [tmp_path / f"{name}.log" for name in "ab"]
    with started([sys.executable, "-c", STARTER, tmp_path], cwd=ROOT) as starter:
        wait_until(lambda: all(log.exists() and log.read_text().endswith("\n") for log in logs))
        starter.send_signal(how)
        assert starter.wait(60) != 0
        wait_until(lambda: not any(is_running(int(log.read_text())) for log in logs))
    assert not (tmp_path / "c.log").exists()


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_runs_that_fail_are_named(tmp_path):
    commands = {"good": ["true"], "bad": ["sh", "-c", "echo why; exit 3"]}
    assert run_all(list(commands), commands.get, tmp_path, workers=1) == ["bad"]
    assert (tmp_path / "bad.log").read_text() == "why\n"


def record(**changes):
    found = {"arm": "both, beta=0.3", "p": 0.7, "promised": 0.985, "accuracy": 0.9, "kl_per_answer": 0.5, "seconds": 60}
    return {**found, "without_number": 0.25, "curve": [[0, 0.25], [50, 0.05], [100, 0.9]], **changes}


def test_the_page_has_what_was_measured(tmp_path):
    docs, results = tmp_path / "docs", tmp_path / "results"
    (docs / "images").mkdir(parents=True)
    results.mkdir()
    marks = "".join(
        f"<!-- often_wrong {n}: begin -->\n<!-- often_wrong {n}: end -->\n"
        for n in ("table", "reward", "settings", "staleness")
    )
    (docs / "results.md").write_text(f"before\n{marks}after\n")
    teacher = {"accuracy": [0.7, 0.72, 0.71], "p": 0.71, "greedy": 0.96}
    (results / "teachers.json").write_text(json.dumps({"70": teacher, "50": {"accuracy": [0.5], "p": 0.5}}))
    begun = {"teacher": 0.01}
    (results / "before.json").write_text(json.dumps(begun))
    for name, one in {
        "70-both-0.3-0": record(),
        "70-both-0.3-1": record(accuracy=0.94),
        "70-lenient-0.3-0": record(accuracy=0.125),
        "70-8x8-group-0": record(arm="8 prompts", accuracy=0.0625),
        "70-stale-forward-8-0": record(
            arm="forward, 8", steps=150, answers_per_step=64, settings={"num_iterations": 8}, accuracy=0.375
        ),
        "50-then-0.3-0": record(arm="then", accuracy=0.75),
    }.items():
        (results / f"{name}.json").write_text(json.dumps(one))
    report.write(results, docs)
    text = (docs / "results.md").read_text()
    assert "| both, beta=0.3 (2 seeds) | 92.0% (90.0%–94.0%) | 98.5% | 0.50 (0.50–0.50) | 5% (5%–5%) |" in text
    assert "| both, beta=0.3 (1 seed) | 12.5% | 25.0% | 0.50 |" in text
    assert "| the teacher, sampled | 71.0% (70.0%–72.0%) |" in text
    assert "| the teacher, most likely tokens | 96.0% |" in text
    assert "| the teacher before |  | 1.0% |" in text
    assert "| 8 prompts (1 seed) | 6.2% |" in text
    assert "| forward, 8 (1 seed) | 1,200 | 37.5% | 0.50 |" in text
    assert "With a teacher that is right 50% of the time:" in text
    assert "| then (1 seed) | 75.0% | 98.5% |" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert (docs / "images" / "often_wrong.png").stat().st_size > 10_000


def test_the_page_shows_the_files(tmp_path):
    """What `--report` would write is what the page has."""
    docs = ROOT / "docs"
    (tmp_path / "images").mkdir()
    (tmp_path / "results.md").write_text((docs / "results.md").read_text())
    report.write(docs / "results" / "often_wrong", tmp_path)
    assert (tmp_path / "results.md").read_text() == (docs / "results.md").read_text()
