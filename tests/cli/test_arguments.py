"""What all commands share: help with an example, suggestions, old words, and the environment they start in."""

from __future__ import annotations

import importlib
import os
import warnings

import pytest

from trl_distill.cli.__main__ import COMMANDS, main
from trl_distill.cli.arguments import CommandParser, prepare_environment


OURS = [command for command in COMMANDS if command != "sweep"]


def run(command: str, *words: str) -> None:
    importlib.import_module(f"trl_distill.cli.{command}").run([*words])


@pytest.mark.parametrize("command", OURS)
def test_help_begins_with_an_example(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as ended:
        run(command, "--help")
    assert ended.value.code == 0
    usage, _, rest = capsys.readouterr().out.partition("\n\n")
    assert usage.startswith(f"usage: trl-distill {command} ")
    example = rest.split("\n\n")[1]
    assert example.startswith(f"    trl-distill {command} ")
    flags = [word for word in example.split() if word.startswith("--")]
    arguments = rest[rest.index(example) + len(example) :]
    assert all(f"\n  {flag}" in arguments for flag in flags)


def test_the_arguments_that_are_used_most_come_first(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        run("train", "--help")
    shown = capsys.readouterr().out
    first = shown[shown.index("\nmost used:") : shown.index("\nall others:")]
    assert 10 < sum(line.startswith("  --") for line in first.splitlines()) < 15
    assert "--accelerate_config" in first
    assert shown.index("\n  --weight_decay ") > shown.index("\nall others:")
    assert shown.index("\nmost used:") < 3000
    assert "--learning-rate" not in shown  # one spelling of each


@pytest.mark.parametrize(
    ("command", "words", "meant"),
    [
        ("train", ["--lerning_rate", "1e-5"], "--learning_rate"),
        ("train", ["--lerning-rate=1e-5"], "--learning_rate"),
        ("train", ["--confg", "settings.yaml"], "--config"),
        ("check", ["--teacher_modle_name_or_path", "x"], "--teacher_model_name_or_path"),
        ("generate", ["--dataset_nme", "x"], "--dataset_name"),
        ("generate", ["--num_generation_s", "2"], "--num_generations"),
        ("evaluate", ["--reward_func", "f", "--dataset_nme", "x"], "--dataset_name"),
        ("report", ["--compare_wiht", "x"], "--compare_with"),
        ("plot", ["out", "--lables", "x"], "--labels"),
    ],
)
def test_a_mistyped_argument_is_answered_by_the_likeliest(command, words, meant, capsys):
    with pytest.raises(SystemExit) as ended:
        run(command, *words)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"Did you mean `{meant}`?" in said
    assert said.startswith(f"trl-distill {command}: ")
    assert len(said.splitlines()) == 2
    assert "required" not in said


def test_a_word_too_many_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        run("generate", "--keep", "best", "all")
    assert ended.value.code == 2
    assert "no argument takes 'all'" in capsys.readouterr().err


def test_a_mistyped_command(capsys):
    assert main(["trian"]) == 2
    assert "Did you mean `train`?" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "key", "meant"), [("train", "betta", "beta"), ("generate", "keap", "keep")])
def test_a_mistyped_key_of_the_yaml_file(command, key, meant, tmp_path, capsys):
    (tmp_path / "settings.yaml").write_text(f"{key}: 0.5\n")
    with pytest.raises(SystemExit) as ended:
        run(command, "--config", str(tmp_path / "settings.yaml"))
    assert ended.value.code == 2
    assert f"`--{key}` (in the YAML file). Did you mean `--{meant}`?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "key", "value", "expected"),
    [
        ("train", "reward_funcs", "my_module.correct", ["my_module.correct"]),
        ("train", "reward_funcs", "[a.b, c.d]", ["a.b", "c.d"]),
        ("train", "teacher_server_urls", "http://localhost:8000", ["http://localhost:8000"]),
        ("train", "lora_target_modules", "q_proj", ["q_proj"]),
        ("train", "reward_weights", "0.5", [0.5]),
        ("train", "reward_weights", "2", [2]),
        ("train", "reward_funcs", "null", None),
        ("check", "reward_funcs", "my_module.correct", ["my_module.correct"]),
        ("generate", "reward_funcs", "my_module.correct", ["my_module.correct"]),
    ],
)
def test_a_single_word_in_the_yaml_file_is_a_list_of_one(command, key, value, expected, tmp_path):
    """And arguments that take one word are left alone."""
    from trl_distill.cli import generate, train

    (tmp_path / "settings.yaml").write_text(f"{key}: {value}\noutput_dir: {tmp_path}\n")
    words = ["--config", str(tmp_path / "settings.yaml")]
    if command == "generate":
        usual = ["--dataset_name", "p", "--teacher_model_name_or_path", "t"]
        found = vars(generate.parsed([*words, *usual]))
    else:
        found = vars(train.make_parser(command).options(words))
    assert found[key] == expected
    assert found["output_dir"] == str(tmp_path)


