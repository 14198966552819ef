"""Reads a good answer of a teacher's server all at once: no Python code runs for each of the alternatives.

It returns scores only for an answer that passes every check of `server_answers.py`. It says nothing about any other
one: that is read there again, position by position, so that the error says where.
"""

from __future__ import annotations

import itertools
import json
import operator
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


try:
    import orjson

    _loads: Any = orjson.loads
except ImportError:
    _loads = json.loads


IMPOSSIBLE = -9999.0  # what vLLM writes for a log-probability of -inf, which JSON lacks
LARGEST_LOG_PROB = 1e-4  # rounding
LARGEST_MASS = 1 + 1e-3
TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
IDS = re.compile(rf"(?:{TOKEN_ID.pattern})(?:,(?:{TOKEN_ID.pattern}))*+")
SPACED_COLON = re.compile(rb'"[ \t\n\r]+:')
_log_prob, _rank = operator.itemgetter("logprob"), operator.itemgetter("rank")


@dataclass
class Row:
    """A row of the rollouts as it is sent: its index, its ids without padding, and the judged positions."""

    index: int
    ids: list[int]
    judged: list[int]


@dataclass
class TokenScores:
    """
    Log-probabilities of N judged tokens, row by row.

    Attributes:
        log_p (`numpy.ndarray` of shape `(N,)`): of the tokens, nats.
        top_ids (`numpy.ndarray` of shape `(N, K)`, int64): the teacher's K most likely ids.
        top_log_p (`numpy.ndarray` of shape `(N, K)`): their log-probabilities, nats.
    """

    log_p: NDArray[np.float64]
    top_ids: NDArray[np.int64]
    top_log_p: NDArray[np.float64]

    @classmethod
    def cat(cls, pieces: list[TokenScores], top_k: int) -> TokenScores:
        """One after the other; `top_k` is K, also without any piece."""
        none = cls(np.zeros(0), np.zeros((0, top_k), dtype=np.int64), np.zeros((0, top_k)))
        return cls(
            *(
                np.concatenate([getattr(piece, name) for piece in (none, *pieces)])
                for name in ("log_p", "top_ids", "top_log_p")
            )
        )


class _NotGoodError(Exception):
    """The answer is not read here."""


def read_good_answer(content: bytes | str, rows: list[Row], model: str, top_k: int) -> TokenScores | None:
    """
    The scores of all judged tokens from the answer of `/v1/completions` for `rows`; `None` if it is not a good one.

    Args:
        content (`bytes` or `str`): the answer.
        rows (`list[Row]`): what was sent.
        model (`str`): the model that was asked.
        top_k (`int`): number of most likely ids that are kept; at least one is sent.
    """
    try:
        answer = _loads(content)
        choices = answer["choices"]
        if answer["model"] != model or "error" in answer or answer.get("object") == "error":
            return None
        if type(choices) is not list or len(choices) != len(rows):
            return None
        keys = _keys({**answer, "choices": None})
        pieces = []
        for number, (choice, row) in enumerate(zip(choices, rows, strict=True)):
            keys += _keys({**choice, "prompt_logprobs": None})
            scores, inside = _read_choice(choice, number, row, max(top_k, 1))
            keys += inside
            pieces.append(TokenScores(scores.log_p, scores.top_ids[:, :top_k], scores.top_log_p[:, :top_k]))
    except (_NotGoodError, AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError):
        return None
    text = content.encode() if isinstance(content, str) else content
    # every key is followed by a colon, and only keys are; in strings the quotation mark is escaped
    found = text.count(b'":')
    if found != keys and found - text.count(b'\\":') != keys:
        return None  # a key may stand twice
    if _has_spaced_key(text):
        return None  # such a key is not counted, so that another may stand twice
    return TokenScores.cat(pieces, top_k)


def _has_spaced_key(text: bytes) -> bool:
    """Whether white space stands between a key and its colon. All keys that are read end in a letter or a digit."""
    if not any(space + b":" in text for space in (b" ", b"\t", b"\n", b"\r")):
        return False
    # a quotation mark that opens a string, as in `":": " :"`, does not follow a letter or a digit
    return any(text[found.start() - 1 : found.start()].isalnum() for found in SPACED_COLON.finditer(text))


