"""Real tokenizers as maps between text and bytes, pairs of them aligned, and one step of training across them."""

from __future__ import annotations

import functools
import itertools
import math
import unicodedata

import pytest
from alignment.test_completions import check
from hypothesis import given, settings, strategies
from real_tokenizers.families import CHAT, FAMILIES

from trl_distill.alignment.completions import align
from trl_distill.alignment.text_tokenizer import TextTokenizer
from trl_distill.alignment.vocabularies import vocabularies


pytestmark = pytest.mark.slow

TEXTS = [
    "Größe, naïve façade — „quoted“ …",
    "Все люди рождаются свободными и равными.",
    "人人生而自由，在尊严和权利上一律平等。すべての人間は、생まれながらにして",
    "모든 인간은 태어날 때부터 자유로우며",
    "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "כל בני האדם נולדו בני חורין",
    "तमाम मनुष्य जन्म से स्वतन्त्र",
    "มนุษย์ทั้งหลายเกิดมามีอิสระ",
    "def f(x):\n\treturn {'a': [x ** 2, -1.5e-3]}  # 0xFF\n\n\n    y = f(f(3))\r\n",
    "👩‍👩‍👧 🇩🇪 👍🏽 ☕️",
    "  two spaces,   three, \t tabs\t\t, \u00a0no-break,\u3000wide \n \n\n end ",
    "\x00\x01\x07\x1b[0m\x7f\u200b\u2028\ufeff",
    "1234567890 12 345 6.78 9,999",
    " a leading space",
    "<|im_start|>system</s><bos>[INST]<think>",
    "𝕳𝖊𝖑𝖑𝖔 ℌ ﬁ ½ ²",
]


@pytest.fixture(scope="session")
def text_of(tokenizer_of):
    return functools.cache(lambda name: TextTokenizer(tokenizer_of(name), "student"))


def read_as(name: str, text: str) -> str:
    """The text as the family's tokenizer normalises it."""
    return unicodedata.normalize("NFC", text) if name == "qwen3" else text


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_come_back_byte_by_byte(text_of, name):
    tokenizer = text_of(name)
    for text in TEXTS:
        assert tokenizer.text_bytes(tokenizer.encode(text)) == read_as(name, text).encode(), text


@settings(max_examples=150, deadline=None)
@given(name=strategies.sampled_from(list(FAMILIES)), text=strategies.text(max_size=30))
def test_any_text_comes_back(text_of, name, text):
    tokenizer = text_of(name)
    assert tokenizer.text_bytes(tokenizer.encode(text)) == read_as(name, text).encode()


@pytest.mark.parametrize(("student", "teacher"), list(itertools.permutations(FAMILIES, 2)))
def test_texts_are_aligned_and_not_charged(text_of, tokenizer_of, student, teacher):
    pair = vocabularies(text_of(student), TextTokenizer(tokenizer_of(teacher), "teacher"))
    assert 10_000 < len(pair.closed) <= len(pair.shared)
    for text in TEXTS:
        ids = pair.student.encode(read_as("qwen3", text))
        for stopped in (True, False):
            check(pair, ids, stopped)
        charged = sum(align(pair, ids, True).charged)
        assert charged == 0, (text, pair.student.shown(ids))


@pytest.mark.parametrize(("student", "teacher"), list(zip(CHAT, [*CHAT[1:], CHAT[0]], strict=True)))
def test_a_step_across_tokenizers(make_trainer, saved_teacher, student, teacher):
    """Chat prompts, each model in its own template; tiny random models."""
    prompts = [[{"role": "user", "content": "What is 2 + 2?"}]] * 8
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}} if "qwen3" in (student, teacher) else {}
    trainer = make_trainer(student, prompts, saved_teacher(teacher), cross_tokenizer=True, top_k=0, **kwargs)
    found = {finding.check: finding for finding in trainer.preflight.findings}
    assert "commonest" in found["spans"].found or "exact" in found["spans"].found
    trainer.train()
    (row,) = [row for row in trainer.state.log_history if "loss" in row]
    assert math.isfinite(row["loss"])
    assert 0 <= row["distill/exact_tokens"] <= 1
