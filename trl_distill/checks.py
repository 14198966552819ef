"""What is checked before the first step: everything here would otherwise fail late, or train on a wrong number.

Functions of configurations, tokenizers and datasets that return nothing and raise with what to change. Training is left
to the trainer.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


def check_text_only(config: PretrainedConfig, whose: str) -> None:
    """Refuse vision-language models."""
    if getattr(config, "vision_config", None) is not None:
        raise ValueError(
            f"The {whose} is a vision-language model ({config.model_type}). Distilling those has not been run yet and "
            "is refused; use a text model."
        )


def check_train_dataset(dataset: Any, prompts_per_generation: int) -> None:
    """
    A training dataset must have a `prompt` column and fill at least one generation batch.

    Args:
        dataset: `Dataset` or `IterableDataset`; of the latter only the column names, where known, are checked.
        prompts_per_generation (`int`): prompts that one generation batch takes.
    """
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        raise ValueError(f"The training dataset has several splits. Take one: `dataset['{next(iter(dataset))}']`.")
    _check_prompts(dataset, "training")
    if isinstance(dataset, Dataset) and len(dataset) < prompts_per_generation:
        raise ValueError(
            f"The training dataset has {len(dataset)} prompts, but one generation batch takes "
            f"{prompts_per_generation}, and incomplete ones are dropped: not a single step would be made. Lower "
            "`per_device_train_batch_size`, `gradient_accumulation_steps` or `generation_batch_size`, or give more "
            "prompts."
        )


def check_eval_datasets(datasets: Any) -> None:
    """Evaluation datasets, one or several by name, need prompts too: found out now, not at the first evaluation."""
    for dataset in datasets.values() if isinstance(datasets, dict) else [datasets]:
        _check_prompts(dataset, "evaluation")


def _check_prompts(dataset: Any, purpose: str) -> None:
    if not isinstance(dataset, Dataset | IterableDataset):
        return  # TRL says what it takes
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"The {purpose} dataset is empty. Check the split and the filters that made it.")
    columns = dataset.column_names
    if columns is not None and "prompt" not in columns:
        raise ValueError(
            f"The {purpose} dataset has no 'prompt' column; it has {sorted(columns)}. Rename the column that holds the "
            "prompts: `dataset.rename_column('...', 'prompt')`."
        )
    if isinstance(dataset, Dataset):
        prompts = enumerate(dataset["prompt"])
        prompts = enumerate(dataset["prompt"])
        bad = next((i for i, prompt in prompts if not prompt or not isinstance(prompt, str | list)), None)
        if bad is not None:
            raise ValueError(
                f"Row {bad} of the {purpose} dataset has the prompt {dataset[bad]['prompt']!r}; a prompt is text or a "
                "list of messages, and not empty. Drop such rows: `dataset.filter(lambda row: row['prompt'])`."
            )


def check_logits(expected: torch.Tensor, computed: torch.Tensor, whose: str) -> None:
    """
    What we compute from hidden states must be what the model itself puts out.

    Args:
        expected (`torch.Tensor` of shape `(..., V)`): the model's logits for a few tokens.
        computed (`torch.Tensor` of shape `(..., V)`): ours, from its last hidden state and head.
        whose (`str`): "student" or "teacher".
    """
    expected, computed = expected.float().log_softmax(-1), computed.float().log_softmax(-1)
    difference, spread = (expected - computed).abs().mean().item(), expected.std().item()
    if not difference < 0.02 + 0.05 * spread:  # above rounding in bf16, far below a missing scale; NaN fails too
        raise ValueError(
            f"The {whose}'s logits do not follow from its last hidden state and LM head: log-probabilities differ by "
            f"{difference:.3g} nats on average. Its architecture transforms them in a way that is not known here, and "
            "the divergence would be that of another distribution."
        )


def load_config(name_or_path: str, whose: str, argument: str, **kwargs: Any) -> PretrainedConfig:
    """A model's configuration: a cheap way to learn that a path is wrong before any weights are loaded."""
    try:
        return AutoConfig.from_pretrained(name_or_path, **kwargs)
    except (OSError, ValueError) as error:
        if os.path.isfile(os.path.join(name_or_path, "adapter_config.json")):
            raise ValueError(
                f"The {whose} {name_or_path!r} is an adapter, not a whole model. In Python, pass a `PeftModel`: "
                f"`AutoPeftModelForCausalLM.from_pretrained({name_or_path!r})`. Or save it merged and use that: "
                "`model.merge_and_unload().save_pretrained(...)`."
            ) from None
        if name_or_path.startswith((".", "/", "~")):
            raise ValueError(f"The {whose}'s folder {name_or_path!r} has no `config.json`. Check {argument}.") from None
        raise ValueError(
            f"The {whose} {name_or_path!r} could not be found: it is neither a folder with a `config.json` nor a model "
            f"found on the hub. Check {argument}. ({error})"
        ) from error


