"""An LM head as this package uses it: weights, bias, scale and soft cap of a model's last projection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .._trl import gathered_head


class LMHead:
    """
    An output layer as it turns hidden states into logits: `softcap · tanh(scale · (h Wᵀ + b) / softcap)`.

    Weight and bias are looked up at each use, since PEFT, FSDP and DeepSpeed replace them.

    Raises:
        ValueError: the model has no output layer, or one whose weight alone does not say what it does.
    """

    def __init__(self, model: PreTrainedModel):
        layer = model.get_output_embeddings()
        if layer is None:
            raise ValueError(f"{type(model).__name__} has no LM head. Use a causal language model (`...ForCausalLM`).")
        if hasattr(layer, "base_layer"):
            raise ValueError(
                "An adapter on the LM head is not supported: the divergence is computed from the head's weight, which "
                "does not hold it. Merge the adapter (`model.merge_and_unload()`) or leave `lm_head` out of its "
                "`target_modules`."
            )
        self._model = model
        config = model.config.get_text_config()
        self.logit_scale = logit_scale(config)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)

    @property
    def vocab_size(self) -> int:
        """Rows of the weight, also where ZeRO-3 holds none of them at the moment."""
        weight = self._model.get_output_embeddings().weight
        return getattr(weight, "ds_shape", weight.shape)[0]

    def parameters(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight `(V, H)` and bias `(V,)`; FSDP2's shards are gathered, once per call."""
        layer = self._model.get_output_embeddings()
        weight, bias = layer.weight, getattr(layer, "bias", None)
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
            bias = None if bias is None else bias.full_tensor()
        return weight, bias

    @contextmanager
    def gathered(self) -> Iterator[LMHead]:
        """This head with weights that are gathered once, by ZeRO-3 or FSDP2, for as long as the context lasts."""
        weight, bias = self.parameters()
        with gathered_head(weight, bias):
            sharded = isinstance(self._model.get_output_embeddings().weight, DTensor)
            yield FixedHead(self._model, weight, bias) if sharded else self

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """All logits `(..., V)`, for a few positions only: what the kernel is taken to compute."""
        weight, bias = self.parameters()
        logits = (weight @ hidden.flatten(0, -2).T).T  # for few rows many times as fast on CPUs as the other way round
        logits = logits.unflatten(0, hidden.shape[:-1])
        logits = self.logit_scale * (logits if bias is None else logits + bias.to(logits.dtype))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class FixedHead(LMHead):
    """An output layer with weights that are given, where the model's own are others by the time they are used."""

    def __init__(self, model: PreTrainedModel, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__(model)
        self._weight, self._bias = weight, bias

    @property
    def vocab_size(self) -> int:
        return self._weight.shape[0]

    def parameters(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._weight, self._bias


def logit_scale(config: Any) -> float:
    """What the model multiplies its logits by before the softmax; each model family has its own name for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse, Falcon-H1
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)  # Granite, MiniCPM3 divide


def check_same_device(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Both heads project the same tokens; raises `ValueError` where they lie apart."""
    if student.device != teacher.device:
        raise ValueError(
            f"The student's LM head is on {student.device}, the teacher's on {teacher.device}. Both project the same "
            "tokens, so place them on one device in their `device_map`."
        )
