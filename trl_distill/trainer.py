"""`OPDTrainer`: GRPO with the reward set to zero and the teacher in the place of the reference model.

It decides what is minimised and in which order things are asked for. The mathematics is in `objective.py` and
`heads.py`, teachers are in `teachers.py`, what can be wrong before the first step in `checks.py`, and every private
name of TRL in `_compat.py`.
"""

from __future__ import annotations

import logging
import textwrap
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from trl import GRPOConfig

from . import checks, objective
from ._compat import Seams, get_config_model_id, probe_environments
from .config import OPDConfig
from .estimators import make_estimator
from .forwards import DistilledOutput, JudgedModel, add_student_forward, last_hidden_state, unwrap_adapter
from .heads import LMHead
from .metrics import forces, means
from .signals import HiddenStates, Rollouts
from .teachers import Teacher, load_teacher_tokenizer, make_teacher, student_config, teacher_config


logger = logging.getLogger(__name__)


def no_reward(completions: list, **_: Any) -> list[float]:
    """Stands where TRL demands a reward source; never called."""
    return [0.0] * len(completions)


class OPDTrainer(Seams):
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
        teacher_model (`str`, [`~transformers.PreTrainedModel`], `PeftModel` or [`Teacher`], *optional*):
            Who judges: a hub name or folder, a model, or anything with `score(rollouts)`. Needed where `beta > 0`;
            `args.teacher_model_name_or_path` may stand in for it. A model is frozen, and its forward extended in place.
        args ([`OPDConfig`], *optional*):
            Settings. A [`~trl.GRPOConfig`] is taken as it is, with its `beta`.

    All other arguments are those of [`~trl.GRPOTrainer`].

    Raises:
        ValueError: before anything is trained, where teacher, student, dataset or settings do not fit together.
    """

    _tag_names = ["trl", "trl_distill", "on-policy-distillation"]
    _name = "On-Policy Distillation"
    _paper = {
        "title": "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        "id": "2306.13649",
        "citation": textwrap.dedent("""\
            @inproceedings{agarwal2024onpolicy,
                title        = {{On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes}},
                author       = {Rishabh Agarwal and Nino Vieillard and Yongchao Zhou and Piotr Stanczyk and Sabela Ramos and Matthieu Geist and Olivier Bachem},
                year         = 2024,
                booktitle    = {The Twelfth International Conference on Learning Representations},
                eprint       = {arXiv:2306.13649},
            }
            @inproceedings{gu2024minillm,
                title        = {{MiniLLM: Knowledge Distillation of Large Language Models}},
                author       = {Yuxian Gu and Li Dong and Furu Wei and Minlie Huang},
                year         = 2024,
                booktitle    = {The Twelfth International Conference on Learning Representations},
                eprint       = {arXiv:2306.08543},
            }"""),
    }

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
        teacher_model: str | PreTrainedModel | Teacher | None = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = OPDConfig(f"{name.split('/')[-1]}-OPD")
        elif not isinstance(args, OPDConfig):
            if teacher_model is not None and args.beta == 0:
                raise ValueError(
                    f"A teacher is given, but `args` is a {type(args).__name__} with `beta=0`, under which it would not be "
                    "used. Use `OPDConfig` (its `beta` is 1.0), or set `beta`."
                )
            args = OPDConfig.from_grpo(args)
        if reward_funcs is not None and not isinstance(reward_funcs, list):
            reward_funcs = [reward_funcs]
        environment_rewards, environment_factory = probe_environments(environment_factory)
        self.has_rewards = bool(reward_funcs) or environment_rewards
        args = args.resolved(self.has_rewards)

        # one reward per nat, whatever the size of the group; other scalings and aggregations keep GRPO's baseline
        self.leave_one_out = (
            args.beta > 0 and args.scale_rewards == "none" and args.multi_objective_aggregation == "sum_then_normalize"
        )
        self.teacher: Teacher | None = None
        teacher_spec = None
        if args.beta == 0 and teacher_model is not None:
            logger.warning("`beta` is 0, so this is plain GRPO: the teacher is not loaded.")
        if args.beta > 0:
            teacher_spec = self._teacher_spec(model, teacher_model, args)
            if environment_factory is None:  # an environment may own the prompts
                checks.check_train_dataset(train_dataset, args.prompts_per_generation)
                checks.check_eval_datasets(eval_dataset)
            if not self.has_rewards:
                reward_funcs = [no_reward]

        beta, args.beta = args.beta, 0.0  # TRL's own `self.beta` stays 0: it would ask for a reference model
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
        if teacher_spec is not None:
            self._add_teacher(teacher_spec)

    @staticmethod
    def _teacher_spec(model: Any, teacher_model: Any, args: OPDConfig) -> str | nn.Module | Teacher:
        """Who the teacher is, checked as far as that is possible before anything is loaded."""
        named = args.teacher_model_name_or_path
        if teacher_model is not None and named is not None and teacher_model != named:
            raise ValueError(
                f"Two teachers: `teacher_model` was passed, and `args.teacher_model_name_or_path` is {named!r}. Keep one."
            )
        spec = teacher_model if teacher_model is not None else named
        if isinstance(spec, str) and spec == model:
            logger.warning(
                f"Student and teacher are both {spec!r}. They start out equal, so there is nothing to learn until they "
                "differ: with a `peft_config`, or a reward. Check the paths if that is not intended."
            )
        if spec is None:
            raise ValueError(
                f"There is no teacher, but `beta` is {args.beta}. Pass `teacher_model=...` (or "
                "`--teacher_model_name_or_path`), or set `beta=0` for plain GRPO. A PEFT student's own base model is "
                "not taken in its place."
            )
        if isinstance(spec, str | nn.Module):
            checks.check_text_only(teacher_config(spec, args), "teacher")
        elif isinstance(spec, type) or not isinstance(spec, Teacher):
            raise TypeError(
                f"`teacher_model` is {spec!r}; give a hub name, a folder, a model, or an object with `score(rollouts)`."
            )
        if isinstance(model, str):
            checks.check_text_only(student_config(model, args), "student")
        else:
            checks.check_text_only(unwrap_adapter(model).config, "student")
            if isinstance(spec, nn.Module) and unwrap_adapter(spec) is unwrap_adapter(model):
                raise ValueError(
                    "`teacher_model` is the student itself, or the base model under its adapter: the same weights would "
                    "be trained and frozen. Load the teacher once more, as a model of its own."
                )
        return spec

    def _add_teacher(self, spec: str | nn.Module | Teacher) -> None:
        """Check that teacher and student fit, load the teacher, and let the student's forward answer its signal."""
        args: OPDConfig = self.args
        student = unwrap_adapter(self.model)
        student_size = student.config.get_text_config().vocab_size
        self._same_vocabulary = True
        if isinstance(spec, str | nn.Module):
            checks.check_same_tokenizer(
                self.tokenizer, load_teacher_tokenizer(spec, args), assume_same=args.assume_same_tokenizer
            )
            teacher_size = teacher_config(spec, args).get_text_config().vocab_size
            checks.check_teacher_vocabulary(self.tokenizer, teacher_size, args.assume_same_tokenizer)
            self._stay_inside_vocabulary(teacher_size, student_size)
        if args.save_strategy == "steps":
            checks.check_checkpoint_boundary(
                args.save_steps, args.gradient_accumulation_steps, args.micro_steps_per_generation
            )
        self._check_head(student, "student")
        self.teacher = make_teacher(spec, args, self.accelerator, student_size)
        self.ref_model = getattr(self.teacher, "model", None)  # where TRL keeps the model that the KL is taken to
        if self.ref_model is not None:
            self._check_head(self.ref_model, "teacher")
        temperature = args.kl_temperature or args.temperature
        self.estimator = make_estimator(
            args.kl_estimator,
            args.divergence,
            temperature,
            args.kl_top_k,
            log_p_temperature=args.temperature if self.has_rewards else None,
        )
        add_student_forward(student, self.estimator.measure, fp32_head=args.cast_lm_head_to_fp32)

    def _check_head(self, model: nn.Module, whose: str) -> None:
        """Compare our way from hidden states to logits with the model's own on four tokens; not on sharded weights."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return
        base, training = unwrap_adapter(model), model.training
        token_ids = torch.arange(4, device=next(base.parameters()).device)[None]
        with torch.no_grad(), self.accelerator.autocast():
            model.eval()
            with last_hidden_state(base.base_model) as caught:
                expected = model(input_ids=token_ids, use_cache=False).logits
            model.train(training)
            head = LMHead(base)
            checks.check_logits(expected, head.logits(caught[0].to(expected.device)), whose)

    def _stay_inside_vocabulary(self, teacher_size: int, student_size: int) -> None:
        """Keep rollouts to ids that the teacher has an opinion on, where its vocabulary is padded less."""
        if teacher_size >= student_size:
            return
        self._same_vocabulary = False
        remedy = (
            "Pad the teacher instead: `teacher.resize_token_embeddings(...)` to the student's "
            f"{student_size} rows, save it, and use that."
        )
        if self.args.kl_estimator != "full" or self.args.kl_discount > 0:
            raise ValueError(
                f"The teacher's vocabulary ({teacher_size}) is smaller than the student's ({student_size}), which only "
                f"kl_estimator='full' with kl_discount=0 renormalises. {remedy}"
            )
        if self.use_vllm:
            raise ValueError(
                f"The teacher's vocabulary ({teacher_size}) is smaller than the student's ({student_size}), and vLLM "
                f"rollouts cannot be kept inside it yet. {remedy}"
            )
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise ValueError(
                f"The teacher's vocabulary ({teacher_size}) is smaller than the student's ({student_size}), which is "
                f"not supported under ZeRO-3 yet. {remedy}"
            )
        suppressed = [*(self.generation_config.suppress_tokens or []), *range(teacher_size, student_size)]
        self.generation_config.suppress_tokens = suppressed
        self.generation_kwargs["suppress_tokens"] = suppressed
        logger.warning(
            f"The teacher's vocabulary ends at {teacher_size}, the student's at {student_size}: the student's last "
            f"{student_size - teacher_size} ids are left out of the divergence and suppressed in rollouts."
        )

    @property
    def teacher_beta(self) -> float:
        """Weight of the teacher's term at the current step."""
        args = self.args
        if args.beta_schedule == "constant":
            return args.beta
        steps = args.beta_schedule_steps or self.state.max_steps
        return objective.scheduled_beta(args.beta_schedule, args.beta, args.beta_end, self.state.global_step, steps)

    def rollout_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's policy loss plus beta times the divergence from the teacher, from one forward of the student."""
        if self.teacher is None:
            return self.policy_loss(model, inputs)
        beta, rewarded, for_policy = self.teacher_beta, self.has_rewards, inputs
        if rewarded and self.state.global_step < self.args.reward_start_step:
            rewarded, for_policy = False, {**inputs, "advantages": torch.zeros_like(inputs["advantages"])}
        self.record("distill/beta", beta)
        if beta == 0.0:
            return self.policy_loss(model, for_policy)
        rollouts = Rollouts.from_inputs(inputs)
        signal = self.teacher.score(rollouts)
        if not isinstance(signal, HiddenStates):
            raise TypeError(
                f"The teacher's `score` returned a {type(signal).__name__}; it must return `trl_distill.HiddenStates` (see "
                "docs/teachers.md)."
            )
        judged = JudgedModel(model, rollouts, signal)
        if rewarded or self.has_side_terms:
            policy = self.policy_loss(judged, for_policy)
        else:
            policy = torch.zeros((), device=self.accelerator.device)
            with self.accelerator.autocast():
                judged(**self._student_inputs(rollouts))
        per_token = self._kl_term(judged.output, rollouts, inputs)
        divergence = beta * self.reduce_per_token(per_token, rollouts.mask, inputs)
        losses = {"distill/loss": divergence}
        if self.has_rewards and not self.has_side_terms:  # with side terms TRL logs it itself
            losses["policy_loss"] = policy
        self._log_step(judged.output, per_token, losses, rollouts, inputs, rewarded or self.has_side_terms)
        return policy + divergence

    def _student_inputs(self, rollouts: Rollouts) -> dict[str, Any]:
        """Arguments of the student's forward where there is no policy loss to call it."""
        inputs: dict[str, Any] = {"input_ids": rollouts.input_ids, "attention_mask": rollouts.attention_mask}
        if self.estimator.needs_log_probs or self.args.kl_discount > 0:
            labels = torch.full_like(rollouts.input_ids, -100)
            completion = slice(-rollouts.mask.shape[1], None)
            labels[:, completion] = rollouts.input_ids[:, completion].masked_fill(~rollouts.mask, -100)
            inputs |= {"labels": labels, "fused_lm_head": True}
        return inputs

    def _kl_term(self, output: DistilledOutput, rollouts: Rollouts, inputs: dict[str, Any]) -> torch.Tensor:
        """The teacher's term for each completion token, `(B, C)`: value in nats, gradient of the objective."""
        device, mask = self.accelerator.device, rollouts.mask
        assert output.measured is not None
        measured = {name: values.to(device) for name, values in output.measured.items()}
        log_q = ratio = weight = None
        if output.log_probs is not None:
            log_q = output.log_probs[:, -mask.shape[1] :].to(device)
            rollout_log_q = inputs.get("old_per_token_logps")
            change = log_q - (log_q.detach() if rollout_log_q is None else rollout_log_q)
            ratio = torch.where(mask, change, 0.0).exp()  # masked before exp: what is not judged cannot overflow
            weight = ratio.detach()
            if "importance_sampling_ratio" in inputs:  # from vLLM's sampler to the old policy, truncated by TRL
                correction = inputs["importance_sampling_ratio"]  # (B, C), or (B, 1) for the sequence as a whole
                ratio = ratio * correction
                weight = weight * correction if correction.shape[1] == mask.shape[1] else weight
        per_token = self.estimator.term(measured, log_q, ratio, weight)
        if self.args.kl_discount > 0:
            assert ratio is not None
            per_token = objective.sequence_term(per_token, mask, ratio, self.args.kl_discount)
        return per_token

    def _log_step(
        self,
        output: DistilledOutput,
        per_token: torch.Tensor,
        losses: dict[str, torch.Tensor],
        rollouts: Rollouts,
        inputs: dict[str, Any],
        policy_called: bool,
    ) -> None:
        """Log the divergence, the entropy where TRL does not, and how teacher and reward stand to each other."""
        of_tokens, of_rows = forces(output, per_token, rollouts.mask, inputs, self.teacher_beta)
        of_tokens[f"distill/{self.args.divergence}"] = per_token
        entropy = of_tokens.pop("entropy", None)
        if entropy is not None and not policy_called:
            of_tokens[self._entropy_key if output.log_probs is None else "entropy"] = entropy
        accumulation = self.current_gradient_accumulation_steps if self.mode == "train" else 1
        quantities = {name: (values, rollouts.mask) for name, values in of_tokens.items()}
        # rows that no reward function could score have no objective
        quantities |= {name: (values, ~values.isnan()) for name, values in of_rows.items()}
        quantities |= {name: (loss * accumulation, torch.ones_like(loss)) for name, loss in losses.items()}
        for name, mean in means(self.accelerator, quantities).items():
            self.record(name, mean)

    @property
    def _entropy_key(self) -> str:
        """TRL's key, where the divergence's distribution is the one that is sampled from; else one of our own."""
        same = self._same_vocabulary and self.args.kl_temperature in (None, self.args.temperature)
        return "entropy" if same else "distill/entropy"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not self.has_rewards:  # the placeholder's zeros say nothing
            self.forget("reward", "frac_reward_zero_std")
            self.drop_reward_column(no_reward.__name__)
        super().log(logs, start_time)
