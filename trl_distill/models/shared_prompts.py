"""A prompt that several rows share is read once; their completions continue from its cached keys and values.

Attention layers keep what they have read as keys and values, which can be repeated for several rows. Layers with a
state over time cannot be, and some positions depend on the length of the whole sequence. So a model's configuration and
its cache are checked, and the first rows are computed both ways: prompts are shared only if both results agree.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .packing import agrees
from .properties import PADDING_COUNTS, backbone_of, positions_depend_on_length, reads_images


logger = logging.getLogger(__name__)

LAYERS = {"full_attention", "sliding_attention", "attention"}  # of these, keys and values are all that is kept
LEAST_SAVED = 0.2  # share of the tokens, with padding; if fewer are saved, a second forward pass costs more
_VERDICT = "_trl_distill_shares_prompts"  # attribute of a model: the longest rows for which sharing is exact; 0: never


@dataclass(frozen=True)
class Prompts:
    """
    The distinct prompts among the rows of a batch.

    Attributes:
        first (`torch.Tensor` of shape `(G,)`, int64): for each distinct prompt the first row that has it.
        of_row (`torch.Tensor` of shape `(B,)`, int64): number of each row's prompt, from 0 to G − 1.
        length (`int`): columns of the prompts, P.
    """

    first: torch.Tensor
    of_row: torch.Tensor
    length: int

    @classmethod
    def among(cls, ids: torch.Tensor, attended: torch.Tensor, completion: int) -> Prompts:
        """From token ids `(B, P + C)` and their attention mask; `completion` is C."""
        length = ids.shape[1] - completion
        seen = ids[:, :length].masked_fill(attended[:, :length] == 0, -1)
        _, of_row = seen.unique(dim=0, return_inverse=True)
        order = torch.arange(len(ids), device=ids.device)
        count = int(of_row.max()) + 1 if len(ids) else 0
        first = order.new_full((count,), len(ids)).scatter_reduce(0, of_row, order, "amin")
        return cls(first, of_row, length)

    def pay(self, columns: int) -> bool:
        """Whether reading each prompt once saves more than it costs, for rows of `columns` tokens with padding."""
        return pays(len(self.of_row), len(self.first), self.length, columns)


def pays(rows: int, distinct: int, length: int, columns: int) -> bool:
    """The same for `distinct` prompts of `length` tokens."""
    return (rows - distinct) * length >= LEAST_SAVED * max(rows * columns, 1)


def can_share(model: PreTrainedModel) -> bool:
    """Whether a model may read a prompt once for several rows: no [`obstacle`], and no difference on earlier rows."""
    return not obstacle(model) and getattr(model, _VERDICT, None) != 0


def obstacle(model: PreTrainedModel) -> str:
    """Why a model's rows cannot share prompts, as far as that is known beforehand; empty if they can."""
    weight: Any = next(model.parameters())
    # ZeRO-3 and FSDP2, which leaves whole tensors where its root is not sharded again and inside of a forward pass
    if hasattr(weight, "ds_id") or isinstance(weight, DTensor) or any(map(_is_fsdp, model.modules())):
        return "sharded weights, for which all processes must run as many forward passes"
    if reads_images(model.config):
        return "it reads images, so that equal token ids need not be equal prompts"
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ())
    if getattr(model, "_is_stateful", False) or layers - LAYERS:
        return "layers that keep more than keys and values"
    if positions_depend_on_length(config):
        return "positions that depend on the length of the whole sequence"
    return "results depend on padding" if config.model_type in PADDING_COUNTS else ""


def _is_fsdp(module: Any) -> bool:
    return isinstance(module, FSDPModule)


