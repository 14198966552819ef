"""A tokenizer as a map between text and bytes: what each id adds to a text, and the ids of a text.

Special tokens are not looked for in text: a `</s>` that a model spells out is text. Whoever has a special token's id
asks for its content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase


class TextTokenizer:
    """
    The bytes of each id, and the ids of a text.

    Three kinds are known, by the tokenizer's decoder: byte-level ("Ġ" is a space), SentencePiece with byte fallback
    ("▁" is a space, "<0xE4>" a byte), and words that are separated by white space, each of which is written with a
    space before it.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): a fast one.
        whose (`str`): "student" or "teacher", for messages.

    Attributes:
        kind (`str`): "bytes", "sentencepiece" or "words".
        bytes_of (`list` of `bytes`): what each id adds to a text; `None` for added tokens and ids without a token.
        added (`dict[int, str]`): contents of added tokens, by id.
        id_of_added (`dict[str, int]`): the reverse.
        hash (`str`): of all that decides how a text is tokenised.

    Raises:
        ValueError: the tokenizer is of another kind.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, whose: str):
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError(
                f"The {whose}'s tokenizer ({type(tokenizer).__name__}) has no file `tokenizer.json`, from which the "
                "bytes of its tokens are known. Save a fast tokenizer with the model, or use a teacher with the "
                "student's tokenizer."
            )
        written = backend.to_str()
        self.hash = hashlib.sha256(written.encode()).hexdigest()
        self.whose, self.kind = whose, _kind(json.loads(written), type(tokenizer).__name__, whose)
        self._backend = Tokenizer.from_str(written)  # a copy: its settings are changed
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        added = {i: token.content for i, token in self._backend.get_added_tokens_decoder().items()}
        # Gemma has runs of white space among its added tokens: they are text
        self.added = {i: content for i, content in added.items() if not _text_of(content, self.kind).isspace()}
        self.id_of_added = {content: i for i, content in self.added.items()}
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.bytes_of: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
        for token, i in vocabulary.items():
            if i not in self.added:
                self.bytes_of[i] = token.encode() if token.isspace() else _bytes(token, self.kind)
        self._adds_space = self.kind != "words" and self._joined(self._ids("a")) == b" a"

    def __len__(self) -> int:
        return len(self.bytes_of)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens and without a space that the tokenizer adds in front."""
        if not self._adds_space or not text:
            return self._ids(text)
        return self._ids(text[1:]) if text[0] == " " else self._behind_a_line(text)

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """[`~TextTokenizer.encode`] of many texts."""
        if self._adds_space:
            return [self.encode(text) for text in texts]
        return [found.ids for found in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def text_bytes(self, ids: list[int]) -> bytes | None:
        """The bytes of ids, added tokens by their content; `None` if there is an id without a token."""
        parts = [self.piece(i) for i in ids]
        return None if None in parts else b"".join(part for part in parts if part is not None)

    def piece(self, i: int) -> bytes | None:
        """The bytes of one id, of an added token its content; `None` if it has no token."""
        if i in self.added:
            return self.added[i].encode()
        return self.bytes_of[i] if 0 <= i < len(self.bytes_of) else None

    def ordinary(self) -> Iterator[tuple[int, bytes]]:
        """All ids but those of added tokens, with their bytes."""
        for i, piece in enumerate(self.bytes_of):
            if piece:
                yield i, piece

    def shown(self, ids: list[int]) -> str:
        """Ids as their tokens' texts, for messages."""
        texts = [(self.piece(i) or b"").decode("utf-8", "replace") for i in ids]
        return " | ".join(repr(text)[1:-1] for text in texts)

    def _ids(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _joined(self, ids: list[int]) -> bytes:
        return self.text_bytes(ids) or b""

    def _behind_a_line(self, text: str) -> list[int]:
        """The ids of a text without the added space: those after a line break, where its ids can be told apart."""
        ids = self._ids("\n" + text)
        for count in range(1, min(len(ids), 4)):
            if self._joined(ids[:count]).strip(b" ") == b"\n":
                return ids[count:]
        return self._ids(text)


def _kind(described: dict[str, Any], name: str, whose: str) -> str:
    """The kind of a tokenizer, from the content of its `tokenizer.json`."""
    decoders = {part["type"] for part in _flat(described.get("decoder"), "decoders")}
    model = (described.get("model") or {}).get("type")
    if "ByteLevel" in decoders:
        return "bytes"
    if "ByteFallback" in decoders or "Metaspace" in decoders:
        return "sentencepiece"
    if model == "WordLevel" and not decoders:
        return "words"
    raise ValueError(
        f"The {whose}'s tokenizer ({name}: model {model!r}, decoders {sorted(decoders) or 'none'}) is of a kind whose "
        "tokens have no known bytes. Byte-level BPE, SentencePiece and words separated by spaces are known; use a "
        "teacher with the student's tokenizer."
    )


def _flat(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return [leaf for one in part[inner] for leaf in _flat(one, inner)] if inner in part else [part]


def _text_of(token: str, kind: str) -> str:
    return token.replace("\u2581", " ") if kind == "sentencepiece" else token


def _bytes(token: str, kind: str) -> bytes | None:
    if kind == "words":
        return f" {token}".encode()
    if kind == "sentencepiece":
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return _text_of(token, kind).encode()
    if not all(character in BYTE_OF for character in token):
        return None
    return bytes(BYTE_OF[character] for character in token)


def _byte_of() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others are moved behind 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(moved)}


BYTE_OF = _byte_of()
