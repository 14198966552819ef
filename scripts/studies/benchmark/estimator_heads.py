"""Are `topk` and `sampled` as fast as `full`? Only what they differ in: the LM heads, forward and backward.

    python -m scripts.studies.benchmark.estimator_heads                    # a minute
    python -m scripts.studies.benchmark.estimator_heads --write_results    # and docs/results/costs/estimators.json

Random hidden states of student and teacher, with the slopes of a loss with and without a reward, as the trainer knows
them on fresh rollouts. Estimators take turns. The time is that of the processor (of this process, one thread), so that
other processes do not show. Whole updates are compared by the cell "ragged, estimators" of `scripts/benchmark.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from trl_distill.estimators import make_estimator
from trl_distill.heads.fused import ExpectedSlopes
from trl_distill.heads.lm_head import LMHead
from trl_distill.signals import HiddenStates


RESULTS = Path(__file__).parents[3] / "docs" / "results" / "costs" / "estimators.json"
ESTIMATORS = ("full", "topk", "sampled")
CELLS = ((128, 32_000), (48, 151_936))  # judged tokens, ids
WIDTHS = (576, 960)  # of student and teacher
TOP_K = 64
BAR = 1.0  # of the time of "full"


def heads(vocabulary: int) -> list[LMHead]:
    """The LM heads of student and teacher."""
    sizes: dict[str, Any] = {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    configs = [LlamaConfig(vocab_size=vocabulary, hidden_size=width, **sizes) for width in WIDTHS]
    return [LMHead(LlamaForCausalLM(config)) for config in configs]


def measure(tokens: int, vocabulary: int, rewarded: bool, repeats: int) -> dict[str, Any]:
    """Seconds of each estimator, in turns, after one uncounted time each."""
    set_seed(0)
    student, teacher = heads(vocabulary)
    hidden = torch.randn(tokens, WIDTHS[0], requires_grad=True)
    signal = HiddenStates(torch.randn(tokens, WIDTHS[1]), teacher)
    sampled = torch.randint(0, vocabulary, (tokens,))
    by_term = torch.full((tokens,), 1 / tokens)
    by_policy = torch.randn(tokens) / tokens if rewarded else None
    slopes = ExpectedSlopes(by_term, by_policy)
    log_p_temperature = 1.0 if rewarded else None
    made = [make_estimator(name, "reverse_kl", 1.0, TOP_K, log_p_temperature=log_p_temperature) for name in ESTIMATORS]
    times: dict[str, list[float]] = {name: [] for name in ESTIMATORS}
    for turn in range(repeats + 1):
        for name, estimator in zip(ESTIMATORS, made, strict=True):
            start = time.process_time()
            found: Any = estimator.measure(hidden, student, signal, sampled, None, slopes)
            log_q = found.policy_log_q
            ratio = None if log_q is None else (log_q - log_q.detach()).exp()
            loss = (by_term * estimator.term(found, log_q, ratio, None)).sum()
            if by_policy is not None:
                loss = loss + (by_policy * log_q).sum()
            loss.backward()
            if turn:
                times[name].append(time.process_time() - start)
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "tokens": tokens,
        "vocabulary": vocabulary,
        "rewarded": rewarded,
        "seconds": times,
        "ratio": {name: value / medians["full"] for name, value in medians.items()},
        "bar": BAR,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write_results", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [measure(*cell, rewarded, options.repeats) for cell in CELLS for rewarded in (False, True)]
    table = Table(title="LM heads, forward and backward (processor time; seconds, and of `full`)")
    for column in ("tokens", "ids", "loss", *ESTIMATORS):
        table.add_column(column, justify="right")
    for one in found:
        medians = {name: statistics.median(times) for name, times in one["seconds"].items()}
        cells = [f"{medians[name]:.2f} ({one['ratio'][name]:.2f})" for name in ESTIMATORS]
        table.add_row(str(one["tokens"]), str(one["vocabulary"]), "reward" if one["rewarded"] else "pure", *cells)
    Console().print(table)
    if options.write_results:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        shape = {"student": WIDTHS[0], "teacher": WIDTHS[1], "top_k": TOP_K, "torch": torch.__version__}
        RESULTS.write_text(json.dumps({**shape, "cells": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
