"""`cast_lm_head_to_fp32`: every estimator and kernel computes with fp32 logits, whatever the models' dtype."""

from __future__ import annotations

import pytest
import torch
from helpers import VOCAB, batch, config, gradients, in_training, make_model, relative_error

from trl_distill import OPDTrainer
from trl_distill.models.hidden_states import last_hidden


def fp32_log_probs(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """From the model's own hidden states, packed or padded as in training, projected in fp32: `(B, C, V)`."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    hidden = last_hidden(model, input_ids=ids, attention_mask=mask).float()
    logits = hidden @ model.get_output_embeddings().weight.float().T
    return logits[:, -inputs["completion_ids"].shape[1] - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("kernel", [False, True], ids=["ours", "TRL's kernel"])
@pytest.mark.parametrize("estimator", ["full", "topk", "sampled"])
@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16], ids=["student fp32", "student bf16"])
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16], ids=["teacher fp32", "teacher bf16"])
@pytest.mark.parametrize("rewards", [False, True], ids=["pure", "rewards"])
def test_logits_in_fp32(
    tmp_path, tokenizer, prompts, monkeypatch, kernel, estimator, student_dtype, teacher_dtype, rewards
):
    if kernel:
        monkeypatch.setattr("trl_distill.estimators.full.uses_kernel", lambda *_: True)
    teacher = make_model("untied", seed=2).to(teacher_dtype)
    trainer = in_training(
        OPDTrainer(
            model=make_model("untied", seed=1).to(student_dtype),
            teacher_model=teacher,
            reward_funcs=[lambda completions, **_: [0.0] * len(completions)] if rewards else None,
            args=config(
                tmp_path,
                num_generations=2 if rewards else 1,
                kl_estimator=estimator,
                kl_top_k=VOCAB,  # so that the head of `topk` is the whole vocabulary
                cast_lm_head_to_fp32=True,
            ),
            train_dataset=prompts,
            processing_class=tokenizer,
        )
    )
    inputs = batch(rows=4)
    found = trainer.rollout_loss(trainer.model, inputs)
    found.backward()
    ours = gradients(trainer.model)
    trainer.model.zero_grad()
    log_q = fp32_log_probs(trainer.model, inputs)
    with torch.no_grad():
        log_p = fp32_log_probs(teacher, inputs)
    mask = inputs["completion_mask"].bool()
    if estimator == "sampled":  # the value; its gradient is a score function's
        ids = inputs["completion_ids"][..., None]
        expected = (log_q - log_p).gather(2, ids)[..., 0][mask].mean()
    else:
        expected = (log_q.exp() * (log_q - log_p)).sum(-1)[mask].mean()
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-4, atol=1e-5)
    if estimator != "sampled":
        expected.backward()
        exact = student_dtype == torch.float32
        assert relative_error(ours, gradients(trainer.model)) < (1e-4 if exact else 2e-2)
