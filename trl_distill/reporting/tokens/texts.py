"""Tokens as text: what each of them adds to a completion, and what to call an id that stands alone.

Byte-level tokens may hold a part of a character, and some tokenizers write spaces between words only when they decode
several at once. What of it is shown how is left to the page.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no character yet


_CONTEXT = 4  # tokens before the current one that are decoded along with it


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text if isinstance(text, str) else "".join(text)


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, ...]:
    """
    The share of each token in the text of a completion; joined they are that text.

    A character of several tokens belongs to the last of them, and the others have an empty share.
    """
    shares: list[str] = []
    start = 0  # where the decoded context begins
    known = 0  # tokens whose text is known
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
    """What to call an id that stands alone; the tokenizer's own name for it where it is no whole character."""
    piece = tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(tokenizer) else None
    if not isinstance(piece, str):
        return f"<id {token}>"  # a row of the embedding that is padding
    text = _decode(tokenizer, [token])
    if not text or UNFINISHED in text:
        return piece
    return f" {text}" if piece.startswith("\u2581") and not text.startswith(" ") else text
