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


pytest.importorskip("optuna")
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
    (out / "step.new").write_text(str(step))
    os.replace(out / "step.new", out / "step")  # whole, whenever the run is killed
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

    from trl_distill.sweeps.schema import read_sweep
    from trl_distill.sweeps.space import Drawn, draw

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
    from trl_distill.sweeps.schema import read_sweep
    from trl_distill.sweeps.space import Drawn, draw

    sweep("bayes", {"beta": {"min": 0.0, "max": 1.0}})
    config = read_sweep(Path("sweep.yaml"))
    earlier = [Drawn({"beta": i / 10}, -((i / 10 - 0.7) ** 2)) for i in range(11)]
    drawn = [draw(config, 11, earlier, seed)["beta"] for seed in range(8)]
    assert sum(abs(beta - 0.7) for beta in drawn) / 8 < 0.15  # 0.29 if drawn evenly


SPECS = {
    "i": {"min": 2, "max": 5},
    "u": {"min": 0.5, "max": 2.5},
    "q": {"distribution": "q_uniform", "min": 0.1, "max": 1.0, "q": 0.25},
    "log": {"distribution": "log_uniform_values", "min": 1.0e-4, "max": 1.0},
    "qlog": {"distribution": "q_log_uniform_values", "min": 1.0, "max": 1000, "q": 10},
    "inv": {"distribution": "inv_log_uniform_values", "min": 1.0e-4, "max": 1.0},
    "n": {"distribution": "normal", "mu": 3.0, "sigma": 0.5},
    "qn": {"distribution": "q_normal", "mu": 0.0, "sigma": 10.0, "q": 5},
    "ln": {"distribution": "log_normal", "mu": 1.0, "sigma": 0.5},
    "c": {"values": ["a", 1, True, None]},
    "p": {"values": ["x", "y", "z"], "probabilities": [0.7, 0.0, 0.3]},
}


def test_random_draws_have_wandbs_distributions(sweep):
    """Medians and shares of 400 draws; with 400, a share is within 0.1 of its own in all but 1 of 10,000 cases."""
    from statistics import median

    from trl_distill.sweeps.schema import read_sweep
    from trl_distill.sweeps.space import draw

    sweep("random", SPECS)
    config = read_sweep(Path("sweep.yaml"))
    draws = [draw(config, index, [], seed=3) for index in range(400)]
    assert list(draws[0]) == sorted(SPECS)
    of = {name: [drawn[name] for drawn in draws] for name in SPECS}
    assert {value: of["i"].count(value) / 400 for value in (2, 3, 4, 5)} == pytest.approx(
        dict.fromkeys((2, 3, 4, 5), 0.25), abs=0.1
    )
    assert all(0.5 <= value <= 2.5 for value in of["u"])
    assert set(of["q"]) == {0.0, 0.25, 0.5, 0.75, 1.0}  # as wandb: rounded after drawing
    assert median(of["log"]) == pytest.approx(1e-2, rel=0.6)
    assert median(of["inv"]) == pytest.approx(1e-2, rel=0.6)
    assert all(type(value) is int and value % 10 == 0 for value in of["qlog"])
    assert median(of["qlog"]) == pytest.approx(30, abs=10)
    assert median(of["n"]) == pytest.approx(3, abs=0.1)
    assert sum(abs(value - 3) < 0.5 for value in of["n"]) / 400 == pytest.approx(0.683, abs=0.1)
    assert all(type(value) is int and value % 5 == 0 for value in of["qn"])
    assert median(of["ln"]) == pytest.approx(2.718, rel=0.1)
    assert {repr(value) for value in of["c"]} == {"'a'", "1", "True", "None"}
    assert of["p"].count("x") / 400 == pytest.approx(0.7, abs=0.1)
    assert of["p"].count("y") == 0


