"""`OPDConfig`: GRPO's configuration plus the fields that a teacher needs.

The docstring of the class explains each field, once: the command line's help is made from it. Invalid values are
rejected by `config_checks.py`, and by `resolved_checks.py` once it is known whether there are rewards.
"""

from __future__ import annotations

import copy
import inspect
import re
from dataclasses import MISSING, dataclass, field, fields
from types import MappingProxyType
from typing import Any

from trl import GRPOConfig

from ._trl import DICT_FIELDS, post_init_without_group_check
from .config_checks import (
    DIVERGENCE_KERNELS,
    KL_ESTIMATORS,
    REWARD_BASELINES,
    SCHEDULES,
    check_values,
    check_weighting,
    divergences_of,
)
from .objective.custom import load_divergence
from .objective.divergences import DIVERGENCES
from .objective.weighting import WEIGHTINGS, load_weighting
from .objective.weights import check_teacher_weights
from .redaction import from_environment, redacted
from .resolved_checks import check_group, check_resolved, shaping


GENERATIONS_IN_GROUPS = 8  # GRPO's own default, for rewards that are compared among the completions of a prompt


GENERATIONS = 1  # more prompts teach more than more completions of each: docs/results.md


class _NamesOrPaths(list[str]):
    """Choices of the command line that also take an import path, which is checked when it is imported."""

    def __contains__(self, value: object) -> bool:
        return super().__contains__(value) or (isinstance(value, str) and ("." in value or ":" in value))


def _explained(config: type) -> type:
    """Use the text of each field in a configuration's docstring as its help on the command line."""
    written = inspect.cleandoc(config.__doc__ or "") + "\n"  # from Python 3.13 on, docstrings are without their indent
    texts = re.findall(r"^    (\w+) \(.*?\):\n((?:        .*\n)+)", written, re.MULTILINE)
    for name, text in texts:
        found = config.__dataclass_fields__[name]  # type: ignore[attr-defined]
        words = " ".join(text.split()).replace("%", "%%")  # argparse formats it
        found.metadata = MappingProxyType({"help": words, **found.metadata})
    return config


