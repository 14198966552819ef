"""The sweeps that are shipped: valid, and each of their runs one that opd.py takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest


pytest.importorskip("optuna")

SCRIPTS = Path(__file__).parents[2] / "scripts"
SWEEPS = sorted((SCRIPTS / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_shipped_sweeps_are_valid_and_their_runs_are_settings_that_exist(path, monkeypatch, tmp_path):
    """Every command line is parsed by opd.py's own parser, as `wandb agent` would write it."""
    from trl import ModelConfig, TrlParser

    from trl_distill import OPDConfig
    from trl_distill.cli.arguments import expand_together, with_environment
    from trl_distill.cli.train import OPDScriptArguments
    from trl_distill.sweeps.commands import command_line
    from trl_distill.sweeps.schema import read_sweep
    from trl_distill.sweeps.space import Drawn, draw, size_of

    monkeypatch.setenv("WANDB_RUN_ID", "a1b2c3")
    config = read_sweep(path)
    earlier: list[Drawn] = []
    for index in range(size_of(config, 5 if config["method"] == "random" else None)):
        drawn = draw(config, index, earlier, seed=0)
        words = command_line(config, drawn)
        assert words[:3] == ["/usr/bin/env", sys.executable, "scripts/opd.py"]
        parser = TrlParser([OPDScriptArguments, OPDConfig, ModelConfig])
        arguments = expand_together([*words[3:], "--report_to=none", "--use_cpu", "--bf16=false"])
        script, args, model = parser.parse_args_and_config(arguments)
        assert with_environment(args.output_dir) == f"sweeps/{path.stem}/a1b2c3"
        assert (script.dataset_name, model.model_name_or_path) == ("trl-lib/DeepMath-103K", "Qwen/Qwen3-0.6B")
        assert args.resolved(bool(script.reward_funcs)).teacher_model_name_or_path == "Qwen/Qwen3-4B"
        earlier.append(Drawn(drawn, None))
    assert len({json.dumps(run.parameters) for run in earlier}) == len(earlier)


def test_the_command_is_the_one_that_wandbs_agent_makes():
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    from trl_distill.sweeps.commands import command_line
    from trl_distill.sweeps.schema import read_sweep
    from trl_distill.sweeps.space import draw

    config = read_sweep(SCRIPTS / "sweeps" / "divergence.yaml")
    drawn = draw(config, 3, [], seed=0)
    theirs = utils.create_sweep_command_args({"args": {name: {"value": v} for name, v in drawn.items()}})["args"]
    assert [word for word in command_line(config, drawn) if word in theirs] == theirs
    assert "--cast_lm_head_to_fp32=True" in theirs
    assert utils.create_sweep_command(list(config["command"])) == config["command"]  # $WANDB_RUN_ID is left to opd.py


def test_the_divergence_sweep_has_each_pair_that_the_configuration_allows_once():
    from trl_distill import OPDConfig
    from trl_distill.config_checks import KL_ESTIMATORS
    from trl_distill.objective.divergences import DIVERGENCES
    from trl_distill.sweeps.commands import in_parts
    from trl_distill.sweeps.schema import read_sweep

    allowed = set()
    for divergence in DIVERGENCES:
        for estimator in KL_ESTIMATORS:
            try:
                OPDConfig(divergence=divergence, kl_estimator=estimator, use_cpu=True, bf16=False)
            except ValueError:
                continue
            allowed.add((divergence, estimator))
    config = read_sweep(SCRIPTS / "sweeps" / "divergence.yaml")
    pairs = [in_parts(value) for value in config["parameters"]["together"]["values"]]
    assert len(pairs) == len(allowed)
    assert {(pair["divergence"], pair["kl_estimator"]) for pair in pairs} == allowed


def test_output_dir_is_filled_in_from_the_environment(monkeypatch):
    from trl_distill.cli.arguments import with_environment

    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    assert with_environment("sweeps/$WANDB_RUN_ID") == "sweeps/abc"
    assert with_environment("out") == "out"
    monkeypatch.delenv("WANDB_RUN_ID")
    with pytest.raises(ValueError, match="`wandb agent` sets WANDB_RUN_ID"):
        with_environment("sweeps/$WANDB_RUN_ID")
