"""Tokens as text: what each token adds to a completion, and a label for a single id.

Byte-level tokens may be parts of a character, and some tokenizers write spaces between words only when they decode
several tokens at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


UNFINISHED = "\ufffd"  # what a decoder writes for an incomplete character


_CONTEXT = 4  # number of preceding tokens that are decoded together with the current one


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text if isinstance(text, str) else "".join(text)


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, ...]:
    """
    The part of a completion's text that each token adds; joined, they are that text.

    A character of several tokens belongs to the last of them; the others add an empty string.
    """
    shares: list[str] = []
    start = 0  # start of the decoded context
    known = 0  # number of tokens whose text is known
    for end in range(1, len(ids) + 1):
        before, now = _decode(tokenizer, ids[start:known]), _decode(tokenizer, ids[start:end])
        last = end == len(ids)
        if now.endswith(UNFINISHED) and not last and end - known < _CONTEXT:
            shares.append("")
            continue
        shares.append(now[len(before) :] if now.startswith(before) else _decode(tokenizer, ids[known:end]))
        start, known = known, end
    return tuple(shares)


def label(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The label of a single id: its text, or the tokenizer's name for it if it is not a whole character."""
    piece = tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(tokenizer) else None
    if not isinstance(piece, str):
        return f"<id {token}>"  # a padding row of the embedding
    text = _decode(tokenizer, [token])
    if not text or UNFINISHED in text:
        return piece
    return f" {text}" if piece.startswith("\u2581") and not text.startswith(" ") else text