@pytest.mark.parametrize("name", SPECS)
def test_bayes_finds_every_value_again_on_its_axis(sweep, name):
    """What was drawn, also after rounding beyond the bounds, has a coordinate that gives it back."""
    from trl_distill.sweeps.schema import parameter
    from trl_distill.sweeps.space import Drawn, axis_of, draw

    sweep("bayes", {name: SPECS[name]})
    config = {"method": "bayes", "metric": {"name": "m", "goal": "minimize"}}
    config["parameters"] = {name: parameter(name, SPECS[name])}
    axis = axis_of(config["parameters"][name])
    earlier: list[Drawn] = []
    for index in range(12):
        drawn = draw(config, index, earlier, seed=0)
        coordinate = axis.coordinate(drawn[name])
        assert axis.distribution._contains(axis.distribution.to_internal_repr(coordinate))
        again = axis.value(coordinate)
        assert again == (pytest.approx(drawn[name], rel=1e-6) if isinstance(again, float) else drawn[name])
        assert type(again) is type(drawn[name])
        earlier.append(Drawn(drawn, float(index)))


def test_a_failed_or_stopped_run_counts_as_worse_than_any_other(sweep):
    """Where runs fail, bayes does not look again."""
    from trl_distill.sweeps.schema import read_sweep
    from trl_distill.sweeps.space import Drawn, draw

    sweep("bayes", {"beta": {"min": 0.0, "max": 1.0}})
    config = read_sweep(Path("sweep.yaml"))
    for lost in ({"metric": None}, {"metric": 9.0, "stopped": True, "history": (9.0, 9.0)}):
        earlier = [Drawn({"beta": i / 20}, **(lost if i < 12 else {"metric": 1.0})) for i in range(21)]
        drawn = [draw(config, 21, earlier, seed)["beta"] for seed in range(12)]
        assert sum(beta >= 0.55 for beta in drawn) >= 10  # 5 if drawn evenly


GRID = {
    "z": {"values": [3, 1, 2]},
    "fixed": {"value": "x"},
    "a": {"values": [True, "b", 1, True]},  # one of them twice
    "n": {"min": 4, "max": 6},
    "q": {"distribution": "q_uniform", "min": 0.0, "max": 0.75, "q": 0.25},
}


def test_a_grid_has_wandbs_order(sweep):
    """By name, the last fastest; a value that stands twice counts once; a quantised range is without its end."""
    import itertools

    from trl_distill.sweeps.schema import read_sweep
    from trl_distill.sweeps.space import draw, size_of

    sweep(parameters=GRID)
    config = read_sweep(Path("sweep.yaml"))
    q = [0.0, 0.25, 0.5]
    expected = list(itertools.product([True, "b", 1], ["x"], [4, 5, 6], q, [3, 1, 2]))
    assert size_of(config, None) == len(expected) == 81
    found = [draw(config, index, [], seed=index) for index in range(81)]
    assert [list(point) for point in found] == [["a", "fixed", "n", "q", "z"]] * 81
    assert repr([tuple(point.values()) for point in found]) == repr(expected)
    assert draw(config, 81, [], 0) is None


