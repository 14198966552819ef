"""Wrong settings are refused before anything is read, with what to write instead."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

from trl_distill.cli.generate import parsed
from trl_distill.synthetic import GenerateConfig
from trl_distill.synthetic.address import Address, parse_address
from trl_distill.synthetic.config import FIXED
from trl_distill.synthetic.pipeline import FREE
from trl_distill.synthetic.sources.base import Sampling


GOOD = {"dataset_name": "p.jsonl", "output_dir": "out", "teacher_model_name_or_path": "t"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": ""}, "no prompts"),
        ({"output_dir": ""}, "no place for the result"),
        ({"teacher_model_name_or_path": None}, "Name the teacher"),
        ({"teacher_models": {"a": "b"}}, "not both"),
        ({"teacher_models": "{"}, "no JSON"),
        ({"request_options": "[1]"}, "JSON object"),
        ({"request_options": '{"x": [NaN]}'}, "a number that JSON does not have"),
        ({"correct_from": float("nan")}, "`correct_from` is nan"),
        ({"api_key_env": "sk-123"}, "names an environment variable, but"),
        ({"teacher_model_name_or_path": "http://h:1/v1?key=x#m"}, "something after"),
        ({"teacher_model_name_or_path": "ftp://h#m"}, "in full"),
        ({"reward_funcs": ["f"], "judge": "http://h/@x#m"}, "Keep one"),
        ({"judge": "http://h/@x#m"}, "`@` after the host"),
        ({"keep": "some"}, "'all', 'correct', 'best'"),
        ({"teacher_assignment": "x"}, "not known"),
        ({"chunk_size": 0}, "`chunk_size` is 0; it must be at least 1."),
        ({"human_share": 1.5, "human_data": "h"}, "between 0 and 1"),
        ({"human_share": 1.0, "human_data": "h"}, "no room"),
        ({"human_share": 0.5}, "belong together"),
        ({"human_data": "h"}, "belong together"),
        ({"temperature": 0, "completions_per_prompt": 2}, "the same text each time"),
        ({"keep": "correct"}, "needs scores"),
        ({"pairs": True}, "needs scores"),
        ({"pairs": True, "reward_funcs": ["f"]}, "two completions"),
        ({"pairs": True, "reward_funcs": ["f"], "completions_per_prompt": 2, "keep": "best"}, "by itself"),
        (
            {"pairs": True, "reward_funcs": ["f"], "completions_per_prompt": 2, "human_data": "h", "human_share": 0.1},
            "no rejected completions",
        ),
        ({"reward_funcs": ["f"], "judge": "http://x#m"}, "Keep one"),
        ({"judge": "http://x"}, "does not say which model"),
        ({"judge_prompt": "file"}, "no `judge`"),
        ({"chat_template_kwargs": "[1]"}, "JSON object"),
        (
            {"teacher_model_name_or_path": "http://x#m", "chat_template_kwargs": {"enable_thinking": False}},
            "all teachers are endpoints. Write them into `request_options`",
        ),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        GenerateConfig(**{**GOOD, **changes})


def test_every_setting_is_documented():
    documented = "".join(inspect.cleandoc(kind.__dict__.get("__doc__") or "") for kind in GenerateConfig.__mro__)
    for field in fields(GenerateConfig):
        assert f"\n    {field.name} (" in documented, field.name
        assert field.metadata["help"], field.name


def test_settings_that_completions_hang_on_exist():
    names = {field.name for field in fields(GenerateConfig)}
    assert set(FIXED) <= names
    assert set(FREE) <= names
    assert not set(FIXED) & set(FREE)


def test_arguments_of_the_chat_template_are_the_teachers_alone(monkeypatch):
    from trl_distill.synthetic.sources import load
    from trl_distill.synthetic.stages import judge

    monkeypatch.setattr(judge, "check_source", lambda address: None)
    monkeypatch.setattr(load, "TransformersSource", lambda *given: given)
    config = GenerateConfig(**GOOD, judge="folder", chat_template_kwargs='{"enable_thinking": false}')
    (teacher,) = config.teachers.values()
    assert load.load_source(teacher, Sampling(), config)[3] == {"enable_thinking": False}
    assert judge.load_judging(config).load()[3] is None


def test_addresses(tmp_path):
    assert parse_address("org/model") == Address("transformers", "org/model")
    assert parse_address("vllm:org/model") == Address("vllm", "org/model")
    assert parse_address("http://h:1/v1/#org/m") == Address("endpoint", "org/m", "http://h:1/v1")
    for wrong in ("http://h:1/v1", " "):
        with pytest.raises(ValueError, match=r"which model|empty name"):
            parse_address(wrong)
    assert parse_address(str(tmp_path)).short_name == tmp_path.name  # no path of this machine in the rows
    config = GenerateConfig(
        **{**GOOD, "teacher_model_name_or_path": None, "teacher_models": '{"a": "x", "b": "vllm:y"}'}
    )
    assert list(config.teachers) == ["a", "b"]


@pytest.mark.parametrize(
    "changes",
    [
        {"request_options": '{"api_key": "sesame"'},
        {"request_options": '["sesame"]'},
        {"teacher_model_name_or_path": None, "teacher_models": '{"a": "http://u:sesame@h#m"'},
        {"teacher_model_name_or_path": "http://u:sesame@h"},
        {"teacher_model_name_or_path": "HTTP://u:sesame@h"},
        {"teacher_model_name_or_path": "http://u:sesame#and@h#m"},
        {"teacher_model_name_or_path": "http://u:sesame#and@h"},
        {"teacher_model_name_or_path": "http://u:sesame/and@h#m"},
        {"teacher_model_name_or_path": "http://u:1/sesame@h#m"},
        {"teacher_model_name_or_path": "http://h?key=sesame#m"},
        {"judge": "http://u:sesame@h"},
        {"judge": "vllm:http://u:sesame@h#m"},
        {"api_key_env": "my-sesame"},
    ],
)
def test_no_error_shows_a_secret(changes):
    with pytest.raises(ValueError) as error:  # noqa: PT011  any message
        GenerateConfig(**{**GOOD, **changes})
    assert "sesame" not in str(error.value)


def test_settings_are_shown_without_secrets():
    options = {
        "max_tokens": 7,
        "stop": ["$x"],
        "extra_headers": {"Authorization": "Bearer sesame"},
        "api_key": "sesame",
    }
    config = GenerateConfig(
        **{**GOOD, "teacher_model_name_or_path": "http://u:sesame@h/v1#m"},
        request_options={**options, "note": "sk-sesamesesamesesame", "token": "$MINE"},
        judge="http://u:sesame@h/v1#m",
    )
    assert "sesame" not in f"{config!r} {config.shown()} {config.teachers}"
    shown = config.shown()["request_options"]
    assert (shown["max_tokens"], shown["stop"], shown["token"]) == (7, ["$x"], "$MINE")
    assert config.request_options["api_key"] == "sesame"


def test_a_single_reward_function_need_not_be_a_list(tmp_path):
    assert GenerateConfig(**GOOD, reward_funcs="my.f").reward_funcs == ["my.f"]
    (tmp_path / "run.yaml").write_text(
        "\n".join(f"{name}: {value}" for name, value in GOOD.items()) + "\nreward_funcs: my.f\n"
    )
    assert parsed(["--config", str(tmp_path / "run.yaml")]).reward_funcs == ["my.f"]
