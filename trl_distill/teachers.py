"""Teachers: who they are, and how to obtain a signal from them for a batch of rollouts.

A teacher is anything with `score(rollouts) -> signal`. Here: a model in this process. What is computed from the signal
is left to `heads.py`, when to ask for it to the trainer.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ._compat import create_model_from_path, get_config_model_id, prepare_deepspeed, prepare_fsdp
from .checks import load_config, load_tokenizer
from .config import OPDConfig
from .forwards import add_teacher_forward, unwrap_adapter
from .signals import HiddenStates, Rollouts


@runtime_checkable
class Teacher(Protocol):
    """Anything that can judge rollouts."""

    def score(self, rollouts: Rollouts) -> HiddenStates:
        """Judge the tokens that `rollouts.mask` marks. Called once per micro-batch, on every process."""
        ...


class LocalTeacher:
    """
    A model in this process, frozen, in eval mode, prepared as TRL prepares its reference model.

    DeepSpeed ZeRO-3 and FSDP shard it; otherwise each process holds a copy.

    Args:
        model ([`~transformers.PreTrainedModel`] or `PeftModel`): the teacher. Its forward is extended in place.
        accelerator ([`~accelerate.Accelerator`]): the trainer's.
        student_vocab_size (`int`): where the teacher's is smaller, each batch is checked for ids that it lacks.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator, student_vocab_size: int):
        self.accelerator = accelerator
        self.vocab_size: int = unwrap_adapter(model).config.get_text_config().vocab_size
        self._lacks_ids = self.vocab_size < student_vocab_size
        model.requires_grad_(False)
        model.eval()
        add_teacher_forward(model)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.model = prepare_deepspeed(model, accelerator)
        elif accelerator.distributed_type == DistributedType.FSDP:
            if accelerator.state.fsdp_plugin.fsdp_version == 1:
                raise ValueError(
                    "FSDP version 1 flattens the teacher's LM head, which the divergence needs whole. Set "
                    "`fsdp_version: 2` in the accelerate configuration."
                )
            self.model = prepare_fsdp(model, accelerator)
        else:
            self.model = accelerator.prepare_model(model, evaluation_mode=True)

    @torch.no_grad()
    def score(self, rollouts: Rollouts) -> HiddenStates:
        """
        One forward of the backbone; the LM head is applied later, in tiles.

        Raises:
            ValueError: a prompt or completion holds an id that the teacher's vocabulary lacks.
        """
        # Padding may be an id that the teacher lacks, and its embedding is looked up although nobody attends to it
        input_ids = rollouts.input_ids.masked_fill(rollouts.attention_mask == 0, 0)
        if self._lacks_ids and (input_ids >= self.vocab_size).any():
            raise ValueError(
                f"A rollout holds the id {input_ids.max().item()}, but the teacher's vocabulary ends at "
                f"{self.vocab_size - 1}. Keep such ids out of prompts and rollouts, or use a teacher that has them."
            )
        with self.accelerator.autocast():
            return self.model(input_ids=input_ids, attention_mask=rollouts.attention_mask, rollouts=rollouts)


def make_teacher(
    spec: str | nn.Module | Teacher, args: OPDConfig, accelerator: Accelerator, student_vocab_size: int
) -> Teacher:
    """
    The teacher that `spec` means: a name or folder is loaded, a model wrapped, anything with `score` taken as it is.

    Weights are loaded in the checkpoint's own dtype, on this process's device, unless `args.teacher_model_init_kwargs`
    say else.
    """
    if not isinstance(spec, str | nn.Module):
        return spec
    if isinstance(spec, str):
        kwargs: dict[str, Any] = {"dtype": "auto", **_init_kwargs(args)}
        if accelerator.num_processes > 1 or accelerator.distributed_type == DistributedType.DEEPSPEED:
            kwargs["device_map"] = None  # each process places its own copy, or its own shard
        spec = create_model_from_path(spec, **kwargs)
    return LocalTeacher(spec, accelerator, student_vocab_size)


def teacher_config(spec: str | nn.Module, args: OPDConfig) -> PretrainedConfig:
    """
    The teacher's configuration, without its weights.

    Raises:
        ValueError: the name or folder leads nowhere, or `teacher_model_init_kwargs` were given beside a loaded model.
    """
    if isinstance(spec, str):
        return load_config(
            spec, "teacher", "`teacher_model` or `--teacher_model_name_or_path`", **_hub_kwargs(_init_kwargs(args))
        )
    if args.teacher_model_init_kwargs is not None:
        raise ValueError(
            "`teacher_model_init_kwargs` are for loading a teacher, but `teacher_model` is loaded already. Leave them "
            "out, or pass the teacher's name."
        )
    return unwrap_adapter(spec).config


def student_config(name_or_path: str, args: OPDConfig) -> PretrainedConfig:
    """The student's configuration, without its weights. Raises `ValueError` where the name leads nowhere."""
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}  # type: ignore[dict-item]
    return load_config(name_or_path, "student", "`model` or `--model_name_or_path`", **_hub_kwargs(kwargs))


def load_teacher_tokenizer(spec: str | nn.Module, args: OPDConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside the teacher, `None` where there is none."""
    name = spec if isinstance(spec, str) else get_config_model_id(unwrap_adapter(spec).config)
    return load_tokenizer(name, **_hub_kwargs(_init_kwargs(args)))


def _hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of a model's keyword arguments, those that say where and how to fetch."""
    names = ("revision", "trust_remote_code", "token", "cache_dir", "local_files_only", "force_download", "proxies")
    return {name: value for name, value in kwargs.items() if name in names}


def _init_kwargs(args: OPDConfig) -> dict[str, Any]:
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.teacher_model_init_kwargs or {})}  # type: ignore[dict-item]
    if args.teacher_model_revision is not None:
        kwargs.setdefault("revision", args.teacher_model_revision)
    return kwargs
