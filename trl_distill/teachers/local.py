"""A teacher that is its own model in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from .._trl import prepare_deepspeed
from ..models.hidden_states import add_teacher_forward
from ..models.properties import has_relative_positions, unwrap_adapter
from ..models.shared_prompts import Prompts, can_share, obstacle
from ..places import places
from ..rollouts import Rollouts
from ..signals import HiddenStates
from .base import Teacher
from .sharding import sharded


class LocalTeacher(Teacher):
    """
    A model in this process: frozen, in eval mode, and prepared as TRL prepares its reference model.

    DeepSpeed ZeRO-3 and FSDP shard it; otherwise each process holds a copy.

    Args:
        model ([`~transformers.PreTrainedModel`] or `PeftModel`): the teacher. Its forward is extended in place.
        accelerator ([`~accelerate.Accelerator`]): the trainer's.
        student_vocab_size (`int`): if the teacher's is smaller, each batch is checked for ids that the teacher lacks.
        batch_size (`int`, *optional*): rows per forward pass. Defaults to all rows.
    """

    def __init__(
        self, model: nn.Module, accelerator: Accelerator, student_vocab_size: int, batch_size: int | None = None
    ):
        self.accelerator, self.batch_size = accelerator, batch_size
        self.vocab_size: int = unwrap_adapter(model).config.get_text_config().vocab_size
        self._lacks_ids = self.vocab_size < student_vocab_size
        self._trims_prompts = has_relative_positions(unwrap_adapter(model).config)
        self._base = unwrap_adapter(model)
        model.requires_grad_(False)
        model.eval()
        add_teacher_forward(model)
        self.model = self.module = self._placed(model)
        self.prompts_once = not obstacle(self._base)
        self.bytes_per_token = state_bytes(self._base)

    def _placed(self, model: nn.Module) -> Any:
        accelerator = self.accelerator
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            return prepare_deepspeed(model, accelerator)
        if accelerator.distributed_type == DistributedType.FSDP:
            return sharded(model, accelerator)
        return accelerator.prepare_model(model, evaluation_mode=True)

    @contextmanager
    def on_device(self) -> Iterator[nn.Module]:
        """The model, which is always on its device."""
        yield self.model

    @torch.no_grad()
    def score(self, rollouts: Rollouts) -> HiddenStates:
        """
        Run the backbone; the LM head is applied later, in tiles.

        Raises:
            ValueError: a prompt or completion holds an id that the teacher's vocabulary lacks.
        """
        # the padding id may be one that the teacher lacks, and its embedding is looked up even though it is masked
        input_ids = rollouts.input_ids.masked_fill(rollouts.attention_mask == 0, 0)
        if self._lacks_ids and (input_ids >= self.vocab_size).any():
            raise ValueError(
                f"A rollout has the token id {input_ids.max().item()}, but the teacher's vocabulary ends at "
                f"{self.vocab_size - 1}. Keep such ids out of prompts and rollouts, or use a teacher that has them."
            )
        with self.on_device() as model, self.accelerator.autocast():
            return in_parts(
                model,
                replace(rollouts, input_ids=input_ids),
                self.batch_size,
                self._trims_prompts,
                can_share(self._base),
            )


def state_bytes(model: Any) -> int:
    """Bytes of a model's last hidden state at one token; `model` without wrappers."""
    head = model.get_output_embeddings().weight
    return model.config.get_text_config().hidden_size * head.element_size()


def in_parts(
    model: Callable[..., HiddenStates],
    rollouts: Rollouts,
    batch_size: int | None = None,
    trims_prompts: bool = False,
    shares_prompts: bool = False,
) -> HiddenStates:
    """
    Score `batch_size` rows at a time, rows of similar length together, without unnecessary padding.

    Args:
        model (`Callable`): the teacher's forward pass, see [`~trl_distill.models.hidden_states.add_teacher_forward`].
        rollouts ([`Rollouts`]): what to score.
        batch_size (`int`, *optional*): rows at a time. Defaults to all.
        trims_prompts (`bool`): whether padding on the left is cut too.
        shares_prompts (`bool`): whether a prompt that rows share is read once. Its rows are then scored together, and
            `batch_size` of their completions at a time.

    Returns:
        [`HiddenStates`]: in the order of `rollouts`.
    """
    size = batch_size or max(len(rollouts), 1)
    if len(rollouts) <= size:
        part = rollouts.trimmed(trims_prompts)
        return _read(model, part, size, shares_prompts)
    pieces: dict[int, HiddenStates] = {}
    for rows in parts_of(rollouts, size, shares_prompts):
        part = rollouts.rows(rows).trimmed(trims_prompts)
        signal = _read(model, part, size, shares_prompts)
        pieces |= dict(zip(rows.tolist(), signal.split(places(part.mask).counts), strict=True))
    return HiddenStates.cat([pieces[row] for row in range(len(rollouts))])


def _read(model: Callable[..., HiddenStates], part: Rollouts, size: int, shares_prompts: bool) -> HiddenStates:
    return model(**part.arguments, rollouts=part, **({"share_prompts": size} if shares_prompts else {}))


def parts_of(rollouts: Rollouts, size: int, whole_groups: bool) -> list[torch.Tensor]:
    """
    Indices of the rows that are scored together, the longest first.

    Args:
        rollouts ([`Rollouts`]): all rows.
        size (`int`): rows of a part.
        whole_groups (`bool`): keep rows with the same prompt together; a part with one prompt may have more rows.
    """
    lengths = rollouts.attention_mask.sum(1)
    if not whole_groups:
        return list(lengths.argsort(descending=True, stable=True).split(size))
    prompts = Prompts.among(rollouts.input_ids, rollouts.attention_mask, rollouts.mask.shape[1])
    of_row, groups = prompts.of_row.tolist(), dict[int, list[int]]()  # in the order of their longest rows
    for row in lengths.argsort(descending=True, stable=True).tolist():
        groups.setdefault(of_row[row], []).append(row)
    parts: list[list[int]] = [[]]
    for group in groups.values():
        if parts[-1] and len(parts[-1]) + len(group) > size:
            parts.append([])
        parts[-1] += group
    return [torch.tensor(part, device=lengths.device) for part in parts]
