"""Sweeps are run: stopped and continued, poor runs ended early; two of them with opd.py itself."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from processes import LONG, kill_all, started, wait_for
from sweep_calls import PROGRAM, UNIFORM, call, results, starts


pytest.importorskip("optuna")


pytest.importorskip("matplotlib")


SCRIPTS = Path(__file__).parents[2] / "scripts"


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


# -- ending poor runs early --------------------------------------------------------------------------------------------


def test_bands_are_wandbs():
    from itertools import islice

    from trl_distill.sweeps.early_stopping import bands_of

    assert list(islice(bands_of({"min_iter": 3, "eta": 3}), 4)) == [3, 9, 27, 81]
    assert list(islice(bands_of({"min_iter": 2, "eta": 1.5}), 4)) == [2, 3, 4, 6]
    assert list(bands_of({"max_iter": 27, "s": 2, "eta": 3})) == [3, 9]
    assert list(bands_of({"max_iter": 27, "s": 9, "eta": 3})) == [1, 3, 9]


def test_a_run_goes_on_while_its_best_is_among_the_best_at_each_band():
    """wandb's rule on the example in its own documentation, where "b" ends at the first band and "c" at the second."""
    from trl_distill.sweeps.early_stopping import cut

    rule = {"max_iter": 5, "s": 2, "eta": 2}  # bands at 1 and 2
    a, b, c, d, e = [10, 9], [10, 10], [10, 8, 8], [10, 7, 7], [10, 6, 6]
    assert cut(b, [a, d, e], rule, "minimize") == 2
    assert cut(c, [a, b, d, e], rule, "minimize") == 3
    assert cut(d, [a, b, e], rule, "minimize") is None
    assert cut(e, [a, b, d], rule, "minimize") is None
    assert cut([-value for value in c], [[-v for v in run] for run in (a, b, d, e)], rule, "maximize") == 3
    assert cut(b, [], rule, "minimize") is None  # nothing to be held against
    assert cut([9.5, 9.2, *[0] * 9], [a, d, e], rule, "minimize") == 2  # whatever came later


def test_values_that_are_logged_again_after_a_checkpoint_count_once(tmp_path):
    from trl_distill.sweeps.early_stopping import RunLog

    path = tmp_path / "log.txt"
    log = RunLog(path)
    assert log.read() == []
    path.write_text("==> first\n{'reward': '1', 'epoch': '0.1'}\n 5%|#| 1/9\r{'reward': 2, 'epoch': '0.2'}\n{'rew")
    assert [entry["reward"] for entry in log.read()] == [1, 2]
    with path.open("a") as file:
        file.write("ard': 3, 'epoch': 0.3, 'note': 'x', 'lost': 'nan'}\n")
    assert log.read()[2:] == [{"reward": 3, "epoch": 0.3}]
    with path.open("a") as file:
        file.write("==> second\n{'settings': {}}\n{'reward': 2.5, 'epoch': 0.2}\n{'reward': 4, 'epoch': 0.2}\n")
    assert [entry["reward"] for entry in log.read()] == [1, 2.5, 4]
    with path.open("a") as file:
        file.write("==> third\n{'reward': 7}\n")  # without an epoch: from the beginning
    assert [entry["reward"] for entry in log.read()] == [7]
    assert RunLog(path).read() == log.read()


STOPPING = {
    "parameters": {"beta": {"values": [0.2, 0.9, 0.1]}},
    "early_terminate": {"type": "hyperband", "min_iter": 2},
}


@pytest.mark.slow
def test_a_poor_run_is_ended_early_and_is_a_result(sweep, capsys):
    """The second of three is worse from the start: it ends at its third value, long before its 2000 steps are done."""
    sweep(**STOPPING)
    slow = PROGRAM.replace("    print({", "    time.sleep(0.02 if beta > 0.5 else 0)\n    print({")
    Path("program.py").write_text(slow)
    assert call("--last", "2", "--", "--steps=2000") == 0
    assert int(Path("out/001/out/step").read_text()) < 1999
    assert not Path("out/001/out/trainer_state.json").exists()
    result = json.loads(Path("out/001/result.json").read_text())
    assert result["stopped"].startswith("after 3 logged values its best reward was 0.1")
    assert result["history"] == [0.1, 0.1, 0.1]
    assert result["metrics"] == {"reward": pytest.approx(0.1)}
    assert not Path("out/001/failure.json").exists()
    assert "001 beta=0.9: ended early" in " ".join(capsys.readouterr().out.split())
    rows = results()
    assert [bool(row["stopped"]) for row in rows] == [False, True, False]
    assert "| 001 | 0.9 | 0.1 |  | ended early |" in Path("out/table.md").read_text()
    assert call("--last", "2", "--", "--steps=2000") == 0
    assert len(starts()) == 3  # nothing is run again


@pytest.mark.parametrize("when", ["before its end", pytest.param("after its end", marks=pytest.mark.slow)])
def test_which_runs_end_early_does_not_depend_on_when_the_log_was_read(sweep, monkeypatch, when):
    """A fast run that has ended before anybody looked, and one that was left behind: the same results."""
    from trl_distill.sweeps import runner

    sweep(**STOPPING)
    if when == "after its end":
        monkeypatch.setattr(runner, "LOOK_SECONDS", 5)
    assert call("--", "--steps=20") == 0
    first = Path("out/results.csv").read_text()
    assert [bool(row["stopped"]) for row in results()] == [False, True, False]
    for run in ("001", "002"):  # as if killed: the logs are there, the results are not
        Path(f"out/{run}/result.json").unlink()
    assert call("--", "--steps=20") == 0
    assert len(starts()) == 3
    assert Path("out/results.csv").read_text() == first


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