def _keys(value: Any) -> int:
    """Number of keys in a parsed value, at all depths."""
    if isinstance(value, dict):
        return len(value) + sum(map(_keys, value.values()))
    return sum(map(_keys, value)) if isinstance(value, list) else 0


def _read_choice(choice: Any, number: int, row: Row, k: int) -> tuple[TokenScores, int]:
    """The scores of one row, and the number of keys in its log-probabilities. Raises if anything is unusual."""
    echoed, entries = choice["prompt_token_ids"], choice["prompt_logprobs"]
    _require(type(choice["index"]) is int and choice["index"] == number)
    _require(type(echoed) is list and set(map(type, echoed)) == {int} and echoed == row.ids)
    _require(type(entries) is list and len(entries) == len(row.ids) and entries[0] is None)
    entries = entries[1:]
    _require(set(map(type, entries)) <= {dict} and all(entries))
    if not entries:
        return TokenScores.cat([], k), 0
    sizes = np.fromiter(map(len, entries), dtype=np.int64, count=len(entries))  # (T,)
    names = list(itertools.chain.from_iterable(entries))  # the ids of all positions, A of them
    fields = list(itertools.chain.from_iterable(map(dict.values, entries)))
    _require(set(map(type, fields)) == {dict})
    log_p, ranks, ids = _numbers(names, fields)
    starts = sizes.cumsum() - sizes
    _require(bool((ids[starts] == np.array(row.ids[1:])).all()))  # the token stands first
    by_rank = _by_rank(ranks, sizes, starts, k)  # (T, k)
    top_log_p, own_log_p = log_p[by_rank], log_p[starts]
    behind = ranks[starts] > k  # the token is not among the k most likely
    last = np.where(behind, own_log_p, top_log_p[:, -1])
    _require(bool((np.diff(top_log_p, axis=1) <= 0).all() and (last <= top_log_p[:, -1]).all()))
    mass = np.exp(top_log_p).sum(1) + np.where(behind, np.exp(own_log_p), 0.0)
    _require(bool((mass <= LARGEST_MASS).all()))
    judged = np.array(row.judged, dtype=np.int64) - 1
    _require(bool((last[judged] > IMPOSSIBLE).all()))
    found = TokenScores(own_log_p[judged], ids[by_rank[judged]], top_log_p[judged])
    return found, len(names) + sum(map(len, fields))


def _numbers(names: list[str], fields: list[Any]) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Log-probabilities, ranks and ids, `(A,)` each."""
    log_ps, given = list(map(_log_prob, fields)), list(map(_rank, fields))
    _require(set(map(type, log_ps)) <= {float, int} and set(map(type, given)) == {int})
    _require(IDS.fullmatch(",".join(names)) is not None)
    log_p, ids = np.array(log_ps, dtype=np.float64), np.array(list(map(int, names)), dtype=np.int64)
    _require(bool(((log_p >= IMPOSSIBLE) & (log_p <= LARGEST_LOG_PROB)).all()))
    return log_p, np.array(given, dtype=np.int64), ids


def _by_rank(
    ranks: NDArray[np.int64], sizes: NDArray[np.int64], starts: NDArray[np.int64], k: int
) -> NDArray[np.int64]:
    """Places `(T, k)` of ranks 1 to k; each stands once, and no other rank but that of a token, which stands first."""
    own = ranks[starts]
    _require(bool((ranks >= 1).all() and (sizes == k + (own > k)).all()))
    position = np.repeat(np.arange(len(sizes)), sizes)  # (A,)
    top = ranks <= k
    _require(int((~top).sum()) == int((own > k).sum()))
    places = np.full((len(sizes), k), -1)
    places[position[top], ranks[top] - 1] = top.nonzero()[0]
    _require(bool((places >= 0).all()))  # as many places as entries, so none stands twice
    return places


def _require(holds: bool) -> None:
    if not holds:
        raise _NotGoodError
