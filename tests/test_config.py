"""Settings: what is resolved, what is refused, and that TRL's own checks still run."""

from __future__ import annotations

import dataclasses

import pytest
from helpers import config
from transformers import HfArgumentParser
from trl import GRPOConfig

from trl_distill import OPDConfig
from trl_distill.config import _explained


def test_defaults_are_those_of_the_documentation():
    fields = {f.name: f.default for f in dataclasses.fields(OPDConfig)}
    assert fields["beta"] == 1.0
    assert fields["divergence"] == "reverse_kl"
    assert fields["kl_estimator"] == "full"
    assert fields["num_generations"] is fields["scale_rewards"] is fields["kl_temperature"] is None


def test_what_depends_on_rewards_is_resolved_in_a_copy(tmp_path):
    asked = config(tmp_path, per_device_train_batch_size=8)
    with_rewards, without = asked.resolved(has_rewards=True), asked.resolved(has_rewards=False)
    assert (with_rewards.num_generations, without.num_generations) == (1, 1)
    assert (with_rewards.reward_baseline, without.reward_baseline) == ("batch", None)
    assert with_rewards.scale_rewards == without.scale_rewards == "none"
    assert asked.num_generations is asked.reward_baseline is None
    assert asked.scale_rewards is None


@pytest.mark.parametrize("baseline", ["batch", "prompt"])
def test_other_baselines_than_the_groups_need_no_group(tmp_path, baseline):
    args = config(tmp_path, num_generations=1, reward_baseline=baseline)
    assert args.resolved(has_rewards=True).num_generations == 1
    alone = config(tmp_path, num_generations=1, reward_baseline=baseline, beta=0.0).resolved(has_rewards=True)
    assert alone.scale_rewards == "none"  # GRPO's own divides by the group's standard deviation
    default = config(tmp_path, reward_baseline=baseline, per_device_train_batch_size=8).resolved(has_rewards=True)
    assert default.num_generations == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": 0.0},
        {"num_generations": 4},
        {"scale_rewards": "group"},
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"reward_baseline": "group"},
    ],
)
def test_rewards_are_compared_in_groups_where_a_setting_speaks_of_them(tmp_path, changes):
    """GRPO's own 8 completions where the reward stands alone, or where nothing else is said."""
    found = config(tmp_path, per_device_train_batch_size=8, **changes).resolved(has_rewards=True)
    assert found.reward_baseline == "group"
    assert found.num_generations == changes.get("num_generations", 8)


def test_scale_rewards_is_grpos_without_a_teacher(tmp_path):
    assert config(tmp_path, beta=0.0, per_device_train_batch_size=8).resolved(True).scale_rewards == "group"
    assert config(tmp_path, scale_rewards="batch").resolved(False).scale_rewards == "batch"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": -0.1}, "negative weight would drive the student away"),
        ({"sync_ref_model": True}, "write the student's weights into the teacher"),
        ({"divergence": "total_variation"}, "this version has reverse_kl"),
        ({"kl_estimator": "k3"}, "this version has full"),
        ({"kl_temperature": 0.0}, "must be > 0"),
        ({"temperature": 0.0}, "For greedy rollouts set `top_k=1`"),
        ({"num_generations": 0}, "at least one completion"),
        ({"num_generations": 3}, r"which `num_generations` \(3\) does not divide"),
        ({"steps_per_generation": 2, "generation_batch_size": 8}, "can not be both configured"),  # TRL's own
        ({"auto_find_batch_size": True}, "auto_find_batch_size is not supported"),  # TRL's own
    ],
)
def test_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_generations": 1, "reward_baseline": "group"},
            "compared among the completions of one prompt. Set `reward_baseline='batch'`",
        ),
        (
            {"per_device_train_batch_size": 6, "reward_baseline": "group"},
            r"holds 6 completions, which `num_generations` \(8\)",
        ),
        (
            {
                "per_device_train_batch_size": 8,
                "per_device_eval_batch_size": 4,
                "eval_strategy": "steps",
                "reward_baseline": "group",
            },
            r"evaluation batch holds 4 completions",
        ),
    ],
)
def test_refused_once_rewards_are_known(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes).resolved(has_rewards=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_return_sequences": 2}, "set `num_generations`"),
        ({"n": 2}, "set `num_generations`"),
        ({"return_dict_in_generate": True}, "token ids are needed"),
        ({"stop_strings": ["x"]}, "Use stop tokens"),
    ],
)
def test_settings_of_generate_that_do_not_give_one_completion_per_row(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, generation_kwargs=given).resolved(has_rewards=False)
    config(tmp_path, generation_kwargs={"num_return_sequences": 1, "seed": 3}).resolved(has_rewards=False)


