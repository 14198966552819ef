"""`TokenReport`: the token-level report during training, every N steps and at the end.

It samples from the student in eval mode and restores all modes and random generators, so that training is not changed.
Data are collected in `collect.py`; the page is made in `page.py`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback

from ...data.images import has_images, tidy_row
from ...data.readers import PromptReader
from ...data.rewards import RewardFunction
from ...data.sampling import SampledCompletion, Sampling, preserving_state, sample_completions, scorer_of
from ...images import EncodedPrompt
from ...models.properties import placeholder_ids, unwrap_adapter
from ...signals import HiddenStates
from ...teachers.base import is_sharded
from ..trackers import log_page
from .collect import labels_of, scored, with_rewards
from .page import page
from .spans import Reading, labels_of_both, scored_texts
from .table import Completion, TokenTable


logger = logging.getLogger(__name__)


class TokenReport(TrainerCallback):
    """
    Writes `output_dir/reports/step-000100.html` and so on, and logs it to wandb or Trackio as "reports/tokens".

    ```python
    >>> trainer = OPDTrainer(..., callbacks=[TokenReport(every=100)])
    ```

    Completions are sampled at the training temperature, always with the same seed. Only the main process works; others
    wait for it at the next step. If a report fails, training continues with a warning.

    Args:
        every (`int`, *optional*, defaults to 100):
            Optimizer steps between two reports. There is always one after the last step.
        prompts (`Dataset`, or `list` of `dict`, `str` or messages, *optional*):
            Rows with a "prompt", optionally a "teacher_prompt", images, and columns for rewards. Defaults to the
            trainer's evaluation dataset, or else its training dataset.
        rows (`int`, *optional*, defaults to 16):
            Number of rows that are used, from the first.
        num_generations (`int`, *optional*, defaults to 1):
            Completions per prompt.
        reward_funcs (`list` of functions, *optional*):
            Reward functions, called as TRL calls them. The trainer's are called only if they are given here too, since
            calls may be counted or cost money.
        teacher (`str`, *optional*):
            Name of the teacher to use, if there are several.
        batch_size (`int`, *optional*, defaults to 8):
            Completions that are sampled and scored at a time.
        seed (`int`, *optional*, defaults to 0):
            Random seed of sampling.

    Raises:
        ValueError: when the trainer is made, if it has no teacher in this process or weights are sharded.
    """

    def __init__(
        self,
        every: int = 100,
        prompts: Any = None,
        rows: int = 16,
        num_generations: int = 1,
        reward_funcs: Sequence[RewardFunction] = (),
        teacher: str | None = None,
        batch_size: int = 8,
        seed: int = 0,
    ):
        numbers = {"every": every, "rows": rows, "num_generations": num_generations, "batch_size": batch_size}
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"`TokenReport({name}={value})`: it must be 1 or more.")
        self.every, self.prompts, self.rows, self.num_generations = every, prompts, rows, num_generations
        self.reward_funcs, self.teacher, self.batch_size, self.seed = list(reward_funcs), teacher, batch_size, seed
        self._trainer: Any = None
        self._rows: list[dict[str, Any]] = []
        self._last = -1  # step of the latest report

    def bind(self, trainer: Any) -> None:
        """Attach to the trainer, which calls this at construction and before training. May raise `ValueError`."""
        if is_sharded(trainer.accelerator):
            raise ValueError(
                "`TokenReport` samples from the student on the main process alone, which ZeRO-3 and FSDP do not allow: "
                "every forward pass takes all processes. Leave it out, and run `trl-distill report` on checkpoints."
            )
        if trainer.pool is None:
            raise ValueError(
                "`TokenReport` shows the KL to a teacher, but this trainer has none (`beta` is 0). Leave it out, or "
                "give a `teacher_model`."
            )
        names = trainer.pool.names
        if self.teacher is None and trainer.pool.several:
            raise ValueError(
                f"There are several teachers ({', '.join(names)}). Name the one to use: "
                f"`TokenReport(teacher={names[0]!r})`."
            )
        name = names[0] if self.teacher is None else self.teacher
        if name not in names:
            raise ValueError(f"`TokenReport(teacher={name!r})`: there is no such teacher, only {', '.join(names)}.")
        judge = trainer.pool.teachers[name]
        texts = trainer.setup is not None and judge.prompts in trainer.setup.readers
        if not texts and judge.gives is not HiddenStates:
            raise ValueError(
                "`TokenReport` needs the teacher's whole distribution over the student's ids. A served teacher gives "
                "only a few log-probabilities: run `trl-distill report` where it can be loaded."
            )
        self._rows = self._first_rows(trainer)
        self._trainer, self._name, self._last = trainer, name, -1

    def _first_rows(self, trainer: Any) -> list[dict[str, Any]]:
        source = self.prompts
        if source is None:
            evaluated = trainer.eval_dataset
            source = evaluated if isinstance(evaluated, Dataset) else trainer.train_dataset
            if not isinstance(source, Dataset):
                raise ValueError(
                    f"`TokenReport` would take its prompts from a {type(source).__name__}, which may be readable only "
                    "once. Give it separate prompts: `TokenReport(prompts=[...])`."
                )
        first = [source[i] for i in range(min(self.rows, len(source)))]
        rows = [row if isinstance(row, dict) else {"prompt": row} for row in first]
        if not rows or any(not row.get("prompt") for row in rows):
            raise ValueError("`TokenReport` needs at least one row, and a prompt in each row. Give `prompts`.")
        rows = [tidy_row(row) for row in rows]
        if trainer.processor is None and any(map(has_images, rows)):
            raise ValueError(
                "`TokenReport` was given prompts with images, but the student is a text model. Leave the images out."
            )
        return rows

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self._report(args, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._report(args, state.global_step)

    def _report(self, args: Any, step: int) -> None:
        if self._trainer is None or not self._trainer.accelerator.is_main_process or step == self._last:
            return
        self._last = step
        path = Path(args.output_dir) / "reports" / f"step-{step:06d}.html"
        try:
            text = page(self._table(step))
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
            log_page(args.report_to, path, "reports/tokens", {"train/global_step": step})
        except Exception as error:
            logger.warning(f"The token report of step {step} could not be made: {error}", exc_info=True)

    def _table(self, step: int) -> TokenTable:
        trainer, args, tokenizer = self._trainer, self._trainer.args, self._trainer.tokenizer
        temperature = args.kl_temperature or args.temperature
        merged = getattr(trainer.estimator, "stops", ())
        # with vLLM, TRL has no settings for `generate`, and no ids are suppressed
        suppressed = () if trainer.use_vllm else trainer.generation_config.suppress_tokens or ()
        images = placeholder_ids(unwrap_adapter(trainer.accelerator.unwrap_model(trainer.model)).config)
        how = Sampling(
            limit=trainer.max_completion_length,
            stops=tuple(trainer.eos_token_ids),
            temperature=args.temperature,
            generations=self.num_generations,
            seed=self.seed,
            suppressed=tuple({*suppressed, *images}),
        )
        teacher, device = trainer.pool.teachers[self._name], trainer.accelerator.device
        reading = self._reading(teacher)
        completions: list[Completion] = []
        written: list[SampledCompletion] = []
        reader = self._reader(teacher)
        prompts = [reader.prompt(row) for row in self._rows]
        with preserving_state(trainer.model), trainer.accelerator.autocast():
            size = max(1, self.batch_size // self.num_generations)
            for start in range(0, len(self._rows), size):
                part = slice(start, start + size)
                batch = sample_completions(trainer.model, self._rows[part], prompts[part], tokenizer.pad_token_id, how)
                student = scorer_of(trainer.model, as_in_training=True)
                if reading is not None:
                    completions += scored_texts(batch, [student], reading, tokenizer, device, temperature)
                else:
                    how_judged = (tokenizer, device, merged, temperature, reader)
                    completions += scored(batch, [student], teacher.score, *how_judged)
                written += batch
            completions = with_rewards(completions, written, self.reward_funcs, tokenizer)
        return TokenTable(
            title=f"Tokens after step {step}",
            teacher=self._name if trainer.pool.several else _name(teacher),
            students=(_name(trainer),),
            completions=tuple(completions),
            labels=labels_of(completions, tokenizer)
            if reading is None
            else labels_of_both(completions, tokenizer, reading.tokenizer),
            settings={
                "temperature": f"{temperature:g}",
                "seed": str(self.seed),
                "up to": f"{how.limit} tokens",
            },
        )

    def _reading(self, teacher: Any) -> Reading | None:
        """How a teacher with another tokenizer reads completions; `None` for one with the student's."""
        readers = self._trainer.setup.readers
        if teacher.prompts not in readers:
            return None
        kwargs = dict(self._trainer.chat_template_kwargs)
        stops = sorted(self._trainer.eos_token_ids)
        return Reading(teacher.score, teacher.pair, readers[teacher.prompts], stops, kwargs)

    def _reader(self, teacher: Any) -> PromptReader:
        """How student and teacher read prompts in training."""
        trainer = self._trainer

        def of_student(prompt: Any, tools: Any = None) -> EncodedPrompt:
            return trainer.encoded([prompt], [tools])[0]

        encode = trainer.setup.encoders.get(teacher.prompts)  # of a teacher with another processor
        if encode is None:
            return PromptReader(of_student)
        return PromptReader(of_student, lambda prompt, tools=None: encode([prompt], tools=[tools])[0])


def _name(owner: Any) -> str:
    """The name or folder of a model (or of an object's `model`), or else its class."""
    from ...models.properties import name_of

    model = getattr(owner, "model", None) or getattr(owner, "module", None) or owner
    return name_of(model)