def completion_states(
    backbone: Any, inputs: dict[str, torch.Tensor], prompts: Prompts, at_once: int
) -> torch.Tensor | None:
    """
    Last hidden states that predict the tokens of completions, `(B, C, H)`; 0 behind the longest rows of each part.

    Args:
        backbone: the model without its LM head.
        inputs (`dict` of `torch.Tensor` of shape `(B, P + C)`): "input_ids", "attention_mask", and maybe
            "position_ids".
        prompts ([`Prompts`]): the prompts of these rows.
        at_once (`int`): rows whose completions are read at a time.

    Returns:
        `torch.Tensor`, *optional*: `None` if the model's cache is not made of keys and values alone.
    """
    length, attended = prompts.length, inputs["attention_mask"]
    read = backbone(**{name: value[prompts.first, :length] for name, value in inputs.items()}, use_cache=True)
    layers: Any = getattr(getattr(read, "past_key_values", None), "layers", None)
    if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return None
    last = read.last_hidden_state[:, -1:]  # (G, 1, H), predicts the first token of completions
    rows, columns = attended.shape
    states = last.new_zeros(rows, columns - length, last.shape[-1])
    for part in torch.arange(rows, device=prompts.of_row.device).split(at_once):
        mine, here = prompts.of_row[part], part.to(last.device)  # a model may lie on several devices
        states[here, :1] = last[mine.to(last.device)]
        end = length + int(attended[part, length:].any(0).sum())  # the columns of this part's longest completion
        if end - length < 2:
            continue
        new = {name: value[part, length : end - 1] for name, value in inputs.items()}
        new["attention_mask"] = attended[part, : end - 1]
        cache = Cache(layers=[_RepeatedLayer(layer, mine) for layer in layers])
        found = backbone(**new, past_key_values=cache, use_cache=True).last_hidden_state
        states[here, 1 : end - length] = found
    return states


class _RepeatedLayer(DynamicLayer):
    """
    A layer of a cache as the rows of a part see it. It keeps nothing: keys and values are repeated while a layer runs.

    Args:
        layer: the cache's layer, with one row for each distinct prompt.
        rows (`torch.Tensor` of shape `(B,)`, int64): the prompt of each row.
    """

    def __init__(self, layer: Any, rows: torch.Tensor):
        super().__init__()
        vars(self).update(vars(layer))
        self.is_sliding = layer.is_sliding
        self._layer, self._rows = layer, rows.to(layer.keys.device)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._layer.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self._layer.get_seq_length()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of prompts and completions, `(B, heads, P + C, D)`."""
        return self._joined(self._layer.keys, key_states), self._joined(self._layer.values, value_states)

    def _joined(self, kept: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        repeated = kept.expand(len(new), -1, -1, -1) if len(kept) == 1 else kept[self._rows]
        return torch.cat([repeated, new], dim=-2)


def is_exact(model: PreTrainedModel, inputs: dict[str, torch.Tensor], prompts: Prompts) -> bool:
    """
    Whether continuing from shared prompts gives the states of whole rows, tested on two or three rows of this batch.

    It is tested on the first batch with a completion of two tokens or more, and again when rows are twice as long as
    those tested or reach a sliding window.

    Args:
        model: the model, in eval mode.
        inputs, prompts: see [`completion_states`]; at least one prompt is shared.
    """
    verdict, columns = getattr(model, _VERDICT, None), inputs["input_ids"].shape[1]
    if verdict is not None and not _untested(model, verdict, columns):
        return verdict > 0
    completion = columns - prompts.length
    chosen = _tested(inputs["attention_mask"], prompts)
    few = {name: value[chosen] for name, value in inputs.items()}
    kept = few["attention_mask"][:, prompts.length :].bool()
    if not kept[:, 1:].any():  # nothing continues a prompt
        return False
    whole = backbone_of(model)(**few, use_cache=False).last_hidden_state[:, prompts.length - 1 : -1]
    distinct = Prompts.among(few["input_ids"], few["attention_mask"], completion)
    reason = "its cache holds more than keys and values"
    try:
        found = completion_states(backbone_of(model), few, distinct, len(chosen))
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # of the model's own code, which may keep other things in a cache than most do
        found, reason = None, f"it cannot continue from a cache ({type(failure).__name__}: {failure})"
    if found is not None:
        exact, error = agrees(found, whole, kept.to(whole.device))
        reason = "" if exact else f"hidden states would differ from those of whole rows by {error:.1%}"
    if reason:
        logger.warning(
            f"{type(model).__name__} reads the prompt of every row, also where rows share it, since {reason}. This is "
            "correct, but slower."
        )
    setattr(model, _VERDICT, 0 if reason else columns)
    return not reason


def _tested(attended: torch.Tensor, prompts: Prompts) -> torch.Tensor:
    """The two longest rows of the prompt that most rows share, and the longest of the others, if there are any."""
    order = attended.sum(1).argsort(descending=True, stable=True)
    of_row = prompts.of_row[order]
    most = prompts.of_row.bincount().argmax()
    return torch.cat([order[of_row == most][:2], order[of_row != most][:1]])


def _untested(model: PreTrainedModel, tested: int, columns: int) -> bool:
    """Whether rows of `columns` tokens are so much longer than those tested that sharing is tested again."""
    if tested == 0:
        return False
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return columns > 2 * tested or (isinstance(window, int) and tested < window <= columns)
