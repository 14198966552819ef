"""Architectures that differ from Llama's: heads, backbones, padding, and those that are refused."""

from __future__ import annotations

import pytest
import torch
from helpers import SIZES, VOCAB, config
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertGenerationConfig,
    GraniteMoeConfig,
    HunYuanDenseV1Config,
    InklingTextConfig,
    Llama4TextConfig,
    LlamaConfig,
    MptConfig,
    RecurrentGemmaConfig,
    set_seed,
    xLSTMConfig,
)

from trl_distill import OPDTrainer
from trl_distill.checks import models as model_checks
from trl_distill.heads.lm_head import LMHead
from trl_distill.models.hidden_states import last_hidden
from trl_distill.models.properties import has_relative_positions


HUNYUAN = HunYuanDenseV1Config(**SIZES)
LLAMA4 = Llama4TextConfig(
    **SIZES, intermediate_size_mlp=32, num_local_experts=2, layer_types=["chunked_attention", "full_attention"]
)
ENCODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TO_ALL = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "initializer_range": 0.3}


def make(model_config):
    set_seed(1)
    model = AutoModelForCausalLM.from_config(model_config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.dim() == 1:
            parameter.data *= 1 + 0.3 * torch.randn_like(parameter)
    return model


def trainer(tmp_path, tokenizer, prompts, model_config, **changes):
    return OPDTrainer(
        model=make(model_config),
        teacher_model=make(model_config),
        args=config(tmp_path, assume_different_teacher=True, **changes),
        train_dataset=prompts,
        processing_class=tokenizer,
    )


def heads():
    small = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, **TO_ALL}
    yield "mpt", MptConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=VOCAB, logit_scale=0.5, initializer_range=0.3)
    yield (
        "recurrent_gemma",
        RecurrentGemmaConfig(
            **small, num_key_value_heads=2, logits_soft_cap=0.1, block_types=["recurrent", "attention"]
        ),
    )
    yield (
        "xlstm",
        xLSTMConfig(vocab_size=VOCAB, hidden_size=128, num_heads=2, num_hidden_layers=1, output_logit_soft_cap=0.1),
    )
    yield "inkling", InklingTextConfig(**SIZES, logits_mup_width_multiplier=4.0, moe_intermediate_size=8)
    yield "llama4", LLAMA4


@pytest.mark.parametrize(
    ("name", "model_config"), list(heads()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_logits_from_hidden_states_are_the_models_own(name, model_config):
    """Scales and soft caps under other names, one that is not used, and a backbone that `base_model` does not find."""
    model, ids = make(model_config), torch.arange(2, 10)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        computed = LMHead(model).logits(last_hidden(model, input_ids=ids))
    torch.testing.assert_close(computed, expected, rtol=1e-5, atol=1e-6)


def test_padding_is_kept_where_it_changes_logits():
    """Rotary positions, but a norm after the rotation, whose weights differ."""
    model, ids = make(HUNYUAN), torch.arange(2, 10)[None]
    padded, attended = torch.nn.functional.pad(ids, (3, 0)), torch.ones(1, 11, dtype=torch.long)
    attended[:, :3] = 0
    with torch.no_grad():
        alone, after = model(ids).logits, model(padded, attention_mask=attended).logits[:, 3:]
    assert (after - alone).norm() / alone.norm() > 1e-3
    assert not has_relative_positions(model.config)
    assert has_relative_positions(LlamaConfig(**SIZES))


def test_an_encoder_is_refused_unless_it_is_a_decoder(tmp_path, tokenizer, prompts):
    """BERT's generation model would otherwise be trained on probabilities that see the answer."""
    with pytest.raises(ValueError, match=r"is not causal.*`is_decoder=True`"):
        trainer(tmp_path, tokenizer, prompts, BertGenerationConfig(**ENCODER, **TO_ALL))
    trainer(tmp_path, tokenizer, prompts, BertGenerationConfig(**ENCODER, **TO_ALL, is_decoder=True))


def test_layers_between_hidden_state_and_head_are_refused(tmp_path, tokenizer, prompts):
    with pytest.raises(ValueError, match="do not follow from its last hidden state"):
        trainer(tmp_path, tokenizer, prompts, BertConfig(**ENCODER, **TO_ALL, is_decoder=True))


def test_a_head_of_another_width_is_refused():
    model_checks.check_width(16, 16, "teacher")
    with pytest.raises(ValueError, match="The teacher's LM head takes 1664 values, but its last hidden state has 16"):
        model_checks.check_width(16, 1664, "teacher")


def test_ids_that_are_left_out_after_the_projection_are_refused():
    with pytest.raises(ValueError, match="logits are of 24 ids, but its LM head has 29 rows"):
        model_checks.check_logits(torch.zeros(3, 24), torch.zeros(3, 29), "student")


def test_a_load_balancing_loss_that_trl_cannot_compute_is_refused(tmp_path, tokenizer, prompts):
    """Otherwise the first step ends in an `AttributeError`."""
    experts = GraniteMoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.01)
    with pytest.raises(ValueError, match=r"no `num_experts`.*Set `router_aux_loss_coef=0`"):
        trainer(tmp_path, tokenizer, prompts, experts)
    trainer(tmp_path, tokenizer, prompts, experts, router_aux_loss_coef=0.0)
