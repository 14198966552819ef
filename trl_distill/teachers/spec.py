"""A teacher as it was asked for: by name, as a model, or as an object; and how it is loaded."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from .._trl import create_model_from_path, get_config_model_id
from ..config import OPDConfig
from ..models.loading import load_config, load_tokenizer, load_whole
from ..models.properties import unwrap_adapter
from .base import Teacher, is_sharded
from .local import LocalTeacher
from .offloaded import OffloadedTeacher
from .pool import TeacherPool
from .self_distillation import ADAPTER_OFF, AdapterOff, MovingAverage
from .server import ServedTeacher


def read_specs(teacher_model: Any, args: OPDConfig) -> dict[str, Any]:
    """
    Who the teachers are, by name, from what was passed and what the configuration says; nothing is loaded.

    Raises:
        ValueError: there is none, or two ways to name one are used at once.
        TypeError: one of them cannot be a teacher.
    """
    settings = ("teacher_model_name_or_path", "teacher_models", "teacher_ema")
    named = next((name for name in settings if getattr(args, name) is not None), None)
    from_args: Any = None if named is None else getattr(args, named)
    if args.teacher_ema is not None:
        from_args = MovingAverage(args.teacher_ema)
    elif args.teacher_server_urls:
        top_k = args.kl_top_k if args.kl_estimator == "topk" else 0
        from_args = ServedTeacher(args.teacher_server_urls, model=from_args, top_k=top_k)
    if teacher_model is not None and named is not None and teacher_model != from_args:
        raise ValueError(f"Two teachers: `teacher_model` was passed, and `args.{named}` is given. Keep one.")
    spec = teacher_model if teacher_model is not None else from_args
    if spec is None:
        raise ValueError(
            f"There is no teacher, but `beta` is {args.beta}. Pass `teacher_model=...` (or "
            "`--teacher_model_name_or_path`), or set `beta=0` for plain GRPO. A PEFT student's own base model is "
            f"not taken in its place: ask for it by name, `teacher_model={ADAPTER_OFF!r}`."
        )
    if isinstance(spec, dict) and not spec:
        raise ValueError("`teacher_model` is an empty dictionary. Give at least one teacher by name.")
    specs = spec if isinstance(spec, dict) else {"teacher": spec}
    return {name: _checked_spec(single) for name, single in specs.items()}


def _checked_spec(spec: Any) -> str | nn.Module | Teacher:
    if spec == ADAPTER_OFF:
        return AdapterOff()
    if isinstance(spec, str) and spec.startswith(("http://", "https://")):
        raise ValueError(
            f"The teacher {spec!r} is a server. Say which model it serves: `ServedTeacher({spec!r}, model=...)`, or "
            "`--teacher_server_urls` with `--teacher_model_name_or_path`."
        )
    if isinstance(spec, str | nn.Module) or (isinstance(spec, Teacher) and not isinstance(spec, type)):
        return spec
    raise TypeError(
        f"`teacher_model` is {spec!r}; give a hub name, a folder, a model, an object with `score(rollouts)`, or "
        "several of these by name."
    )


def load_pool(
    specs: dict[str, Any], args: OPDConfig, accelerator: Any, student: nn.Module, student_vocab_size: int
) -> TeacherPool:
    """
    Load or bind every teacher once, whatever the number of its names.

    Args:
        specs (`dict`): by name, a hub name or folder, a model, or a [`Teacher`].
        args ([`OPDConfig`]): for loading.
        accelerator ([`~accelerate.Accelerator`]): the trainer's.
        student: the model that is trained, for teachers that look at it.
        student_vocab_size (`int`): rows of its LM head.
    """
    made: dict[Any, Teacher] = {}
    teachers: dict[str, Teacher] = {}
    for name, spec in specs.items():
        key = spec if isinstance(spec, str) else id(spec)
        if key not in made:
            if isinstance(spec, str | nn.Module):
                made[key] = load_teacher(spec, args, accelerator, student_vocab_size)
            else:
                made[key] = spec
                if hasattr(spec, "bind"):
                    spec.bind(student, accelerator, args.teacher_batch_size or args.per_device_train_batch_size)
        teachers[name] = made[key]
    return TeacherPool(teachers, accelerator, uses=args.num_iterations, together=is_sharded(accelerator))


def teacher_generation(spec: Any, args: OPDConfig) -> GenerationConfig | None:
    """The settings that a teacher generates with, where it brings any."""
    if isinstance(spec, nn.Module):
        return getattr(unwrap_adapter(spec), "generation_config", None)
    try:
        if isinstance(spec, ServedTeacher):
            return GenerationConfig.from_pretrained(spec.model)
        return GenerationConfig.from_pretrained(spec, **hub_kwargs(args))
    except (OSError, ValueError):
        return None


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
    kind = OffloadedTeacher if args.teacher_offload else LocalTeacher
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