def load_tokenizer(name_or_path: str, **kwargs: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside a model, or `None` where there is none."""
    if not name_or_path:
        return None
    try:
        return AutoTokenizer.from_pretrained(name_or_path, **kwargs)
    except (OSError, ValueError, KeyError, TypeError):  # what transformers raises for a folder without a tokenizer
        return None


def check_same_tokenizer(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase | None, assume_same: bool = False
) -> None:
    """
    The divergence compares probabilities id by id, so an id must be the same token for both.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's, or `None` where it is not known; then there is a warning.
        assume_same (`bool`): warn instead of raising.

    Raises:
        ValueError: with the first ids that differ.
    """
    if teacher is None:
        logger.warning(
            "The teacher came without a tokenizer, so it was not checked that its token ids mean what they mean to the "
            "student. Load the teacher from a folder or hub name that holds its tokenizer to have this checked."
        )
        return
    of_student = {index: token for token, index in student.get_vocab().items()}
    of_teacher = {index: token for token, index in teacher.get_vocab().items()}
    differing = [i for i in sorted(of_student.keys() | of_teacher.keys()) if of_student.get(i) != of_teacher.get(i)]
    if not differing:
        return
    shown = "; ".join(f"{i}: {of_student.get(i)!r} against {of_teacher.get(i)!r}" for i in differing[:5])
    message = (
        f"The tokenizers of student and teacher differ in {len(differing)} of {len(of_student)} ids. The first, "
        f"student against teacher: {shown}."
    )
    if not assume_same:
        raise ValueError(
            f"{message} The divergence compares probabilities id by id, so it would compare different tokens. Use a "
            "teacher with the student's tokenizer, or set `assume_same_tokenizer=True` if these ids do not matter."
        )
    logger.warning(f"{message} Going on, as `assume_same_tokenizer=True` asks.")


def check_teacher_vocabulary(student_tokenizer: PreTrainedTokenizerBase, teacher_size: int, assume_same: bool) -> None:
    """Every id that the tokenizer can produce must have a row in the teacher's embedding."""
    needed = max(student_tokenizer.get_vocab().values()) + 1
    if needed > teacher_size and not assume_same:
        raise ValueError(
            f"The tokenizer produces ids up to {needed - 1}, but the teacher's vocabulary ends at {teacher_size - 1}. "
            "Use a teacher for this tokenizer, or set `assume_same_tokenizer=True` if those ids never occur in prompts."
        )


def check_checkpoint_boundary(save_steps: float, accumulation: int, generate_every: int) -> None:
    """
    Warn where a checkpoint falls inside a generation batch.

    Resuming from such a checkpoint generates anew in the middle, so the run is not the uninterrupted one.

    Args:
        save_steps (`float`): optimizer steps between checkpoints; a share of all steps (below 1) is not checked.
        accumulation (`int`): micro-steps per optimizer step.
        generate_every (`int`): micro-steps per generation batch, all iterations over it included.
    """
    if save_steps >= 1 and int(save_steps) * accumulation % generate_every != 0:
        optimizer_steps = generate_every / accumulation
        logger.warning(
            f"`save_steps={int(save_steps)}` does not fall on the end of a generation batch, which lasts "
            f"{optimizer_steps:g} optimizer steps. A run resumed from there generates anew in the middle of one and "
            "will not repeat the uninterrupted run exactly. Choose a multiple to avoid it."
        )
