"""`OPDConfig`: GRPO's configuration plus the few fields that a teacher needs, and the checks that need no model.

Models, tensors and datasets are left to the trainer.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from trl import GRPOConfig

from ._trl import DICT_FIELDS, post_init_without_group_check
from .config_checks import KL_ESTIMATORS, SCHEDULES
from .objective.divergences import DIVERGENCES


logger = logging.getLogger(__name__)


GENERATIONS_WITH_REWARDS = 8  # GRPO's own default


GENERATIONS_WITHOUT = 1  # nothing is compared within a group, so more prompts beat more samples of one


@dataclass
class OPDConfig(GRPOConfig):
    r"""
    Configuration of [`OPDTrainer`]: all of [`~trl.GRPOConfig`], with the following added or changed.

    > Parameters that control the teacher

        beta (`float`, *optional*, defaults to `1.0`):
            Weight of the divergence from the teacher, in units of reward per nat. `0.0` is plain GRPO: no teacher is
            loaded.
        beta_schedule (`str`, *optional*, defaults to `"constant"`):
            How the weight changes with the global step: `"constant"`, `"linear"` or `"cosine"` from `beta` to
            `beta_end` over `beta_schedule_steps`, or `"step"`, a jump to `beta_end` at `beta_schedule_steps`.
        beta_end (`float`, *optional*):
            Weight at the end of the schedule.
        beta_schedule_steps (`int`, *optional*):
            Optimizer steps that the schedule takes. `None` is the whole run.
        reward_start_step (`int`, *optional*, defaults to `0`):
            Optimizer step from which rewards have weight (distil first, then reinforce). They are logged all the same.
        teacher_model_name_or_path (`str`, *optional*):
            Teacher for scripts. In Python, pass `teacher_model` to the trainer.
        teacher_model_revision (`str`, *optional*):
            Revision of the teacher on the hub.
        teacher_model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments for the teacher's `from_pretrained`. Its dtype is the checkpoint's own unless `dtype` is
            given here.
        teacher_models (`dict` or `str`, *optional*):
            Several teachers for scripts, `{"math": "path", "code": "path"}`; the dataset's `teacher` column says who
            judges a row. In Python, pass them as `teacher_model`.
        teacher_server_urls (`list[str]`, *optional*):
            Servers of the teacher that `teacher_model_name_or_path` names, with vLLM's OpenAI-compatible protocol. It
            is not loaded then.
        teacher_offload (`bool`, *optional*, defaults to `False`):
            Park the teacher in CPU memory. It visits the accelerator once per generation batch.
        teacher_ema (`float`, *optional*):
            The teacher is the student's exponential moving average with this decay. Takes the place of
            `teacher_model`.
        teacher_batch_size (`int`, *optional*):
            Rows per forward of the teacher. `None` is `per_device_train_batch_size`.
        merge_stop_tokens (`bool`, *optional*, defaults to `True`):
            Where student and teacher end a turn with different ids, compare the probability of stopping as a whole.
        assume_different_teacher (`bool`, *optional*, defaults to `False`):
            Go on although the teacher has the student's weights, and nothing can be learnt from it at first.
        assume_same_tokenizer (`bool`, *optional*, defaults to `False`):
            Go on although the tokenizers of student and teacher differ. The divergence compares probabilities id by
            id, so this is right only where the ids that matter mean the same to both.

    > Parameters that control the divergence

        divergence (`str`, *optional*, defaults to `"reverse_kl"`):
            What is minimised at each token: `"reverse_kl"`, KL(student ‖ teacher); `"forward_kl"`,
            KL(teacher ‖ student); `"jsd"`, `"skewed_forward_kl"`, `"skewed_reverse_kl"` or `"mixed"`, see
            [`~trl_distill.objective.summands`].
        divergence_alpha (`float`, *optional*):
            The divergence's own parameter, in [0, 1], and that of `off_policy_divergence`. Defaults to 0.5 for `"jsd"`
            and `"mixed"`, 0.1 for the skewed ones.
        kl_estimator (`str`, *optional*, defaults to `"full"`):
            How it is computed: `"full"`, exactly, over the whole vocabulary; `"topk"`, exactly over the student's
            `kl_top_k` most likely ids and by the sampled token for the rest; `"sampled"`, by the sampled token alone.
            All three have the same expected gradient.
        kl_top_k (`int`, *optional*, defaults to `64`):
            Ids in the exact head of `"topk"`.
        kl_discount (`float`, *optional*, defaults to `0.0`):
            Discount γ of the KL still to come that a token answers for. 0: each token answers for its own KL. 1: the
            true gradient of the sequence KL, which is noisy on long completions.
        kl_temperature (`float`, *optional*):
            Softmax temperature of both models in the divergence. `None` is the sampling temperature.
        lmbda (`float`, *optional*, defaults to `1.0`):
            Share of generation batches that are on-policy, evenly spaced. The others train on the dataset's
            `completion` column, without generation and rewards. Below 1 with `kl_estimator="full"` and `kl_discount=0`
            only: everything else assumes that the student wrote the tokens.
        off_policy_divergence (`str`, *optional*, defaults to `"forward_kl"`):
            What is minimised there; a name as for `divergence`.

    > Parameters that end a run early

        stop_above_truncation (`float`, *optional*):
            Stop, with a checkpoint, where a larger share of completions than this is cut in three generation batches in
            a row.
        stop_above_repetition (`float`, *optional*):
            Stop, with a checkpoint, where a larger share of the completions' 4-grams than this has stood in the same
            completion before, in three generation batches in a row.

    > Parameters with another default than GRPO's

        num_generations (`int`, *optional*):
            Completions per prompt. `None` is resolved by the trainer: 8 with rewards, 1 without.
        scale_rewards (`str` or `bool`, *optional*):
            `None` is resolved by the trainer: `"none"` where `beta > 0` (dividing by the group's standard deviation
            changes the optimum), else GRPO's default.

    Raises:
        ValueError: a value, or a combination, that cannot mean anything; the message says what to write instead.
    """

    _VALID_DICT_FIELDS = [*DICT_FIELDS, "teacher_model_init_kwargs", "teacher_models"]  # the name that TRL reads

    beta: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the divergence from the teacher, in units of reward per nat. 0.0 is plain GRPO: no "
            "teacher is loaded."
        },
    )
    beta_schedule: str = field(
        default="constant",
        metadata={
            "help": "How `beta` changes with the step: 'linear' or 'cosine' to `beta_end`, or 'step', a jump to it.",
            "choices": list(SCHEDULES),
        },
    )
    beta_end: float | None = field(default=None, metadata={"help": "Weight at the end of the schedule."})
    beta_schedule_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps that the schedule takes. Defaults to the whole run."}
    )
    reward_start_step: int = field(
        default=0, metadata={"help": "Optimizer step from which rewards have weight: distil first, then reinforce."}
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Teacher: a hub name or a local folder."}
    )
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "Revision (branch, tag or commit) of the teacher on the hub."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for the teacher's `from_pretrained`, as JSON. Its dtype is the checkpoint's own "
            "unless `dtype` is given here."
        },
    )
    teacher_models: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Several teachers by name, as JSON; the dataset's `teacher` column says who judges a row."},
    )
    teacher_server_urls: list[str] | None = field(
        default=None,
        metadata={"help": "vLLM servers of the teacher that `teacher_model_name_or_path` names; it is not loaded."},
    )
    teacher_offload: bool = field(
        default=False,
        metadata={"help": "Park the teacher in CPU memory; it visits the accelerator once per generation batch."},
    )
    teacher_ema: float | None = field(
        default=None,
        metadata={"help": "The teacher is the student's exponential moving average with this decay, e.g. 0.99."},
    )
    teacher_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows per forward of the teacher. Defaults to `per_device_train_batch_size`."},
    )
    merge_stop_tokens: bool = field(
        default=True,
        metadata={
            "help": "Where student and teacher end a turn with different ids, compare the probability of stopping as a "
            "whole."
        },
    )
    assume_different_teacher: bool = field(
        default=False,
        metadata={"help": "Go on although the teacher has the student's weights."},
    )
    assume_same_tokenizer: bool = field(
        default=False,
        metadata={"help": "Go on although the tokenizers of student and teacher differ, for those who know better."},
    )
    divergence: str = field(
        default="reverse_kl",
        metadata={
            "help": "What is minimised at each token: KL(student || teacher), or another divergence.",
            "choices": list(DIVERGENCES),
        },
    )
    divergence_alpha: float | None = field(
        default=None,
        metadata={"help": "The divergence's parameter. Defaults to 0.5 for jsd and mixed, 0.1 for the skewed ones."},
    )
    kl_estimator: str = field(
        default="full",
        metadata={
            "help": "'full': exactly, over the whole vocabulary. 'topk': exactly over the student's `kl_top_k` most "
            "likely ids, the rest by the sampled token. 'sampled': by the sampled token alone.",
            "choices": list(KL_ESTIMATORS),
        },
    )
    kl_top_k: int = field(default=64, metadata={"help": "Ids in the exact head of `kl_estimator='topk'`."})
    kl_discount: float = field(
        default=0.0,
        metadata={
            "help": "Discount of the KL still to come that a token answers for. 0: its own alone. 1: the true gradient "
            "of the sequence KL, noisy on long completions."
        },
    )
    kl_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Softmax temperature of both models in the divergence. Defaults to the sampling temperature."
        },
    )
    lmbda: float = field(
        default=1.0,
        metadata={
            "help": "Share of generation batches that are on-policy; the others train on the dataset's `completion` "
            "column."
        },
    )
    off_policy_divergence: str = field(
        default="forward_kl",
        metadata={"help": "What is minimised on the dataset's completions.", "choices": list(DIVERGENCES)},
    )
    stop_above_truncation: float | None = field(
        default=None, metadata={"help": "Stop where more completions than this share are cut, three batches in a row."}
    )
    stop_above_repetition: float | None = field(
        default=None,
        metadata={"help": "Stop where more 4-grams than this share repeat earlier ones, three batches in a row."},
    )
    num_generations: int | None = field(
        default=None, metadata={"help": "Completions per prompt. Defaults to 8 with rewards, 1 without."}
    )
    scale_rewards: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "How rewards are scaled: 'group', 'batch' or 'none'. Defaults to 'none' where `beta > 0`, since "
            "scaling changes the optimum, else to GRPO's default."
        },
    )

    def __post_init__(self) -> None:
        self._check_values()
        try:
            post_init_without_group_check(self)
        except ValueError:
            if self.generation_batch_size is not None and self.num_generations is not None:
                self._check_group(self.num_generations)  # says more of it than TRL does
            raise

    def _check_group(self, group: int) -> None:
        assert self.generation_batch_size is not None
        if self.generation_batch_size % group != 0:
            raise ValueError(
                f"The generation batch holds {self.generation_batch_size} completions, which `num_generations` "
                f"({group}) does not divide. Change `num_generations`, or `per_device_train_batch_size`, "
                "`gradient_accumulation_steps` or `generation_batch_size`."
            )

    def _check_values(self) -> None:
        if self.beta < 0:
            raise ValueError(
                f"`beta` is {self.beta}, but a negative weight would drive the student away from the teacher. Use a "
                "positive value, or 0 for plain GRPO."
            )
        choices: tuple[tuple[str, Any], ...] = (
            ("divergence", DIVERGENCES),
            ("off_policy_divergence", DIVERGENCES),
            ("kl_estimator", KL_ESTIMATORS),
            ("beta_schedule", SCHEDULES),
        )
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; this version has {', '.join(allowed)}.")
        if self.kl_temperature is not None and self.kl_temperature <= 0:
            raise ValueError(f"`kl_temperature` is {self.kl_temperature}; it divides the logits, so it must be > 0.")
        if self.temperature <= 0:
            raise ValueError(
                f"`temperature` is {self.temperature}; it divides the logits, so it must be > 0. For greedy rollouts "
                "set `top_k=1`."
            )
        if self.kl_top_k < 0:
            raise ValueError(f"`kl_top_k` is {self.kl_top_k}; it counts ids. 0 is the sampled token alone.")
        if not 0 <= self.kl_discount <= 1:
            raise ValueError(f"`kl_discount` is {self.kl_discount}; a discount lies in [0, 1].")
        self._check_off_policy()
        if self.divergence_alpha is not None:
            used = [name for name in self._divergences if DIVERGENCES[name] is not None]
            if not used:
                raise ValueError(
                    f"`divergence_alpha` is {self.divergence_alpha}, but divergence={self.divergence!r} has no "
                    "parameter. Leave it out, or use 'jsd', 'skewed_forward_kl', 'skewed_reverse_kl' or 'mixed'."
                )
            skewed = any(name.startswith("skewed") for name in used)
            if not 0 <= self.divergence_alpha <= 1 or (skewed and self.divergence_alpha == 1):
                bounds = "[0, 1), since at 1 both sides are the same" if skewed else "[0, 1]"
                raise ValueError(f"`divergence_alpha` is {self.divergence_alpha}; it lies in {bounds}.")
        if self.kl_estimator == "topk" and DIVERGENCES[self.divergence] is not None:
            raise ValueError(
                f"kl_estimator='topk' has no form for divergence={self.divergence!r}. Use kl_estimator='full', or "
                "'reverse_kl' or 'forward_kl'."
            )
        if self.kl_estimator == "sampled" and self.divergence != "reverse_kl":
            raise ValueError(
                f"kl_estimator='sampled' estimates the reverse KL alone; divergence={self.divergence!r} is an average "
                "over the teacher's tokens, of which none was sampled. Use kl_estimator='full', or no `divergence`."
            )
        if self.kl_estimator != "full" and self.kl_temperature not in (None, self.temperature):
            raise ValueError(
                f"`kl_temperature` is {self.kl_temperature}, but tokens are sampled at `temperature` "
                f"{self.temperature}, and kl_estimator={self.kl_estimator!r} learns from the sampled token. Leave "
                "`kl_temperature` out, or use kl_estimator='full'."
            )
        if (self.beta_schedule == "constant") != (self.beta_end is None):
            raise ValueError(
                f"`beta_schedule` is {self.beta_schedule!r} and `beta_end` is {self.beta_end}: a schedule needs an "
                "end, and a constant weight has none. Set both or neither."
            )
        if self.beta_end is not None and (self.beta_end < 0 or self.beta == 0):
            raise ValueError(
                f"`beta` goes from {self.beta} to {self.beta_end}. The end must not be negative, and the start must "
                "not be 0, which loads no teacher: start from a small value instead."
            )
        if self.beta_schedule == "step" and self.beta_schedule_steps is None:
            raise ValueError("`beta_schedule='step'` jumps at `beta_schedule_steps`; say when.")
        if self.beta_schedule == "constant" and self.beta_schedule_steps is not None:
            raise ValueError("`beta_schedule_steps` is given, but `beta_schedule` is 'constant'. Set both or neither.")
        if self.beta == 0 and self.reward_start_step > 0:
            raise ValueError(
                f"`reward_start_step` is {self.reward_start_step}, but `beta` is 0: nothing would be learnt before it. "
                "Give a teacher weight, or start with the reward."
            )
        for name, least in (("beta_schedule_steps", 1), ("reward_start_step", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it counts optimizer steps, from {least}.")
        if self.teacher_batch_size is not None and self.teacher_batch_size < 1:
            raise ValueError(f"`teacher_batch_size` is {self.teacher_batch_size}; it counts rows, from 1.")
        for name in ("stop_above_truncation", "stop_above_repetition"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it is a share, in [0, 1).")
        if self.teacher_ema is not None and not 0 < self.teacher_ema < 1:
            raise ValueError(f"`teacher_ema` is {self.teacher_ema}; it is a decay, in (0, 1), such as 0.99.")
        self._check_one_teacher()
        if self.num_generations is not None and self.num_generations < 1:
            raise ValueError(f"`num_generations` is {self.num_generations}; at least one completion is needed.")
        if self.sync_ref_model and self.beta > 0:
            raise ValueError(
                "`sync_ref_model=True` would write the student's weights into the teacher, which stands where TRL has "
                "its reference model. Set `sync_ref_model=False`."
            )

    def _check_off_policy(self) -> None:
        """On text that the student did not write, only what is a function of the prefix alone is right."""
        if not 0 <= self.lmbda <= 1:
            raise ValueError(f"`lmbda` is {self.lmbda}; it is a share, in [0, 1].")
        if self.lmbda == 1:
            return
        if self.beta == 0:
            raise ValueError(
                f"`lmbda` is {self.lmbda}, but `beta` is 0: there is no teacher to learn from on the dataset's "
                "completions. Set `beta`, or `lmbda=1`."
            )
        if self.kl_estimator != "full" or self.kl_discount != 0:
            raise ValueError(
                f"`lmbda` is {self.lmbda}, so some batches are not written by the student, but "
                f"kl_estimator={self.kl_estimator!r} with kl_discount={self.kl_discount:g} learns from its samples. "
                "Use kl_estimator='full' with kl_discount=0, or `lmbda=1`."
            )

    @property
    def _divergences(self) -> list[str]:
        """Those that are used."""
        return [self.divergence, *([self.off_policy_divergence] if self.lmbda < 1 else [])]

    def _check_one_teacher(self) -> None:
        """The ways to name a teacher exclude each other."""
        named = [
            name
            for name in ("teacher_model_name_or_path", "teacher_models", "teacher_ema")
            if getattr(self, name) is not None
        ]
        if len(named) > 1:
            raise ValueError(f"Both `{named[0]}` and `{named[1]}` say who the teacher is. Keep one.")
        if self.teacher_server_urls and self.teacher_model_name_or_path is None:
            raise ValueError(
                "`teacher_server_urls` are given, but not which model they serve. Name it with "
                "`teacher_model_name_or_path`, as `/v1/models` of the server lists it."
            )
        if self.teacher_offload and (self.teacher_server_urls or self.teacher_ema is not None):
            raise ValueError(
                "`teacher_offload=True` parks a teacher that is loaded here, and this one is not. Leave it out."
            )

    @property
    def biased_sampling(self) -> list[str]:
        """Settings under which rollouts are no samples of the student, where the estimator takes them for that."""
        whole = {"top_p": (1.0,), "top_k": (0, -1), "min_p": (0.0,), "repetition_penalty": (1.0,)}
        if self.kl_estimator == "full" and self.kl_discount == 0:
            return []
        found = [name for name, values in whole.items() if getattr(self, name) not in (*values, None)]
        return [f"`{name}={getattr(self, name)}`" for name in found]

    def _check_ignored(self) -> None:
        """Settings of the policy loss, where there is no reward and so no policy loss."""
        if self.reward_weights is not None:
            raise ValueError("`reward_weights` are given, but no `reward_funcs`. Give both or neither.")
        ignored = {
            "delta": None,
            "off_policy_mask_threshold": None,
            "top_entropy_quantile": 1.0,
            "reward_start_step": 0,
        }
        for name, default in ignored.items():
            if getattr(self, name) != default:
                logger.warning(f"`{name}` shapes the policy loss, and without rewards there is none: it has no effect.")

    def alpha_of(self, divergence: str) -> float:
        """`divergence_alpha`, or its default; 0 where the divergence has none."""
        default = DIVERGENCES[divergence]
        if default is None:
            return 0.0
        return default if self.divergence_alpha is None else self.divergence_alpha

    @property
    def prompts_per_generation(self) -> int:
        """Prompts in one generation batch, over all processes. Known once `num_generations` is resolved."""
        assert self.generation_batch_size is not None
        assert self.num_generations is not None
        return self.generation_batch_size // self.num_generations

    @property
    def micro_steps_per_generation(self) -> int:
        """Micro-steps that live on one generation batch, all iterations over it included."""
        assert self.steps_per_generation is not None  # TRL's __post_init__ sets it
        return self.steps_per_generation * self.num_iterations

    @classmethod
    def from_grpo(cls, args: GRPOConfig) -> OPDConfig:
        """
        The same settings as an `OPDConfig`: `beta` is kept (GRPO's default is 0.0), fields of ours get their defaults.

        Methods and properties of a subclass of `GRPOConfig` are not carried over.
        """
        config = object.__new__(cls)  # not through __init__: `args` is past its own __post_init__
        for f in fields(cls):
            default = f.default if f.default is not MISSING else None
            setattr(config, f.name, getattr(args, f.name, default))
        config.__dict__.update(vars(args))
        config._check_values()
        return config

    def resolved(self, has_rewards: bool) -> OPDConfig:
        """
        A copy in which what depends on the rewards is settled: `num_generations` and `scale_rewards`.

        Raises:
            ValueError: one generation with rewards, or a generation batch that the group size does not divide.
        """
        config = copy.copy(self)
        config.accelerator_config = copy.copy(self.accelerator_config)  # TRL writes into it
        if config.scale_rewards is None:
            config.scale_rewards = "none" if config.beta > 0 else GRPOConfig.scale_rewards
        elif has_rewards and config.beta > 0 and config.scale_rewards != "none":
            logger.warning(
                f"`scale_rewards={config.scale_rewards!r}` divides rewards by their standard deviation, so `beta` is "
                "no longer a weight in reward per nat and the optimum is another. Use 'none' to optimise the stated "
                "objective."
            )
        if has_rewards and config.beta > 0 and config.multi_objective_aggregation != "sum_then_normalize":
            logger.warning(
                f"`multi_objective_aggregation={config.multi_objective_aggregation!r}` divides rewards by their "
                "standard deviations, so `beta` is no longer a weight in reward per nat. Use 'sum_then_normalize' to "
                "optimise the stated objective."
            )
        ceiling = config.epsilon if config.epsilon_high is None else config.epsilon_high
        if has_rewards and config.beta > 0 and config.loss_type == "cispo" and ceiling < 1:
            raise ValueError(
                f"loss_type='cispo' clips the ratio at `epsilon_high` ({ceiling}), below its value on fresh rollouts, "
                f"so the reward would weigh {ceiling} times what it says and `beta` would not be reward per nat. Set "
                "`epsilon_high` to more than 1 (5.0 in the ScaleRL recipe)."
            )
        if config.num_generations is None:
            config.num_generations = GENERATIONS_WITH_REWARDS if has_rewards else GENERATIONS_WITHOUT
        if not has_rewards and config.beta > 0:
            config._check_ignored()
        group = config.num_generations
        assert config.generation_batch_size is not None  # TRL's __post_init__ sets it
        if has_rewards and group < 2:
            raise ValueError(
                "`num_generations` is 1, but rewards are compared within the completions of one prompt. Set it to 2 "
                "or more, or leave it out (8)."
            )
        config._check_group(group)
        group_eval = config.num_generations_eval or group
        eval_batch = config.per_device_eval_batch_size * config.world_size
        if config.do_eval and config.eval_strategy != "no" and eval_batch % group_eval != 0:
            raise ValueError(
                f"The global evaluation batch holds {eval_batch} completions, which the number of generations used "
                f"for evaluation ({group_eval}) does not divide. Change `per_device_eval_batch_size` or "
                "`num_generations_eval`."
            )
        return config
