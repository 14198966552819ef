"""What several test files share: tiny models of several families, a configuration for the CPU, a hand-made batch."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    set_seed,
)

from trl_distill import OPDConfig


WORDS = ["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz", "."]
VOCAB = len(WORDS)  # 29
PAD, EOS = 0, 1

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "initializer_range": 0.3,  # far from uniform, so that a KL is not zero by accident
}
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "tied": (Qwen3Config, {"tie_word_embeddings": True}),
    "untied": (LlamaConfig, {"tie_word_embeddings": False}),
    "bias": (PhiConfig, {"tie_word_embeddings": False}),  # Phi's LM head has a bias
    "softcap": (Gemma2Config, {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, "sliding_window": 64}),
    "scale": (CohereConfig, {"logit_scale": 0.5}),
    "inverse_scale": (GraniteConfig, {"logits_scaling": 2.0, "tie_word_embeddings": False}),
}


# renders user, assistant with tool calls, and tool messages: what TRL asks of a template before it allows tools
TOOL_TEMPLATE = """{%- for message in messages %}
{{- message['role'][0] + ' ' }}
{%- if message.get('content') %}{{- message['content'] }}{%- endif %}
{%- for call in message.get('tool_calls') or [] %}
{{- ' ' + call['function']['name'] }}{{- call['function']['arguments'] | tojson }}
{%- endfor %}
{{- ' . ' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'a ' }}{%- endif %}"""


def make_tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token=".")


def make_model(family: str = "tied", seed: int = 0, **changes: Any):
    """A causal LM of about 5,000 parameters in fp32."""
    config_class, special = FAMILIES[family]
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config_class(**{**SIZES, **special, **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)  # initialised to zero otherwise
    return model


def config(output_dir: Any, **changes: Any) -> OPDConfig:
    """Settings for a fast run on the CPU in fp32: greedy rollouts (`top_k=1`), so that two runs see the same ones."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "top_k": 1,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return OPDConfig(output_dir=str(output_dir), **{**settings, **changes})


def batch(rows: int = 3, prompt: int = 4, completion: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    """A micro-batch as GRPOTrainer makes them, with padding on both sides, as unequal as the shape allows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(2, VOCAB, shape, generator=generator)

    prompt_lengths = torch.tensor([prompt, 1, 2, 3] * rows)[:rows].clamp(max=prompt)
    completion_lengths = torch.tensor([2, completion, 1, 4] * rows)[:rows].clamp(max=completion)
    prompt_mask = (torch.arange(prompt) >= (prompt - prompt_lengths)[:, None]).long()
    completion_mask = (torch.arange(completion) < completion_lengths[:, None]).long()
    return {
        "prompt_ids": draw(rows, prompt).masked_fill(prompt_mask == 0, PAD),
        "prompt_mask": prompt_mask,
        "completion_ids": draw(rows, completion).masked_fill(completion_mask == 0, PAD),
        "completion_mask": completion_mask,
        "advantages": torch.zeros(rows),
        "num_items_in_batch": completion_mask.sum(),
    }


def in_training(trainer):
    """The state that `Trainer.train` puts a trainer in before it asks for a loss, without accumulation."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def gradients(model: torch.nn.Module) -> torch.Tensor:
    """All gradients as one vector, zeros where there is none."""
    return torch.cat(
        [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten().double() for p in model.parameters()]
    )


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()
