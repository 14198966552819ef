"""Languages: planted texts are told apart; short texts, code and formulas are not decided on."""

from __future__ import annotations

import pytest

from trl_distill.synthetic.stages.language import LETTERS, check_language, language_fault, language_of


TEXTS = {
    "en": "Natalia sold clips to her friends in April, and then she sold half as many of them in May.",
    "de": "Schreibe bitte eine kurze Geschichte über einen Fischer, der jeden Morgen auf das Meer hinausfährt.",
    "fr": "Expliquez en quelques phrases pourquoi les feuilles des arbres changent de couleur en automne.",
    "es": "Escribe una carta a tu vecino para pedirle que baje el volumen de la música por las noches.",
    "ru": "Объясните простыми словами, почему небо голубое, а закаты бывают красными.",
    "ja": "日本の首都はどこですか。その歴史を簡単に説明してください。",
    "zh": "请用简单的语言解释为什么天空是蓝色的，而日落时却是红色的。",
}


@pytest.mark.parametrize("code", TEXTS)
def test_languages_are_told_apart(code):
    assert language_of(TEXTS[code]) == code
    assert language_fault(TEXTS[code], "42", [code]) is None
    other = "de" if code != "de" else "en"
    assert language_fault(TEXTS[code], "42", [other]) == f"prompt in another language ({code})"
    messages = [{"role": "user", "content": TEXTS[other]}]
    assert language_fault(messages, TEXTS[code], [other]) == f"completion in another language ({code})"
    assert language_fault(messages, TEXTS[code], [other, code]) is None


def test_too_little_prose_is_not_decided_on():
    assert language_of(TEXTS["de"][: LETTERS - 5]) is None
    assert language_of("") is None
    code = "def meer(hinaus):\n    return [fischer for fischer in hinaus if fischer.morgen]\n" * 3
    assert language_of(f"```python\n{code}```") is None
    assert language_of("$" + "alpha beta gamma delta " * 5 + "$ https://example.org/" + "geschichte" * 9) is None
    assert language_of(f"{TEXTS['en']}\n```\n{TEXTS['de'] * 5}\n```") == "en"


def test_unknown_languages_are_found_early():
    check_language([])
    check_language(["en", "de"])
    with pytest.raises(ValueError, match="does not know the language 'xq'"):
        check_language(["en", "xq"])
