"""`OPDTrainer`: GRPO whose reference model is the teacher, with or without rewards.

This file decides the order of the steps. The loss is in `loss.py`, setup in `setup.py`, what stops and resumes a run in
`safeguards.py`, and every private name of TRL's trainer in `grpo_hooks.py`.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from trl import GRPOConfig

from .._trl import get_config_model_id, probe_environments
from ..checks.cross_tokenizer import check_writers
from ..checks.datasets import check_datasets
from ..checks.findings import Report
from ..checks.images import check_sight
from ..checks.preflight import check_before_loading
from ..config import OPDConfig
from ..data.completions import Turns, completion_batch
from ..data.datasets import with_prompts
from ..data.images import has_images, prompt_of, shows_images
from ..data.rewards import check_rewards
from ..errors import RunawayError, StoppedBySignal, TeacherAnswerError, TeacherUnavailable
from ..estimators.base import Estimator
from ..heads.tiles import release_memory
from ..models.properties import unwrap_adapter
from ..objective.weights import scheduled_beta
from ..reporting.metrics import means
from ..reporting.tokens.callback import TokenReport
from ..reporting.trackers import close_last
from ..rollouts import MicroBatch, teacher_prompts
from ..teachers.base import Teacher, is_sharded
from ..teachers.pool import TeacherPool
from ..teachers.spec import TeacherSpec, read_specs, student_config
from .citation import PAPER
from .grpo_hooks import GRPOHooks
from .loss import DistillationLoss, LossParts
from .model_card import complete_file
from .reward_baseline import RewardBaseline
from .safeguards import Safeguards
from .setup import Setup, add_reporting, prepare
from .step_metrics import loss_quantities, off_policy_quantities, step_quantities


logger = logging.getLogger(__name__)


def no_reward(completions: list, **_: Any) -> list[float]:
    """Placeholder for the reward function that TRL requires; never called."""
    return [0.0] * len(completions)


def _sees_images(model: Any, args: OPDConfig, datasets: dict[str, Any]) -> bool:
    """Whether there are images, and a student that sees them; raises `ValueError` if it does not."""
    found = {}
    for purpose, given in datasets.items():
        for name, dataset in given.items() if isinstance(given, dict) else [("", given)]:
            if shows_images(dataset):
                found[f"the {purpose} dataset{name and f' {name!r}'}"] = dataset
    if not found or args.beta == 0:
        return bool(found)
    config = student_config(model, args) if isinstance(model, str) else unwrap_adapter(model).config
    check_sight(found, config)
    return True


def _as_opd_config(args: GRPOConfig | None, model: Any, teacher_model: Any) -> OPDConfig:
    """The settings as an `OPDConfig`, whether none, GRPO's or our own were given."""
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return OPDConfig(f"{name.split('/')[-1]}-OPD")
    if isinstance(args, OPDConfig):
        return args
    if teacher_model is not None and args.beta == 0:
        raise ValueError(
            f"A teacher is given, but `args` is a {type(args).__name__} with `beta=0`, under which it would not be "
            "used. Use `OPDConfig` (its `beta` is 1.0), or set `beta`."
        )
    return OPDConfig.from_grpo(args)


def _teachers_of(teacher_model: Any, args: OPDConfig, has_rewards: bool) -> dict[str, TeacherSpec]:
    """The teachers by name; none where `beta` is 0."""
    if args.beta > 0:
        return read_specs(teacher_model, args)
    if not has_rewards:
        raise ValueError(
            "No reward source provided, and `beta` is 0, so the teacher has no weight either: there is nothing to "
            "learn. Pass `reward_funcs`, or an `environment_factory` with a reward, or set `beta` above 0."
        )
    if teacher_model is not None:
        logger.warning("`beta` is 0, so this is plain GRPO: the teacher is not loaded.")
    return {}


