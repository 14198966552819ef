"""Words, normal forms, and what can be a prompt."""

from __future__ import annotations

import pytest

from trl_distill.synthetic.text import fault_of, flat, normal, numbers, repetition, words


def test_words_of_languages_with_and_without_spaces():
    assert words("Two  Words,\nhere") == ["two", "words,", "here"]
    assert words("今日は good") == ["今", "日", "は", "good"]


def test_normal_forms():
    assert normal(" A\t b\n") == "A b"
    assert normal(" A\t b\n", fold_case=True) == "a b"
    assert normal("ﬁne １２") == "fine 12"


def test_numbers_in_their_order():
    assert numbers("3 of 1,000 are 2.5") == ("3", "1,000", "2.5")
    assert numbers("12 - 7") != numbers("7 - 12")


@pytest.mark.parametrize(
    ("text", "share"),
    [("", 0.0), ("a b c", 0.0), ("a b c d e", 0.0), ("a a a a a", 0.5), ("a b c d " * 10, 1 - 4 / 37)],
)
def test_repetition_is_the_share_of_repeated_4_grams(text, share):
    assert repetition(text) == pytest.approx(share)


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        ("Hi", None),
        ([USER], None),
        ([{"role": "system", "content": ""}, USER], None),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], None),
        (None, "no prompt"),
        (" \n", "empty prompt"),
        ([], "empty prompt"),
        ([{"role": "user", "content": " "}], "empty prompt"),
        ([{"role": "user", "content": None}], "empty prompt"),
        ([USER, {"role": "assistant", "content": "Hello"}], "prompt ends with an assistant's message"),
        (7, "prompt is neither text nor messages"),
        (["Hi"], "prompt is neither text nor messages"),
        ([{"content": "Hi"}], "prompt is neither text nor messages"),
    ],
)
def test_what_can_be_a_prompt(prompt, fault):
    assert fault_of(prompt) == fault


def test_flat_leaves_roles_out_of_a_single_message():
    assert flat("Hi") == flat([USER]) == "Hi"
    assert flat([USER, {"role": "assistant", "content": "Yo"}]) == "user: Hi\nassistant: Yo"
