"""Two vocabularies side by side: the ids that both have, and which of them are closed.

A comparison is kept in this process and in a file, by the hashes of both tokenizers: the first one of two vocabularies
of 200,000 ids takes some seconds.

An id is closed if a token that the teacher has begun with it rarely goes on: where both tokenizations begin anew and
the student writes it, both begin anew after it, too. No result is wrong where that fails; it costs noise and time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from .kept import cached_file, keep, read
from .text_tokenizer import TextTokenizer


@dataclass(frozen=True)
class Vocabularies:
    """
    What is known of a pair of tokenizers, without any text.

    Attributes:
        student, teacher ([`TextTokenizer`]): the tokenizers.
        shared (`dict[int, int]`): the teacher's id for each id of the student that both have with the same bytes or,
            for added tokens, the same content; both tokenise its text to this one id.
        closed (`dict[int, int]`): those of them that are not `unfinished`.
        unfinished (`set` of tuples of `int`): the student's ids that begin, but do not end, its spelling of tokens of
            the teacher, and go on as one of them in more than `OFTEN` of the cases, as estimated from ranks.
        changed (`tuple[int, ...]`): the student's ids whose text the teacher cannot write as it is.
    """

    student: TextTokenizer
    teacher: TextTokenizer
    shared: dict[int, int]
    closed: dict[int, int]
    unfinished: frozenset[tuple[int, ...]]
    changed: tuple[int, ...] = ()


WORTH_KEEPING = 1.0  # seconds that a comparison took


OFTEN = 0.03  # share of cases from which a begun token counts as unfinished


_known: dict[tuple[str, str], dict[str, Any]] = {}


def vocabularies(student: TextTokenizer, teacher: TextTokenizer) -> Vocabularies:
    """
    Compare two vocabularies, once for each pair of hashes.

    Raises:
        ValueError: one of them writes words with spaces between them, and the other does not.
    """
    if (student.kind == "words") != (teacher.kind == "words"):
        raise ValueError(
            f"The student's tokenizer is of the kind {student.kind!r}, the teacher's of the kind {teacher.kind!r}: one "
            "of them does not keep white space, so that its tokens have no place in the other's text. Use a teacher "
            "with a tokenizer of the student's kind."
        )
    key = (student.hash, teacher.hash)
    if key not in _known:
        path = cached_file(*key)
        kept, begun = read(path), time.perf_counter()
        _known[key] = kept or _compared(student, teacher)
        if kept is None and time.perf_counter() - begun > WORTH_KEEPING:
            keep(path, _known[key])
    return Vocabularies(student, teacher, **_known[key])


def _compared(student: TextTokenizer, teacher: TextTokenizer) -> dict[str, Any]:
    by_teacher = _spelled(teacher, dict(student.ordinary()))
    by_student = _spelled(student, dict(teacher.ordinary()))
    shared = {v: ids[0] for v, ids in by_teacher.items() if len(ids) == 1 and by_student.get(ids[0]) == [v]}
    unfinished = {tail for tail, share in _going_on(by_student, student, teacher).items() if share > OFTEN}
    closed = {v: w for v, w in shared.items() if (v,) not in unfinished}
    both = {v: teacher.id_of_added[c] for v, c in student.added.items() if c in teacher.id_of_added}
    changed = tuple(v for v, piece in student.ordinary() if v not in by_teacher and _text(piece) is not None)
    return {
        "shared": shared | both,
        "closed": closed | both,
        "unfinished": frozenset(unfinished),
        "changed": changed,
    }


def _spelled(tokenizer: TextTokenizer, pieces: dict[int, bytes]) -> dict[int, list[int]]:
    """How a tokenizer writes those pieces that are whole text, where it keeps their bytes; by the pieces' ids."""
    texts = {i: text for i, piece in pieces.items() if (text := _text(piece)) is not None}
    found, bytes_of = {}, tokenizer.bytes_of
    for i, ids in zip(texts, tokenizer.encode_all(list(texts.values())), strict=True):
        # most are one token; added ones have no bytes of their own
        same = bytes_of[ids[0]] == pieces[i] if len(ids) == 1 else bool(ids) and tokenizer.text_bytes(ids) == pieces[i]
        if same:
            found[i] = ids
    return found


def _going_on(spelled: dict[int, list[int]], student: TextTokenizer, teacher: TextTokenizer) -> dict[tuple, float]:
    """
    For ids of the student with which it begins to spell tokens of the teacher: how often they go on as one of those.

    Ids are ordered by how common their tokens were when the tokenizer was made, and frequencies fall like one over the
    rank. So a token of rank w takes about t / w of the occurrences of its beginning, a token of rank t.
    """
    several = {w: ids for w, ids in spelled.items() if len(ids) > 1}
    own = _spelled(teacher, {w: teacher.bytes_of[w] or b"" for w in several})
    rank = {piece: i for i, piece in reversed(list(teacher.ordinary()))}
    found: dict[tuple, float] = {}
    for w, ids in several.items():
        if own.get(w) != [w]:
            continue  # its own tokenizer never writes it
        text = b""
        for count in range(1, len(ids)):
            tail = tuple(ids[:count])
            text += student.piece(ids[count - 1]) or b""
            begun = rank.get(text, w)
            found[tail] = found.get(tail, 0.0) + min(1.0, (begun + 1) / (w + 1))
    return found


def _text(piece: bytes) -> str | None:
    """Bytes as text; `None` if they are no whole characters."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None
