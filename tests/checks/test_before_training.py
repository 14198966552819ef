"""What the trainer settles before the first step: stop tokens, context, generation settings, whether it can save."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import config, make_model
from peft import LoraConfig
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from trl_distill import OPDTrainer


class ReadOnly(GgufHfQuantizer):
    """As transformers leaves it on a model that was loaded from GGUF."""

    def __init__(self):
        self.quantization_config = SimpleNamespace(quant_method="gguf")


@pytest.mark.parametrize("adapter", [False, True])
def test_a_student_that_cannot_be_saved(tmp_path, tokenizer, prompts, student, teacher, adapter):
    student.hf_quantizer = ReadOnly()
    with pytest.raises(ValueError, match="quantized with gguf and is not serializable"):  # transformers, at the end
        student.save_pretrained(tmp_path / "x")

    def make():
        return OPDTrainer(
            model=student,
            teacher_model=teacher,
            args=config(tmp_path),
            train_dataset=prompts,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if adapter else None,
        )

    if adapter:
        trainer = make()
        trainer.save_model(str(tmp_path / "adapter"))
        assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
        return
    with pytest.raises(ValueError, match="loaded from GGUF, which transformers can read but not save"):
        make()


def test_a_student_by_name_from_gguf(saved, prompts):
    with pytest.raises(ValueError, match="loaded from GGUF, which transformers can read but not save"):
        OPDTrainer(
            model=str(saved / "student"),
            teacher_model=str(saved / "teacher"),
            args=config(saved, model_init_kwargs={"gguf_file": "student.gguf"}),
            train_dataset=prompts,
        )


@pytest.mark.parametrize("merge", [True, False])
def test_other_stop_tokens_are_merged_and_said(tmp_path, tokenizer, prompts, student, teacher, caplog, merge):
    teacher.generation_config.eos_token_id = [1, 28]
    trainer = OPDTrainer(
        model=student,
        teacher_model=teacher,
        args=config(tmp_path, merge_stop_tokens=merge),
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    assert trainer.estimator.stops == ([1, 28] if merge else [])
    ends = [1, 28] if merge else [1]
    assert trainer.eos_token_ids == trainer.generation_config.eos_token_id == ends
    said = "The student ends with '<eos>' (1), the teacher with '<eos>' (1), '.' (28)."
    assert caplog.text.count(said) == 1
    assert ("completions would grow" in caplog.text) is not merge
    trainer.train()


def test_ids_that_mean_nothing_to_the_tokenizer_are_no_stop_tokens(tmp_path, tokenizer, prompts, student, teacher):
    """A configuration's default is no stop token of either side, so there is nothing to merge."""
    student.generation_config.eos_token_id = [1, 5]
    trainer = OPDTrainer(
        model=student,
        teacher_model=teacher,
        args=config(tmp_path),
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    assert trainer.estimator.stops == []
    assert trainer.eos_token_ids == [1, 5]  # TRL's business


def test_under_vllm_merged_stop_tokens_end_rollouts_too(tmp_path, tokenizer, prompts, student, teacher):
    trainer = OPDTrainer(
        model=student,
        teacher_model=teacher,
        args=config(tmp_path),
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    trainer.use_vllm, trainer.vllm_generation = True, SimpleNamespace(generation_kwargs={"stop_token_ids": [7]})
    trainer.end_rollouts_with([1, 28])
    assert trainer.eos_token_ids == [1, 28]
    assert trainer.vllm_generation.generation_kwargs == {"stop_token_ids": [1, 7, 28]}


def test_prompts_beyond_the_context_stop_the_run(tmp_path, tokenizer, prompts, student, teacher):
    with pytest.raises(ValueError, match="the student has 128 positions") as error:
        OPDTrainer(
            model=student,
            teacher_model=teacher,
            args=config(tmp_path, max_completion_length=125),
            train_dataset=prompts,
            processing_class=tokenizer,
        )
    assert error.value.report.count("error") == 2  # the teacher has no more


OWN = {
    "ids": {
        "suppress_tokens": [5, 6, 7, 8, 9, 10, 11, 12],
        "begin_suppress_tokens": list(range(2, 20)),
        "bad_words_ids": [[i] for i in range(2, 15)],
        "sequence_bias": [[[5], 50.0]],
        "forced_eos_token_id": 7,
    },
    "lengths": {"min_new_tokens": 8, "min_length": 30, "exponential_decay_length_penalty": (1, 9.0), "max_time": 1e-9},
    "probabilities": {"no_repeat_ngram_size": 1, "repetition_penalty": 5.0, "typical_p": 0.1, "min_p": 0.9},
    "shapes": {"num_beams": 3, "num_return_sequences": 2},
    "what generate refuses or returns otherwise": {"stop_strings": ["a"], "return_dict_in_generate": True},
}


@pytest.fixture(scope="module")
def with_own_settings(tmp_path_factory, tokenizer, prompts):
    """Trains and evaluates a student that has generation settings of its own."""

    def run(own):
        student = make_model(seed=1)
        for name, value in own.items():
            setattr(student.generation_config, name, value)
        before = student.generation_config.to_dict()
        trainer = OPDTrainer(
            model=student,
            teacher_model=make_model(seed=2, hidden_size=24),
            args=config(tmp_path_factory.mktemp("run"), max_steps=1, top_k=0),
            train_dataset=prompts,
            eval_dataset=prompts.select(range(4)),
            processing_class=tokenizer,
        )
        trainer.train()
        trainer.evaluate()
        assert student.generation_config.to_dict() == before  # what is saved
        weights = torch.cat([p.detach().flatten() for p in student.parameters()])
        return trainer, (weights, trainer.state.log_history[-1]["eval_loss"])

    return run


@pytest.fixture(scope="module")
def without_any(with_own_settings):
    return with_own_settings({})


@pytest.mark.parametrize("kind", OWN)
def test_the_students_own_generation_settings_do_not_shape_rollouts(with_own_settings, without_any, kind):
    """As in evaluations and reports; training and evaluation are the same bit for bit, and one line lists them."""
    trainer, (weights, loss) = with_own_settings(OWN[kind])
    _, (expected_weights, expected_loss) = without_any
    assert torch.equal(weights, expected_weights)
    assert loss == expected_loss
    (finding,) = (found for found in trainer.preflight.findings if found.check == "sampling")
    assert (finding.level, finding.notify) == ("ok", True)
    for name in OWN[kind].keys() - {"return_dict_in_generate"}:  # that one changes no token
        assert f"`{name}=" in finding.found
    (plain,) = (found for found in without_any[0].preflight.findings if found.check == "sampling")
    assert "left aside" not in plain.found
    assert not plain.notify


def test_what_the_run_asks_for_is_used_and_named(tmp_path, tokenizer, prompts, student, teacher, caplog):
    student.generation_config.update(temperature=0.6, top_p=0.95)  # of many chat models: not worth a warning
    args = config(tmp_path, kl_estimator="sampled", top_k=0, generation_kwargs={"suppress_tokens": [5], "num_beams": 1})
    trainer = OPDTrainer(
        model=student, teacher_model=teacher, args=args, train_dataset=prompts, processing_class=tokenizer
    )
    (finding,) = (found for found in trainer.preflight.findings if found.check == "sampling")
    assert finding.level == "warning"
    assert finding.found.startswith("`suppress_tokens=[5]` changes the distribution")
    assert "left aside, and saved with it: `temperature=0.6`, `top_p=0.95`." in finding.found
    seen = []
    trainer.safeguards.watch = lambda batch: seen.append(batch["completion_ids"])
    trainer.train()
    assert seen
    assert all(5 not in ids for ids in seen)
