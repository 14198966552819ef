"""Two small byte-level tokenizers with different merges, and models for them that are saved in folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers import make_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


STUDENT = ["<pad>", "<eos>", "a", "b", "ab"]
TEACHER = ["<pad>", "<end>", "<alt>", "b", "a", "ba", "aa"]
MERGES = {"student": [("a", "b")], "teacher": [("b", "a"), ("a", "a")]}
TEACHER_STOPS = [1, 2]


def make_bpe(tokens: list[str], merges: list[tuple[str, str]], eos: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of these tokens; those in angle brackets are special."""
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens if token.startswith("<")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token=eos)


def make_pair(folder: Path, spread: float = 0.3, teacher_tokens: str = "teacher") -> tuple[Any, Any, Any, Any]:
    """Student, its tokenizer, teacher, its tokenizer; the teacher's is saved where its model says that it is from."""
    own = make_bpe(STUDENT, MERGES["student"], "<eos>")
    other = own if teacher_tokens == "student" else make_bpe(TEACHER, MERGES["teacher"], "<end>")
    small = {"hidden_size": 8, "head_dim": 4, "initializer_range": spread}
    student = make_model("untied", seed=1, vocab_size=len(STUDENT), **small)
    teacher = make_model("untied", seed=2, vocab_size=len(other), **small)
    if teacher_tokens == "teacher":
        teacher.generation_config.eos_token_id = TEACHER_STOPS
    for model in (student, teacher):
        model.get_input_embeddings().padding_idx = None  # an ordinary token here
    other.save_pretrained(folder)
    teacher.config._name_or_path = str(folder)
    return student, own, teacher, other
