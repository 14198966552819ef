"""Training on a terminal shows a line for each log; piped, or when asked to, everything as before."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import pytest

from trl_distill.cli import train
from trl_distill.cli.log_line import ERASE, LogLine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def line():
    """A callback at step 2 of 12, where training has begun now; `at` sets step and seconds since."""
    out, clock = Terminal(), Clock()
    callback = LogLine(out, clock)
    args = SimpleNamespace(disable_tqdm=False)
    state = SimpleNamespace(global_step=2, max_steps=12, is_world_process_zero=True)
    callback.on_train_begin(args, state, None)

    def at(step: int, seconds: float, logs: dict | None) -> str:
        state.global_step, clock.now = step, 100.0 + seconds
        out.seek(0)
        out.truncate()
        if logs is None:
            callback.on_step_end(args, state, None)
        else:
            callback.on_log(args, state, None, logs=logs)
        return out.getvalue()

    at.args, at.state = args, state
    return at


LOG = {
    "loss": 0.1,
    "distill/reverse_kl": 0.41234,
    "distill/top1_agreement": 0.713,
    "reward": 1 / 3,
    "completions/mean_length": 187.4,
    "learning_rate": 9.5e-6,
    "entropy": 0.5,
}


def test_a_log_is_one_line(line):
    expected = "step 4/12  KL 0.412  agreement 71%  reward 0.333  length 187  lr 9.5e-06  2.5 s/step  0:00:20 left"
    assert line(4, 5.0, LOG) == f"{ERASE}{expected}\n"


def test_pace_is_that_since_the_last_log_and_time_left_that_of_the_run(line):
    line(4, 4.0, LOG)
    assert line(6, 20.0, {"learning_rate": 1e-6}).endswith("lr 1e-06  8 s/step  0:00:30 left\n")


def test_what_is_not_logged_is_left_out(line):
    assert "reward" not in line(4, 1.0, {key: value for key, value in LOG.items() if key != "reward"})
    assert "agreement" not in line(5, 1.0, {"distill/reverse_kl": float("nan")})


def test_steps_between_logs_overwrite_each_other(line):
    shown = line(4, 3.0, None)
    assert shown == f"{ERASE}step 4/12  1.5 s/step  0:00:12 left\r"
    line.args.disable_tqdm = True
    assert line(5, 4.0, None) == ""


def test_evaluation_and_the_end(line):
    logs = {"eval_loss": 0.0, "eval_distill/reverse_kl": 0.25, "eval_completions/mean_length": 3.0}
    assert line(4, 3.0, logs) == f"{ERASE}step 4/12  evaluation  KL 0.25  length 3\n"
    assert line(12, 70.0, {"train_runtime": 70.2, "train_loss": 0.0}) == f"{ERASE}Trained to step 12 in 0:01:10\n"


def test_other_processes_are_silent(line):
    line.state.is_world_process_zero = False
    assert line(4, 3.0, LOG) == line(5, 3.0, None) == ""


@pytest.fixture
def shown(saved, prompts, monkeypatch):
    """What a run of two steps prints, on a terminal or not."""
    monkeypatch.chdir(saved)
    (saved / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts["prompt"]))

    def call(out: io.StringIO, *words: str) -> list[str]:
        monkeypatch.setattr(sys, "stdout", out)
        usual = (
            "--model_name_or_path student --teacher_model_name_or_path teacher --dataset_name prompts.jsonl --use_cpu "
            "--output_dir out --max_steps 2 --per_device_train_batch_size 4 --max_completion_length 6 --bf16 false "
            "--gradient_checkpointing false --report_to none --save_strategy no --logging_steps 1"
        )
        train.main(*train.parsed([*usual.split(), *words]))
        return out.getvalue().splitlines()

    return call


def test_training_on_a_terminal(shown):
    lines = shown(Terminal())
    for step in (1, 2):
        (found,) = [line for line in lines if f"step {step}/2  KL " in line]
        assert "length" in found
        assert "s/step" in found
    assert not any("{'" in line for line in lines)
    assert any("Trained to step 2" in line for line in lines)
    assert lines[-1] == "Done after 2 steps. The model is in out"


@pytest.mark.parametrize(("out", "words"), [(io.StringIO, []), (Terminal, ["--log_format", "full"])])
def test_everything_is_shown_in_a_pipe_or_when_asked_for(out, words, shown):
    lines = shown(out(), *words)
    assert sum("'distill/reverse_kl'" in line for line in lines) == 2
    assert not any("step 1/2  KL" in line for line in lines)
