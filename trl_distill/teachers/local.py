"""Teachers: anything with `score(rollouts) -> signal`. Here: the protocol, and models of their own in this process.

Teachers that are the student itself are in `self_teachers.py`, one behind a server in `served.py`. Whom to ask and when
is left to `panel.py`, what is computed from a signal to `estimators.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ._compat import create_model_from_path, get_config_model_id, prepare_deepspeed, prepare_fsdp
from .config import OPDConfig
from .forwards import add_teacher_forward, has_relative_positions, unwrap_adapter
from .loading import load_config, load_tokenizer, load_whole
from .signals import HiddenStates, Rollouts, Signal


@runtime_checkable
class Teacher(Protocol):
    """
    Anything that can judge rollouts.

    A class may also say, where it differs from the default:

    - `gives`: the signal that `score` returns; [`HiddenStates`] unless said else.
    - `per_generation` (`bool`): whether it judges whole generation batches at once instead of each micro-batch.
    - `temperature` (`float`): the only softmax temperature at which it can judge.
    """

    def score(self, rollouts: Rollouts) -> Signal:
        """Judge the tokens that `rollouts.mask` marks. Called on every process."""
        ...


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether parameters are cut up among processes, so that every forward takes all of them: ZeRO-3 and FSDP."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP


def shard_layers(model: nn.Module, accelerator: Accelerator) -> None:
    """
    Shard a frozen model layer by layer under FSDP2, so that a forward gathers one layer at a time.

    TRL shards its reference model at the root alone, which gathers all of it at once.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    plugin, mesh = accelerator.state.fsdp_plugin, getattr(accelerator, "torch_device_mesh", None)
    layers = set(getattr(unwrap_adapter(model), "_no_split_modules", None) or ())
    for module in [module for module in model.modules() if type(module).__name__ in layers]:
        fully_shard(
            module,
            mesh=None if mesh is None else mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)],
            reshard_after_forward=True,
            mp_policy=plugin.mixed_precision_policy or MixedPrecisionPolicy(),
            **({"offload_policy": plugin.cpu_offload} if plugin.cpu_offload else {}),
        )


class LocalTeacher:
    """
    A model in this process, frozen, in eval mode, prepared as TRL prepares its reference model.

    DeepSpeed ZeRO-3 and FSDP shard it; otherwise each process holds a copy.

    Args:
        model ([`~transformers.PreTrainedModel`] or `PeftModel`): the teacher. Its forward is extended in place.
        accelerator ([`~accelerate.Accelerator`]): the trainer's.
        student_vocab_size (`int`): where the teacher's is smaller, each batch is checked for ids that it lacks.
        batch_size (`int`, *optional*): rows per forward. Defaults to all that it is asked about.
    """

    gives = HiddenStates

    def __init__(
        self, model: nn.Module, accelerator: Accelerator, student_vocab_size: int, batch_size: int | None = None
    ):
        self.accelerator, self.batch_size = accelerator, batch_size
        self.vocab_size: int = unwrap_adapter(model).config.get_text_config().vocab_size
        self._lacks_ids = self.vocab_size < student_vocab_size
        self._trims_prompts = has_relative_positions(unwrap_adapter(model).config)
        model.requires_grad_(False)
        model.eval()
        add_teacher_forward(model)
        self.model = self._placed(model)

    def _placed(self, model: nn.Module) -> Any:
        accelerator = self.accelerator
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            return prepare_deepspeed(model, accelerator)
        if accelerator.distributed_type == DistributedType.FSDP:
            if accelerator.state.fsdp_plugin.fsdp_version == 1:
                raise ValueError(
                    "FSDP version 1 flattens the teacher's LM head, which the divergence needs whole. Set "
                    "`fsdp_version: 2` in the accelerate configuration."
                )
            shard_layers(model, accelerator)
            return prepare_fsdp(model, accelerator)
        return accelerator.prepare_model(model, evaluation_mode=True)

    @contextmanager
    def at_work(self) -> Iterator[nn.Module]:
        """The model, where it can be called."""
        yield self.model

    @torch.no_grad()
    def score(self, rollouts: Rollouts) -> HiddenStates:
        """
        Forwards of the backbone; the LM head is applied later, in tiles.

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
        with self.at_work() as model, self.accelerator.autocast():
            return in_parts(
                lambda part: model(input_ids=part.input_ids, attention_mask=part.attention_mask, rollouts=part),
                Rollouts(input_ids, rollouts.attention_mask, rollouts.mask),
                self.batch_size,
                self._trims_prompts,
            )


class ParkedTeacher(LocalTeacher):
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
    def at_work(self) -> Iterator[nn.Module]:
        try:
            for parameter, home in self._parked:
                parameter.data = self._arrived(home)
            yield self.model
        finally:
            for parameter, home in self._parked:
                parameter.data = home


def in_parts(
    forward: Callable[[Rollouts], HiddenStates],
    rollouts: Rollouts,
    batch_size: int | None = None,
    trims_prompts: bool = False,
) -> HiddenStates:
    """
    Judge `batch_size` rows at a time, rows of like length together and without padding that none of them needs.

    Args:
        forward: of the teacher.
        rollouts ([`Rollouts`]): what is judged.
        batch_size (`int`, *optional*): rows at a time; all of them unless given.
        trims_prompts (`bool`): cut padding on the left, too.

    Returns:
        [`HiddenStates`]: in the order of the rollouts.
    """
    size = batch_size or len(rollouts)
    order = rollouts.attention_mask.sum(1).argsort(descending=True, stable=True)
    pieces: dict[int, HiddenStates] = {}
    for rows in order.split(size):
        part = rollouts.rows(rows).trimmed(trims_prompts)
        counts = part.mask.sum(1).tolist()
        pieces |= dict(zip(rows.tolist(), forward(part).split(counts), strict=True))
    return HiddenStates.cat([pieces[row] for row in range(len(rollouts))])


def load_teacher(spec: str | nn.Module, args: OPDConfig, accelerator: Accelerator, student_vocab_size: int) -> Teacher:
    """
    A teacher in this process: a name or folder is loaded, a model wrapped; parked with `args.teacher_offload`.

    Weights are loaded in the checkpoint's own dtype, on this process's device, unless `args.teacher_model_init_kwargs`
    say else.
    """
    if isinstance(spec, str):
        kwargs: dict[str, Any] = {"dtype": "auto", **_init_kwargs(args)}
        if accelerator.num_processes > 1 or accelerator.distributed_type == DistributedType.DEEPSPEED:
            kwargs["device_map"] = None  # each process places its own copy, or its own shard
        if args.teacher_offload:
            kwargs.setdefault("device_map", None)
        model: Any = load_whole(create_model_from_path, spec, "teacher", **kwargs)
    else:
        model = spec
    kind = ParkedTeacher if args.teacher_offload else LocalTeacher
    return kind(model, accelerator, student_vocab_size, args.teacher_batch_size or args.per_device_train_batch_size)


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


def hub_kwargs(args: OPDConfig) -> dict[str, Any]:
    """Where and how the teacher's files are fetched."""
    return _hub_kwargs(_init_kwargs(args))


def _hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of a model's keyword arguments, those that say where and how to fetch."""
    names = ("revision", "trust_remote_code", "token", "cache_dir", "local_files_only", "force_download", "proxies")
    return {name: value for name, value in kwargs.items() if name in names}


def _init_kwargs(args: OPDConfig) -> dict[str, Any]:
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.teacher_model_init_kwargs or {})}  # type: ignore[dict-item]
    if args.teacher_model_revision is not None:
        kwargs.setdefault("revision", args.teacher_model_revision)
    return kwargs