def test_a_large_grid_begins_at_once(sweep):
    """A grid of 10^12 points is neither listed nor counted one by one."""
    from trl_distill.sweeps.schema import read_sweep
    from trl_distill.sweeps.space import draw, size_of

    sweep(parameters={f"p{i}": {"values": list(range(1000))} for i in range(4)})
    config = read_sweep(Path("sweep.yaml"))
    assert size_of(config, None) == 10**12
    assert size_of(config, 7) == 7
    assert draw(config, 123_456_789_012, [], 0) == {"p0": 123, "p1": 456, "p2": 789, "p3": 12}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "best"}, "'best' is not one of"),
        ({"metric": None}, "not valid"),
        ({"parameters": {"beta": {"min": 2, "max": 1}}}, "min 2 is not less than max 1"),
        ({"parameters": {"names": {"value": ["a", "b"]}}}, "--names one two"),
        ({"parameters": {"optim": {"parameters": {"lr": {"value": 1}}}}}, "'optim' is nested"),
        ({"command": ["${program}", "${args_json}"]}, r"has \$\{args_json\}"),
        ({"parameters": {"lr": {"min": "1e-5", "max": 1.0}}}, "write 1.0e-5"),
        ({"parameters": {"lr": {"distribution": "log_uniform", "min": -3, "max": 1}}}, "write log_uniform_values"),
        ({"parameters": {"lr": {"distribution": "beta"}}}, "'beta' of 'lr' is unknown here"),
        ({"parameters": {"lr": {"min": 0.1, "max": 1.0}}}, "a grid cannot hold it"),
        ({"parameters": {"lr": {"values": [1], "q": 2}}}, "'lr' has 'q'; 'categorical' takes values"),
        ({"method": "random", "parameters": {"x": {"values": [1, 2], "probabilities": [0.5, 0.4]}}}, "sum to 1"),
        ({"metric": {"name": "x", "goal": "best"}}, "write minimize or maximize"),
        ({"metric": {"name": "x", "impute": "best"}}, "counts as the worst"),
        ({"run_cap": 3}, "write `--runs`"),
        ({"early_terminate": {"type": "median"}}, "has one type, hyperband"),
        ({"early_terminate": {"type": "hyperband", "max_iter": 9}}, "needs `min_iter`, or `max_iter` with `s`"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 3, "eta": 1}}, "a number above 1"),
        ({"early_terminate": {"type": "hyperband", "max_iter": 2, "s": 1}}, "never looks"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(sweep, changes, message):
    from trl_distill.sweeps.schema import read_sweep

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


PARSER = """
import argparse
parser = argparse.ArgumentParser()
for name in ("beta", "beta_schedule", "learning_rate", "output_dir", "output", "use_peft"):
    parser.add_argument("--" + name, "--" + name.replace("_", "-"))
parser.parse_args()
"""


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--learning_rate", "1"], "`--learning_rate` is what"),
        (["--learning_rate=1"], "`--learning_rate` is what"),
        (["--learning-rate", "1"], "`--learning-rate` is read as `--learning_rate`"),
        (["--learning-rate=1"], "`--learning-rate` is read as `--learning_rate`"),
        (["--learning_r=1"], "`--learning_r` is read as `--learning_rate`"),
        (["--lear", "1"], "`--lear` is read as `--learning_rate`"),
        (["--no_use_peft"], "`--no_use_peft` is read as `--use_peft`"),
        (["--beta_s=linear"], "`--beta_s` is read as `--beta_schedule`"),
        (["--together=--x 1 --learning-rate=2"], "`--learning-rate` is read as `--learning_rate`"),
        (['--together=--together="--learning_r 2"'], "`--learning_r` is read as `--learning_rate`"),
        (["--output-dir=x"], "`--output-dir` stands before `--`"),
        (["--output_d=x"], "`--output_d` stands before `--`"),
        (["--together=--output_dir x"], "`--output_dir` stands before `--`"),
    ],
)
def test_what_the_sweep_varies_is_refused_in_every_spelling(sweep, capsys, given, meant):
    together = {"values": ["--other=1", "--beta_schedule=x", "--use_peft"]}
    sweep(parameters={"learning_rate": {"values": [0.1, 0.2]}, "together": together})
    Path("program.py").write_text(PARSER)
    assert call("--", *given) == 2
    assert meant in " ".join(capsys.readouterr().out.split())
    assert not Path("out").exists()


def test_a_sweep_that_is_written_with_dashes_is_guarded_as_well(sweep, capsys):
    sweep(parameters={"learning-rate": {"values": [0.1, 0.2]}})
    assert call("--", "--learning_rate=1") == 2
    assert "`--learning_rate` is read as `--learning-rate`" in " ".join(capsys.readouterr().out.split())


def test_arguments_that_only_begin_alike_are_taken(sweep):
    """`--beta` is an option of its own, also where `--beta_schedule` is varied; so is `--output` beside the folder."""
    from trl_distill.sweeps.commands import check_overrides
    from trl_distill.sweeps.schema import read_sweep

    sweep(parameters={"beta_schedule": {"values": ["a", "b"]}, "fixed": {"value": 1}})
    Path("program.py").write_text(PARSER)
    check_overrides(read_sweep(Path("sweep.yaml")), ["--beta=1", "--output", "x", "--fixed=2", "--beta_schedules=1"])


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


@pytest.mark.parametrize("when", ["before its end", "after its end"])
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
