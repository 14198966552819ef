"""Tiles of logits for `fused.py`: their sizes, their projection by a head, and their memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .lm_head import LMHead


@dataclass(frozen=True)
class TileSizes:
    """
    How much is computed at a time on a kind of device.

    Attributes:
        tile (`int`): elements of each model's tile of logits.
        part (`int`): elements of the part of a tile that elementwise passes work on at a time.
        ids (`int`): ids that are projected at a time.
    """

    tile: int
    part: int
    ids: int


ON_GPU = TileSizes(tile=2**26, part=2**24, ids=2**30)
ON_CPU = TileSizes(tile=2**24, part=2**19, ids=2**11)  # a part stays in the cache; narrow products are faster


def sizes_for(device: torch.device) -> TileSizes:
    return ON_CPU if device.type == "cpu" else ON_GPU


KEPT = 2**23  # elements: on CPUs, memory up to this size is kept between micro-steps


def tiles(rows: int, vocab_size: int, device: torch.device) -> Iterator[slice]:
    """Slices of `rows` tokens; the logits of each slice are projected together."""
    yield from _slices(0, rows, max(1, sizes_for(device).tile // vocab_size))


def parts(tile: slice, vocab_size: int, device: torch.device) -> Iterator[slice]:
    """Slices of a tile; the logits of each slice are processed together."""
    yield from _slices(tile.start, tile.stop, max(1, sizes_for(device).part // vocab_size))


def _slices(start: int, stop: int, most: int) -> Iterator[slice]:
    """Slices of similar size. At least one, so that heads sharded by ZeRO-3 are gathered on every process."""
    pieces = max(1, -(-(stop - start) // most))
    size = max(1, -(-(stop - start) // pieces))
    for begin in range(start, max(stop, start + 1), size):
        yield slice(begin, min(begin + size, stop))


class Projection:
    """Projects hidden states by a head, in a given dtype with fp32 results."""

    def __init__(self, head: LMHead, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, name: str):
        self.head, self.weight, self.bias = head, weight.detach().to(dtype), bias
        self.memory = TileMemory(name, weight.device)
        if not weight.is_cuda:
            self.weight = self.weight.float()  # rounded above; converted here once for all tiles

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Products with the weight alone, `(n, V)`, fp32; on CPUs overwritten by the next tile."""
        if states.is_cuda and states.dtype != torch.float32:
            return torch.mm(states, self.weight.T, out_dtype=torch.float32)
        logits = self.memory.take(len(states), len(self.weight))
        for ids in _slices(0, len(self.weight), sizes_for(states.device).ids):
            torch.mm(states.float(), self.weight[ids].T, out=logits[:, ids])
        return logits

    def finish(self, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        """Apply bias, scale, soft cap and temperature, in place."""
        if self.bias is not None:
            logits += self.bias.detach().float()
        if self.head.softcap is not None:
            logits.mul_(self.head.logit_scale / self.head.softcap).tanh_().mul_(self.head.softcap / temperature)
        elif self.head.logit_scale != temperature:
            logits.mul_(self.head.logit_scale / temperature)
        return logits

    def backward_through_scale(self, derivative: torch.Tensor, finished: torch.Tensor, temperature: float) -> None:
        """Turn a derivative by finished logits into one by projected logits, in place."""
        if self.head.softcap is not None:
            derivative.mul_(1 - (finished * (temperature / self.head.softcap)).square_())
        if self.head.logit_scale != temperature:
            derivative.mul_(self.head.logit_scale / temperature)


_kept = threading.local()


class TileMemory:
    """
    Memory that is reused for every tile: on CPUs a new page costs several times the work done in it.

    On CPUs each thread keeps it for the next micro-step, if it is not large, until [`release_memory`]. On GPUs
    PyTorch's allocator does that.
    """

    def __init__(self, name: str, device: torch.device):
        self.name, self.device = name, device
        kept = getattr(_kept, name, None) if device.type == "cpu" else None
        usable = kept is not None and (not kept.is_inference() or torch.is_inference_mode_enabled())
        self._memory = kept if usable else None

    def take(self, rows: int, columns: int) -> torch.Tensor:
        """An uninitialised fp32 tensor `(rows, columns)`, in the same memory as the one before."""
        if self._memory is None or self._memory.numel() < rows * columns:
            self._memory = torch.empty(rows * columns, dtype=torch.float32, device=self.device)
            if self.device.type == "cpu" and self._memory.numel() <= KEPT:
                setattr(_kept, self.name, self._memory)
        return self._memory[: rows * columns].view(rows, columns)


def release_memory() -> None:
    """Free the memory that this thread keeps between micro-steps."""
    _kept.__dict__.clear()
