"""What the preflight says of chat templates that a teacher with another tokenizer has."""

from __future__ import annotations

import pytest
from helpers import make_tokenizer

from trl_distill.checks.cross_tokenizer import thoughts


def tokenizer(end: str):
    """One whose template writes `end` before an answer."""
    made = make_tokenizer()
    made.chat_template = (
        "{% for m in messages %}{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}" + end + "{% endif %}"
    )
    return made


@pytest.mark.parametrize(
    ("student", "teacher", "level"),
    [
        ("assistant: ", "answer: ", "ok"),
        ("assistant: <think>\n\n</think>\n\n", "answer: ", "ok"),  # an empty thought is over when the answer begins
        ("assistant: <think>\n", "answer: ", "error"),
        ("answer: ", "assistant: <think>\n", "error"),
        ("assistant: <think>\n", "answer: <think>", "ok"),
        ("assistant: <think>one</think><think>", "answer: ", "error"),
        ("assistant: ", "<|channel|>analysis<|message|>", "error"),
    ],
)
def test_a_thought_that_one_template_opens_and_the_other_does_not(student, teacher, level):
    assert thoughts(tokenizer(student), tokenizer(teacher), None).level == level
