"""Wrong settings are refused before anything is read, with what to write instead."""

from __future__ import annotations

from dataclasses import fields

import pytest

from trl_distill.synthetic import GenerateConfig
from trl_distill.synthetic.address import Address, parse_address
from trl_distill.synthetic.config import FIXED
from trl_distill.synthetic.pipeline import FREE


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
        ({"judge": "somebody"}, "http://host:port/v1#model"),
        ({"judge_prompt": "file"}, "no `judge`"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        GenerateConfig(**{**GOOD, **changes})


def test_every_setting_is_documented():
    for field in fields(GenerateConfig):
        assert f"        {field.name} (" in (GenerateConfig.__doc__ or ""), field.name
        assert field.metadata["help"], field.name


def test_settings_that_completions_hang_on_exist():
    names = {field.name for field in fields(GenerateConfig)}
    assert set(FIXED) <= names
    assert set(FREE) <= names
    assert not set(FIXED) & set(FREE)


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
