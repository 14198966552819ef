"""`--accelerate_config`: the command becomes `accelerate launch` of itself."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.launch import launch_command_parser
from processes import run as run_process
from processes import succeeds

from trl_distill.cli import train
from trl_distill.cli.launch import LAUNCHED, LaunchArguments, find_config, launch_command


ROOT = Path(__file__).parents[2]
SHIPPED = ["fsdp2", "zero2", "zero2_cpu", "zero3", "zero3_cpu", "zero3_multinode", "zero3_offload"]


def test_configurations_by_name_and_by_path(tmp_path):
    assert sorted(path.stem for path in find_config("zero3").parent.iterdir()) == SHIPPED
    for name in SHIPPED:
        assert find_config(name).read_text() == (ROOT / "deepspeed_configs" / f"{name}.yaml").read_text()
    mine = tmp_path / "mine.yaml"
    mine.touch()
    assert find_config(str(mine)) == mine


@pytest.mark.parametrize(("name", "meant"), [("zero33", "'zero3'"), ("deepspeed_configs/fsdp.yaml", "'fsdp2'")])
def test_a_configuration_that_is_not_there(name, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"Did you mean {meant}.*zero3_offload"):
        find_config(name)


class Became(Exception):
    pass


@pytest.fixture
def launched(monkeypatch):
    """What `accelerate launch` understands of the command that a call of `trl-distill train` becomes."""

    def become(line):
        raise Became(line)

    monkeypatch.setattr(train, "become", become)
    monkeypatch.delenv("RANK", raising=False)

    def call(*words: str) -> SimpleNamespace:
        with pytest.raises(Became) as raised:
            train.run([*words])
        line = raised.value.args[0]
        assert line[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
        return launch_command_parser().parse_args(line[3:])

    return call


def test_what_accelerate_is_told(launched):
    words = ["--model_name_or_path", "x", "--accelerate_config", "zero3", "--num_processes", "4", "--beta=0.5"]
    found = launched(*words)
    assert found.config_file == str(find_config("zero3"))
    assert found.num_processes == 4
    assert (found.module, found.training_script) == (True, "trl_distill.cli")
    assert found.training_script_args == ["train", *words]


def test_from_the_yaml_file(launched, tmp_path):
    (tmp_path / "settings.yaml").write_text("accelerate_config: zero2\nbeta: 0.5\n")
    assert launched("--config", str(tmp_path / "settings.yaml")).config_file == str(find_config("zero2"))


def test_settings_that_only_hold_for_all_processes_are_not_judged_by_one(launched):
    launched("--accelerate_config", "zero3", "--per_device_train_batch_size", "1", "--num_generations", "8")


def test_a_mistyped_argument_is_said_before_anything_is_launched(capsys):
    with pytest.raises(SystemExit) as ended:
        train.run(["--accelerate_config", "zero3", "--betta", "1"])
    assert ended.value.code == 2
    assert "Did you mean `--beta`?" in capsys.readouterr().err


def test_nothing_is_launched_twice():
    options = LaunchArguments(accelerate_config="zero3")
    assert launch_command(options, "train", [], {})[-2:] == ["trl_distill.cli", "train"]
    assert launch_command(options, "train", [], {LAUNCHED: "1", "RANK": "0"}) == []
    assert launch_command(LaunchArguments(), "train", [], {}) == []
    with pytest.raises(ValueError, match="another launcher has started"):
        launch_command(options, "train", [], {"RANK": "0"})


ONE = "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nuse_cpu: true\nnum_machines: 1\nnum_processes: 1\n"


@pytest.fixture
def words(saved, prompts) -> list[str]:
    (saved / "one.yaml").write_text(ONE)
    prompts.select_columns(["prompt"]).to_json(saved / "prompts.jsonl")
    line = (
        "--model_name_or_path student --teacher_model_name_or_path teacher --dataset_name prompts.jsonl --use_cpu "
        "--output_dir out --max_steps 2 --per_device_train_batch_size 4 --max_completion_length 6 --bf16 false "
        "--gradient_checkpointing false --report_to none --save_strategy no --learning_rate 0.01 --logging_steps 1"
    )
    return line.split()


@pytest.mark.slow
@pytest.mark.parametrize("by", ["the command", "accelerate"])
def test_two_steps_under_accelerate(by, saved, words):
    """The preflight's warnings are shown: here, that `top_k` biases a KL that is estimated from samples."""
    own = ["-m", "trl_distill.cli", "train", "--accelerate_config", "one.yaml", *words]
    theirs = ["-m", "accelerate.commands.launch", "--config_file", "one.yaml", "-m", "trl_distill.cli", "train", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env.pop("TRANSFORMERS_VERBOSITY", None)
    line = [sys.executable, *(own if by == "the command" else theirs), "--kl_estimator", "sampled", "--top_k", "3"]
    done = run_process(line, cwd=saved, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done after 2 steps" in done.stdout
    assert "top_k=3" in done.stderr
    log = json.loads((saved / "out" / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in log if "distill/reverse_kl" in row] == [1, 2]


@pytest.mark.slow
def test_check_under_accelerate_trains_nothing(saved, words):
    line = [sys.executable, "-m", "trl_distill.cli", "check", *words, "--accelerate_config", "one.yaml"]
    shown = succeeds(line, cwd=saved, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert "0 errors" in shown
    assert not (saved / "out" / "model.safetensors").exists()