class OPDTrainer(GRPOHooks):
    """
    On-policy distillation: the student writes, the teacher judges every token, KL(student ‖ teacher) is minimised.

        max E[ r(x, y) ] − beta · Σ_t KL( student(·|x, y_<t) ‖ teacher(·|x, y_<t) )

    Without reward functions r is zero. With `beta = 0` this is [`~trl.GRPOTrainer`].

    Example:

    ```python
    >>> from trl_distill import OPDConfig, OPDTrainer

    >>> trainer = OPDTrainer(
    ...     model="student",
    ...     teacher_model="teacher",
    ...     args=OPDConfig(output_dir="out"),
    ...     train_dataset=dataset,  # a "prompt" column
    ... )
    >>> trainer.train()
    ```

    Args:
        teacher_model (`str`, [`~transformers.PreTrainedModel`], `PeftModel`, [`Teacher`], `dict` of these, *optional*):
            The teacher: a hub name or folder, `"adapter-off"`, a model, or an object with `score(rollouts)`. Several
            can be given by name; the dataset's `teacher` column then selects one for each row. Required where
            `beta > 0`, unless `args` names it. A model is frozen, and its forward is extended in place.
        args ([`OPDConfig`], *optional*):
            Settings. A [`~trl.GRPOConfig`] is accepted too, and its `beta` is used.

    All other arguments are those of [`~trl.GRPOTrainer`].

    Raises:
        ValueError: teacher, student, dataset and settings do not fit together; raised before training starts.
    """

    setup: Setup | None = None
    loss: DistillationLoss | None = None
    facts: dict[str, Any]  # names of student, teachers and rewards
    preflight: Report
    _models_checked = False
    _terms: dict[str, torch.Tensor] = {}  # the parts of the last loss, for the file that describes a non-finite loss

    _tag_names = ["trl", "trl_distill", "on-policy-distillation"]
    _name = "On-Policy Distillation"
    _paper = PAPER

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        *,
        teacher_model: str | PreTrainedModel | Teacher | dict[str, Any] | None = None,
    ):
        args = _as_opd_config(args, model, teacher_model)
        if reward_funcs is not None and not isinstance(reward_funcs, list):
            reward_funcs = [reward_funcs]
        environment_rewards, environment_factory = probe_environments(environment_factory)
        self.has_rewards = bool(reward_funcs) or environment_rewards
        args = args.resolved(self.has_rewards)
        # keeps `beta` in reward per nat for every group size; other scalings and aggregations keep GRPO's baseline
        self.leave_one_out = (
            args.beta > 0 and args.scale_rewards == "none" and args.multi_objective_aggregation == "sum_then_normalize"
        )
        if self.has_rewards and args.reward_baseline in ("batch", "prompt"):
            self.baseline = RewardBaseline(args.reward_baseline)
        if environment_factory is None:
            ours = args.beta > 0  # plain GRPO takes what TRL takes, images too
            sees = _sees_images(model, args, {"training": train_dataset, "evaluation": eval_dataset})
            train_dataset = with_prompts(train_dataset, "the training dataset", check=ours, parts=sees)
            eval_dataset = with_prompts(eval_dataset, "the evaluation dataset", check=ours, parts=sees)
        if environment_factory is None and reward_funcs:
            check_rewards(reward_funcs, train_dataset)
        specs = _teachers_of(teacher_model, args, self.has_rewards)
        if specs:
            check_before_loading(model, specs, args, adapter=peft_config is not None)
            writers = {"tools": tools, "rollout_func": rollout_func, "environment_factory": environment_factory}
            check_datasets(train_dataset, eval_dataset, list(specs), args, writers)
            if args.cross_tokenizer:
                check_writers(writers)
            if not self.has_rewards:
                reward_funcs = [no_reward]

        beta, args.beta = args.beta, 0.0  # TRL's own `self.beta` stays 0, or TRL would load a reference model
        try:
            super().__init__(
                model=model,
                reward_funcs=reward_funcs,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                tools=tools,
                rollout_func=rollout_func,
                environment_factory=environment_factory,
            )
        finally:
            args.beta = beta
        self.safeguards, self.turns = Safeguards(self), Turns()
        add_reporting(self, specs)
        if specs:
            self._prepare(specs)
        self._bind_reports()

    def _prepare(self, specs: dict[str, TeacherSpec]) -> None:
        """Set up teachers and estimator; an error carries the report so far, which `trl-distill check` prints."""
        self.preflight = Report()
        try:
            self.setup = prepare(self, specs, self.preflight)
        except (ValueError, TeacherAnswerError, TeacherUnavailable) as error:
            vars(error).setdefault("report", self.preflight)
            raise
        self.loss = DistillationLoss(self, self.setup)

    @property
    def pool(self) -> TeacherPool | None:
        """The teachers; `None` for plain GRPO."""
        return None if self.setup is None else self.setup.pool

    @property
    def teacher(self) -> Any:
        """The teacher, or the first of several."""
        if self.setup is None:
            return None
        first, _ = self.setup.pool.members[0]
        return getattr(first, "original", first)

    @property
    def estimator(self) -> Estimator:
        """The estimator of the divergence."""
        assert self.setup is not None
        return self.setup.estimator

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As [`~transformers.Trainer.train`]; [`Safeguards.train`] lists what it raises when a run ends early."""
        return self.safeguards.train(super().train, resume_from_checkpoint, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.safeguards.stop_when_finished()
        return super().training_step(*args, **kwargs)

    def loss_computed(self, loss: torch.Tensor, inputs: dict[str, Any]) -> None:
        self.safeguards.check_loss(loss, inputs, self._terms)

    def _bind_reports(self) -> None:
        """Attach every [`~trl_distill.TokenReport`] to this trainer, or raise where it cannot report on it."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TokenReport):
                callback.bind(self)

    def beta_at(self, step: int) -> float:
        """Weight of the teacher's term at an optimizer step."""
        args = self.args
        if args.beta_schedule == "constant":
            return args.beta
        steps = args.beta_schedule_steps or self.state.max_steps
        return scheduled_beta(args.beta_schedule, args.beta, args.beta_end, step, steps)

    def dataset_batch(self, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The dataset's completions, where `lmbda` makes this batch off-policy; else `None`."""
        args = self.args
        if args.lmbda == 1 or self.mode == "eval" or self.beta_at(self.state.global_step) == 0:
            return None
        on_policy = self.turns.next_is_on_policy(args.lmbda)
        self.record("distill/on_policy", float(on_policy))
        if on_policy:
            return None
        self.forget_completions()
        batch = completion_batch(
            rows,
            first=self.accelerator.process_index * len(rows),
            group=self.num_generations,
            tokenizer=self.tokenizer,
            stops=self.eos_token_ids,
            limit=self.max_completion_length,
            template_kwargs=dict(self.chat_template_kwargs),  # type: ignore[arg-type]
            mask_truncated=self.mask_truncated_completions,
            processor=self.processor,
        )
        device = self.accelerator.device
        return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}

    def on_rollouts(self, rows: list[dict[str, Any]], batch: dict[str, Any]) -> None:
        """Assign teachers and their prompts to rows, and run those teachers that score whole generation batches."""
        if self.mode == "train" and "row_weight" not in batch:
            self.safeguards.watch(batch)
        if self.pool is None or self.beta_at(self.state.global_step) == 0:  # a weight that has reached 0 stays 0
            return
        self._check_models(batch)
        assert self.setup is not None
        own = [prompt_of(row, "teacher_prompt") for row in rows]
        tools = [row.get("tools") for row in rows]
        pad = self.tokenizer.pad_token_id
        if any(teacher.prompts == "teacher_prompt" for teacher, _ in self.pool.members):
            batch |= teacher_prompts(own, batch, functools.partial(self.encoded, tools=tools), pad)
        for name, encode in self.setup.encoders.items():  # in their own tokens, templates and pixels
            read = [prompt or prompt_of(row) for prompt, row in zip(own, rows, strict=True)]
            batch |= teacher_prompts(read, batch, functools.partial(encode, tools=tools), pad, name)
        batch |= self.pool.assign(rows, batch["prompt_ids"].device)
        self.pool.score_ahead(MicroBatch.from_inputs(batch), self.mode == "train")

    def before_rollouts(self, rows: list[dict[str, Any]]) -> None:
        """Raise on all processes if a teacher sees no images, or sharded weights were needed for some rows' alone."""
        sharded, blind = is_sharded(self.accelerator), self.setup.blind if self.setup is not None else {}
        if self.processor is None or not (sharded or blind):
            return
        counts = torch.tensor([sum(map(has_images, rows)), len(rows)], device=self.accelerator.device)
        shown, total = self.accelerator.reduce(counts, reduction="sum").tolist()
        if shown and blind:
            raise ValueError(str(next(iter(blind.values()))))
        if sharded and 0 < shown < total:
            raise ValueError(
                f"{shown} of {total} rows of a generation batch have images. Under ZeRO-3 and FSDP all processes must "
                "run the same layers, or they wait for each other for ever. Train on rows with images and without in "
                "separate runs, or use ZeRO-2 or plain data parallelism."
            )

    def _check_models(self, batch: dict[str, Any]) -> None:
        """The checks that set-up had to leave out because weights are sharded, on the first rollouts of training."""
        assert self.setup is not None
        if self._models_checked or self.mode == "eval" or not self.setup.checks.wait_for_rollouts:
            return
        found = self.setup.checks.on_rollouts(MicroBatch.from_inputs(batch), own="row_weight" not in batch)
        if found is not None:
            self._models_checked = True
            self.preflight.add(*found.findings)

    def rollout_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's policy loss plus beta times the divergence from the teacher, from one forward of the student."""
        self._terms = {}
        if self.loss is None:
            return self.policy_loss(model, inputs)
        batch, beta = MicroBatch.from_inputs(inputs), self.beta_at(self.state.global_step)
        rewarded = self.has_rewards and self.state.global_step >= self.args.reward_start_step
        self.record("distill/beta", beta)
        if batch.is_off_policy:
            parts = self.loss.off_policy(model, batch, beta)
        elif beta == 0.0:
            return self.policy_loss(model, batch.inputs)
        else:
            parts = self.loss(model, batch, beta, rewarded)
        self._log_step(parts)
        return parts.total

    def _log_step(self, parts: LossParts) -> None:
        """Record the metrics of one loss, as [`~trl_distill.training.step_metrics`] computes them."""
        terms = {"distill/loss": parts.divergence}
        if self.has_rewards and not self.has_side_terms and not parts.batch.is_off_policy:  # otherwise TRL logs it
            terms["policy_loss"] = torch.zeros_like(parts.divergence) if parts.policy is None else parts.policy
        self._terms = {name: loss.detach() for name, loss in terms.items()}
        if parts.batch.is_off_policy:
            quantities = off_policy_quantities(parts, self.args.off_policy_divergence)
        else:
            how = (self.args.divergence, self.has_rewards, self._entropy_key(parts), self.estimator.profiles)
            assert self.setup is not None
            quantities = step_quantities(parts, *how, texts=bool(self.setup.readers))
        accumulation = self.current_gradient_accumulation_steps if self.mode == "train" else 1
        quantities |= loss_quantities(terms, accumulation)
        for name, mean in means(self.accelerator, quantities).items():
            self.record(name, mean)

    def _entropy_key(self, parts: LossParts) -> str | None:
        """
        Where to log the entropy: under TRL's key if it is that of the sampling distribution, under our own otherwise;
        `None` if TRL's loss has already logged it.
        """
        if parts.policy is not None:
            return None
        assert self.setup is not None
        same = self.setup.same_vocabulary and self.args.kl_temperature in (None, self.args.temperature)
        return "entropy" if same or parts.output.log_probs is not None else "distill/entropy"

    def on_run_start(self, checkpoint: str | None) -> None:
        self.turns.load(checkpoint)
        if self.baseline is not None:
            self.baseline.load(checkpoint)
        self._bind_reports()  # including those added since construction
        close_last(self)
        for teacher, _ in self.pool.members if self.pool is not None and checkpoint else ():
            teacher.load(str(checkpoint))
        if self.loss is not None and self.loss.weighting is not None:
            self.loss.weighting.load(checkpoint)

    def on_run_end(self) -> None:
        release_memory()

    def raised_everywhere(self, error: Exception) -> bool:
        """Whether every process raised this error at the same point, so that all can write a checkpoint together."""
        of_teacher = isinstance(error, TeacherUnavailable | TeacherAnswerError)
        return (
            isinstance(error, RunawayError | StoppedBySignal)
            or (self.pool is not None and self.pool.failed_everywhere)
            or (of_teacher and self.accelerator.num_processes == 1)
        )

    def checkpoint_written(self, folder: str) -> None:
        if self.args.lmbda < 1 and self.accelerator.is_main_process:
            self.turns.save(folder, under_way=not self.between_generations)
        if self.baseline is not None and self.baseline.kind == "prompt" and self.accelerator.is_main_process:
            self.baseline.save(folder, under_way=not self.between_generations)
        for teacher, _ in self.pool.members if self.pool is not None and self.accelerator.is_main_process else ():
            teacher.save(folder)
        if self.loss is not None and self.loss.weighting is not None and self.accelerator.is_main_process:
            self.loss.weighting.save(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As [`~transformers.Trainer.create_model_card`]; it also names the teachers and how they were distilled."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            complete_file(Path(self.args.output_dir, "README.md"), self.facts, self.args)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not self.has_rewards:  # only the placeholder's zeros
            self.forget("reward", "frac_reward_zero_std")
            self.drop_reward_column(no_reward.__name__)
        super().log(logs, start_time)
