"""LM heads: weight, bias, scale and soft cap of a model's output layer."""

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
    A model's output layer, from hidden states to logits: `softcap · tanh(scale · (h Wᵀ + b) / softcap)`.

    Weight and bias are looked up at each use, since PEFT, FSDP and DeepSpeed replace them.

    Args:
        model ([`~transformers.PreTrainedModel`]): a causal language model.

    Raises:
        ValueError: the model has no output layer, there is an adapter on it, or it is quantised.
    """

    def __init__(self, model: PreTrainedModel):
        layer = model.get_output_embeddings()
        if layer is None:
            raise ValueError(f"{type(model).__name__} has no LM head. Use a causal language model (`...ForCausalLM`).")
        if hasattr(layer, "base_layer"):
            raise ValueError(
                "An adapter on the LM head is not supported: the divergence is computed from the head's own weight, "
                "without the adapter. Merge the adapter (`model.merge_and_unload()`) or leave `lm_head` out of its "
                "`target_modules`."
            )
        check_not_quantised(layer)
        self._model = model
        config = model.config.get_text_config()
        self.logit_scale = logit_scale(config)
        self.softcap = softcap(config)

    @property
    def vocab_size(self) -> int:
        """Number of rows of the weight, even while ZeRO-3 holds no rows here."""
        weight = self._model.get_output_embeddings().weight
        return getattr(weight, "ds_shape", weight.shape)[0]

    def parameters(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight `(V, H)` and bias `(V,)`; FSDP2's shards are gathered at each call."""
        layer = self._model.get_output_embeddings()
        weight, bias = layer.weight, getattr(layer, "bias", None)
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
            bias = None if bias is None else bias.full_tensor()
        return weight, bias

    @contextmanager
    def gathered(self) -> Iterator[LMHead]:
        """This head with its weights gathered once, under ZeRO-3 or FSDP2, for the duration of the context."""
        weight, bias = self.parameters()
        with gathered_head(weight, bias):
            sharded = isinstance(self._model.get_output_embeddings().weight, DTensor)
            yield FixedHead(self._model, weight, bias) if sharded else self

    def in_fp32(self) -> LMHead:
        """This head with weights in fp32; 16-bit weights are copied."""
        weight, bias = self.parameters()
        if weight.dtype == torch.float32:
            return self
        return FixedHead(self._model, weight.detach().float(), None if bias is None else bias.detach().float())

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """All logits `(..., V)`, for a few positions only."""
        weight, bias = self.parameters()
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(weight.dtype)  # of a head that was cast to fp32 on a model in 16 bits
        logits = (weight @ hidden.flatten(0, -2).T).T  # for few rows, far faster on CPUs than hidden @ weight.T
        logits = logits.unflatten(0, hidden.shape[:-1])
        logits = self.logit_scale * (logits if bias is None else logits + bias.to(logits.dtype))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class FixedHead(LMHead):
    """An output layer with given weights, for models whose own weights change before the head is used."""

    def __init__(self, model: PreTrainedModel, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__(model)
        self._weight, self._bias = weight, bias

    @property
    def vocab_size(self) -> int:
        return self._weight.shape[0]

    def parameters(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._weight, self._bias


def check_not_quantised(layer: Any) -> None:
    """Raise `ValueError` for an output layer whose weight is no plain matrix of at least 16 bits per value."""
    weight: Any = getattr(layer, "weight", None)  # none in the layers of some quantisers
    plain = isinstance(weight, torch.Tensor) and type(weight.data) in (torch.Tensor, DTensor)
    if not plain or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise ValueError(
            f"The LM head is quantised ({type(layer).__name__}, {type(weight).__name__}), but the divergence is "
            "computed from its weight. Leave it in 16 or 32 bits, as transformers does by default: keep `lm_head` in "
            "`llm_int8_skip_modules` (bitsandbytes), and leave out `include_input_output_embeddings` (torchao)."
        )


def logit_scale(config: Any) -> float:
    """The factor of the model's logits before the softmax; its name in the configuration differs among models."""
    if config.model_type == "mpt":  # has a `logit_scale` that transformers does not use
        return 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse, Falcon-H1
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    for name in ("logits_scaling", "logits_mup_width_multiplier"):  # Granite, MiniCPM3 and Inkling divide
        if getattr(config, name, None) is not None:
            scaling = float(getattr(config, name))
            return scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    return 1.0


def softcap(config: Any) -> float | None:
    """The bound `c` of the model's logits, `c · tanh(logits / c)`; `None` if there is none."""
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):  # RecurrentGemma, xLSTM
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    return None


def check_same_device(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Check that both heads are on one device; raises `ValueError` if they are not."""
    if student.device != teacher.device:
        raise ValueError(
            f"The student's LM head is on {student.device}, the teacher's on {teacher.device}. Both project the same "
            "tokens, so place them on one device in their `device_map`."
        )
