"""Does `torch.compile` make the elementwise passes over a tile of logits faster, and is that seen in an update?

    python -m scripts.studies.compile.tile                                     # five minutes on one CPU core
    python -m scripts.studies.compile.tile --output docs/results/compile/tile.json

The mathematics of the reverse KL at n tokens, from both models' logits to the divergence, the log-probabilities of the
sampled ids, the entropy and the derivative: as `LogitsTile` computes it in memory that is reused, and as one compiled
function. Both on the parts that fit into the cache, and compiled on the whole tile too. Beside them the four products
with the heads. All ways take turns; the compiled results are compared with the eager ones.
"""

from __future__ import annotations

from scripts.studies.startup import ONE_THREAD, prepare_environment  # before the libraries


prepare_environment(HF_HUB_OFFLINE="1", OMP_NUM_THREADS=ONE_THREAD)

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trl_distill.heads.fused import DivergenceSpec, LogitsTile, TokenStatistics
from trl_distill.heads.tiles import parts


SHAPES = {  # hidden sizes of student and teacher, ids
    "135M": (576, 960, 49_152),
    "0.6B": (1024, 2048, 151_936),
}
TOKENS = 64


def eager(ours: torch.Tensor, theirs: torch.Tensor, ids: torch.Tensor, slope: torch.Tensor) -> list[torch.Tensor]:
    """Divergence, log q, log p and entropy of each token, and the derivative by the student's logits, in `theirs`."""
    values = [torch.empty(len(ours)) for _ in range(4)]
    found = TokenStatistics(values[0], values[1], values[3], values[2], torch.empty(5, 0))
    tile = LogitsTile(ours, theirs, DivergenceSpec())
    tile.record(found, slice(0, len(ours)), ids, None)
    derivative = tile.measure(found.divergence, True, slope, None)
    assert derivative is not None
    return [found.divergence, found.log_q, found.log_p, found.entropy, derivative]


def plain(ours: torch.Tensor, theirs: torch.Tensor, ids: torch.Tensor, slope: torch.Tensor) -> list[torch.Tensor]:
    """The same without reused memory, for the compiler to fuse."""
    log_q, log_p = ours.log_softmax(-1), theirs.log_softmax(-1)
    q, gap = log_q.exp(), log_q - log_p
    divergence = (q * gap).sum(-1, keepdim=True)
    entropy = -(q * log_q).sum(-1)
    sampled = [x.gather(1, ids)[:, 0] for x in (log_q, log_p)]
    return [divergence[:, 0], *sampled, entropy, slope * q * (gap - divergence)]


def by_parts(call: Callable[..., Any], *tensors: torch.Tensor) -> list[list[torch.Tensor]]:
    ours = tensors[0]
    pieces = parts(slice(0, len(ours)), ours.shape[1], ours.device)
    return [call(*(one[rows] for one in tensors)) for rows in pieces]


def joined(found: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [torch.cat(one) for one in zip(*found, strict=True)]


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Seconds of each way in turns, and the largest difference of the compiled results from the eager ones."""
    width, other, vocabulary = SHAPES[name]
    torch.manual_seed(0)
    ours, theirs = torch.randn(TOKENS, vocabulary), torch.randn(TOKENS, vocabulary)
    ids, slope = torch.randint(vocabulary, (TOKENS, 1)), torch.full((TOKENS, 1), 0.5)
    states = torch.randn(TOKENS, width), torch.randn(TOKENS, other)
    weights = torch.randn(vocabulary, width), torch.randn(vocabulary, other)
    began = time.perf_counter()
    compiled = torch.compile(plain, dynamic=True)
    results = joined(by_parts(compiled, ours, theirs, ids, slope))
    compiling = time.perf_counter() - began
    expected = joined(by_parts(eager, ours, theirs.clone(), ids, slope))
    differences = [((a - b).norm() / b.norm()).item() for a, b in zip(results, expected, strict=True)]

    def products() -> None:
        for state, weight in zip(states, weights, strict=True):
            state @ weight.T
        ours @ weights[0]
        ours.T @ states[0]

    ways: dict[str, Callable[[], Any]] = {
        "eager, parts": lambda: by_parts(eager, ours, kept, ids, slope),
        "compiled, parts": lambda: by_parts(compiled, ours, theirs, ids, slope),
        "compiled, whole tile": lambda: compiled(ours, theirs, ids, slope),
        "products": products,
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(repeats + 1):
        for way, call in ways.items():
            kept = theirs.clone()
            spent = seconds(call)
            if turn:  # the first is not counted
                taken[way].append(spent)
    medians = {way: statistics.median(times) for way, times in taken.items()}
    best = min(medians[way] for way in ways if way.startswith("compiled"))
    whole = medians["products"] + medians["eager, parts"]
    return {
        "shape": name,
        "tokens": TOKENS,
        "ids": vocabulary,
        "seconds": taken,
        "median": medians,
        "compiling": compiling,
        "difference": max(differences),
        "saved_of_heads": (medians["eager, parts"] - best) / whole,
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args(arguments)
    found = [measure(name, args.repeats) for name in args.shapes]
    for one in found:
        print(
            json.dumps({name: one[name] for name in ("shape", "median", "compiling", "difference", "saved_of_heads")})
        )
    results = {"torch": torch.__version__, "threads": torch.get_num_threads(), "shapes": found}
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
