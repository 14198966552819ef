"""A stand-in for FlashAttention on a CPU: transformers' own code for it, on functions of PyTorch in place of kernels.

Where rows begin is found by transformers, from position ids or row lengths, as with the kernels. A family whose
attention loses them on the way computes here what it would compute there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers.modeling_flash_attention_utils as flash
from transformers import PreTrainedModel


IMPLEMENTATION = "flash_attention_2"


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of rows `(B, T, heads, D)`, as `flash_attn_func` computes it."""
    grouped = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(grouped, 2), v.repeat_interleave(grouped, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    behind = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])  # (T_q, T_k)
    hidden = (behind < 0) & causal
    if window_size[0] >= 0:
        hidden |= behind > window_size[0]
    scores = scores.masked_fill(hidden, float("-inf"))
    if s_aux is not None:  # attention sinks
        sinks = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1).to(scores.dtype)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def attention_of_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of packed rows `(N, heads, D)`, as `flash_attn_varlen_func` computes it."""
    lengths = [ends.diff().tolist() for ends in (cu_seqlens_q, cu_seqlens_k)]
    how = (dropout_p, softmax_scale, causal, window_size, softcap, s_aux)
    rows = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
    return torch.cat([attention(of_q[None], of_k[None], of_v[None], *how)[0] for of_q, of_k, of_v in rows])


_STATE: dict[str, Any] = {
    "_loaded_implementation": IMPLEMENTATION,
    "_flash_fn": attention,
    "_flash_varlen_fn": attention_of_rows,
    "_flash_with_kvcache_fn": None,
    "_pad_fn": flash._pad_input,
    "_unpad_fn": flash._unpad_input,
    "_process_with_kvcache_kwargs_fn": None,
}


@contextmanager
def stand_in(model: type[PreTrainedModel]) -> Iterator[None]:
    """Let models of a class be made and run with `attn_implementation="flash_attention_2"` in this context."""
    code: Any = sys.modules[model.__module__]
    if not hasattr(code, "_flash_attention_forward"):  # older ones import it only where the package is installed
        code._flash_attention_forward = flash._flash_attention_forward
        code.flash_attn_supports_top_left_mask = lambda: False

    def supported(self: PreTrainedModel, *args: Any, **kwargs: Any) -> bool:
        if not self._supports_flash_attn:
            raise ValueError(f"{type(self).__name__} does not support FlashAttention")
        return True

    process = flash._lazy_define_process_function(attention_of_rows)
    changes: list[tuple[Any, str, Any]] = [
        (flash, name, value) for name, value in {**_STATE, "_process_flash_kwargs_fn": process}.items()
    ]
    changes.append((PreTrainedModel, "_flash_attn_can_dispatch", supported))
    kernels = "_compatible_flash_implementations"  # of models with attention sinks, which this stand-in has, too
    changes += [(one, kernels, None) for one in model.__mro__ if kernels in vars(one)]
    before = [(place, name, getattr(place, name)) for place, name, _ in changes]
    try:
        for place, name, value in changes:
            setattr(place, name, value)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)
