"""Alignment of completions: every byte is in one span on both sides, decided from the left, and the traps by name."""

from __future__ import annotations

import pytest
from helpers import make_tokenizer
from hypothesis import given, settings, strategies
from text_models import MERGES, STUDENT, TEACHER, make_bpe
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_distill.alignment.completions import align
from trl_distill.alignment.text_tokenizer import BYTE_OF, TextTokenizer
from trl_distill.alignment.vocabularies import vocabularies


CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}
TEXTS = ["the cat's  hat", "naïve 漢字 漢", "12345 67", "  x\n\n  y\t<think>z", "a\u0301é", "👩‍👩‍👧!"]
SPECIAL = ["<eos>", "<think>"]


def written(text: str) -> str:
    return "".join(CHARACTER_OF[byte] for byte in text.encode())


def byte_level(merges: list[tuple[str, str]], special: list[str], normalizer=None) -> PreTrainedTokenizerFast:
    """All bytes, and merges of texts; words are split as in GPT-2's tokenizer."""
    pairs = [(written(a), written(b)) for a, b in merges]
    vocabulary = dict.fromkeys([*CHARACTER_OF.values(), *(a + b for a, b in pairs)])
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0])


def sentencepiece(merges: list[tuple[str, str]], characters: str) -> PreTrainedTokenizerFast:
    """Characters and merges with "▁" for a space, and bytes for all other characters."""
    pairs = [(a.replace(" ", "▁"), b.replace(" ", "▁")) for a, b in merges]
    tokens = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *characters]
    vocabulary = dict.fromkeys([*tokens, *(a + b for a, b in pairs)])
    tokenizer = Tokenizer(
        models.BPE({t: i for i, t in enumerate(vocabulary)}, pairs, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


MAKERS = {
    "words": lambda: byte_level([("t", "h"), ("th", "e"), (" ", "the"), ("c", "a"), ("ca", "t"), ("1", "2")], SPECIAL),
    "others": lambda: byte_level([("h", "e"), (" ", "t"), ("a", "t"), ("2", "3")], ["<end>"]),
    "composed": lambda: byte_level([("a", "t"), (" ", "a")], ["<end>"], normalizers.NFC()),
    "pieces": lambda: sentencepiece([("t", "h"), (" ", "t"), (" t", "h"), ("c", "a")], "thecas12345 naxyz"),
}


@pytest.fixture(scope="module")
def tokenizers_by_name():
    return {name: make() for name, make in MAKERS.items()}


def pair_of(found, student: str, teacher: str):
    return vocabularies(TextTokenizer(found[student], "student"), TextTokenizer(found[teacher], "teacher"))


def check(pair, ids: list[int], stopped: bool, window: int | None = None) -> None:
    """What holds for every completion, whatever its tokens."""
    found = align(pair, ids, stopped, window)
    assert found.starts == sorted(set(found.starts))
    assert not found.starts or found.starts[0] == 0
    assert len(found.places) == len(found.starts) + 1
    assert found.end <= len(ids) + stopped
    assert (found.end == len(ids) + 1) == stopped
    text = pair.student.text_bytes(ids[: min(found.end, len(ids))])
    if any(found.charged) or text is None:
        return
    assert pair.teacher.text_bytes(found.paths[0]) == text  # no byte is lost, and none is there twice
    for start, place in zip(found.starts, found.places, strict=False):
        before = found.paths[place.path][: place.count]
        assert pair.teacher.text_bytes(before) == pair.student.text_bytes(ids[:start])
    for path, common in zip(found.paths[1:], found.common[1:], strict=True):
        assert path[:common] == found.paths[0][:common]
        assert path[common : common + 1] != found.paths[0][common : common + 1]


NAMES = list(MAKERS)


@settings(max_examples=60, deadline=None)
@given(data=strategies.data())
def test_every_byte_is_in_one_span_on_both_sides(tokenizers_by_name, data):
    """Texts in many scripts and random ids; the alignment of a beginning does not change with what follows."""
    pair = pair_of(
        tokenizers_by_name, data.draw(strategies.sampled_from(NAMES)), data.draw(strategies.sampled_from(NAMES))
    )
    if data.draw(strategies.booleans()):
        text = data.draw(strategies.text(max_size=12) | strategies.sampled_from(TEXTS))
        ids = pair.student.encode(text)
    else:
        ids = data.draw(strategies.lists(strategies.integers(0, len(pair.student) + 1), max_size=10))
    for stopped in (False, True):
        check(pair, ids, stopped)
    whole = align(pair, ids, True)
    for count in range(len(ids)):
        cut = align(pair, ids[:count], False)
        assert [start for start in whole.starts if start < cut.end] == [s for s in cut.starts if s < cut.end]
        assert (cut.end == count) == (count in whole.starts)
        ended = align(pair, ids[:count], True).charged  # the end may charge what is unfinished
        assert cut.charged == whole.charged[:count] or ended != cut.charged


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", TEXTS)
def test_a_tokenizers_own_text_is_canonical(tokenizers_by_name, name, text):
    pair = pair_of(tokenizers_by_name, name, name)
    ids = pair.student.encode(text)
    found = align(pair, ids, True)
    changed = pair.student.text_bytes(ids) != text.encode()
    assert not any(found.charged) or changed
    assert found.paths[0] == ids


def test_another_spelling_is_charged_once_and_the_text_goes_on(tokenizers_by_name):
    pair = pair_of(tokenizers_by_name, "words", "others")
    ids = [pair.student.encode(part) for part in ("t", "h", "e", " the")]
    found = align(pair, [i for part in ids for i in part], True)
    assert found.charged == [False, True, False, False]  # "t|h" is written "th"; "h|e" is canonical by itself
    assert pair.teacher.text_bytes(found.paths[0]) == b"the the"


def test_crossed_tokens_are_read_on_a_second_path():
    pair = vocabularies(
        TextTokenizer(make_bpe(STUDENT, MERGES["student"], "<eos>"), "student"),
        TextTokenizer(make_bpe(TEACHER, MERGES["teacher"], "<end>"), "teacher"),
    )
    a, b, ab = (STUDENT.index(token) for token in ("a", "b", "ab"))
    found = align(pair, [b, ab], True)
    assert [pair.teacher.shown(path) for path in found.paths] == ["ba | b"]
    assert found.starts == [0, 2] or found.starts == [0]  # "b" is about to go on as "ba"
    assert a not in pair.closed  # nor "a", as "aa"


def test_a_cut_character_and_a_cut_word_are_left_out(tokenizers_by_name):
    pair = pair_of(tokenizers_by_name, "words", "others")
    ids = pair.student.encode("x 漢")
    cut = align(pair, ids[:-1], False)
    assert cut.end < len(ids) - 1
    assert not any(cut.charged)
    assert align(pair, ids[:-1], True).charged[-1]  # a stop token behind a part of a character


def test_a_marker_is_one_token_or_its_text(tokenizers_by_name):
    student = TextTokenizer(tokenizers_by_name["words"], "student")
    pair = pair_of(tokenizers_by_name, "words", "others")
    think = student.id_of_added["<think>"]
    found = align(pair, [think, *student.encode("x")], True)
    assert pair.teacher.text_bytes(found.paths[0]) == b"<think>x"
    assert not any(found.charged)
    spelled = student.encode("<think>")  # as text it is no special token
    assert think not in spelled


def test_a_window_gives_what_the_whole_text_gives(tokenizers_by_name):
    pair = pair_of(tokenizers_by_name, "words", "pieces")
    ids = pair.student.encode("the cat that 12 cats hate, then the hat " * 6)
    assert align(pair, ids, True, window=16) == align(pair, ids, True, window=None)


def test_words_do_not_go_with_other_kinds(tokenizers_by_name):
    words = TextTokenizer(make_tokenizer(), "student")
    assert words.text_bytes(words.encode("a b")) == b" a b"
    with pytest.raises(ValueError, match="does not keep white space"):
        vocabularies(words, TextTokenizer(tokenizers_by_name["words"], "teacher"))
