"""`GRPOHooks`: public hooks for the private methods and attributes of `GRPOTrainer` that this package relies on."""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import Sampler
from transformers.trainer_utils import rotate_checkpoints
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from ..data.images import encode, has_images, is_processor, pictures_of, tidy_row
from ..data.rows import tools_of
from ..data.sampling import answer_texts, without_own_settings
from ..errors import CheckpointError, NonFiniteLossError
from ..images import EncodedPrompt, Images, by_rows, keys_of, without_empty
from ..objective.weights import leave_one_out
from ..rollouts import READ, counted
from .checkpoints import last_complete, mark_complete, unmark, what_is_missing
from .micro_batches import by_length, trimmed
from .reward_baseline import RewardBaseline, prompt_keys


class ReplayingSampler(RepeatSampler):
    """
    TRL's sampler, except that a resumed run gets the order of its current epoch.

    TRL's own sampler starts every resumed run with the first epoch's order. This one first draws and discards the
    permutations of the finished epochs.

    Args:
        sampler (`RepeatSampler`): TRL's; its settings and generator are used.
        epochs_done (`Callable[[], int]`): number of finished epochs; called at the first pass, with the checkpoint
            loaded.
    """

    def __init__(self, sampler: Sampler, epochs_done: Callable[[], int]):
        self.__dict__.update(vars(sampler))
        self._epochs_done: Callable[[], int] | None = epochs_done

    def __iter__(self) -> Iterator[int]:
        if self._epochs_done is not None and self.shuffle:
            for _ in range(self._epochs_done()):
                torch.randperm(self.num_samples, generator=self.generator)
        self._epochs_done = None
        yield from super().__iter__()


