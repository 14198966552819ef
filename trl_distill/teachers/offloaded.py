"""A teacher whose weights are kept in CPU memory and copied to the accelerator when it scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..models.properties import unwrap_adapter
from .base import is_sharded
from .local import LocalTeacher
from .shared_memory import is_shared, share_weights


class OffloadedTeacher(LocalTeacher):
    """
    A model in CPU memory that is copied to the accelerator once per generation batch.

    Only its LM head stays on the accelerator. Weights are never copied back: the accelerator's copy is dropped. The
    processes of a node share the CPU memory.
    """

    per_generation = True

    def _placed(self, model: nn.Module) -> Any:
        base = unwrap_adapter(model)
        if is_sharded(self.accelerator):
            raise ValueError(
                "`teacher_offload=True` offloads a whole teacher, but ZeRO-3 and FSDP shard it. Leave it out, and "
                "let the engine offload: `offload_param` under ZeRO-3."
            )
        if getattr(base, "is_quantized", False) or getattr(base, "hf_device_map", None):
            raise ValueError(
                "`teacher_offload=True` moves the whole teacher, which is not possible if it is quantised or has a "
                "`device_map`. Leave one of the two out."
            )
        device = self.accelerator.device
        if is_shared(self.accelerator):
            share_weights(model, self.accelerator)
        else:
            model.to("cpu")
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        head = {id(parameter) for parameter in base.get_output_embeddings().parameters()}  # including tied embeddings
        self._offloaded = self._homes([p for p in model.parameters() if id(p) not in head])
        for parameter in base.get_output_embeddings().parameters():
            parameter.data = parameter.data.to(device)
        for parameter, home in self._offloaded:
            parameter.data = home
        return model

    def _on_accelerator(self, home: torch.Tensor) -> torch.Tensor:
        return home.to(self.accelerator.device, non_blocking=True)

    def _homes(self, parameters: list[nn.Parameter]) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """
        The CPU memory of each parameter. With a GPU it is pinned, which makes copies faster: one block per dtype, since
        the size of every pinned block is rounded up to a power of two. Shared memory is pinned already.
        """
        if self.accelerator.device.type != "cuda" or is_shared(self.accelerator):
            return [(p, p.data) for p in parameters]
        homes = []
        for dtype in {p.dtype for p in parameters}:
            alike = [p for p in parameters if p.dtype == dtype]
            memory = torch.empty(sum(p.numel() for p in alike), dtype=dtype, pin_memory=True)
            pieces = memory.split([p.numel() for p in alike])
            homes += [(p, piece.view(p.shape).copy_(p.data)) for p, piece in zip(alike, pieces, strict=True)]
        return homes

    @contextmanager
    def on_device(self) -> Iterator[nn.Module]:
        try:
            for parameter, home in self._offloaded:
                parameter.data = self._on_accelerator(home)
            yield self.model
        finally:
            for parameter, home in self._offloaded:
                parameter.data = home
