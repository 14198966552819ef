"""What a GRPO script sets keeps working when its trainer is exchanged, alone (beta = 0) and beside a teacher."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from datasets import Dataset
from helpers import EOS, PAD, TOOL_TEMPLATE, VOCAB, WORDS, config, make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, OPTConfig, Qwen3Config, set_seed
from trl import GRPOConfig

from trl_distill import OPDTrainer


def length(completions, **_) -> list[float]:
    return [float(len(text)) for text in completions]


def variety(completions, **_) -> list[float]:
    return [float(len(set(text))) for text in completions]


async def asynchronous(completions, **_) -> list[float]:
    return [float(len(set(text))) for text in completions]


def silent(completions, **_) -> list[None]:
    return [None] * len(completions)


def of_a_column(completions, target, trainer_state, **_) -> list[float]:
    assert trainer_state.global_step >= 0
    return [-float(abs(len(text) - value)) for text, value in zip(completions, target, strict=True)]


def reward_model():
    set_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = Qwen3Config(vocab_size=VOCAB, head_dim=8, num_key_value_heads=2, num_labels=1, pad_token_id=PAD, **sizes)
    return AutoModelForSequenceClassification.from_config(made)


@pytest.fixture(params=["grpo", "beside a teacher"])
def make(request, tmp_path, tokenizer, prompts, student, teacher):
    """The trainer of a GRPO script, with our class in place of TRL's."""
    with_teacher = request.param == "beside a teacher"

    def build(model=student, reward_funcs=length, train_dataset=None, extra=None, **changes):
        settings = {"num_generations": 2, "top_k": 0, "beta": 0.5 if with_teacher else 0.0, **changes}
        return OPDTrainer(
            model=model,
            teacher_model=teacher if with_teacher else None,
            reward_funcs=reward_funcs,
            args=config(tmp_path, **settings),
            train_dataset=prompts if train_dataset is None else train_dataset,
            processing_class=tokenizer,
            **(extra or {}),
        )

    return build


def trained(trainer):
    """Trains; asserts that every trainable parameter has moved, and that no other has."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(before[name], parameter) != parameter.requires_grad, name
        assert parameter.isfinite().all(), name
    assert trainer.state.log_history[-1]["train_loss"] is not None
    return trainer


SETTINGS = {
    "defaults of dtype and checkpointing": {"bf16": None, "gradient_checkpointing": True},
    "more generations than rows": {
        "per_device_train_batch_size": 2,
        "num_generations": 4,
        "gradient_accumulation_steps": 2,
    },
    "iterations": {"num_iterations": 2},
    "importance of sequences": {"num_iterations": 2, "importance_sampling_level": "sequence"},
    "steps per generation": {"steps_per_generation": 2},
    "off-policy mask": {"off_policy_mask_threshold": 0.5},
    "two-sided clipping": {"delta": 2.0},
    "tokens of high entropy": {"top_entropy_quantile": 0.2},
    "head in fp32": {"cast_lm_head_to_fp32": True},
    "workers": {"dataloader_num_workers": 2},
    "sampling": {"top_p": 0.9, "top_k": 10, "min_p": 0.01, "repetition_penalty": 1.1},
    "beams": {"generation_kwargs": {"do_sample": True, "top_k": 20, "num_beams": 2, "length_penalty": -0.1}},
    "temperature": {"temperature": 0.7},
    **{f"scale_rewards={scale}": {"scale_rewards": scale} for scale in (True, False, "group", "batch", "none")},
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_settings(make, changes):
    trained(make(**changes))


REWARDS = {
    "a model": [reward_model],
    "several kinds": [length, reward_model, asynchronous],
    "one that abstains": [length, silent],
    "of a column": [of_a_column],
}


@pytest.mark.parametrize("rewards", REWARDS.values(), ids=REWARDS)
def test_rewards(make, tokenizer, prompts, rewards):
    made = [one() if one is reward_model else one for one in rewards]
    classes = {"reward_processing_classes": [tokenizer if one is reward_model else None for one in rewards]}
    dataset = prompts.add_column("target", list(range(len(prompts))))
    trained(make(reward_funcs=made, train_dataset=dataset, extra=classes))


def test_weighted_rewards_are_normalised_first_and_logged(make):
    trainer = trained(
        make(
            reward_funcs=[length, variety],
            reward_weights=[0.7, 0.3],
            multi_objective_aggregation="normalize_then_sum",
        )
    )
    logs = trainer.state.log_history[0]
    assert {f"rewards/{name}/{what}" for name in ("length", "variety") for what in ("mean", "std")} <= set(logs)


def test_a_warning_where_no_reward_applies(make, caplog):
    with caplog.at_level("WARNING", logger="trl.trainer.grpo_trainer"):
        make(reward_funcs=silent).train()
    assert "All reward functions returned None" in caplog.text


@pytest.mark.parametrize("changes", [{}, {"num_generations_eval": 1}, {"eval_on_start": True, "loss_type": "grpo"}])
def test_evaluation(make, prompts, changes):
    trainer = make(eval_strategy="steps", eval_steps=1, extra={"eval_dataset": prompts.select(range(8))}, **changes)
    trainer.train()
    assert "eval_reward" in {key for row in trainer.state.log_history for key in row}


@pytest.mark.parametrize("given_as", ["config", "model"])
def test_adapters(make, student, given_as):
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    if given_as == "config":
        trained(make(extra={"peft_config": adapter}))
    else:
        trained(make(model=get_peft_model(student, adapter)))


@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2}, {"entropy_coef": 0.01}])
def test_a_backbone_that_the_model_goes_past(make, changes):
    """OPT's own forward calls the decoder within what others give their hidden states with."""
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    set_seed(1)
    made = OPTConfig(vocab_size=VOCAB, num_attention_heads=2, pad_token_id=PAD, eos_token_id=EOS, dropout=0.0, **sizes)
    trainer = make(model=AutoModelForCausalLM.from_config(made), **changes)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_truncated_completions_teach_nothing(make, student):
    """All of them are cut here, so that nothing is left to learn from."""
    with torch.no_grad():
        student.model.embed_tokens.weight[EOS] = 0.0
    trainer = make(mask_truncated_completions=True, max_completion_length=2, top_k=2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.log_history[0]["completions/clipped_ratio"] == 1.0
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(before[name], parameter), name


def test_rows_reach_a_step_as_they_are(make, prompts):
    """Each prompt as often as it is answered, in the order of the dataset, each generation batch as often as reused."""
    trainer = make(
        train_dataset=prompts.select(range(12)),
        per_device_train_batch_size=6,
        num_generations=4,
        steps_per_generation=4,
        gradient_accumulation_steps=3,
        num_iterations=2,
        num_train_epochs=1,
        max_steps=-1,
        shuffle_dataset=False,
    )
    with patch.object(OPDTrainer, "training_step", wraps=trainer.training_step) as steps:
        trainer.train()
    seen = [call.args[1] for call in steps.call_args_list]
    batches = [[{"prompt": text} for text in prompts["prompt"][i : i + 6] for _ in range(4)] for i in (0, 6)]
    assert seen == [batches[0]] * 8 + [batches[1]] * 8


def multiply(a: int, b: int) -> int:
    """
    Multiplies two integers.

    Args:
        a: The first.
        b: The second.
    """
    return a * b


async def multiply_later(a: int, b: int) -> int:
    """
    Multiplies two integers.

    Args:
        a: The first.
        b: The second.
    """
    return a * b


TOOL_CALLS = {  # how an answer is parsed: the form of transformers from 5.13 on
    "defaults": {"role": "assistant"},
    "start_anchor": ". a",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<eos>\s*", "content": "text"},
    },
}


