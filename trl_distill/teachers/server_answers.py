"""Reads the answers of a teacher's server, position by position; an answer is accepted only if all of it matches.

The format is that of vLLM; `server.py` sends the requests. Good answers are read by `answer_arrays.py`, at once; what
is here reads all the others, and says what is wrong with them.
"""

from __future__ import annotations

import itertools
import json
import math
import reprlib
from typing import Any

import numpy as np

from ..errors import TeacherAnswerError
from ..http_messages import error_inside
from .answer_arrays import IMPOSSIBLE, LARGEST_LOG_PROB, LARGEST_MASS, TOKEN_ID, Row, TokenScores, read_good_answer


TokenScore = tuple[float, list[int], list[float]]  # log p of the token; the K most likely ids; their log p


class ErrorInsideError(TeacherAnswerError):
    """
    An answer with status 200 that holds an error.

    Attributes:
        status (`int`, *optional*): the HTTP status that it names.
    """

    def __init__(self, message: str, status: int | None):
        super().__init__(message)
        self.status = status


def read_answer(content: bytes | str, rows: list[Row], model: str, top_k: int) -> TokenScores:
    """
    The scores of all judged tokens, row by row, from the answer of `/v1/completions` for `rows`.

    Raises:
        TeacherAnswerError: the answer is malformed or does not match the request; the message says where.
        ErrorInsideError: it holds an error.
    """
    good = read_good_answer(content, rows, model, top_k)
    return good if good is not None else _read_carefully(content, rows, model, top_k)


def _read_carefully(content: bytes | str, rows: list[Row], model: str, top_k: int) -> TokenScores:
    """The same with Python's own reader; raises if anything is wrong."""
    answer = read_json(content)
    if answer.get("model") != model:
        raise TeacherAnswerError(
            f"it is from the model {show(answer.get('model'))}, but {model!r} was requested. A server with several "
            "names answers with its first: pass that one as `model`."
        )
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != len(rows):
        raise TeacherAnswerError(f"{len(rows)} sequences were sent, found as choices: {show(choices)}.")
    scores = [
        score
        for number, (choice, row) in enumerate(zip(choices, rows, strict=True))
        for score in _read_choice(choice, number, row, top_k)
    ]
    log_p, top_ids, top_log_p = zip(*scores, strict=True) if scores else ((), (), ())
    shape = (len(scores), top_k)
    return TokenScores(
        np.array(log_p, dtype=np.float64),
        np.array(top_ids, dtype=np.int64).reshape(shape),
        np.array(top_log_p, dtype=np.float64).reshape(shape),
    )


def _read_choice(choice: Any, number: int, row: Row, top_k: int) -> list[TokenScore]:
    if not isinstance(choice, dict) or not same(choice.get("index"), number):
        raise TeacherAnswerError(f"row {row.index}: choice {number} should have that index, found {show(choice)}.")
    lists: list[Any] = [choice.get("prompt_token_ids"), choice.get("prompt_logprobs")]
    if not all(isinstance(found, list) and len(found) == len(row.ids) for found in lists):
        found = " and ".join(f"{len(found)}" if isinstance(found, list) else show(found) for found in lists)
        raise TeacherAnswerError(
            f"row {row.index}: {len(row.ids)} tokens were sent; as prompt_token_ids and prompt_logprobs came {found}."
        )
    judged, scores = set(row.judged), []
    for position, (token, echoed, entry) in enumerate(zip(row.ids, *lists, strict=True)):
        try:
            if not same(echoed, token):
                raise ValueError(f"the server read it as {show(echoed)}")
            if position > 0:
                score = _read_position(entry, token, max(top_k, 1), position in judged)
                if position in judged:
                    scores.append((score[0], score[1][:top_k], score[2][:top_k]))
            elif entry is not None:
                raise ValueError(f"nothing stands before it, so null was expected, found {show(entry)}")
        except ValueError as error:
            raise TeacherAnswerError(f"row {row.index}, position {position}, token {token}: {error}.") from None
    return scores


def _read_position(entry: Any, token: int, k: int, judged: bool) -> TokenScore:
    """Read `{"<id>": {"logprob": ..., "rank": ...}}`: first the token, then the other ids among the k most likely."""
    if not isinstance(entry, dict) or not entry:
        raise ValueError(f"an object with log-probabilities was expected, found {show(entry)}")
    ranked: dict[int, tuple[int, float]] = {}  # rank: (id, log p)
    for key, value in entry.items():
        if not TOKEN_ID.fullmatch(key):
            raise ValueError(f"{show(key)} is not a token id")
        fields: Any = value if isinstance(value, dict) else {}
        log_p, rank = fields.get("logprob"), fields.get("rank")
        if type(log_p) not in (float, int) or not IMPOSSIBLE <= log_p <= LARGEST_LOG_PROB:
            raise ValueError(f"id {key} should have a log-probability, found {show(value)}")
        if type(rank) is not int or rank in ranked:
            raise ValueError(f"id {key} should have a rank of its own, found {show(value)}")
        ranked[rank] = (int(key), float(log_p))
    first = next(iter(entry))
    if int(first) != token:
        raise ValueError(f"found the score of token {first}; positions are shifted, or a proxy sorts JSON keys")
    own = entry[first]["rank"]
    if sorted(ranked) != [*range(1, k + 1), *([own] if own > k else [])]:
        raise ValueError(f"ranks 1 to {k} and the token's own, {own}, were expected, found {show(sorted(ranked))}")
    log_ps = [ranked[rank][1] for rank in sorted(ranked)]
    if any(better < worse for better, worse in itertools.pairwise(log_ps)):
        raise ValueError(f"log-probabilities do not fall with the rank: {show(log_ps)}")
    if sum(map(math.exp, log_ps)) > LARGEST_MASS:
        raise ValueError(f"the listed probabilities sum to {sum(map(math.exp, log_ps)):.4f}, more than 1")
    if judged and log_ps[-1] <= IMPOSSIBLE:
        raise ValueError(
            f"the teacher gives id {ranked[max(ranked)][0]} probability 0 (vLLM writes -inf as {IMPOSSIBLE}), "
            "so the divergence would be infinite. Keep such ids out of the rollouts, or lower `top_k`"
        )
    top_ids, top_log_p = zip(*(ranked[rank] for rank in range(1, k + 1)), strict=True)
    return ranked[own][1], list(top_ids), list(top_log_p)


def read_models(content: bytes) -> list[str]:
    """The model names in the answer of `/v1/models`."""
    cards = read_json(content).get("data")
    if not isinstance(cards, list) or not all(
        isinstance(card, dict) and isinstance(card.get("id"), str) for card in cards
    ):
        raise TeacherAnswerError(f"a list of models was expected, found {show(cards)}.")
    return [card["id"] for card in cards]


def read_json(content: bytes | str) -> dict[str, Any]:
    """An answer as a JSON object without an error in it. Raises `TeacherAnswerError`."""

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError(f"a key occurs twice among {show([key for key, _ in pairs])}")
        return result

    try:
        answer = json.loads(content, object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise TeacherAnswerError(f"it is not JSON ({error}); it begins with {content[:80]!r}.") from None
    if not isinstance(answer, dict):
        raise TeacherAnswerError(f"a JSON object was expected, found {show(answer)}.")
    if inside := error_inside(answer):
        message, status = inside
        raise ErrorInsideError(f"it holds an error: {message.rstrip('.')}.", status)
    return answer


def same(found: Any, expected: int) -> bool:
    return type(found) is int and found == expected  # True == 1 == 1.0


def show(value: Any) -> str:
    return reprlib.repr(value)
