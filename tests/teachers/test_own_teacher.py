"""The student itself as teacher, without its adapter or as a moving average; prompts of the teacher's own."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import IterableDataset
from helpers import config
from peft import LoraConfig, get_peft_model
from teacher_runs import generated, lora, trained

from trl_distill import MovingAverage, OPDTrainer
from trl_distill.rollouts import MicroBatch
from trl_distill.training.checkpoints import mark_complete


@pytest.mark.parametrize("discount", [0.0, 1.0])
@pytest.mark.parametrize("estimator", ["full", "topk", "sampled"])
def test_adapter_off_equals_a_copy_of_the_base(make, student, estimator, discount):
    """With an adapter that starts away from zero, so that there is something to learn."""
    settings = {"kl_estimator": estimator, "kl_top_k": 4, "kl_discount": discount, "peft_config": lora()}
    expected = trained(make(teacher_model=copy.deepcopy(student), **settings))
    found = trained(make(teacher_model="adapter-off", **settings))
    for a, b in zip(expected[0], found[0], strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    torch.testing.assert_close(expected[1], found[1], rtol=1e-4, atol=1e-6)


def test_adapter_off_needs_an_adapter_and_a_frozen_head(make):
    with pytest.raises(ValueError, match="the student has no adapter"):
        make(teacher_model="adapter-off")
    with pytest.raises(ValueError, match="LM head is trained too"):
        make(
            teacher_model="adapter-off",
            peft_config=LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        )


@pytest.mark.parametrize("peft", [False, True])
def test_the_moving_average_is_one(make, prompts, peft):
    """After some steps the teacher's signal is that of a model made by hand from the averaged weights."""
    hints = prompts.add_column("teacher_prompt", [f"h {text}" for text in prompts["prompt"]])
    trainer = make(
        teacher_model=None,
        teacher_ema=0.8,
        train_dataset=hints,
        max_steps=3,
        **({"peft_config": lora()} if peft else {}),
    )
    average = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    follow = trainer.teacher.follow

    def by_hand():
        follow()
        for name, parameter in trainer.model.named_parameters():
            if name in average:
                average[name] = 0.8 * average[name] + 0.2 * parameter.detach()

    trainer.teacher.follow = by_hand
    trainer.train()
    own = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    batch = generated(trainer, [{"prompt": "a b"}] * 2)
    (score,) = trainer.pool.score(MicroBatch.from_inputs(batch), training=True)
    for name, parameter in trainer.model.named_parameters():  # the student has its own weights back
        assert torch.equal(parameter, own[name])
        parameter.data = average.get(name, parameter.data)
    trainer.model.eval()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -batch["completion_ids"].shape[1] - 1 : -1]
    found = score.signal.head.logits(score.signal.hidden)
    torch.testing.assert_close(found, logits[score.mask], rtol=1e-4, atol=1e-5)
    moved = max((own[name] - value).abs().max() for name, value in average.items())
    assert moved > 1e-3