@_explained
@dataclass
class OPDConfig(GRPOConfig):
    r"""
    Configuration of [`OPDTrainer`]: all of [`~trl.GRPOConfig`], with the following added or changed.

    > Parameters that control the teacher

        beta (`float`, *optional*, defaults to `1.0`):
            Weight of the divergence from the teacher, in units of reward per nat. `0.0` is plain GRPO, without a
            teacher.
        beta_schedule (`str`, *optional*, defaults to `"constant"`):
            How the weight changes with the global step: `"constant"`, `"linear"` or `"cosine"` from `beta` to
            `beta_end` over `beta_schedule_steps`, or `"step"`, a jump to `beta_end` at `beta_schedule_steps`.
        beta_end (`float`, *optional*):
            Weight at the end of the schedule.
        beta_schedule_steps (`int`, *optional*):
            Length of the schedule in optimizer steps. `None` is the whole run.
        reward_start_step (`int`, *optional*, defaults to `0`):
            Optimizer step from which rewards have weight (distil first, then reinforce). They are always logged.
        teacher_model_name_or_path (`str`, *optional*):
            Hub name or folder of the teacher, for the command line. In Python, pass `teacher_model` to the trainer.
        teacher_model_revision (`str`, *optional*):
            Revision of the teacher on the hub.
        teacher_model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments for the teacher's `from_pretrained`. Its dtype is the checkpoint's unless `dtype` is given
            here. `"$NAME"` is an environment variable, as for a `token`.
        teacher_models (`dict` or `str`, *optional*):
            Several teachers, for the command line: `{"math": "path", "code": "path"}`. The dataset's `teacher` column
            says which of them scores a row. In Python, pass them as `teacher_model`.
        teacher_weights (`dict` or `str`, *optional*):
            Weights of several teachers, by name, for all rows whose `teacher` column gives none:
            `{"teacher": 1.25, "ref": -0.25}`. Weights may be negative where they add up to 1; the target is then
            ∏ p_i^{w_i} / Z.
        teacher_server_urls (`list[str]`, *optional*):
            URLs of vLLM servers that serve the model `teacher_model_name_or_path`. The teacher is then not loaded here.
        teacher_api_key_env (`str`, *optional*, defaults to `"VLLM_API_KEY"`):
            Environment variable with the key of `teacher_server_urls`; it need not be set if they have none.
        teacher_offload (`bool`, *optional*, defaults to `False`):
            Keep the teacher in CPU memory, and copy it to the accelerator once per generation batch.
        teacher_ema (`float`, *optional*):
            Decay of an exponential moving average of the student, which is then the teacher, in place of
            `teacher_model`.
        teacher_batch_size (`int`, *optional*):
            Rows per forward pass of the teacher. `None` is `per_device_train_batch_size`.
        merge_stop_tokens (`bool`, *optional*, defaults to `True`):
            If student and teacher end a turn with different ids, compare their total probability of stopping.
        assume_different_teacher (`bool`, *optional*, defaults to `False`):
            Continue even if the teacher gives the same probabilities as the student, so that there is nothing to learn
            from it at first.
        assume_same_tokenizer (`bool`, *optional*, defaults to `False`):
            Continue even if the token ids of student and teacher differ. The divergence compares probabilities id by
            id, so this is right only if the ids that occur mean the same to both.
        cross_tokenizer (`bool`, *optional*, defaults to `False`):
            The teacher has another tokenizer: it reads completions as text, in its own tokens and chat template, and
            the reverse KL between texts is minimised, see docs/objective.md.

    > Parameters that control the divergence

        divergence (`str` or `Callable`, *optional*, defaults to `"reverse_kl"`):
            What is minimised at each token: `"reverse_kl"`, KL(student ‖ teacher); `"forward_kl"`,
            KL(teacher ‖ student); `"jsd"`, `"skewed_forward_kl"`, `"skewed_reverse_kl"` or `"mixed"`, see
            [`~trl_distill.objective.divergences.summands`]; or one of your own, as a function or by its import path
            `module.function`, see docs/objective.md. Its name is then that path.
        divergence_alpha (`float`, *optional*):
            Parameter of `divergence` and of `off_policy_divergence`, in [0, 1]. Defaults to 0.5 for `"jsd"` and
            `"mixed"`, and to 0.1 for the skewed ones.
        kl_estimator (`str`, *optional*, defaults to `"full"`):
            How it is computed: `"full"`, exactly, over the whole vocabulary; `"topk"`, exactly over the student's
            `kl_top_k` most likely ids and from the sampled token for the rest; `"sampled"`, from the sampled token
            alone. For the reverse KL all three have the same expected gradient.
        kl_top_k (`int`, *optional*, defaults to `64`):
            Number of ids that `"topk"` computes exactly.
        divergence_kernel (`str`, *optional*, defaults to `"trl"`):
            What `"full"` computes with: `"trl"`, TRL's Triton kernel, where it can: on GPUs, for the KLs and the JSD,
            without merged stop tokens; or `"fused"`, always our own, which projects each model once. Values and
            gradients are equal up to rounding; which is faster on a GPU is in docs/benchmarks.md.
        kl_discount (`float`, *optional*, defaults to `0.0`):
            Discount γ of the later KL that is credited to a token. 0: each token is credited with its own KL alone. 1:
            the true gradient of the sequence KL, which is noisy on long completions.
        kl_temperature (`float`, *optional*):
            Softmax temperature of both models in the divergence. `None` is the sampling `temperature`.
        lmbda (`float`, *optional*, defaults to `1.0`):
            Share of generation batches that are on-policy, evenly spaced. The others train on the dataset's
            `completion` column, without generation and rewards. Below 1, `kl_estimator="full"` and `kl_discount=0` are
            required: everything else assumes that the student wrote the tokens.
        off_policy_divergence (`str` or `Callable`, *optional*, defaults to `"forward_kl"`):
            What is minimised on the dataset's completions where `lmbda < 1`; a name as for `divergence`.
        token_weighting (`str` or `Callable`, *optional*):
            What a token weighs in the divergence, as a function of what was measured there: `"cap"`, min(1, c / KL);
            `"top_share"`, `"student_entropy"`, `"teacher_entropy"` or `"position"`, see docs/objective.md; or one of
            your own, as a function or by its import path `module.function`. `None` weights all tokens alike.
        token_weighting_kwargs (`dict` or `str`, *optional*):
            Parameters of `token_weighting` by name, such as `{"nats": 0.3}` for `"cap"`.

    > Parameters that control the reward

        reward_baseline (`str`, *optional*):
            What a completion's reward is compared with; its own reward stays out. `"group"`: the mean of the other
            completions of its prompt. `"batch"`: the mean of all other completions of the generation batch, over all
            processes. `"prompt"`: the mean of all rewards that its prompt has had so far; for a prompt that is new, as
            `"batch"`. The last two also work with `num_generations=1`. `None` is resolved by the trainer: `"group"` if
            `beta` is 0, as in GRPO, or where settings speak of groups (`num_generations` above 1, `scale_rewards`,
            `multi_objective_aggregation`); else `"batch"`.

    > Parameters that end a run early

        stop_above_truncation (`float`, *optional*):
            Stop, with a checkpoint, if more than this share of the completions is cut at the length limit in three
            generation batches in a row.
        stop_above_repetition (`float`, *optional*):
            Stop, with a checkpoint, if more than this share of the completions' 4-grams repeat earlier ones of the same
            completion in three generation batches in a row.

    > Parameters with another default than GRPO's

        num_generations (`int`, *optional*):
            Completions per prompt. `None` is resolved by the trainer: 8 if rewards are compared in groups, else 1.
        scale_rewards (`str` or `bool`, *optional*):
            `None` is resolved by the trainer: `"none"` if `beta > 0` or with another `reward_baseline` than `"group"`,
            since dividing by the standard deviation changes the optimum; else GRPO's default.

    Secrets (a `token` in keyword arguments, a login in a URL, keys) are in no written form of a configuration: not in
    `repr`, `to_dict`, `to_json_string`, nor in a pickle such as `training_args.bin`. Copies keep them. In
    `model_init_kwargs`, `teacher_model_init_kwargs` and URLs, `"$NAME"` (inside a text `"${NAME}"`) is read from the
    environment.

    Raises:
        ValueError: a value or a combination of values is invalid; the message says what to write instead.
    """

    # the name that TRL reads
    _VALID_DICT_FIELDS = [*DICT_FIELDS, "teacher_model_init_kwargs", "teacher_models", "teacher_weights"]
    _VALID_DICT_FIELDS += ["token_weighting_kwargs"]

    beta: float = 1.0
    beta_schedule: str = field(default="constant", metadata={"choices": list(SCHEDULES)})
    beta_end: float | None = None
    beta_schedule_steps: int | None = None
    reward_start_step: int = 0
    teacher_model_name_or_path: str | None = None
    teacher_model_revision: str | None = None
    teacher_model_init_kwargs: dict[str, Any] | str | None = None
    teacher_models: dict[str, Any] | str | None = None
    teacher_weights: dict[str, Any] | str | None = None
    teacher_server_urls: list[str] | None = None
    teacher_api_key_env: str = "VLLM_API_KEY"
    teacher_offload: bool = False
    teacher_ema: float | None = None
    teacher_batch_size: int | None = None
    merge_stop_tokens: bool = True
    assume_different_teacher: bool = False
    assume_same_tokenizer: bool = False
    cross_tokenizer: bool = False
    divergence: str = field(default="reverse_kl", metadata={"choices": _NamesOrPaths(DIVERGENCES)})
    divergence_alpha: float | None = None
    kl_estimator: str = field(default="full", metadata={"choices": list(KL_ESTIMATORS)})
    kl_top_k: int = 64
    divergence_kernel: str = field(default="trl", metadata={"choices": list(DIVERGENCE_KERNELS)})
    kl_discount: float = 0.0
    kl_temperature: float | None = None
    lmbda: float = 1.0
    off_policy_divergence: str = field(default="forward_kl", metadata={"choices": _NamesOrPaths(DIVERGENCES)})
    token_weighting: str | None = field(default=None, metadata={"choices": _NamesOrPaths(WEIGHTINGS)})
    token_weighting_kwargs: dict[str, Any] | str | None = None
    reward_baseline: str | None = field(default=None, metadata={"choices": list(REWARD_BASELINES)})
    stop_above_truncation: float | None = None
    stop_above_repetition: float | None = None
    num_generations: int | None = None
    scale_rewards: str | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self._load_divergences()
        check_values(self)
        try:
            post_init_without_group_check(self)
        except ValueError:
            if self.generation_batch_size is not None and self.num_generations is not None:
                check_group(self, self.num_generations)  # a more helpful message than TRL's
            raise
        check_weighting(self)  # its parameters are a `dict` by now, as are the weights
        if self.teacher_weights is not None:
            assert isinstance(self.teacher_weights, dict)
            check_teacher_weights(self.teacher_weights, "`teacher_weights` has", divergences_of(self))

    def _load_divergences(self) -> None:
        """Import functions of one's own, and try divergences; a weighting is tried with its parameters."""
        self.divergence = load_divergence(self.divergence, DIVERGENCES)
        self.off_policy_divergence = load_divergence(self.off_policy_divergence, DIVERGENCES)
        self.token_weighting = load_weighting(self.token_weighting)

    def without_secrets(self) -> OPDConfig:
        """A copy with `***` in place of secrets, for everything that is shown or written."""
        config = copy.copy(self)
        for f in fields(self):
            vars(config)[f.name] = redacted(vars(self)[f.name], f.name)
        return config

    def to_dict(self) -> dict[str, Any]:
        return redacted(super().to_dict())

    def __repr__(self) -> str:
        return GRPOConfig.__str__(self.without_secrets())

    __str__ = __repr__

    def __getstate__(self) -> dict[str, Any]:  # for pickles, which are files; copies are made below
        return vars(self.without_secrets())

    def __copy__(self) -> OPDConfig:
        config = object.__new__(type(self))
        vars(config).update(vars(self))
        return config

    def __deepcopy__(self, memo: dict[int, Any]) -> OPDConfig:
        config = object.__new__(type(self))
        memo[id(self)] = config
        vars(config).update(copy.deepcopy(vars(self), memo))
        return config

    @property
    def biased_sampling(self) -> list[str]:
        """Settings that change the sampling distribution, if the estimator relies on samples of the student."""
        if self.kl_estimator == "full" and self.kl_discount == 0 and not self.cross_tokenizer:
            return []
        given: dict[str, Any] = dict(self.generation_kwargs or {})  # type: ignore[arg-type]
        if given.get("temperature", self.temperature) == self.temperature:
            given.pop("temperature", None)
        names = ("top_p", "top_k", "min_p", "repetition_penalty")
        found = shaping({name: getattr(self, name) for name in names} | given)
        return [f"`{name}={value}`" for name, value in found.items()]

    def alpha_of(self, divergence: str) -> float:
        """`divergence_alpha`, or its default; 0 for a divergence without a parameter."""
        default = DIVERGENCES.get(divergence)  # `None` for a function of one's own
        if default is None:
            return 0.0
        return default if self.divergence_alpha is None else self.divergence_alpha

    @property
    def asks_for_groups(self) -> bool:
        """Whether a setting works only with rewards that are compared among the completions of a prompt."""
        scaled = self.scale_rewards not in (None, "none") or self.multi_objective_aggregation != "sum_then_normalize"
        return scaled or (self.num_generations or 1) > 1

    @property
    def prompts_per_generation(self) -> int:
        """Prompts in one generation batch, over all processes. Known once `num_generations` is resolved."""
        assert self.generation_batch_size is not None
        assert self.num_generations is not None
        return self.generation_batch_size // self.num_generations

    @property
    def micro_steps_per_generation(self) -> int:
        """Micro-steps per generation batch, all iterations over it included."""
        assert self.steps_per_generation is not None  # TRL's __post_init__ sets it
        return self.steps_per_generation * self.num_iterations

    @classmethod
    def from_grpo(cls, args: GRPOConfig) -> OPDConfig:
        """
        The same settings as an `OPDConfig`: `beta` is kept (GRPO's default is 0.0), new fields get their defaults.

        Methods and properties of a subclass of `GRPOConfig` are lost.
        """
        config = object.__new__(cls)  # not through __init__, since `args` has been through its own __post_init__
        for f in fields(cls):
            default = f.default if f.default is not MISSING else None
            setattr(config, f.name, getattr(args, f.name, default))
        config.__dict__.update(vars(args))
        config._load_divergences()
        check_values(config)
        return config

    def resolved(self, has_rewards: bool) -> OPDConfig:
        """
        A copy in which `reward_baseline`, `num_generations` and `scale_rewards` are resolved, which depend on whether
        there are rewards, and environment variables are read.

        Raises:
            ValueError: rewards have nothing to be compared with, or the group size does not divide the generation
                batch; or an environment variable is not set.
        """
        config = copy.copy(self)
        for name in ("model_init_kwargs", "teacher_model_init_kwargs", "teacher_server_urls", "vllm_server_base_url"):
            setattr(config, name, from_environment(getattr(self, name), name))
        config.accelerator_config = copy.copy(self.accelerator_config)  # TRL writes into it
        if has_rewards and config.reward_baseline is None:
            config.reward_baseline = "group" if config.beta == 0 or config.asks_for_groups else "batch"
        groups = config.reward_baseline == "group"
        if config.scale_rewards is None:
            config.scale_rewards = GRPOConfig.scale_rewards if groups and config.beta == 0 else "none"
        if config.num_generations is None:
            config.num_generations = GENERATIONS_IN_GROUPS if has_rewards and groups else GENERATIONS
        check_resolved(config, has_rewards)
        return config