@pytest.mark.parametrize("tool", [multiply, multiply_later])
@pytest.mark.parametrize("with_teacher", [True, False])
def test_tools(tmp_path, prompts, tool, with_teacher):
    """Of three answers one calls a tool, one calls it wrongly, one does not."""
    calls = [f'<tool_call>{{"name":"{tool.__name__}","arguments":{{"a":3,"{other}":4}}}}</tool_call>' for other in "bc"]
    tokenizer = make_tokenizer([*WORDS, *calls])
    tokenizer.chat_template, tokenizer.response_template = TOOL_TEMPLATE, TOOL_CALLS
    dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in prompts["prompt"]]})
    trainer = OPDTrainer(
        model=make_model(seed=1, vocab_size=VOCAB + 2),
        teacher_model=make_model(seed=2, vocab_size=VOCAB + 2) if with_teacher else None,
        reward_funcs=lambda completions, **_: [float(len(messages)) for messages in completions],
        args=config(
            tmp_path,
            beta=0.5 if with_teacher else 0.0,
            num_generations=3,
            per_device_train_batch_size=3,
            max_completion_length=32,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        tools=[tool],
    )

    def generate(input_ids, **_):
        first = [[VOCAB, EOS], [VOCAB + 1, EOS], [2, EOS]]
        answers = first if len(input_ids) == 3 else [[3, EOS]] * len(input_ids)
        return torch.cat([input_ids, torch.tensor(answers)], dim=1)

    with patch.object(trainer.model, "generate", side_effect=generate):
        trained(trainer)
    logs = trainer.state.log_history[0]
    assert logs["tools/call_frequency"] == pytest.approx(2 / 3)
    assert logs["tools/failure_frequency"] == pytest.approx(1 / 2)
    if with_teacher:
        assert logs["distill/reverse_kl"] > 0


def test_a_config_of_trl_and_models_by_name(tmp_path, prompts, saved):
    """Everything by name, as scripts have it: models are loaded, and a `GRPOConfig` is enough for plain GRPO."""
    args = GRPOConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=3,
        num_generations=3,
        max_completion_length=8,
        max_steps=2,
        learning_rate=0.1,
        report_to="none",
        use_cpu=True,
    )
    trained(OPDTrainer(model=str(saved / "student"), reward_funcs=length, args=args, train_dataset=prompts))
