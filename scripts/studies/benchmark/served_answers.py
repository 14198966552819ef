"""How long does it take to read a teacher's answer, for each token?

    python -m scripts.studies.benchmark.served_answers                   # seconds
    python -m scripts.studies.benchmark.served_answers --write_results   # and docs/results/costs/served_answers.json

An answer in vLLM's format, made here: rows of tokens, with the most likely ids of each, their ranks and their texts. It
is read into tensors as in training, all at once and, for comparison, position by position, as unusual answers are. The
time is that of the processor (of this process), so that other processes do not show.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from rich.console import Console
from rich.table import Table

from trl_distill.teachers import answer_arrays, server_answers
from trl_distill.teachers.answer_arrays import Row, TokenScores


RESULTS = Path(__file__).parents[3] / "docs" / "results" / "costs" / "served_answers.json"
BAR = 100.0  # microseconds per token with 64 alternatives
ALTERNATIVES = (1, 20, 64)
VOCABULARY = 151_936


def answer(rows: list[Row], k: int, draw: random.Random) -> bytes:
    """The body of a good answer, with texts that have to be escaped now and then."""
    numbers = np.random.default_rng(0)
    choices = []
    for number, row in enumerate(rows):
        entries: list[Any] = [None]
        for token in row.ids[1:]:
            best = np.sort(numbers.standard_normal(k + 1) * 3)[::-1]
            log_p = (best - np.log(np.exp(best).sum()) - 0.05).tolist()
            ids = [one for one in draw.sample(range(VOCABULARY), k + 1) if one != token][:k]
            entry = {str(token): {"logprob": log_p[k], "rank": k + draw.randrange(1, 500), "decoded_token": " the"}}
            for rank, (one, value) in enumerate(zip(ids, log_p, strict=False), 1):
                text = draw.choice([" of", "\n", '":', "tion", "é", "\\"])
                entry[str(one)] = {"logprob": value, "rank": rank, "decoded_token": text}
            entries.append(entry)
        choices.append({"index": number, "text": "", "prompt_logprobs": entries, "prompt_token_ids": row.ids})
    return json.dumps({"id": "x", "object": "text_completion", "model": "teacher", "choices": choices}).encode()


def microseconds(read: Any, content: bytes, rows: list[Row], k: int, repeats: int) -> list[float]:
    """Per judged token, of each repetition."""
    tokens, found = sum(len(row.judged) for row in rows), []
    for _ in range(repeats):
        start = time.process_time()
        scores: TokenScores = read(content, rows, "teacher", k)
        found.append((time.process_time() - start) / tokens * 1e6)
        assert len(scores.log_p) == tokens
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4, help="in one answer")
    parser.add_argument("--tokens", type=int, default=256, help="of each row")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--write_results", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    draw = random.Random(0)
    ids = [[draw.randrange(VOCABULARY) for _ in range(options.tokens + 1)] for _ in range(options.rows)]
    rows = [Row(number, row, list(range(1, len(row)))) for number, row in enumerate(ids)]
    found: list[dict[str, Any]] = []
    for k in ALTERNATIVES:
        content = answer(rows, k, draw)
        at_once = microseconds(server_answers.read_answer, content, rows, k, options.repeats)
        with mock.patch.object(answer_arrays, "_loads", json.loads):
            with_json = microseconds(server_answers.read_answer, content, rows, k, options.repeats)
        with_care = microseconds(server_answers._read_carefully, content, rows, k, max(2, options.repeats // 3))
        bar = BAR if k == max(ALTERNATIVES) else None
        found.append({"alternatives": k, "bytes": len(content), "at_once": at_once, "bar": bar})
        found[-1] |= {"with_json": with_json, "with_care": with_care}
    parser_name = "orjson" if importlib.util.find_spec("orjson") else "json"
    table = Table(title=f"Reading an answer, µs per token (processor time, {parser_name})")
    for column in ("alternatives", "at once", "with Python's json", "position by position", "bar"):
        table.add_column(column, justify="right")
    for one in found:
        medians = [f"{statistics.median(one[name]):.0f}" for name in ("at_once", "with_json", "with_care")]
        table.add_row(str(one["alternatives"]), *medians, f"≤ {one['bar']:.0f}" if one["bar"] else "")
    Console().print(table)
    if options.write_results:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        size = {"rows": options.rows, "tokens": options.tokens, "parser": parser_name}
        RESULTS.write_text(json.dumps({**size, "cells": found}, indent=1) + "\n")
    if any(one["bar"] and statistics.median(one["at_once"]) > one["bar"] for one in found):
        raise SystemExit("It takes longer than asked.")


if __name__ == "__main__":
    main()
