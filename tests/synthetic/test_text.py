"""Words, normal forms and repetition."""

from __future__ import annotations

import pytest

from trl_distill.synthetic.text import flat, normal, numbers, repetition, words


def test_words_of_languages_with_and_without_spaces():
    assert words("Two  Words,\nhere") == ["two", "words,", "here"]
    assert words("今日は good") == ["今", "日", "は", "good"]


def test_normal_forms():
    assert normal(" A\t b\n") == "A b"
    assert normal(" A\t b\n", fold_case=True) == "a b"
    assert normal("cafe\u0301") == normal("caf\u00e9")
    assert normal("What is 5²?") != normal("What is 52?")
    assert normal("H₂O") != normal("H2O")


def test_numbers_in_their_order():
    assert numbers("3 of 1,000 are 2.5") == ("3", "1,000", "2.5")
    assert numbers("12 - 7") != numbers("7 - 12")
    assert numbers("What is 5²?") != numbers("What is 52?")


@pytest.mark.parametrize(
    ("text", "share"),
    [("", 0.0), ("a b c", 0.0), ("a b c d e", 0.0), ("a a a a a", 0.5), ("a b c d " * 10, 1 - 4 / 37)],
)
def test_repetition_is_the_share_of_repeated_4_grams(text, share):
    assert repetition(text) == pytest.approx(share)


USER = {"role": "user", "content": "Hi"}


def test_flat_leaves_roles_out_of_a_single_message():
    assert flat("Hi") == flat([USER]) == "Hi"
    assert flat([USER, {"role": "assistant", "content": "Yo"}]) == "user: Hi\nassistant: Yo"
