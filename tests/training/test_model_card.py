"""The model card names student, teachers and settings, masks secrets, and survives a change of TRL's template."""

from __future__ import annotations

import pytest
from helpers import config, make_model

from trl_distill import OPDTrainer
from trl_distill.training.model_card import complete


def reward(completions, **_):
    return [0.0] * len(completions)


@pytest.fixture
def card(saved, prompts, tokenizer):
    """The card of a run with a student and a teacher from folders."""

    def run(reward_funcs=None, model=None, **changes):
        settings = {"teacher_model_name_or_path": str(saved / "teacher"), **changes}
        trainer = OPDTrainer(
            model=model or str(saved / "student"),
            reward_funcs=reward_funcs,
            args=config(saved / "out", **settings),
            train_dataset=prompts,
            processing_class=tokenizer,
        )
        trainer.create_model_card(model_name="out")
        return (saved / "out" / "README.md").read_text()

    return run


def test_student_teacher_and_settings_are_named(card, saved):
    text = card(kl_estimator="topk", kl_top_k=4, beta=0.5)
    assert "None" not in text.split("## Quick start")[0]
    assert (
        "This model is a fine-tuned version of `student` (a local folder), distilled from `teacher` (a local folder) "
        "on its own completions." in text
    )
    for row in (
        "| student | `student` (a local folder) |",
        "| teacher | `teacher` (a local folder) |",
        "| `beta`, weight of the teacher | 0.5 |",
        "| divergence | `reverse_kl` |",
        "| estimator | `topk`, `kl_top_k=4` |",
        "| rewards | none |",
    ):
        assert row in text
    assert str(saved) not in text
    assert text.count("### Framework versions") == 1


def test_schedules_rewards_and_parameters(card):
    text = card(
        [reward],
        divergence="jsd",
        beta_schedule="linear",
        beta_end=0.1,
        num_generations=2,
    )
    assert "| `beta`, weight of the teacher | 1 to 0.1 (linear) |" in text
    assert "| divergence | `jsd`, `divergence_alpha=0.5` |" in text
    assert "| rewards | `reward` |" in text


def test_plain_grpo_has_no_teacher(card):
    text = card([reward], teacher_model_name_or_path=None, beta=0.0, num_generations=2)
    assert "This model is a fine-tuned version of `student` (a local folder).\n" in text
    assert "| `beta`, weight of the teacher | 0 |" in text
    assert "| teacher" not in text


@pytest.mark.parametrize(
    "template",
    [
        "This model is a fine-tuned version of [None](https://huggingface.co/None).\n\n### Framework versions\n",
        "Another template.\n",
    ],
)
def test_names_from_the_hub_secrets_and_other_templates(tmp_path, template):
    facts = {
        "student": "Qwen/Qwen3-0.6B",
        "teachers": {"a|b": "Qwen/Qwen3-4B", "c": "https://me:hunter2@host/v1"},
        "reward_funcs": [],
    }
    text = complete(template, facts, config(tmp_path, hub_token="hunter2"))
    assert "fine-tuned version of [Qwen/Qwen3-0.6B](https://huggingface.co/Qwen/Qwen3-0.6B), distilled from" in text
    assert r"| teacher 'a\|b' | [Qwen/Qwen3-4B](https://huggingface.co/Qwen/Qwen3-4B) |" in text
    assert "hunter2" not in text
    assert "None" not in text


def test_names_are_no_markdown(tmp_path):
    facts = {"student": "[x](y)/z", "teachers": {"a$b$": "m`n", "[c]": "e/f"}, "reward_funcs": ["<lambda>", "a`b"]}
    text = complete("### Framework versions\n", facts, config(tmp_path))
    assert "fine-tuned version of `[x](y)/z`, distilled from ``m`n`` and [e/f](https://huggingface.co/e/f)" in text
    assert r"| teacher 'a\$b\$' | ``m`n`` |" in text
    assert r"| teacher '\[c\]' |" in text
    assert "| rewards | `<lambda>`, ``a`b`` |" in text


def test_the_datasets_name_stays(tmp_path):
    template = (
        "This model is a fine-tuned version of [a/b](https://huggingface.co/a/b) on the "
        "[c/d](https://huggingface.co/datasets/c/d) dataset.\n"
    )
    text = complete(template, {"student": "a/b", "teachers": {"teacher": "e/f"}, "reward_funcs": []}, config(tmp_path))
    assert "on the [c/d](https://huggingface.co/datasets/c/d) dataset, distilled from [e/f]" in text


def test_a_student_that_was_made_here_has_the_name_of_its_class(card):
    assert "fine-tuned version of `Qwen3ForCausalLM`, distilled from" in card(model=make_model(seed=3))
