"""`OPDTrainer`: GRPO with the reward set to zero and the teacher in the place of the reference model.

It decides what is minimised and in which order things are asked for. The mathematics is in `objective.py` and
`heads.py`, teachers are in `teachers.py`, what can be wrong before the first step in `checks.py`, and every private
name of TRL in `_compat.py`.
"""

from __future__ import annotations

import functools
import json
import logging
import textwrap
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from trl import GRPOConfig

from .._trl import get_config_model_id, probe_environments
from ..checks.datasets import check_datasets
from ..config import OPDConfig
from ..data.completions import completion_batch, is_on_policy
from ..data.datasets import with_prompts
from ..data.rewards import check_rewards
from ..errors import TeacherAnswerError, TeacherUnavailable
from ..estimators.base import Estimator
from ..heads.tiles import release_memory
from ..models.student import DistilledOutput, ForwardPlan, RecordedStudent
from ..objective import terms, weights
from ..reporting.metrics import by_reward, divergence_profile, means, reward_and_teacher
from ..rollouts import Rollouts
from ..signals import TeacherScore
from ..teachers.base import Teacher
from ..teachers.self_distillation import MovingAverage
from ..teachers.spec import read_specs
from .setup import Assembly


logger = logging.getLogger(__name__)


GENERATIONS = "generations.json"  # in a checkpoint, where `lmbda` is below 1


def no_reward(completions: list, **_: Any) -> list[float]:
    """Stands where TRL demands a reward source; never called."""
    return [0.0] * len(completions)


