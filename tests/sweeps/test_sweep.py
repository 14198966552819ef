"""Sweeps: what is drawn, and that an interrupted one goes on as if nothing had been."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from processes import LONG, kill_all, started, wait_for


pytest.importorskip("sweeps.run")
pytest.importorskip("matplotlib")

SCRIPTS = Path(__file__).parents[2] / "scripts"

# Stands for opd.py: logs a KL that falls and a reward that rises with beta's fall, each step a checkpoint
PROGRAM = """
import json, os, pathlib, sys, time
given = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
out = pathlib.Path(given["output_dir"])
out.mkdir(parents=True, exist_ok=True)
with open("starts", "a") as starts:
    starts.write(out.parent.name + " " + given["resume_from_checkpoint"] + "\\n")
beta = float(given["beta"])
if given.get("fail_at") == given["beta"]:
    sys.exit("it went wrong at beta " + given["beta"])
for step in range(int(given.get("steps", 3))):
    (out / "step").write_text(str(step))
    while pathlib.Path("hold-" + out.parent.name).exists():
        time.sleep(0.05)
    print({"reward": "%.3g" % (1 - beta)}, flush=True)
log = [{"step": s, "reward": 1 - beta + s, "distill/reverse_kl": 1 / beta, "note": "x"} for s in (0, 1, 2)]
(out / "trainer_state.json").write_text(json.dumps({"log_history": log}))
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Writes a sweep over beta for the stand-in program, in a folder of its own; returns its configuration."""
    monkeypatch.chdir(tmp_path)
    Path("program.py").write_text(PROGRAM)

    def make(method: str = "grid", parameters: dict | None = None, **changes) -> dict:
        config = {
            "program": "program.py",
            "method": method,
            "metric": {"name": "train/reward", "goal": "maximize"},
            "parameters": parameters or {"beta": {"values": [0.1, 0.5, 1.0]}},
            "command": ["${interpreter}", "${program}", "${args}"],
            **changes,
        }
        Path("sweep.yaml").write_text(yaml.safe_dump(config))
        return config

    return make


def call(*arguments: str) -> int:
    from trl_distill.cli import sweep

    return sweep.main(["--sweep", "sweep.yaml", "--output_dir", "out", *arguments])


def results() -> list[dict[str, str]]:
    with Path("out/results.csv").open() as file:
        return list(csv.DictReader(file))


def starts() -> list[str]:
    return Path("starts").read_text().splitlines()


# -- drawing ---------------------------------------------------------------------------------------------------------

UNIFORM = {"beta": {"distribution": "log_uniform_values", "min": 0.01, "max": 1.0}, "steps": {"value": 2}}


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_draws_depend_on_seed_index_and_results_alone(sweep, method):
    import random

    import numpy as np

    from trl_distill.sweeps.space import Drawn, draw, read_sweep

    sweep(method, UNIFORM)
    config = read_sweep(Path("sweep.yaml"))

    def all_draws(seed: int) -> list[dict]:
        earlier: list[Drawn] = []
        for index in range(5):
            random.seed(time.time())  # whatever happened before in the process
            np.random.seed(None)
            drawn = draw(config, index, earlier, seed)
            earlier.append(Drawn(drawn, None if index == 1 else drawn["beta"]))
        return [run.parameters for run in earlier]

    first = all_draws(0)
    assert all_draws(0) == first
    assert all_draws(1) != first
    assert len({run["beta"] for run in first}) == 5
    assert all(0.01 <= run["beta"] <= 1 and type(run["beta"]) is float and run["steps"] == 2 for run in first)


def test_bayes_looks_where_it_was_good(sweep):
    from trl_distill.sweeps.space import Drawn, draw, read_sweep

    sweep("bayes", {"beta": {"min": 0.0, "max": 1.0}})
    config = read_sweep(Path("sweep.yaml"))
    earlier = [Drawn({"beta": i / 10}, -((i / 10 - 0.7) ** 2)) for i in range(11)]
    drawn = [draw(config, 11, earlier, seed)["beta"] for seed in range(8)]
    assert sum(abs(beta - 0.7) for beta in drawn) / 8 < 0.15  # 0.29 if drawn evenly


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "best"}, "'best' is not one of"),
        ({"metric": None}, "not valid"),
        ({"parameters": {"beta": {"min": 2, "max": 1}}}, "min 2 is not less than max 1"),
        ({"parameters": {"names": {"value": ["a", "b"]}}}, "--names one two"),
        ({"parameters": {"optim": {"parameters": {"lr": {"value": 1}}}}}, "'optim' is nested"),
        ({"command": ["${program}", "${args_json}"]}, r"has \$\{args_json\}"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 3}}, "needs wandb's server"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(sweep, changes, message):
    from trl_distill.sweeps.space import read_sweep

    sweep(**changes)
    with pytest.raises(ValueError, match=message):
        read_sweep(Path("sweep.yaml"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "0"], "counts runs, from 1"),
        (["--last", "0"], "`--last` is 0"),
        (["--", "--beta=3"], "`--beta` is what the sweep varies"),
        (["--", "--output_dir", "x"], "a folder of its own"),
        (["--", "x"], "stand arguments of program.py"),
    ],
)
def test_bad_arguments_are_said_without_a_traceback(sweep, capsys, arguments, message):
    sweep()
    assert call(*arguments) == 2
    assert message in " ".join(capsys.readouterr().out.split())
    assert not Path("out").exists()


def test_endless_draws_need_a_number_and_a_missing_program_is_said(sweep, capsys):
    sweep("random", UNIFORM)
    assert call() == 2
    assert "Say how many with `--runs`" in capsys.readouterr().out
    sweep(program="nowhere.py")
    assert call() == 2
    assert "no nowhere.py here" in capsys.readouterr().out


# -- running, stopping, going on -------------------------------------------------------------------------------------


def test_runs_once_and_reports_what_was_logged(sweep, capsys):
    sweep()
    assert call("--last", "2") == 0
    assert starts() == ["000 auto", "001 auto", "002 auto"]
    rows = results()
    assert [float(row["beta"]) for row in rows] == [0.1, 0.5, 1.0]
    assert [float(row["reward"]) for row in rows] == pytest.approx([2.4, 2.0, 1.5])  # 1 − beta, plus 1.5: steps 1, 2
    assert [float(row["distill/reverse_kl"]) for row in rows] == pytest.approx([10, 2, 1])
    lines = Path("out/table.md").read_text().splitlines()
    assert lines[0] == "| run | beta | reward | distill/reverse_kl |  |"
    assert lines[2] == "| 000 | 0.1 | 2.4 | 10 | Pareto front |"
    assert Path("out/pareto.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.rstrip().endswith("Results are in out: table.md, results.csv, pareto.png")

    assert call("--last", "2") == 0  # nothing is left to run
    assert len(starts()) == 3
    assert call("--last", "3") == 2  # another mean would not be comparable with what is noted
    assert "last differ" in " ".join(capsys.readouterr().out.split())


def test_a_failed_run_is_recorded_and_tried_again(sweep, capsys):
    sweep()
    assert call("--", "--fail_at=0.5") == 1
    shown = capsys.readouterr().out
    assert "it went wrong at beta 0.5" in shown
    assert starts() == ["000 auto", "001 auto", "002 auto"]
    rows = results()
    assert [bool(row["failure"]) for row in rows] == [False, True, False]
    assert "| 001 | 0.5 |  |  | failed |" in Path("out/table.md").read_text()

    Path("program.py").write_text(PROGRAM.replace('sys.exit("it went', '("it went'))  # mended
    assert call("--", "--fail_at=0.5") == 0
    assert starts()[3:] == ["001 auto"]
    assert "failed" not in Path("out/table.md").read_text()


def test_a_program_that_leaves_no_log_has_failed(sweep, capsys):
    sweep()
    Path("program.py").write_text("print('nothing to say')")
    assert call("--runs", "1") == 1
    assert "left no out/000/out/trainer_state.json" in " ".join(capsys.readouterr().out.split())


@pytest.fixture
def start():
    """Starts the script as a process of its own."""
    with ExitStack() as stack:

        def call(*arguments: str) -> subprocess.Popen[str]:
            script = [sys.executable, SCRIPTS / "sweep.py", "--sweep", "sweep.yaml", "--output_dir", "out"]
            return stack.enter_context(started([*script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT))

        yield call


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_an_interrupted_sweep_ends_as_one_that_was_not(sweep, start, how):
    """Also killed outright, when the run that was under way outlives its sweep.py: it is not started beside itself."""
    sweep("random", UNIFORM)
    Path("hold-001").touch()
    first = start("--runs", "3")
    wait_for("out/001/out/step", first)
    first.send_signal(getattr(signal, how))
    if how == "SIGKILL":
        assert first.wait(LONG) == -signal.SIGKILL
    else:
        out, _ = first.communicate(timeout=LONG)
        assert first.returncode == 130
        assert "the same command goes on" in " ".join(out.split())
    assert Path("out/000/result.json").exists()
    assert not Path("out/001/result.json").exists()
    drawn = Path("out/001/parameters.json").read_text()

    if how == "SIGKILL":
        second = start("--runs", "3")
        assert "a run that it left behind" in second.stdout.readline()
        Path("hold-001").unlink()
        out, _ = second.communicate(timeout=LONG)
        assert second.returncode == 0, out
    else:
        Path("hold-001").unlink()
        assert call("--runs", "3") == 0
    assert Path("out/001/parameters.json").read_text() == drawn
    began = [line.split()[0] for line in starts()]
    # killed: the run that was left behind came to its end, and its results were taken up
    assert began == (["000", "001", "002"] if how == "SIGKILL" else ["000", "001", "001", "002"])

    continued = Path("out/results.csv").read_text()
    Path("out").rename("interrupted")
    assert call("--runs", "3") == 0
    assert Path("out/results.csv").read_text() == continued


def test_another_sweep_in_the_same_folder_is_refused(sweep, capsys):
    sweep()
    assert call("--runs", "1") == 0
    sweep(parameters={"beta": {"values": [0.2]}})
    assert call() == 2
    assert "holds a sweep with other settings (sweep differ" in " ".join(capsys.readouterr().out.split())
    sweep()
    assert call() == 0  # more runs of the same sweep
    assert starts() == ["000 auto", "001 auto", "002 auto"]


# -- with opd.py -------------------------------------------------------------------------------------------------------

TOY = (
    *("--model_name_or_path", "student", "--teacher_model_name_or_path", "teacher", "--dataset_name", "prompts.jsonl"),
    *("--reward_funcs", "rewards.wordy", "--max_completion_length", "8", "--per_device_train_batch_size", "8"),
    *("--max_steps", "30", "--save_steps", "5", "--logging_steps", "1"),
    *("--use_cpu", "--bf16", "false", "--gradient_checkpointing", "false"),
)


@pytest.mark.slow
def test_the_beta_sweep_with_opd_killed_and_continued(saved, prompts, start, monkeypatch):
    """Killed with all its processes after a checkpoint: the run resumes, and all ends as without the interruption."""
    monkeypatch.chdir(saved)
    shutil.copytree(SCRIPTS, "scripts", ignore=shutil.ignore_patterns("models"))
    shutil.copy(SCRIPTS / "sweeps" / "beta.yaml", "sweep.yaml")
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts["prompt"]))
    Path("rewards.py").write_text("def wordy(completions, **_):\n    return [len(set(c)) / 10 for c in completions]\n")
    monkeypatch.setenv("PYTHONPATH", f"{SCRIPTS.parent}")

    first = start("--runs", "2", "--", *TOY)
    wait_for("out/000/out/checkpoint-5/trainer_state.json", first)
    kill_all(first)
    first.wait()
    assert not Path("out/000/result.json").exists()
    second = start("--runs", "2", "--", *TOY)
    out, _ = second.communicate(timeout=LONG)
    assert second.returncode == 0, out
    log = Path("out/000/log.txt").read_text()
    _, killed, resumed = log.split("==> ")
    assert 5 <= killed.count("'reward':") < 30
    assert 0 < resumed.count("'reward':") <= 25  # from a checkpoint, not from the beginning
    continued = {row["run"]: (row["reward"], row["distill/reverse_kl"]) for row in results()}
    assert Path("out/pareto.png").read_bytes().startswith(b"\x89PNG")
    assert Path("out/table.md").read_text().startswith("| run | beta | reward | distill/reverse_kl |")
    history = json.loads(Path("out/000/out/trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in history if "reward" in row] == list(range(1, 31))

    Path("out").rename("interrupted")
    third = start("--runs", "1", "--", *TOY)
    assert third.wait(LONG) == 0
    assert (results()[0]["reward"], results()[0]["distill/reverse_kl"]) == continued["000"]


@pytest.mark.slow
def test_the_other_sweeps_with_opd_to_their_pictures(saved, prompts, monkeypatch):
    """Two pairs of divergence and estimator, two learning rates; each ends with its picture and table."""
    monkeypatch.chdir(saved)
    Path("scripts").symlink_to(SCRIPTS)
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts["prompt"]))
    Path("rewards.py").write_text("def wordy(completions, **_):\n    return [len(set(c)) / 10 for c in completions]\n")
    monkeypatch.setenv("PYTHONPATH", f"{SCRIPTS.parent}")
    from trl_distill.cli import sweep

    for name, arguments in (("divergence", TOY), ("learning_rate", (*TOY[:6], *TOY[8:]))):
        words = ["--sweep", f"scripts/sweeps/{name}.yaml", "--output_dir", name, "--runs", "2", "--", *arguments]
        assert sweep.main([*words, "--max_steps", "2", "--save_strategy", "no"]) == 0
        assert Path(name, "metric.png").read_bytes().startswith(b"\x89PNG")
        assert len(Path(name, "table.md").read_text().splitlines()) == 4
