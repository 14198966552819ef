"""A teacher whose weights live in CPU memory and visit the accelerator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..models.properties import unwrap_adapter
from .base import is_sharded
from .local import LocalTeacher


class OffloadedTeacher(LocalTeacher):
    """
    A model that lives in CPU memory and visits the accelerator once per generation batch.

    During the update only its LM head is left there. The weights are never copied back: the visitor's copy is dropped.
    """

    per_generation = True

    def _placed(self, model: nn.Module) -> Any:
        base = unwrap_adapter(model)
        if is_sharded(self.accelerator):
            raise ValueError(
                "`teacher_offload=True` parks a whole teacher, but ZeRO-3 and FSDP cut it up. Leave it out, and "
                "let the engine offload: `offload_param` under ZeRO-3."
            )
        if getattr(base, "is_quantized", False) or getattr(base, "hf_device_map", None):
            raise ValueError(
                "`teacher_offload=True` moves the teacher as a whole, which a quantised one or one with a `device_map` "
                "does not allow. Leave out one of the two."
            )
        device = self.accelerator.device
        model.to("cpu")
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        head = {id(parameter) for parameter in base.get_output_embeddings().parameters()}  # tied embeddings included
        self._parked = self._homes([p for p in model.parameters() if id(p) not in head])
        for parameter in base.get_output_embeddings().parameters():
            parameter.data = parameter.data.to(device)
        for parameter, home in self._parked:
            parameter.data = home
        return model

    def _arrived(self, home: torch.Tensor) -> torch.Tensor:
        return home.to(self.accelerator.device, non_blocking=True)

    def _homes(self, parameters: list[nn.Parameter]) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """
        Where each parameter lives. Pinned where that speeds up the way to the accelerator: one piece of memory for each
        dtype, since every piece is rounded up to a power of two.
        """
        if self.accelerator.device.type != "cuda":
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
            for parameter, home in self._parked:
                parameter.data = self._arrived(home)
            yield self.model
        finally:
            for parameter, home in self._parked:
                parameter.data = home