@pytest.mark.parametrize(
    ("changes", "has_rewards", "words"),
    [
        ({"beta": 0.04}, True, "`beta` is 0.04. In GRPO scripts"),
        ({"beta": 0.04}, True, "the teacher counts little"),
        ({"beta": 0.001}, False, "the whole loss is scaled by it"),
        ({"beta": 0.1}, True, None),
        ({"beta": 0.0}, True, None),
        ({}, True, None),
        ({"beta": 0.01, "beta_schedule": "linear", "beta_end": 1.0}, True, None),
    ],
)
def test_a_beta_left_over_from_a_grpo_script_warns(tmp_path, caplog, changes, has_rewards, words):
    config(tmp_path, per_device_train_batch_size=8, **changes).resolved(has_rewards=has_rewards)
    assert ("In GRPO scripts" in caplog.text) is (words is not None)
    assert (words or "") in caplog.text
    caplog.clear()
    grpo = GRPOConfig(output_dir=str(tmp_path), beta=0.04, bf16=False, use_cpu=True)
    OPDConfig.from_grpo(grpo).resolved(has_rewards=True)
    assert "Leave `beta` out (1.0) unless" in caplog.text


def test_scaled_rewards_with_a_teacher_warn(tmp_path, caplog):
    args = config(tmp_path, per_device_train_batch_size=8, scale_rewards="group")
    args.resolved(has_rewards=False)
    assert not caplog.text
    args.resolved(has_rewards=True)
    assert "Use 'none' to optimise the stated objective" in caplog.text


def test_a_json_string_becomes_the_teachers_keyword_arguments(tmp_path):
    args = config(tmp_path, teacher_model_init_kwargs='{"dtype": "float32"}')
    assert args.teacher_model_init_kwargs == {"dtype": "float32"}


def test_the_command_line_knows_every_field():
    parser = HfArgumentParser(OPDConfig)
    (args,) = parser.parse_args_into_dataclasses(
        ["--output_dir", "x", "--beta", "0.5", "--teacher_model_name_or_path", "t", "--bf16", "false", "--use_cpu"]
    )
    assert args.beta == 0.5
    assert args.num_generations is None
    assert args.teacher_model_name_or_path == "t"
    assert "--kl_temperature" in parser.format_help()  # renders, so no help text holds a stray "%"


def test_from_grpo_keeps_everything(tmp_path):
    grpo = GRPOConfig(output_dir=str(tmp_path), beta=0.25, num_generations=4, temperature=0.5, bf16=False, use_cpu=True)
    ours = OPDConfig.from_grpo(grpo)
    for field in dataclasses.fields(GRPOConfig):
        assert getattr(ours, field.name) == getattr(grpo, field.name), field.name
    assert ours.divergence == "reverse_kl"
    assert isinstance(ours, OPDConfig)


@pytest.mark.parametrize("indent", ["", "    "], ids=["Python 3.13", "before"])
def test_help_is_read_with_and_without_the_indent_of_docstrings(indent):
    @dataclasses.dataclass
    class Settings:
        number: int = 0

    lines = [
        "",
        "Settings.",
        "",
        "Args:",
        "    number (`int`, *optional*):",
        "        How many,",
        "        at most.",
        "",
    ]
    Settings.__doc__ = "\n".join(indent + line for line in lines)
    _explained(Settings)
    assert dataclasses.fields(Settings)[0].metadata["help"] == "How many, at most."


def test_every_field_is_explained_in_the_docstring_and_the_help_is_that_text():
    ours = {field.name: field for field in dataclasses.fields(OPDConfig)}
    added = ours.keys() - {field.name for field in dataclasses.fields(GRPOConfig)} | {
        "beta",
        "num_generations",
        "scale_rewards",
    }
    parser = HfArgumentParser([OPDConfig])
    shown = {action.dest: action.help for action in parser._actions}
    for name in added:
        assert f"{name} (`" in OPDConfig.__doc__, name
        words = " ".join(OPDConfig.__doc__.split())
        assert shown[name].replace("%%", "%") in words, name
        assert len(shown[name]) > 20