def test_every_argument_that_takes_several_words_takes_one_from_a_yaml_file(tmp_path):
    from trl_distill.cli import train

    parser = train.make_parser()
    several = {action.dest for action in parser._actions if action.nargs in ("+", "*")}
    assert {"reward_funcs", "teacher_server_urls", "lora_target_modules"} <= several
    (tmp_path / "settings.yaml").write_text("".join(f"{name}: word\n" for name in several))
    found = vars(parser.options(["--config", str(tmp_path / "settings.yaml")]))
    assert all(found[name] == ["word"] for name in several)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "which is no file"), ("a: [1", "is no YAML"), ("- a\n", "must contain a YAML mapping")]
)
def test_a_yaml_file_that_cannot_be_read(text, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        run("train", f"--config={tmp_path / 'settings.yaml'}")
    assert message in capsys.readouterr().err + str(ended.value.code)


EVALUATE = "--models a b --prompts p.jsonl --split s --teacher t --verifier f"


def test_old_words_of_evaluate(capsys):
    from trl_distill.cli import evaluate

    options = evaluate.arguments(EVALUATE.split())
    assert options.model_name_or_path == ["a", "b"]
    assert (options.dataset_name, options.dataset_split) == ("p.jsonl", "s")
    assert (options.teacher_model_name_or_path, options.reward_funcs) == ("t", ["f"])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 5
    assert said[-1] == "trl-distill evaluate: `--verifier` is now called `--reward_funcs`; the old word still works."


def test_new_words_say_nothing(capsys):
    from trl_distill.cli import evaluate

    new = EVALUATE.replace("--models", "--model_name_or_path").replace("--prompts", "--dataset_name")
    new = new.replace("--split", "--dataset_split").replace("--verifier", "--reward_funcs")
    new = new.replace("--teacher", "--teacher_model_name_or_path")
    assert evaluate.arguments(new.split()) == evaluate.arguments(EVALUATE.split())
    assert len(capsys.readouterr().err.splitlines()) == 5  # of the old ones


def test_old_words_of_report_and_plot(capsys):
    from trl_distill.cli import plot, report

    options = report.arguments(["--model=a", "--teacher=t", "--prompts=p.jsonl", "--split=s"])
    found = (
        options.model_name_or_path,
        options.teacher_model_name_or_path,
        options.dataset_name,
        options.dataset_split,
    )
    assert found == ("a", "t", "p.jsonl", "s")
    assert plot.parse(["out", "--evaluation", "e.json", "--teacher", "t"]).teacher_model_name_or_path == "t"
    assert capsys.readouterr().err.count("the old word still works") == 5


@pytest.mark.parametrize("word", ["num_generations", "num-generations", "completions_per_prompt"])
def test_completions_per_prompt_of_generate(word, capsys, tmp_path):
    from trl_distill.cli import generate

    (tmp_path / "settings.yaml").write_text(f"{word}: 3\n")
    usual = ["--dataset_name", "p", "--output_dir", "o", "--teacher_model_name_or_path", "t"]
    assert generate.parsed([*usual, f"--{word}", "3"]).completions_per_prompt == 3
    if "-" not in word:
        config = generate.parsed(["--config", str(tmp_path / "settings.yaml"), *usual])
        assert config.completions_per_prompt == 3
        assert capsys.readouterr().err.count("the old word still works") == 2 * (word == "completions_per_prompt")


def test_words_after_two_dashes_are_left_alone(capsys):
    parser = CommandParser(command="x", text=None)
    parser.add_argument("--dataset_name")
    parser.add_argument("rest", nargs="*")
    assert parser.parse_args(["--", "--prompts", "--nothing"]).rest == ["--prompts", "--nothing"]
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "verbosity"), [("train", None), ("check", None), ("generate", None), ("evaluate", "error")]
)
def test_training_keeps_the_libraries_warnings(command, verbosity, monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    with warnings.catch_warnings():
        prepare_environment(command)
    assert os.environ.get("TRANSFORMERS_VERBOSITY") == verbosity
    assert "DS_ACCELERATOR" not in os.environ or command == "evaluate"  # training may run on any device


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setattr(os, "environ", {"TRANSFORMERS_VERBOSITY": "info"})
    with warnings.catch_warnings():
        prepare_environment("report")
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
