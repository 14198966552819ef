"""The student's forward pass for log-probabilities under the policy of the rollouts runs only where they are read."""

from __future__ import annotations

import pytest
from helpers import config

from trl_distill import OPDTrainer
from trl_distill.models.properties import unwrap_adapter


def forward_passes(folder, tokenizer, prompts, student, teacher, *, rewards=False, **changes) -> tuple[int, bool]:
    """
    Of the student, in four micro-steps with two generation batches, half of them on stale rollouts, besides those of
    generation; and whether micro-batches hold the old log-probabilities.
    """
    trainer = OPDTrainer(
        model=student,
        teacher_model=teacher,
        reward_funcs=(lambda completions, **_: [float(len(text)) for text in completions]) if rewards else None,
        args=config(
            folder,
            num_generations=2 if rewards else 1,
            steps_per_generation=2,
            gradient_accumulation_steps=1,
            max_steps=4,
            **{"kl_top_k": 4, **changes},
        ),
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    calls, held, generate = [0], [], trainer.model.generate

    def generated(*args, **kwargs):
        before = calls[0]
        found = generate(*args, **kwargs)
        calls[0] = before
        return found

    def called(*_):
        calls[0] += 1

    unwrap_adapter(trainer.model).base_model.register_forward_hook(called)
    trainer.model.generate = generated
    trainer.loss_computed = lambda loss, inputs: held.append("old_per_token_logps" in inputs)
    trainer.train()
    assert len(set(held)) == 1
    return calls[0], held[0]


@pytest.mark.parametrize(
    ("changes", "read"),
    [
        ({}, False),
        ({"kl_estimator": "sampled"}, True),
        ({"kl_estimator": "topk"}, True),
        ({"kl_discount": 1.0}, True),
        ({"rewards": True}, True),
        ({"entropy_coef": 0.01}, True),
    ],
    ids=str,
)
def test_old_log_probabilities_are_computed_where_they_are_read(
    tmp_path, tokenizer, prompts, student, teacher, changes, read
):
    passes = forward_passes(tmp_path, tokenizer, prompts, student, teacher, **changes)
    assert passes == (4 + 4 * read, read)  # TRL takes them in parts of a micro-batch
