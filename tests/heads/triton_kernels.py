"""TRL's kernels, as Triton runs them in its interpreter, beside ours: prints the largest differences as JSON.

    TRITON_INTERPRET=1 PYTHONPATH=FOLDER_OF_TRITON python tests/heads/triton_kernels.py
    python tests/heads/triton_kernels.py    # on a GPU, without the interpreter

On GPUs these kernels compute the exact KLs and the JSD, and TRL's own log-probabilities.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers import make_model, relative_error
from trl.kernels import chunked_divergence, chunked_logprob

from trl_distill._trl import ChunkedLogProbFunction
from trl_distill.estimators.full import KERNEL_BETA
from trl_distill.heads.few_ids import log_probs_of
from trl_distill.heads.fused import DivergenceSpec, fused_divergence
from trl_distill.heads.kernel import kernel_divergence
from trl_distill.heads.lm_head import FixedHead
from trl_distill.signals import HiddenStates


DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") else "cuda")


N, SIZE, TEACHERS_SIZE, ALPHA = 9, 2300, 2500, 0.3  # more ids than a block of the kernels holds; a padded teacher


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def divergences(name: str, family: str, dtype: torch.dtype, temperature: float) -> dict[str, float]:
    draw, model = torch.Generator().manual_seed(0), make_model(family, seed=1)
    weights = [torch.randn(size, 16, generator=draw).to(DEVICE, dtype) for size in (SIZE, TEACHERS_SIZE)]
    biases = [
        torch.randn(len(weight), generator=draw).to(DEVICE, dtype) if family == "bias" else None for weight in weights
    ]
    hidden, theirs = (torch.randn(N, 16, generator=draw).to(DEVICE, dtype) for _ in range(2))
    hidden.requires_grad_()
    weight = torch.nn.Parameter(weights[0])
    head, teacher = FixedHead(model, weight, biases[0]), FixedHead(model, weights[1], biases[1])
    beta = KERNEL_BETA[name]
    found, entropy = kernel_divergence(
        hidden, head, HiddenStates(theirs, teacher), beta or (ALPHA if beta is None else 0.0), temperature
    )
    ours = fused_divergence(hidden, head, theirs, teacher, DivergenceSpec(name, ALPHA, temperature))
    slope = torch.linspace(0.1, 1, N, device=DEVICE)
    gradients = [torch.autograd.grad((slope * value).sum(), [hidden, weight]) for value in (found, ours.divergence)]
    return {
        "value": largest(found, ours.divergence),
        "entropy": largest(entropy, ours.entropy),
        "gradient": max(relative_error(a.float(), b.float()) for a, b in zip(*gradients, strict=True)),
    }


def log_probs(family: str, dtype: torch.dtype, temperature: float) -> dict[str, float]:
    draw, model = torch.Generator().manual_seed(0), make_model(family, seed=1)
    weight = torch.nn.Parameter(torch.randn(SIZE, 16, generator=draw).to(DEVICE, dtype))
    hidden = torch.randn(N, 16, generator=draw).to(DEVICE, dtype).requires_grad_()
    head, ids = FixedHead(model, weight, None), torch.randint(SIZE, (N,), generator=draw).to(DEVICE)
    ours, entropy = log_probs_of(hidden, head, ids[:, None], SIZE, temperature)
    found, theirs = ChunkedLogProbFunction.apply(
        hidden, weight, None, ids, temperature, 1000, head.softcap, head.logit_scale, ("entropy",)
    )[:2]
    gradients = [torch.autograd.grad(value.sum(), [hidden, weight]) for value in (found, ours)]
    return {
        "value": largest(found, ours[:, 0]),
        "entropy": largest(theirs, entropy),
        "gradient": max(relative_error(a.float(), b.float()) for a, b in zip(*gradients, strict=True)),
    }


if __name__ == "__main__":
    assert chunked_logprob._TRITON_AVAILABLE, "Triton is not installed."
    for module in (chunked_divergence, chunked_logprob):
        module._use_triton = lambda device: True
    results = {}
    for family, dtype in itertools.product(("bias", "softcap", "scale"), (torch.float32, torch.bfloat16)):
        shown = f"{family}, {str(dtype).removeprefix('torch.')}"
        results |= {f"{name}, {shown}": divergences(name, family, dtype, 0.7) for name in KERNEL_BETA}
        results[f"log-probabilities, {shown}"] = log_probs(family, dtype, 0.7)
    print(json.dumps(results))
