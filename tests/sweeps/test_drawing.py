"""What a sweep draws, as wandb does; and which settings and arguments are refused before anything runs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from sweep_calls import UNIFORM, call


pytest.importorskip("optuna")
pytest.importorskip("matplotlib")


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
        ({"parameters": {"lr": {"values": [1.0, float("inf")]}}}, "'lr' has the value inf.*as text: \"inf\""),
        ({"parameters": {"lr": {"value": float("nan")}}}, "'lr' has the value nan"),
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