class GRPOHooks(GRPOTrainer):
    """
    `GRPOTrainer` with public names for the private ones that this package needs.

    A subclass overrides [`~GRPOHooks.rollout_loss`], the loss of a micro-batch, and [`~GRPOHooks.on_rollouts`], which
    may add columns to a generation batch.

    Attributes:
        has_rewards (`bool`): whether there is a reward; without one, reward functions are not called.
        leave_one_out (`bool`): whether a row's baseline, the mean of its group, leaves out its own reward.
        baseline ([`~trl_distill.training.reward_baseline.RewardBaseline`], *optional*): used in place of the group's.
        saves_padding (`bool`): whether micro-batches are cut to their longest row.
        trims_prompts (`bool`): whether padding on the left may be cut too.
        is_distilling (`bool`): whether there is a teacher. Then rollouts leave the student's own `generation_config`
            aside, and rewards get completions with their special tokens, as in `evaluate`; otherwise all is TRL's.
    """

    has_rewards: bool = True
    saves_padding: bool = False
    trims_prompts: bool = False
    is_distilling: bool = False
    leave_one_out: bool = False
    baseline: RewardBaseline | None = None
    _skips_old_log_probs: bool = False
    _generating: bool = False
    _rows_tools: list[Any] | None = None
    num_generations: Any
    num_generations_eval: Any
    _rewards_per_func: torch.Tensor | None
    args: Any  # a `GRPOConfig`; `Trainer` declares its base class
    model: Any
    current_gradient_accumulation_steps: int
    _buffered_inputs: Any
    max_completion_length: int
    _logs: dict[str, Any]
    log_multimodal: bool
    processing_class: Any

    # -- hooks: TRL calls the private name, subclasses override the public one ---------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        loss = self.rollout_loss(model, inputs)
        self.loss_computed(loss, inputs)
        return loss

    def loss_computed(self, loss: torch.Tensor, inputs: dict[str, Any]) -> None:
        """Called with each micro-batch and its loss, before the backward pass."""

    def rollout_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Loss of one micro-batch, scaled for gradient accumulation. Here: TRL's policy loss."""
        return self.policy_loss(model, inputs)

    def policy_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's own loss, entropy bonus and MoE loss included. `model` is only ever called, once."""
        return super()._compute_loss(model, inputs)

    def _calculate_rewards(self, inputs: Any, prompts: list, completions: list, completion_ids_list: list):
        if self.has_rewards:
            if self.is_distilling:
                completions = self._as_written(completions, completion_ids_list)
            found = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            endless = found.isinf().any(0).tolist()  # rewards of all processes, so that all of them stop
            if any(endless):
                name = self.reward_func_names[endless.index(True)]
                raise NonFiniteLossError(
                    f"The reward function {name!r} returned an infinite reward after step {self.state.global_step}; "
                    "its advantages would be NaN. Return a finite number, or `None` for completions without a score."
                )
            self._rewards_per_func = found
            return found
        rows = len(prompts) * self.accelerator.num_processes  # TRL expects the rewards of all processes
        return torch.zeros(rows, len(self.reward_funcs), device=self.accelerator.device)

    def _as_written(self, completions: list, completion_ids: list) -> list:
        """Completions with the special tokens that TRL leaves out, except where it parses them for tools."""
        parses = any(getattr(self.tokenizer, name, None) for name in ("response_template", "response_schema"))
        if self.tools or self.has_environments or (parses and not isinstance(completions[0], str)):
            return completions
        texts = answer_texts(self.tokenizer, completion_ids, self.eos_token_ids)
        pairs = zip(completions, texts, strict=True)
        return [text if isinstance(found, str) else [{**found[0], "content": text}] for found, text in pairs]

    def _generate_single_turn(self, prompt_ids: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        images = images and [of_row or None for of_row in images]  # as vLLM takes rows without images
        with without_own_settings(self.model) if self.is_distilling else nullcontext():
            return super()._generate_single_turn(prompt_ids, images, *args, **kwargs)

    def _tokenize_prompts(self, prompts: list) -> Any:
        """TRL's, except that rows with tools of their own (a column `tools`) are rendered with them."""
        rows = self._rows_tools or []
        if len(rows) != len(prompts) or not any(rows):
            ids, images, fields = super()._tokenize_prompts(prompts)
            # processors take no `None` for a row without images
            return ids, images and [of_row or [] for of_row in images], fields
        if self.processor is not None and any(has_images({"prompt": prompt}) for prompt in prompts):
            raise ValueError(
                "The dataset has images and a column `tools`, which are not rendered together. Drop the column, or "
                "pass `tools` to the trainer, the same for all rows."
            )
        everyone, ids = self.tools, [[0]] * len(prompts)
        try:
            for kind in {json.dumps(tools) for tools in rows}:
                members = [i for i, tools in enumerate(rows) if json.dumps(tools) == kind]
                self.tools = rows[members[0]] or everyone
                rendered = super()._tokenize_prompts([prompts[i] for i in members])[0]
                for i, own in zip(members, rendered, strict=True):
                    ids[i] = own
        finally:
            self.tools = everyone
        return ids, None, {}

    @contextmanager
    def _logging_images_of(self, rows: list[dict[str, Any]]) -> Iterator[None]:
        """
        Context in which TRL gathers no images for its table of completions: it does so only where a process has some,
        and then that process waits for the others. They are gathered here, one list for each row.
        """
        logged = self.log_multimodal
        self.log_multimodal = logged and self.processor is None
        try:
            yield
        finally:
            self.log_multimodal = logged
        if logged and self.processor is not None:
            images = gather_object([pictures_of(row) for row in rows])
            if any(images) or self._logs["images"]:
                self._logs["images"].extend(images)

    @contextmanager
    def _with_tools_of(self, rows: list[Any]) -> Iterator[None]:
        self._rows_tools = [tools_of(tools) for tools in rows] if self.is_distilling else None
        try:
            yield
        finally:
            self._rows_tools = None

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's rollouts, with each row's reward, and advantages by the baseline that was asked for."""
        self._fresh = True
        if self.processor is not None:
            inputs = [tidy_row(row) for row in inputs]
        self.before_rollouts(inputs)
        output = self.dataset_batch(inputs)
        if output is None:
            self._rewards_per_func = None
            self._generating = True
            try:
                tools = [row.get("tools") for row in inputs]
                with self._with_tools_of(tools), self._logging_images_of(inputs):
                    output = by_rows(super()._generate_and_score_completions(inputs))
            finally:
                self._generating = False
            if self._rewards_per_func is not None:
                self._add_rewards(output, len(inputs))
        else:
            output |= self._counted(output)
        self.on_rollouts(inputs, output)
        return output

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        if self._generating and self._skips_old_log_probs:  # TRL leaves out of the batch what is `None`
            return None, None, None
        if self.processor is None:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

        def called(**inputs: Any) -> Any:  # with a part of the rows, of which none may have an image
            return model(**without_empty(inputs))

        return super()._get_per_token_logps_and_entropies(called, *args, **by_rows(kwargs))

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """TRL's micro-batch, without padding that none of its rows needs."""
        self._fresh = False
        inputs = super()._prepare_inputs(generation_batch)
        if not self.saves_padding:
            return inputs
        if self._fresh and self.mode == "train":
            arranged = by_length(list(self._buffered_inputs or []), self.micro_batches_alike)
            self._buffered_inputs = counted([trimmed(batch, self.trims_prompts) for batch in arranged])
            return self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs if READ in inputs else counted([trimmed(inputs, self.trims_prompts)])[0]

    @property
    def micro_batches_alike(self) -> int:
        """How many consecutive micro-batches may exchange rows without changing the update; 1 where none may."""
        by_micro_batch = self.loss_type == "bnpo" or self.has_side_terms or self.top_entropy_quantile < 1.0
        accumulation, steps = self.args.gradient_accumulation_steps, self.args.steps_per_generation
        if by_micro_batch or (accumulation % steps and steps % accumulation):
            return 1
        return min(accumulation, steps)

    def before_rollouts(self, rows: list[dict[str, Any]]) -> None:
        """Called on every process before a generation batch is made; `rows` are as in [`~GRPOHooks.on_rollouts`]."""

    def dataset_batch(self, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        """
        A generation batch from the dataset; `None`, as here, to let the student generate it.

        Args:
            rows (`list` of `dict`): as in [`~GRPOHooks.on_rollouts`].

        Returns:
            `dict` of `torch.Tensor`, *optional*: "prompt_ids", "completion_ids" and their masks at least.
        """
        return None

    def _counted(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What TRL computes for a generated batch: token counts for the loss and the log, and advantages, here 0."""
        read = batch["completion_mask"].any(1, keepdim=True)  # duplicates of a row are masked
        counts = torch.stack([(batch["prompt_mask"] * read).sum(), batch["completion_mask"].sum()])
        prompt, completion = self.accelerator.reduce(counts, reduction="sum").tolist()
        self.state.num_input_tokens_seen += prompt + completion
        self._metrics[self.mode]["num_tokens"] = [self.state.num_input_tokens_seen]
        device = batch["prompt_ids"].device
        return {
            "num_items_in_batch": torch.tensor(completion, device=device),
            "advantages": torch.zeros(len(batch["prompt_ids"]), device=device),
        }

    def on_rollouts(self, rows: list[dict[str, Any]], batch: dict[str, Any]) -> None:
        """
        Called with each generation batch before it is shuffled and split.

        Args:
            rows (`list` of `dict`): examples of the dataset, one per rollout of this process.
            batch (`dict`): TRL's tensors of this process. Tensors with one row per rollout can be added; they are
                shuffled and split along with it.
        """

    def _add_rewards(self, output: dict[str, Any], local: int) -> None:
        rewards = self._rewards_per_func  # (all rows, functions)
        assert rewards is not None
        rows = slice(self.accelerator.process_index * local, (self.accelerator.process_index + 1) * local)
        weights = self.reward_weights.to(rewards.device)
        unscored = rewards.isnan().all(1)
        total = (rewards * weights).nansum(1).masked_fill(unscored, torch.nan)  # (all rows,)
        output["rewards"] = total[rows]
        if self.baseline is not None:
            own = prompt_keys(output["prompt_ids"], output["prompt_mask"])
            keys = self.accelerator.gather(own ^ keys_of(Images.from_inputs(output), len(own)).to(own.device))
            everyone = self.baseline.advantages(total, keys, self.mode == "train")
            if self.baseline.kind == "prompt" and self.mode == "train":
                self.record("distill/known_prompts", self.baseline.share_known)
        elif self.leave_one_out:
            group = self.num_generations if self.mode == "train" else self.num_generations_eval
            everyone = leave_one_out(self.accelerator.gather(output["advantages"]), ~unscored, group)
        else:
            return
        output["advantages"] = everyone[rows]
        logged = self._logs["advantages"]  # a deque that TRL has just extended, for the table of completions
        for _ in range(min(len(everyone), len(logged))):
            logged.pop()
        logged.extend(everyone.tolist())

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return ReplayingSampler(super()._get_train_sampler(dataset), lambda: int(self.state.epoch or 0))

    def end_rollouts_with(self, ids: list[int]) -> None:
        """Let any of these ids end a completion, with transformers and with vLLM."""
        self.eos_token_ids = ids
        if not self.use_vllm:
            self.generation_config.eos_token_id = ids
            self.generation_kwargs["eos_token_id"] = ids
            return
        kwargs = self.vllm_generation.generation_kwargs
        kwargs["stop_token_ids"] = sorted({*(kwargs.get("stop_token_ids") or []), *ids})

    def skip_old_log_probs(self) -> None:
        """
        Leave out the forward pass for log-probabilities under the policy that wrote the rollouts; the loss reads none.

        Without them there is no ratio to vLLM's sampler either, and none of TRL's `sampling/` metrics.
        """
        self._skips_old_log_probs = True
        self.vllm_importance_sampling_correction = False

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """TRL's checkpoint, marked as complete at the end; older ones are deleted only then."""
        folder = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        if self.args.should_save:
            unmark(folder)
        try:
            super()._save_checkpoint(model, trial)
            self.checkpoint_written(folder)
        except Exception as error:  # a full disk raises OSError, SafetensorError or RuntimeError
            self.args.save_total_limit = limit
            if self.args.should_save and os.path.isfile(os.path.join(folder, "trainer_state.json")):
                raise  # the checkpoint itself is whole
            whose, deleted = f" by process {self.accelerator.process_index}", ""
            if self.args.should_save:
                whose, deleted = "", "The incomplete folder is deleted. "
                shutil.rmtree(folder, ignore_errors=True)  # frees space on a full disk
            last = last_complete(self.args.output_dir)
            raise CheckpointError(
                f"The checkpoint of step {self.state.global_step} could not be written{whose}: {error}. {deleted}"
                f"{f'The last complete one is {last}' if last else 'There is no earlier one'}. Free some space and "
                "restart with `resume_from_checkpoint=True` (`auto` on the command line)."
            ) from error
        self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if limit is not None:  # it was saved with a limit of `None`
                torch.save(self.args, os.path.join(folder, "training_args.bin"))
            mark_complete(folder)
            best = self.state.best_model_checkpoint
            rotate_checkpoints(
                self._get_output_dir(trial), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True
            )

    def checkpoint_written(self, folder: str) -> None:
        """Called on every process when TRL has written its part of a checkpoint; a subclass may add files."""

    def save_now(self) -> str:
        """Write a checkpoint of the current step, whatever the save strategy; returns its folder."""
        folder = os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        # the main process decides: others might look while the last file is being written
        missing = float(self.accelerator.is_main_process and what_is_missing(folder) is not None)
        if self.accelerator.reduce(torch.tensor(missing, device=self.accelerator.device), reduction="sum") > 0:
            self._save_checkpoint(self.model_wrapped, trial=None)
        return folder

    # -- attributes --------------------------------------------------------------------------------------------------

    @property
    def zero3(self) -> bool:
        """Whether DeepSpeed shards the weights (ZeRO-3)."""
        return self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3

    @property
    def mode(self) -> str:
        """ "train" or "eval", by TRL's rule."""
        return "train" if self.model.training else "eval"

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def processor(self) -> Any:
        """The processor of a vision-language student; `None` for text models."""
        return self.processing_class if is_processor(self.processing_class) else None

    @property
    def has_environments(self) -> bool:
        """Whether environments write or extend the prompts, which are then unknown before an episode begins."""
        return self.environment_factories is not None

    def token_ids_of(self, prompts: list[Any], tools: list[Any] | None = None) -> list[list[int]]:
        """Prompts, text or messages, as they are rendered and tokenised for generation; each with its row's `tools`."""
        if self.processor is not None:
            return [prompt.ids for prompt in self.encoded(prompts, tools)]
        with self._with_tools_of(tools or []):
            return self._tokenize_prompts(prompts)[0]

    def encoded(self, prompts: list[Any], tools: list[Any] | None = None) -> list[EncodedPrompt]:
        """As [`~GRPOHooks.token_ids_of`], with the images of the prompts."""
        if self.processor is None:
            return [EncodedPrompt(ids) for ids in self.token_ids_of(prompts, tools)]
        own = [tools_of(row) or self.tools or None for row in tools or [None] * len(prompts)]
        return encode(self.processor, prompts, dict(self.chat_template_kwargs), own, self.chat_template)  # type: ignore[arg-type]

    @property
    def has_side_terms(self) -> bool:
        """Whether TRL's loss has a term that needs no reward: the entropy bonus or the MoE load-balancing loss."""
        return self._entropy_bonus_enabled or self.aux_loss_enabled

    def record(self, name: str, value: float) -> None:
        """Add a value to the metric `name`; TRL logs the mean of the values since the last log."""
        self._metrics[self.mode][name].append(value)

    def last_recorded(self, name: str) -> float:
        """The last value added to the metric `name`."""
        return self._metrics[self.mode][name][-1]

    def forget(self, *prefixes: str) -> None:
        """Drop all metrics whose name starts with one of `prefixes` from the next log."""
        for metrics in self._metrics.values():
            for name in [name for name in metrics if name.startswith(prefixes)]:
                del metrics[name]

    def forget_completions(self) -> None:
        """Empty the completions table, which would otherwise show the last rollouts again for an off-policy batch."""
        for column in (*self._logs.values(), *self._logs["rewards"].values(), *self._logs["extra"].values()):
            if isinstance(column, deque):
                column.clear()

    @property
    def between_generations(self) -> bool:
        """Whether all micro-steps of the last generation batch are done."""
        return self._step % (self.args.steps_per_generation * self.num_iterations) == 0

    def drop_reward_column(self, name: str) -> None:
        """Leave the reward function `name` out of the completions table."""
        self._logs["rewards"].pop(name, None)

    @property
    def averages_over_rows(self) -> bool:
        """Whether the loss is an average over rows instead of tokens."""
        return self.loss_type in ("grpo", "sapo", "dr_grpo", "luspo")

    # -- the normaliser ----------------------------------------------------------------------------------------------

    def reduce_per_token(
        self, per_token: torch.Tensor, mask: torch.Tensor, inputs: dict[str, Any], loss_type: str | None = None
    ) -> torch.Tensor:
        """
        Reduce a per-token loss as TRL reduces its policy loss under the same `loss_type`, accumulation included.

        Args:
            per_token (`torch.Tensor` of shape `(B, C)`): a value for each completion token.
            mask (`torch.Tensor` of shape `(B, C)`): 1 where a token counts.
            inputs (`dict`): the micro-batch, for its `num_items_in_batch`.
            loss_type (`str`, *optional*): to use another than the run's.

        Returns:
            `torch.Tensor`: scalar.

        Raises:
            ValueError: the `loss_type` is not known.
        """
        loss_type = loss_type or self.loss_type
        training = self.mode == "train"
        accumulation = self.current_gradient_accumulation_steps if training else 1
        per_token = per_token * mask
        if loss_type in ("grpo", "sapo"):
            return (per_token.sum(-1) / mask.sum(-1).clamp(min=1)).mean() / accumulation
        if loss_type == "bnpo":
            return per_token.sum() / mask.sum().clamp(min=1) / accumulation
        if loss_type == "dr_grpo":
            return per_token.sum() / (per_token.size(0) * self.max_completion_length) / accumulation
        if loss_type == "luspo":
            return per_token.sum(-1).mean() / accumulation
        if loss_type in ("dapo", "cispo", "vespo"):
            tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            if training:  # the count spans the generation batch: rescale it to one optimizer step
                tokens = tokens * accumulation / self.args.steps_per_generation
            return per_token.sum() / tokens
        raise ValueError(
            f"loss_type={loss_type!r} is not known to this version of trl_distill. Use one of: dapo, dr_grpo, "
            "grpo, bnpo, luspo, cispo, sapo, vespo."
        )
