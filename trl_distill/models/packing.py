"""Rows of a batch packed into one sequence without padding, for models whose attention supports it.

Attention finds where each row begins from positions that restart at 0 and from the lengths of the rows. Layers that use
neither (linear attention, state-space layers, convolutions over time) would let a row see the one before it. So the
model's layers are checked, and the first batch is computed both ways: rows are packed only if both results agree.

FlashAttention reads each row for itself. PyTorch's attention ("sdpa") multiplies all tokens by all tokens and masks
most of that, so there a batch is packed only where it saves more padding than it costs.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..places import places, take
from .properties import backbone_of, has_relative_positions, reads_images


logger = logging.getLogger(__name__)

KNOWN_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # relative difference of hidden states allowed for rounding
FIRST_TOKENS = 4  # of a row, which a short convolution would mix with the row before
TRIED_ROWS, TRIED_TOKENS = 4, 64  # of the first batch, where attention is masked
MASK_SIZE = 2**22  # tokens by tokens, up to which a mask may be larger than that of the padded rows
WORTH = 0.9  # of the padded batch's work, above which it stays padded
ROUNDED = 5e-2  # the same in 16 bits; if rows see each other, the difference is far larger
_VERDICT = "_trl_distill_packs"  # attribute of a model: whether packing is exact for it


def packs(model: PreTrainedModel) -> bool:
    """
    Whether a model supports packed rows, by its configuration: any kind of FlashAttention or PyTorch's own, rotary
    positions, and no layers with a state.
    """
    return not obstacle(model)


def takes_any_length(model: PreTrainedModel) -> bool:
    """Whether attention reads packed rows one by one, as any kind of FlashAttention does."""
    attention = str(model.config._attn_implementation).replace("-", "_")
    return "flash" in attention and not attention.startswith("paged")


def obstacle(model: PreTrainedModel) -> str:
    """Why a model does not support packed rows, by its configuration; empty if it does."""
    if not takes_any_length(model) and model.config._attn_implementation != "sdpa":
        return "its attention is neither FlashAttention nor PyTorch's"
    if reads_images(model.config):
        return "it reads images, whose tokens may have positions of several dimensions"
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ())
    stateful = bool(getattr(model, "_is_stateful", False)) or bool(layers - KNOWN_LAYERS)
    if stateful:
        return "layers with a state"
    return "" if has_relative_positions(config) else "results depend on padding, or positions are not rotary"


def pays(model: PreTrainedModel, attended: torch.Tensor) -> bool:
    """
    Whether a batch takes less time packed than padded; always, where attention reads rows one by one.

    With masked attention, N tokens cost N + N² / 3h and B padded rows of T tokens B (T + T² / 3h): a layer of width h
    has some 12 h² weights for each token and 2h products for each pair of tokens, which run at half the speed.

    Args:
        attended (`torch.Tensor` of shape `(B, T)`): 0 on padding.
    """
    if takes_any_length(model):
        return True
    rows, longest = attended.shape
    packed, width = places(attended).total, 3 * model.config.get_text_config().hidden_size
    if packed**2 > max(rows * longest**2, MASK_SIZE):
        return False
    return packed * (1 + packed / width) < WORTH * rows * longest * (1 + longest / width)


def packed_hidden(
    backbone: nn.Module, ids: torch.Tensor, attended: torch.Tensor, lengths: dict[str, Any] | None = None
) -> torch.Tensor:
    """
    Last hidden states `(B, T, H)`, computed with all rows in one sequence; 0 on padding.

    Args:
        backbone: the model without its LM head.
        ids (`torch.Tensor` of shape `(B, T)`): token ids.
        attended (`torch.Tensor` of shape `(B, T)`): 0 on padding.
        lengths (`dict`, *optional*): see [`row_lengths`]; by default, those on accelerators and none on a CPU.
    """
    if lengths is None:
        lengths = {} if attended.device.type == "cpu" else row_lengths(backbone, attended)
    positions = take(attended.cumsum(1) - 1, attended)[None]
    read = backbone(input_ids=take(ids, attended)[None], position_ids=positions, use_cache=False, **lengths)
    packed = read.last_hidden_state[0]
    spread = packed.new_zeros(ids.numel(), packed.shape[-1])
    return spread.index_copy(0, places(attended).at.to(packed.device), packed).view(*ids.shape, -1)


def is_exact(model: PreTrainedModel, ids: torch.Tensor, attended: torch.Tensor) -> bool:
    """
    Whether packed rows give the same hidden states as padded ones, tested on the first batch of two or more rows;
    where attention is masked, on the beginning of some of its rows, which costs little.

    Every process runs the same forward passes, as sharded weights require.
    """
    known = getattr(model, _VERDICT, None)
    if known is not None or len(ids) < 2:
        return True if known is None else known
    if not takes_any_length(model):
        ids, attended = beginnings(ids, attended)
    training = model.training
    model.eval()  # dropout would make any two passes differ
    try:
        with torch.no_grad():
            packed = packed_hidden(backbone_of(model), ids, attended)
            padded = backbone_of(model)(input_ids=ids, attention_mask=attended, use_cache=False).last_hidden_state
    finally:
        model.train(training)
    exact, error = agrees(packed, padded, attended.to(padded.device).bool())
    if not exact:
        logger.log(
            logging.WARNING if takes_any_length(model) else logging.INFO,
            f"{type(model).__name__} is not computed on packed rows: hidden states would differ from those of padded "
            f"rows by {error:.1%}, since rows would see each other. Batches are padded instead: correct, but slower.",
        )
    setattr(model, _VERDICT, exact)
    return exact


def beginnings(ids: torch.Tensor, attended: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first tokens of the first rows, padded on the left, as another `(B, T)` with its mask."""
    rows = [row[kept.bool()][:TRIED_TOKENS] for row, kept in zip(ids[:TRIED_ROWS], attended, strict=False)]
    padded = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    return padded(rows), padded([torch.ones_like(row) for row in rows])


