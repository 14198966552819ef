"""`trl-distill train` as a user runs it, with arguments as strings."""

from __future__ import annotations

import json
import re
import sys

import pytest
from helpers import make_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import ModelConfig


@pytest.fixture
def opd(monkeypatch):
    from trl_distill.cli import train as opd

    return opd


@pytest.fixture
def run(opd, saved, prompts, monkeypatch):
    """Runs the script on saved tiny models; further arguments are appended."""
    monkeypatch.chdir(saved)
    (saved / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts["prompt"]))

    def call(*arguments: str):
        defaults = (
            "--model_name_or_path student --teacher_model_name_or_path teacher --dataset_name prompts.jsonl "
            "--output_dir out --max_steps 2 --per_device_train_batch_size 4 --max_completion_length 6 --use_cpu "
            "--bf16 false --gradient_checkpointing false --report_to none --save_strategy no --learning_rate 0.01"
        )
        opd.main(*opd.parsed([*defaults.split(), *arguments]))

    return call


def test_trains_and_says_where_the_model_is(run, saved, capsys):
    run()
    assert capsys.readouterr().out.rstrip().endswith("Done after 2 steps. The model is in out")
    before, after = (AutoModelForCausalLM.from_pretrained(saved / name) for name in ("student", "out"))
    assert not (before.model.embed_tokens.weight == after.model.embed_tokens.weight).all()


def test_peft(run, saved, capsys):
    run("--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj")
    assert "The adapter is in out" in capsys.readouterr().out
    assert all("lora_" in name for name in load_file(saved / "out" / "adapter_model.safetensors"))


def test_rewards_by_import_path(run, saved):
    (saved / "my_rewards.py").write_text(
        "def wordy(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n"
    )
    run(
        "--reward_funcs",
        "my_rewards.wordy",
        "--num_generations",
        "2",
        "--save_strategy",
        "steps",
        "--logging_steps",
        "1",
    )
    sys.modules.pop("my_rewards", None)
    log = json.loads((saved / "out" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert "rewards/wordy/mean" in log[0]
    assert "distill/reverse_kl" in log[0]


def test_settings_from_a_yaml_file(run, saved):
    (saved / "settings.yaml").write_text("beta: 0.5\nkl_temperature: 2.0\n")
    run("--config", "settings.yaml", "--save_strategy", "steps")
    import torch

    args = torch.load(saved / "out" / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert (args.beta, args.kl_temperature) == (0.5, 2.0)


def test_resume_auto(run, saved, capsys):
    run("--resume_from_checkpoint", "auto", "--save_strategy", "steps", "--save_steps", "1")
    run("--resume_from_checkpoint", "auto", "--max_steps", "3")
    assert "Done after 3 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset_name", "nothing.jsonl"], "does not exist"),
        (["--reward_funcs", "no_such_module.f"], "could not be imported"),
        (["--reward_funcs", "no_such_reward"], "could not be imported"),
        (["--eval_strategy", "steps"], "no split 'test' for evaluation"),
        (["--beta", "-1"], "negative weight"),
    ],
)
def test_bad_arguments(run, arguments, message):
    with pytest.raises((SystemExit, ValueError), match=message):
        run(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher_model_name_or_path", "nowhere"], "could not be found"),
        (["--teacher_model_name_or_path", "student"], "nothing to learn"),
        (["--teacher_model_name_or_path", "adapter-off"], "the student has no adapter"),
    ],
)
def test_what_stops_the_setup_is_said_without_a_traceback(run, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run(*arguments)


def test_check_only_prints_a_table_and_trains_nothing(run, saved, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--check_only")
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    checks = ("tokenizer", "vocabulary", "stop tokens", "chat template", "context", "sampling", "teacher differs")
    for check in (*checks, "memory"):
        assert check in shown
    assert re.search(r"About \d+ MiB at the peak, in the \w+ phase", shown)
    assert "0 errors" in shown
    assert not (saved / "out" / "model.safetensors").exists()


def test_check_only_shows_all_errors_at_once(run, saved, capsys):
    words = ["<pad>", "<eos>", *"zyxwvutsrqponmlkjihgfedcba", "."]
    make_tokenizer(words).save_pretrained(saved / "teacher")
    with pytest.raises(SystemExit) as stopped:
        run("--check_only", "--max_completion_length", "200")
    shown = capsys.readouterr().out
    assert stopped.value.code == 1
    assert "3 errors" in shown  # the tokenizer, and both models' positions
    with pytest.raises(SystemExit):
        run("--check_only", "--teacher_model_name_or_path", "nowhere")
    assert "could not be found" in capsys.readouterr().out


def test_check_only_keeps_what_was_found_before_a_teacher_could_not_be_loaded(run, capsys, monkeypatch):
    def missing(*_):
        raise ValueError("The checkpoint lacks 3 of its weights.")

    monkeypatch.setattr("trl_distill.training.setup.load_pool", missing)
    with pytest.raises(SystemExit):
        run("--check_only")
    shown = capsys.readouterr().out
    assert "lacks 3 of its weights" in shown
    for check in ("tokenizer", "vocabulary", "stop tokens"):
        assert check in shown


def test_adapter_off_by_its_name(run, capsys):
    lora = ("--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj")
    run("--teacher_model_name_or_path", "adapter-off", "--assume_different_teacher", *lora)
    assert "The adapter is in out" in capsys.readouterr().out


def test_several_teachers_as_json(opd, saved, prompts, monkeypatch, capsys):
    monkeypatch.chdir(saved)
    rows = [{"prompt": p, "teacher": "ab"[i % 2]} for i, p in enumerate(prompts["prompt"])]
    (saved / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (saved / "settings.yaml").write_text(
        "model_name_or_path: student\ndataset_name: prompts.jsonl\noutput_dir: out\nmax_steps: 1\nuse_cpu: true\n"
        "per_device_train_batch_size: 4\nmax_completion_length: 6\nbf16: false\nreport_to: none\nsave_strategy: 'no'\n"
    )
    teachers = json.dumps({"a": "teacher", "b": "teacher"})
    opd.main(*opd.parsed(["--config", "settings.yaml", "--teacher_models", teachers]))
    assert "Done after 1 steps" in capsys.readouterr().out


def test_missing_names(opd, tmp_path):
    args = opd.OPDConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(SystemExit, match="no student"):
        opd.main(opd.OPDScriptArguments(dataset_name="x"), args, ModelConfig())
    with pytest.raises(SystemExit, match="no dataset"):
        opd.main(opd.OPDScriptArguments(), args, ModelConfig(model_name_or_path="x"))


def test_a_reward_of_trls_by_its_name(opd):
    from trl.rewards import think_format_reward

    assert opd.import_reward("think_format_reward") is think_format_reward
