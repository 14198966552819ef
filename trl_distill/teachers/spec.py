"""A teacher as the user specified it, before anything is loaded: a name, a model, a server, or an object with `score`.

One class for each, with the same methods: its name, configuration, tokenizer and generation settings, and `load`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from .._trl import create_model_from_path, get_config_model_id
from ..config import OPDConfig
from ..config_checks import divergences_of
from ..models.loading import load_config, load_processor, load_tokenizer, load_whole
from ..models.properties import unwrap_adapter
from ..server_urls import without_login
from . import sharding, shared_memory
from .base import Teacher, as_teacher, is_sharded
from .local import LocalTeacher
from .offloaded import OffloadedTeacher
from .pool import TeacherPool
from .self_distillation import ADAPTER_OFF, AdapterOff, MovingAverage
from .server import ServedTeacher


class TeacherSpec:
    """
    Describes a teacher before it is loaded. This class is for objects with `score`, about which nothing is known
    beforehand; subclasses are for models.

    Attributes:
        given (`Any`): what was passed as `teacher_model`.
        served (`bool`): whether it is a served model.
        can_be_examined (`bool`): whether its tokenizer or configuration can be compared with the student's.
    """

    served = False
    can_be_examined = False

    def __init__(self, given: Any, args: OPDConfig):
        self.given, self.args = given, args

    @property
    def name(self) -> str:
        """Its name in logs."""
        return type(self.given).__name__

    @property
    def identity(self) -> Any:
        """Equal for two names of the same teacher, which is then loaded once."""
        return id(self.given)

    @property
    def model(self) -> nn.Module | None:
        """The model that was passed, if one was."""
        return None

    def config(self) -> PretrainedConfig | None:
        """The model's configuration, without weights. Raises `ValueError` if it cannot be found."""
        return None

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer saved with it."""
        return None

    def processor(self) -> Any:
        """Its processor, if it is a vision-language model that has one."""
        return None

    def generation_config(self) -> GenerationConfig | None:
        """Its generation settings."""
        return None

    def load(self, accelerator: Accelerator, student: nn.Module, student_vocab_size: int) -> Teacher:
        """The teacher, ready to score."""
        teacher = as_teacher(self.given)
        teacher.bind(student, accelerator, self.args.teacher_batch_size or self.args.per_device_train_batch_size)
        return teacher


class _ModelSpec(TeacherSpec):
    """Base of models by name and models as objects."""

    can_be_examined = True

    def _placed(self, model: nn.Module, accelerator: Accelerator, student_vocab_size: int) -> Teacher:
        args = self.args
        kind = OffloadedTeacher if args.teacher_offload else LocalTeacher
        return kind(model, accelerator, student_vocab_size, args.teacher_batch_size or args.per_device_train_batch_size)


class NamedModel(_ModelSpec):
    """A hub name or a folder."""

    @property
    def name(self) -> str:
        return self.given

    @property
    def identity(self) -> Any:
        return self.given

    def config(self) -> PretrainedConfig:
        where = "`teacher_model` or `--teacher_model_name_or_path`"
        return load_config(self.given, "teacher", where, **self._hub_kwargs)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return load_tokenizer(self.given, **self._hub_kwargs)

    def processor(self) -> Any:
        return load_processor(self.given, self.config(), **self._hub_kwargs)

    def generation_config(self) -> GenerationConfig | None:
        return _generation_config(self.given, **self._hub_kwargs)

    def load(self, accelerator: Accelerator, student: nn.Module, student_vocab_size: int) -> Teacher:
        """
        Load the model in this process, with the checkpoint's dtype and on this process's device unless
        `teacher_model_init_kwargs` say otherwise; in CPU memory with `teacher_offload`.
        """
        kwargs: dict[str, Any] = {"dtype": "auto", **_init_kwargs(self.args)}
        if "gguf_file" in kwargs:  # TRL looks for the architecture in a `config.json`
            kwargs["architecture"] = AutoModelForCausalLM
        if accelerator.distributed_type == DistributedType.FSDP:
            kwargs["device_map"] = sharding.device_map_before_sharding(accelerator)
        elif is_sharded(accelerator):
            kwargs["device_map"] = None  # ZeRO-3 loads shards
        elif self.args.teacher_offload and shared_memory.is_shared(accelerator):
            kwargs["device_map"] = shared_memory.device_map_before_sharing(accelerator)
        elif self.args.teacher_offload:
            kwargs.setdefault("device_map", None)
        elif accelerator.num_processes > 1 or accelerator.distributed_type == DistributedType.DEEPSPEED:
            # straight to its own device: host memory would hold the model once for each process
            on_device = accelerator.device.type != "cpu"
            kwargs["device_map"] = {"": accelerator.device} if on_device else None
        model = load_whole(create_model_from_path, self.given, "teacher", **kwargs)
        return self._placed(model, accelerator, student_vocab_size)

    @property
    def _hub_kwargs(self) -> dict[str, Any]:
        return hub_kwargs(_init_kwargs(self.args))


class LoadedModel(_ModelSpec):
    """A model that was passed as an object."""

    @property
    def name(self) -> str:
        return get_config_model_id(unwrap_adapter(self.given).config) or type(self.given).__name__

    @property
    def model(self) -> nn.Module:
        return self.given

    def config(self) -> PretrainedConfig:
        if self.args.teacher_model_init_kwargs is not None:
            raise ValueError(
                "`teacher_model_init_kwargs` are for loading a teacher, but `teacher_model` is loaded already. Leave "
                "them out, or pass the teacher's name."
            )
        return unwrap_adapter(self.given).config

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        name = get_config_model_id(unwrap_adapter(self.given).config)
        return load_tokenizer(name, **hub_kwargs(_init_kwargs(self.args)))

    def processor(self) -> Any:
        config = unwrap_adapter(self.given).config
        return load_processor(get_config_model_id(config), config, **hub_kwargs(_init_kwargs(self.args)))

    def generation_config(self) -> GenerationConfig | None:
        return getattr(unwrap_adapter(self.given), "generation_config", None)

    def load(self, accelerator: Accelerator, student: nn.Module, student_vocab_size: int) -> Teacher:
        return self._placed(self.given, accelerator, student_vocab_size)


class ServedModel(TeacherSpec):
    """A served model. Its tokenizer is loaded by the name under which it is served, if that is a name or folder."""

    can_be_examined = True
    served = True

    @property
    def name(self) -> str:
        return self.given.model

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return load_tokenizer(self.given.model)

    def generation_config(self) -> GenerationConfig | None:
        return _generation_config(self.given.model)


def read_specs(teacher_model: Any, args: OPDConfig) -> dict[str, TeacherSpec]:
    """
    The teachers by name, from the `teacher_model` argument and the configuration; nothing is loaded.

    Raises:
        ValueError: there is no teacher, or both the argument and the configuration name one.
        TypeError: one of them cannot be a teacher.
    """
    settings = ("teacher_model_name_or_path", "teacher_models", "teacher_ema")
    named = next((name for name in settings if getattr(args, name) is not None), None)
    from_args: Any = None if named is None else getattr(args, named)
    if args.teacher_ema is not None:
        from_args = MovingAverage(args.teacher_ema)
    elif args.teacher_server_urls:
        top_k = args.kl_top_k if args.kl_estimator == "topk" else 0
        key = os.environ.get(args.teacher_api_key_env)
        from_args = ServedTeacher(args.teacher_server_urls, model=from_args, top_k=top_k, api_key=key)
    if teacher_model is not None and named is not None and teacher_model != from_args:
        raise ValueError(f"Two teachers are given, `teacher_model` and `args.{named}`. Keep one.")
    given = teacher_model if teacher_model is not None else from_args
    if given is None:
        raise ValueError(
            f"There is no teacher, but `beta` is {args.beta}. Pass `teacher_model=...` (or "
            "`--teacher_model_name_or_path`), or set `beta=0` for plain GRPO. A PEFT student's base model is "
            f"not used by default: ask for it by name, `teacher_model={ADAPTER_OFF!r}`."
        )
    if isinstance(given, dict) and not given:
        raise ValueError("`teacher_model` is an empty dictionary. Give at least one teacher by name.")
    by_name = given if isinstance(given, dict) else {"teacher": given}
    return {name: spec_of(single, args) for name, single in by_name.items()}


def spec_of(given: Any, args: OPDConfig) -> TeacherSpec:
    """
    The [`TeacherSpec`] for what was passed as a teacher.

    Raises:
        ValueError: it is the URL of a server, without the name of a model.
        TypeError: it cannot be a teacher.
    """
    if given == ADAPTER_OFF:
        return TeacherSpec(AdapterOff(), args)
    if isinstance(given, str) and given.startswith(("http://", "https://")):
        shown = without_login(given)
        raise ValueError(
            f"The teacher {shown!r} is a server. Name the model that it serves: `ServedTeacher({shown!r}, model=...)`, "
            "or `--teacher_server_urls` with `--teacher_model_name_or_path`."
        )
    if isinstance(given, str):
        return NamedModel(given, args)
    if isinstance(given, ServedTeacher):
        return ServedModel(given, args)
    if isinstance(given, nn.Module):
        return LoadedModel(given, args)
    if callable(getattr(given, "score", None)) and not isinstance(given, type):
        return TeacherSpec(given, args)
    raise TypeError(
        f"`teacher_model` is {given!r}, which cannot score rollouts. Give a hub name, a folder, a model, an object "
        "with `score(rollouts)`, or several of these by name."
    )


def load_pool(
    specs: dict[str, TeacherSpec],
    args: OPDConfig,
    accelerator: Any,
    student: nn.Module,
    student_vocab_size: int,
    readers: Mapping[Any, Callable[[Teacher], Teacher]] | None = None,
) -> TeacherPool:
    """
    Load or bind every teacher, once even if it has several names.

    Args:
        specs (`dict[str, TeacherSpec]`): the teachers by name.
        args ([`OPDConfig`]): the settings.
        accelerator ([`~accelerate.Accelerator`]): the trainer's.
        student (`torch.nn.Module`): the model that is trained, for teachers that use it.
        student_vocab_size (`int`): rows of its LM head.
        readers (`dict` of `Callable`, *optional*): by identity, what turns a loaded teacher with another tokenizer into
            one that reads texts.
    """
    loaded: dict[Any, Teacher] = {}
    for spec in specs.values():
        if spec.identity not in loaded:
            reader = (readers or {}).get(spec.identity)
            # ids of the student that a reader lacks never reach it
            teacher = spec.load(accelerator, student, student_vocab_size if reader is None else 0)
            loaded[spec.identity] = teacher if reader is None else reader(teacher)
    teachers = {name: loaded[spec.identity] for name, spec in specs.items()}
    return TeacherPool(
        teachers,
        accelerator,
        uses=args.num_iterations,
        one_step=(args.steps_per_generation or 1) <= args.gradient_accumulation_steps,
        together=is_sharded(accelerator),
        weights=args.teacher_weights,  # type: ignore[arg-type]
        divergences=divergences_of(args),
    )


def student_config(name_or_path: str, args: OPDConfig) -> PretrainedConfig:
    """The student's configuration, without weights. Raises `ValueError` if it cannot be found."""
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}  # type: ignore[dict-item]
    return load_config(name_or_path, "student", "`model` or `--model_name_or_path`", **hub_kwargs(kwargs))


def hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of a model's keyword arguments that say where its files are and how to download them."""
    names = {"revision", "trust_remote_code", "token", "cache_dir", "local_files_only", "force_download", "proxies"}
    names |= {"gguf_file"}  # which holds the configuration and the tokenizer, too
    return {name: value for name, value in kwargs.items() if name in names}


def _init_kwargs(args: OPDConfig) -> dict[str, Any]:
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.teacher_model_init_kwargs or {})}  # type: ignore[dict-item]
    if args.teacher_model_revision is not None:
        kwargs.setdefault("revision", args.teacher_model_revision)
    return kwargs


def _generation_config(name: str, **kwargs: Any) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(name, **kwargs)
    except (OSError, ValueError):
        return None