def agrees(found: torch.Tensor, expected: torch.Tensor, kept: torch.Tensor) -> tuple[bool, float]:
    """
    Whether hidden states `(B, T, H)` differ by rounding alone where `kept` `(B, T)` is set, and by how much.

    Under autocast, states in fp32 are made of products in 16 bits, and are rounded like these.
    """
    wanted, device = expected[kept].float(), expected.device.type
    error = ((found[kept].float() - wanted).norm() / wanted.norm().clamp(min=1e-12)).item()
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else expected.dtype
    if dtype in TOLERANCE:
        return error <= TOLERANCE[dtype], error
    return error <= ROUNDED and not leaks(found, expected, kept), error


def leaks(packed: torch.Tensor, padded: torch.Tensor, kept: torch.Tensor) -> bool:
    """
    Whether the first tokens of rows, which would see the row before, differ more than others do.

    A short convolution disturbs these alone, and a mean over long rows would hide that.
    """
    errors = (packed.float() - padded.float()).norm(dim=-1) / padded.float().norm(dim=-1).clamp(min=1e-12)  # (B, T)
    place = kept.cumsum(1) - 1
    first = kept & (place < FIRST_TOKENS)
    first[0] = False  # no row is before it
    others = kept & ~first
    if not first.any() or not others.any():
        return False
    usual = errors[others].mean() + 2 * errors[others].std(correction=0)
    return bool(errors[first].mean() > 3 * usual + torch.finfo(torch.float32).eps)


def row_lengths(backbone: nn.Module, attended: torch.Tensor) -> dict[str, Any]:
    """Keyword arguments with the starts of rows, if the model passes them on, so that no layer has to find them."""
    takes = inspect.signature(type(backbone).forward).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes):
        return {}
    counts = [length for length in places(attended).counts if length]
    ends = torch.tensor([0, *counts], dtype=torch.int32)
    if attended.is_cuda:  # from pinned memory a copy need not be waited for
        ends = ends.pin_memory()
    ends = ends.to(attended.device, non_blocking=True).cumsum(0, dtype=torch.int32)
    longest = max(counts, default=0)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
