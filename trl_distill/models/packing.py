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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..places import places, take
from .modes import in_eval_mode
from .properties import backbone_of, has_relative_positions, positions_depend_on_length, reads_images


logger = logging.getLogger(__name__)

KNOWN_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # relative difference of hidden states allowed for rounding
FIRST_TOKENS = 4  # of a row, which a short convolution would mix with the row before
TRIED_ROWS, TRIED_TOKENS = 4, 64  # of the first batch, where attention is masked
MASK_SIZE = 2**22  # tokens by tokens, up to which a mask may be larger than that of the padded rows
WORTH = 0.9  # of the padded batch's work, above which it stays padded
ROUNDED = 5e-2  # the same in 16 bits; if rows see each other, the difference is far larger
_VERDICT = "_trl_distill_packs"  # attribute of a model: its attention, and whether packing is exact with it


def packs(model: PreTrainedModel) -> bool:
    """
    Whether a model supports packed rows, as far as that is known beforehand: any kind of FlashAttention or PyTorch's
    own, rotary positions that do not depend on the length of the sequence, and no layers with a state.
    """
    return not obstacle(model)


def takes_any_length(model: PreTrainedModel) -> bool:
    """Whether attention reads packed rows one by one, as any kind of FlashAttention does."""
    attention = str(model.config._attn_implementation).replace("-", "_")
    return "flash" in attention and not attention.startswith("paged")


def obstacle(model: PreTrainedModel) -> str:
    """Why a model does not support packed rows, as far as that is known beforehand; empty if it does."""
    if not takes_any_length(model):
        if model.config._attn_implementation != "sdpa":
            return "its attention is neither FlashAttention nor PyTorch's"
        if torch.compiler.is_compiling():
            return "it is compiled together with this choice, which differs from batch to batch"
    if reads_images(model.config):
        return "it reads images, whose tokens may have positions of several dimensions"
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ())
    stateful = bool(getattr(model, "_is_stateful", False)) or bool(layers - KNOWN_LAYERS)
    if stateful:
        return "layers with a state"
    if not has_relative_positions(config):
        return "results depend on padding, or positions are not rotary"
    if positions_depend_on_length(config):
        return "positions that depend on the length of the whole sequence"
    return _what_counts_rows(model)


def _what_counts_rows(model: PreTrainedModel) -> str:
    """What else is done to a model that is another thing for rows in one sequence; empty if nothing is."""
    takes = inspect.signature(type(backbone_of(model)).forward).parameters.values()
    if not any(one.name == "position_ids" or one.kind is one.VAR_KEYWORD for one in takes):
        return "its forward pass takes no `position_ids`"
    adapters = getattr(model, "peft_config", None) or {}
    if any(getattr(config, "alora_invocation_tokens", None) for config in adapters.values()):
        return "an activated LoRA, which begins at another place of every row"
    if getattr(model.get_input_embeddings(), "neftune_noise_alpha", None) is not None:
        return "NEFTune, whose noise depends on the length of rows"
    return ""


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


@torch.compiler.disable
def is_exact(model: PreTrainedModel, ids: torch.Tensor, attended: torch.Tensor) -> bool:
    """
    Whether packed rows give the same hidden states as padded ones, tested on the first batch of two or more rows, and
    again with another attention; where attention is masked, on the beginning of some rows, which costs little.

    Every process runs the same forward passes, as sharded weights require.
    """
    known = verdict(model)
    if known is not None or len(ids) < 2:
        return True if known is None else known
    if not takes_any_length(model):
        ids, attended = beginnings(ids, attended)
    with _undisturbed(model, ids.device.type):
        padded = backbone_of(model)(input_ids=ids, attention_mask=attended, use_cache=False).last_hidden_state
        try:
            packed = packed_hidden(backbone_of(model), ids, attended)
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:  # of the model's own code, which may count on rows
            reason = f"it fails on one sequence ({type(failure).__name__}: {failure})"
        else:
            exact, error = agrees(packed, padded, attended.to(padded.device).bool())
            different = f"hidden states would differ from those of padded rows by {error:.1%}"
            reason = "" if exact else f"{different}, since rows would see each other"
    if reason:
        logger.log(
            logging.WARNING if takes_any_length(model) else logging.INFO,
            f"{type(model).__name__} is not computed on packed rows: {reason}. Batches are padded instead: correct, "
            "but slower.",
        )
    setattr(model, _VERDICT, (model.config._attn_implementation, not reason))
    return not reason


def verdict(model: PreTrainedModel) -> bool | None:
    """What was found of a model with its attention; `None` if it was not tested yet."""
    attention, exact = getattr(model, _VERDICT, (None, None))
    return exact if attention == model.config._attn_implementation else None


@contextmanager
def _undisturbed(model: nn.Module, device: str) -> Iterator[None]:
    """
    Without gradients and dropout, which would make any two passes differ, and so that nothing of it is left: autocast
    keeps no weights, since older PyTorch takes those of a pass without gradients for the next one, which then has none,
    and nothing is compiled, since a model has few graphs before `torch.compile` gives up.
    """
    cast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if cast else None
    with (
        in_eval_mode(model),
        torch.no_grad(),
        torch.autocast(device, dtype=dtype, enabled=cast, cache_enabled=False),
        torch.compiler.set_stance("force_eager"),
    ):
        yield


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
