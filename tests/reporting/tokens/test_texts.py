"""Tokens as text, with tokenizers that cut characters or write spaces between words."""

from __future__ import annotations

import pytest
from helpers import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_distill.reporting.tokens.texts import label, token_texts


def byte_level() -> PreTrainedTokenizerFast:
    """One token for each byte: most characters outside of ASCII take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTES = byte_level()


@given(st.text())
def test_shares_join_to_the_text_whatever_characters_take_several_tokens(text):
    text = text.encode("utf-8", "replace").decode()
    assert "".join(token_texts(BYTES, BYTES(text)["input_ids"])) == text


def test_a_character_belongs_to_its_last_token():
    assert token_texts(BYTES, BYTES("aü€b")["input_ids"]) == ("a", "", "ü", "", "", "€", "b")


def test_bytes_that_never_become_a_character_are_not_swallowed():
    broken = [*BYTES("ok")["input_ids"], BYTES("€")["input_ids"][0]]
    assert token_texts(BYTES, broken)[:2] == ("o", "k")
    assert "\ufffd" in token_texts(BYTES, broken)[2]


def test_spaces_that_a_decoder_writes_between_words():
    tokenizer = make_tokenizer()
    ids = tokenizer("a b c")["input_ids"]
    assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids) == "a b c"


@pytest.mark.parametrize(("token", "expected"), [("a", "a"), ("Ġ", " "), ("Ã", "Ã")])
def test_labels(token, expected):
    assert label(BYTES, BYTES.convert_tokens_to_ids(token)) == expected


def test_a_row_of_the_embedding_without_a_token_has_a_label():
    assert label(BYTES, 5000) == "<id 5000>"