class OPDTrainer(Assembly):
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
        teacher_model (`str`, [`~transformers.PreTrainedModel`], `PeftModel`, [`Teacher`] or `dict` of these, *optional*):
            Who judges: a hub name or folder, `"adapter-off"`, a model, or anything with `score(rollouts)`; several by
            name, of which the dataset's `teacher` column chooses. Needed where `beta > 0`; `args` may name it instead.
            A model is frozen, and its forward extended in place.
        args ([`OPDConfig`], *optional*):
            Settings. A [`~trl.GRPOConfig`] is taken as it is, with its `beta`.

    All other arguments are those of [`~trl.GRPOTrainer`].

    Raises:
        ValueError: before anything is trained, where teacher, student, dataset or settings do not fit together.
    """

    _generations: int = 0  # how many generation batches there have been

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
        teacher_model: str | PreTrainedModel | Teacher | dict[str, Any] | None = None,
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
        if environment_factory is None:
            train_dataset, eval_dataset = with_prompts(train_dataset), with_prompts(eval_dataset)
        if environment_factory is None and reward_funcs:
            check_rewards(reward_funcs, train_dataset)
        specs: dict[str, Any] = {}
        if args.beta == 0 and not self.has_rewards:
            raise ValueError(
                "No reward source provided, and `beta` is 0, so that the teacher counts for nothing: there is nothing to "
                "learn. Pass `reward_funcs`, or an `environment_factory` with a reward, or set `beta` above 0."
            )
        if args.beta == 0 and teacher_model is not None:
            logger.warning("`beta` is 0, so this is plain GRPO: the teacher is not loaded.")
        if args.beta > 0:
            specs = read_specs(teacher_model, args)
            self.check_before_loading(model, specs, args)
            writers = {"tools": tools, "rollout_func": rollout_func, "environment_factory": environment_factory}
            check_datasets(train_dataset, eval_dataset, list(specs), args, writers)
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
        self.track(specs)
        if specs:
            try:
                self.add_teachers(specs)
            except (ValueError, TeacherAnswerError, TeacherUnavailable) as error:
                vars(error).setdefault("report", self.preflight)  # what was found until then, for `--check_only`
                raise
        self.show_to_reports()

    def beta_at(self, step: int) -> float:
        """Weight of the teacher's term at an optimizer step."""
        args = self.args
        if args.beta_schedule == "constant":
            return args.beta
        steps = args.beta_schedule_steps or self.state.max_steps
        return weights.scheduled_beta(args.beta_schedule, args.beta, args.beta_end, step, steps)

    def dataset_batch(self, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The dataset's completions, where `lmbda` says that it is their turn."""
        args = self.args
        if args.lmbda == 1 or self.mode == "eval" or self.beta_at(self.state.global_step) == 0:
            return None
        on_policy = is_on_policy(self._generations, args.lmbda)
        self._generations += 1
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
        )
        return {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}

    def on_rollouts(self, rows: list[dict[str, Any]], batch: dict[str, Any]) -> None:
        """Say who judges which row, with which prompt, and ask those teachers that judge whole generation batches."""
        if self.mode == "train" and "row_weight" not in batch:
            self.watch(batch)
        if self.panel is None or self.beta_at(self.state.global_step) == 0:  # a weight of 0 stays 0
            return
        batch |= self._teacher_prompts(rows, batch)
        batch |= self.panel.assign(rows, batch["prompt_ids"].device)
        self.panel.score_ahead(batch, self.mode == "train")

    def _teacher_prompts(self, rows: list[dict[str, Any]], batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Prompts of the teacher's own, `(B, P')`, left-padded; rows without one keep the student's."""
        own = [row.get("teacher_prompt") for row in rows]
        some = next((prompt for prompt in own if prompt), None)
        if some is None:
            return {}
        rendered = self.token_ids_of([prompt or some for prompt in own])
        ids = [
            torch.tensor(theirs, device=kept.device) if prompt else kept[mask.bool()]
            for prompt, theirs, kept, mask in zip(own, rendered, batch["prompt_ids"], batch["prompt_mask"], strict=True)
        ]
        pad = functools.partial(pad_sequence, batch_first=True, padding_side="left")
        return {
            "teacher_prompt_ids": pad(ids, padding_value=self.tokenizer.pad_token_id),
            "teacher_prompt_mask": pad([torch.ones_like(row) for row in ids], padding_value=0),
        }

    def rollout_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's policy loss plus beta times the divergence from the teacher, from one forward of the student."""
        self.terms = {}
        if self.panel is None:
            return self.policy_loss(model, inputs)
        beta, rewarded, for_policy = self.beta_at(self.state.global_step), self.has_rewards, inputs
        if rewarded and self.state.global_step < self.args.reward_start_step:
            rewarded, for_policy = False, {**inputs, "advantages": torch.zeros_like(inputs["advantages"])}
        self.record("distill/beta", beta)
        if "row_weight" in inputs:
            return self._off_policy_loss(model, inputs, beta)
        if beta == 0.0:
            return self.policy_loss(model, for_policy)
        rollouts = Rollouts.from_inputs(inputs)
        judgements = self.panel.score(inputs, self.mode == "train")
        judged = RecordedStudent(
            model, rollouts, judgements, self._forward_plan(for_policy, rollouts, judgements, beta)
        )
        if rewarded or self.has_side_terms:
            policy = self.policy_loss(judged, for_policy)
        else:
            policy = torch.zeros((), device=self.accelerator.device)
            with self.accelerator.autocast():
                judged(**self._student_inputs(rollouts))
        per_token, by_teacher = self._kl_term(self.estimator, judged.output, judgements, rollouts, inputs)
        divergence = beta * self._reduced(per_token, rollouts, inputs)
        losses = {"distill/loss": divergence}
        if self.has_rewards and not self.has_side_terms:  # with side terms TRL logs it itself
            losses["policy_loss"] = policy
        kl = f"distill/{self.args.divergence}"
        of_tokens, of_rows = reward_and_teacher(judged.output, judgements, per_token, rollouts.mask, inputs, beta)
        quantities = {name: (values, rollouts.mask) for name, values in {**of_tokens, kl: per_token}.items()}
        # rows that no reward function could score have no objective
        quantities |= {name: (values, ~values.isnan()) for name, values in of_rows.items()}
        quantities |= {f"{kl}/{name}": found for name, found in by_teacher.items()}
        quantities = divergence_profile(judged.output, per_token, rollouts.mask, kl) | quantities
        if self.has_rewards:
            parts = by_reward(per_token, rollouts.mask, inputs["advantages"])
            quantities |= {f"{kl}/{name}": found for name, found in parts.items()}
        if rewarded or self.has_side_terms:
            entropy_key = None  # TRL has logged it
        else:
            entropy_key = self._entropy_key if judged.output.log_probs is None else "entropy"
        self.terms = {name: loss.detach() for name, loss in losses.items()}
        self._log_step(quantities, losses, entropy_key)
        return policy + divergence

    def _off_policy_loss(self, model: Any, inputs: dict[str, Any], beta: float) -> torch.Tensor:
        """Beta times the divergence on completions of the dataset; rewards, entropy bonus and MoE loss have no part."""
        rollouts = Rollouts.from_inputs(inputs)
        judgements = self.panel.score(inputs, training=True) if self.panel is not None else []
        estimator = self.off_policy_estimator
        self._expected_slopes(inputs, rollouts, judgements, beta)
        judged = RecordedStudent(model, rollouts, judgements, ForwardPlan(estimator))
        with self.accelerator.autocast():
            judged(input_ids=rollouts.input_ids, attention_mask=rollouts.attention_mask)
        per_token, by_teacher = self._kl_term(estimator, judged.output, judgements, rollouts, inputs)
        loss = beta * self._reduced(per_token, rollouts, inputs)
        of_tokens, _ = reward_and_teacher(judged.output, judgements, per_token, rollouts.mask, {}, beta)
        kl = f"distill/off_policy/{self.args.off_policy_divergence}"
        quantities = {kl: (per_token, rollouts.mask)} | {f"{kl}/{name}": found for name, found in by_teacher.items()}
        quantities["distill/off_policy/entropy"] = (of_tokens["entropy"], rollouts.mask)
        self.terms = {"distill/loss": loss.detach()}
        self._log_step(quantities, {"distill/loss": loss}, None)
        return loss

    def _reduced(self, per_token: torch.Tensor, rollouts: Rollouts, inputs: dict[str, Any]) -> torch.Tensor:
        """As the loss is reduced; of rows that stand for several equal ones, each counts once."""
        if "row_weight" not in inputs:
            return self.reduce_per_token(per_token, rollouts.mask, inputs)
        if self.averages_over_rows:
            per_token = per_token * inputs["row_weight"][:, None]
        # a micro-batch of nothing but such rows has no mean of its own
        kind = "dapo" if self.loss_type == "bnpo" else self.loss_type
        return self.reduce_per_token(per_token, rollouts.mask, inputs, kind)

    def _expected_slopes(
        self, inputs: dict[str, Any], rollouts: Rollouts, judgements: list[TeacherScore], beta: float
    ) -> torch.Tensor:
        """
        Note in each judgement what its divergence will weigh in the loss, which is known before the forward pass.

        Returns:
            `torch.Tensor` of shape `(B, C)`: derivative of TRL's reduction by a value of each token.
        """
        with torch.enable_grad():
            value = torch.zeros(rollouts.mask.shape, device=rollouts.mask.device, requires_grad=True)
            reduced = self._reduced(value, rollouts, inputs)
            (slope,) = torch.autograd.grad(reduced, value)
        for judgement in judgements:
            judgement.slope = beta * judgement.weight[:, None] * slope
        return slope

    def _forward_plan(
        self, inputs: dict[str, Any], rollouts: Rollouts, judgements: list[TeacherScore], beta: float
    ) -> ForwardPlan:
        """What the student's forward shall do, with as few projections as these rollouts allow."""
        slope, estimator = self._expected_slopes(inputs, rollouts, judgements, beta), self.estimator
        # a ratio to log-probabilities that TRL computed needs TRL's own, rounded alike; its side terms need more of it
        known = ("old_per_token_logps", "importance_sampling_ratio", "tool_mask")
        if self.has_side_terms or any(name in inputs for name in known):
            return ForwardPlan(estimator)
        whole = len(judgements) == 1 and bool((judgements[0].mask == rollouts.mask).all())
        if whole and self.same_vocabulary and estimator.shares_logits(rollouts.mask.device):
            # of fresh rollouts the policy loss is -A log q; where it is not, the backward pass makes up for it
            return ForwardPlan(estimator, "shared", policy_slope=-inputs["advantages"].view(len(slope), -1) * slope)
        return ForwardPlan(estimator, "here", self.args.temperature)

    def _student_inputs(self, rollouts: Rollouts) -> dict[str, Any]:
        """Arguments of the student's forward where there is no policy loss to call it."""
        inputs: dict[str, Any] = {"input_ids": rollouts.input_ids, "attention_mask": rollouts.attention_mask}
        if self.estimator.needs_log_probs or self.args.kl_discount > 0:
            labels = torch.full_like(rollouts.input_ids, -100)
            completion = slice(-rollouts.mask.shape[1], None)
            labels[:, completion] = rollouts.input_ids[:, completion].masked_fill(~rollouts.mask, -100)
            inputs |= {"labels": labels, "fused_lm_head": True}
        return inputs

    def _kl_term(
        self,
        estimator: Estimator,
        output: DistilledOutput,
        judgements: list[TeacherScore],
        rollouts: Rollouts,
        inputs: dict[str, Any],
    ) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """
        The teachers' term for each completion token, `(B, C)`: value in nats, gradient of the objective.

        With several teachers it is the sum of their terms by the weights of each row. Also returned, by name: each
        teacher's term alone and the tokens that it counts for.
        """
        device, mask = self.accelerator.device, rollouts.mask
        assert output.measured is not None
        assert self.panel is not None
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
        per_token = torch.zeros(mask.shape, device=device)
        by_teacher = {name: (per_token, torch.zeros_like(mask)) for name in self.panel.names if self.panel.several}
        for judgement, found in zip(judgements, output.measured, strict=True):
            measured = {name: values.to(device) for name, values in found.items()}
            alone = estimator.term(measured, log_q, ratio, weight) * judgement.mask
            per_token = per_token + judgement.weight[:, None] * alone
            by_teacher |= {name: (alone, mask & rows[:, None]) for name, rows in judgement.rows.items()}
        if self.args.kl_discount > 0:
            assert ratio is not None
            per_token = terms.sequence_term(per_token, mask, ratio, self.args.kl_discount)
        return per_token, by_teacher

    def _log_step(
        self,
        quantities: dict[str, tuple[torch.Tensor, torch.Tensor]],
        losses: dict[str, torch.Tensor],
        entropy_key: str | None,
    ) -> None:
        """Record means of quantities with their masks, and losses; the entropy under its key, or not at all."""
        accumulation = self.current_gradient_accumulation_steps if self.mode == "train" else 1
        quantities |= {name: (loss * accumulation, torch.ones_like(loss)) for name, loss in losses.items()}
        entropy = quantities.pop("entropy", None)
        if entropy is not None and entropy_key is not None:
            quantities[entropy_key] = entropy
        for name, mean in means(self.accelerator, quantities).items():
            self.record(name, mean)

    @property
    def _entropy_key(self) -> str:
        """TRL's key, where the divergence's distribution is the one that is sampled from; else one of our own."""
        same = self.same_vocabulary and self.args.kl_temperature in (None, self.args.temperature)
        return "entropy" if same else "distill/entropy"

    def on_run_start(self, checkpoint: str | None) -> None:
        self._generations = self._generations_until(checkpoint)
        self.show_to_reports()  # those that were added since
        for teacher, _ in self.panel.members if self.panel is not None and checkpoint else ():
            if isinstance(teacher, MovingAverage):
                teacher.load(str(checkpoint))

    def on_run_end(self) -> None:
        release_memory()

    def raised_everywhere(self, error: Exception) -> bool:
        of_teacher = isinstance(error, TeacherUnavailable | TeacherAnswerError)
        return (
            super().raised_everywhere(error)
            or (self.panel is not None and self.panel.failed_everywhere)
            or (of_teacher and self.accelerator.num_processes == 1)
        )

    def _generations_until(self, checkpoint: str | None) -> int:
        """How many generation batches lie behind a checkpoint."""
        path = Path(checkpoint or "", GENERATIONS)
        return json.loads(path.read_text())["generations"] if checkpoint and path.is_file() else 0

    def checkpoint_written(self, folder: str) -> None:
        if self.args.lmbda < 1 and self.accelerator.is_main_process:
            unfinished = int(not self.between_generations)  # one that is under way is written anew
            Path(folder, GENERATIONS).write_text(json.dumps({"generations": self._generations - unfinished}))
        for teacher, _ in self.panel.members if self.panel is not None else ():
            if isinstance(teacher, MovingAverage) and self.accelerator.is_main_process:
                teacher.save(folder)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not self.has_rewards:  # the placeholder's zeros say nothing
            self.forget("reward", "frac_reward_zero_std")
            self.drop_reward_column(no_reward.__name__)
        super().log(logs, start_time)