def test_the_moving_average_is_saved_and_resumed(make, prompts, tmp_path):
    hints = prompts.add_column("teacher_prompt", ["h"] * len(prompts))
    settings = {
        "teacher_model": None,
        "teacher_ema": 0.8,
        "train_dataset": hints,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = make(**settings, max_steps=4)
    whole.train()
    resumed = make(**settings, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, average in whole.teacher.averages.items():
        torch.testing.assert_close(resumed.teacher.averages[name], average, rtol=1e-5, atol=1e-7)
    (tmp_path / "checkpoint-2" / "teacher_ema.safetensors").unlink()
    mark_complete(tmp_path / "checkpoint-2")  # as of a run that had none
    with pytest.raises(ValueError, match="from a run without this `teacher_ema`"):
        make(**settings, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_two_moving_averages_have_files_of_their_own(make, prompts, tmp_path):
    rows = prompts.add_column("teacher", ["slow", "fast"] * (len(prompts) // 2))
    rows = rows.add_column("teacher_prompt", ["h"] * len(prompts))
    averages = {"slow": MovingAverage(0.9), "fast": MovingAverage(0.5)}
    trainer = make(teacher_model=averages, train_dataset=rows, save_strategy="steps", save_steps=2)
    trainer.train()
    for teacher in averages.values():
        kept = {name: average.clone() for name, average in teacher.averages.items()}
        teacher.load(str(tmp_path / "checkpoint-2"))
        assert all(torch.equal(teacher.averages[name], average) for name, average in kept.items())
    assert not all(map(torch.equal, averages["slow"].averages.values(), averages["fast"].averages.values()))


def test_a_prompt_for_the_teacher_beside_environments(make, prompts):
    class Nothing:
        def reset(self, **_):
            return None

    rows = prompts.add_column("teacher_prompt", ["h"] * len(prompts))
    with pytest.raises(ValueError, match="environments append observations to the prompts"):
        make(train_dataset=rows, environment_factory=Nothing)


def test_adapter_off_refuses_an_adapter_that_trains_the_base(make):
    with pytest.raises(ValueError, match="this teacher would change during training"):
        make(teacher_model="adapter-off", peft_config=LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only"))


def test_what_the_user_froze_stays_frozen(make, student):
    """PEFT switches a whole adapter on again when it leaves `disable_adapter`."""
    model = get_peft_model(student, lora())
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    trainer = make(model=model, teacher_model="adapter-off")
    trainer.train()
    assert {name: parameter.requires_grad for name, parameter in trainer.model.named_parameters()} == before


def test_columns_that_would_be_dropped_or_missing_at_evaluation(make, pair, prompts, tmp_path, student, tokenizer):
    hints = prompts.add_column("teacher_prompt", ["h"] * len(prompts))
    with pytest.raises(ValueError, match="`remove_unused_columns=True` drops the columns"):
        make(train_dataset=hints, remove_unused_columns=True)
    with pytest.raises(ValueError, match="no `teacher` column"):
        OPDTrainer(
            model=student,
            teacher_model=pair,
            args=config(tmp_path),
            train_dataset=prompts.add_column("teacher", ["math"] * len(prompts)),
            eval_dataset=prompts,
            processing_class=tokenizer,
        )


def test_streaming_rows_may_bring_prompts_that_are_not_known_yet(make, prompts):
    rows = [{"prompt": text, "teacher_prompt": f"h {text}"} for text in prompts["prompt"]]
    streaming = IterableDataset.from_generator(lambda: iter(rows))
    assert streaming.column_names is None
    trainer = make(teacher_model=None, teacher_ema=0.9, train_dataset=streaming, max_completion_length=None)
    trainer.train()
    assert trainer.state.log_history[0]["distill/reverse_kl"] > 0


def test_a_decay_that_is_none():
    with pytest.raises(ValueError, match="it is the decay of a moving average"):
        MovingAverage(1.0)


# -- prompts of the teacher's own ------------------------------------------------------------------------------------


def test_teacher_prompts_of_other_lengths_keep_completions_aligned(make, teacher):
    """The signal is the teacher's hidden state at the same completion tokens after its own prompt."""
    trainer = make()
    rows = [
        {"prompt": "a b", "teacher_prompt": "c d e f g"},
        {"prompt": "a b c d", "teacher_prompt": "h"},
        {"prompt": "e", "teacher_prompt": None},
    ]
    batch = generated(trainer, rows)
    (score,) = trainer.pool.score(MicroBatch.from_inputs(batch), training=True)
    logits = score.signal.head.logits(score.signal.hidden).split(score.mask.sum(1).tolist())
    tokenizer = trainer.tokenizer
    for row, found, completion, mask in zip(rows, logits, batch["completion_ids"], score.mask, strict=True):
        prompt = tokenizer(row["teacher_prompt"] or row["prompt"])["input_ids"]
        ids = torch.tensor([[*prompt, *completion[mask].tolist()]])
        expected = teacher(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_teacher_prompts_may_be_messages(make, tokenizer, prompts):
    template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}a {% endif %}"
    with_template = copy.deepcopy(tokenizer)
    with_template.chat_template = template
    trainer = make()
    trainer._tokenizer = trainer.processing_class = with_template
    trainer.chat_template = None
    said = [{"role": "user", "content": "a b"}]
    rows = [{"prompt": said, "teacher_prompt": [{"role": "system", "content": "c d"}, *said]}, {"prompt": said}]
    batch = generated(trainer, rows)
    asked = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(batch["teacher_prompt_ids"], batch["teacher_prompt_mask"], strict=True)
    ]
    assert asked == [tokenizer("c d a b a")["input_ids"], tokenizer("a b a")["input_ids"]]


def test_a_teacher_prompt_that_is_none(make, prompts):
    with pytest.raises(ValueError, match="Row 3 of the training dataset has the teacher prompt ''"):
        make(train_dataset=prompts.add_column("teacher_prompt", ["a", None, "b", "", *["c"] * 28]))
