"""Tiny random models of every causal family that the installed transformers has.

A configuration is shrunk by the names of its fields: widths, layers, heads, experts, windows. Scales and soft caps of
the logits get values that change something. `SPECIAL` holds what a family needs besides.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


FAMILIES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))  # `model_type` of their configurations
VOCAB, PAD, EOS, BOS = 29, 0, 1, 2


SMALL: tuple[tuple[str, Any], ...] = (  # the first pattern that a field's whole name matches gives its value
    (r"(decoder_|encoder_)?vocab_size(_per_layer_input)?|n_words|num_embeddings|n_tokens", VOCAB),
    (r"pad_(token_)?(id|index)", PAD),
    (r"eos_(token_)?(id|index)", EOS),
    (r"(bos|cls|decoder_start)_(token_)?(id|index)", BOS),
    (r".*initializer_range|init_std|embed_init_std", 0.3),  # far from uniform, so that a KL is not 0 by accident
    (r".*drop(out|_prob|_rate|layer)?(_prob|_rate)?|.*_pdrop|layerdrop|.*jitter.*", 0),
    (r"logit_scale|output_multiplier|lm_head_multiplier", 0.5),
    (r"logits_scaling|logits_mup_width_multiplier", 2.0),
    (r"(final_|output_)?logits?_soft_?cap(ping)?", 3.0),
    (r"sliding_window(_size)?|attention_window_size|window_size|attention_chunk_size|local_attention", 4),
    (r"index_topk|indexer_budget|floor_scale", 4),
    (r"index(er)?_n_heads", 16),  # with few, scores are exactly 0 for several tokens, and ties break as they like
    (r".*(_|^)(head_dim|d_head|headdim)|attention_head_size|d_kv|kv_channels", 8),
    (r".*lora_rank|adapter_rank|laurel_rank|hc_lowrank|.*_latent_size", 8),
    (r".*intermediate_size|ffn_hidden_size|.*_ffn_hidden_size|n_inner|d_ff|dim_ff|dff|.*ffn_dim|feed_forward_size", 32),
    (r".*hidden_size(_per_layer_input)?|d_model|n_embd|dim|emb_dim|embedding_size|input_embedding_size", 16),
    (r"num_dense_layers|first_k_dense_replace|moe_layer_start_index|num_nextn_predict_layers|num_kv_shared_layers", 0),
    (r"(encoder_|decoder_)?layers|n_layers?|num_(\w+_)?layers|num_blocks", 2),
    (r".*key_value_heads|(\w*_)?(num_|n_)?(\w+_)?heads?|n_heads?", 2),
    (r"(n_|num_)(routed_|local_)?experts|moe_num_experts", 4),
    (r"(num_|n_)?experts_per_tok(en)?|top_k_experts|moe_top_?k|moe_k", 2),
    (r"n_group|num_(expert_)?groups?|topk_group|n_groups", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq(uence)?_len(gth)?", 128),
    (r"rotary_dim", 4),
    (r".*state_size|.*d_state", 4),
    (r".*chunk_size", 8),
)
# fields that are set even where their default is `None`
OPTIONAL = r".*(token_id|_index|soft_?cap(ping)?|logit_scale|logits_scaling|key_value_heads|head_dim|_size|experts.*)"
KINDS_OF_LAYERS = ("layer_types", "layers_block_type")


_LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8}
_DRAFT = {
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 2,
    "layer_types": ["full_attention"] * 2,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
}
_DECODER = {"is_decoder": True}  # an encoder that is loaded as a decoder, which is left to its user


NOT_TRIED = {  # vision-language families, by what keeps them from being shrunk
    "dots3_note": "its layers are set one by one, and the settings are those of the large model",
    "gemma3n": "its vision tower is from timm, which is not installed",
    "qwen4_exp": "its configuration has no defaults for its indexer",
}


SPECIAL: dict[str, dict[str, Any]] = {  # fields by family, besides those of `SMALL`
    "axk1": {"first_k_dense_replace": 1},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "bert": _DECODER,
    "bert-generation": _DECODER,
    "big_bird": _DECODER,
    "camembert": _DECODER,
    "codegen": {"n_head": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "data2vec-text": _DECODER,
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note_text": {
        "num_hidden_layers": 3,
        "layer_types": ["indexed_attention", "sliding_attention", "sliding_attention"],
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
        "head_dim": 16,
        "first_k_dense_replace": 1,
    },
    "electra": _DECODER,
    "ernie": _DECODER,
    "gemma3": {"text_config": {"final_logit_softcapping": None}},  # which this class leaves out, as all checkpoints do
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "intermediate_size": 32,
    },
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **_DRAFT}},
    "gemma4_text": {"global_head_dim": 8},
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text", **_DRAFT}},
    "gemma4_unified_text": {"global_head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**_MAMBA, **_LINEAR_AND_FULL},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {"no_rope_layers": [1, 0]},
    "longcat_flash": {"zero_expert_num": 2, "qk_head_dim": 16},
    "mamba2": {"num_heads": 4, "head_dim": 8, "n_groups": 1},
    "megatron-bert": _DECODER,
    "mimo_v2_flash": {"num_attention_heads": 4, "head_dim": 16},
    "minicpm3": {"dim_model_base": 8},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 4,
            "llama_4_scaling_beta": 0.1,
        }
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 30,
        "make_ngram_vocab_size_divisible_by": 1,
        "split_ngram_parts": 1,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "rembert": _DECODER,
    "roberta": _DECODER,
    "roberta-prelayernorm": _DECODER,
    "roc_bert": {
        **_DECODER,
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": VOCAB,
        "shape_embed_dim": 8,
        "shape_vocab_size": VOCAB,
    },
    "roformer": _DECODER,
    "xlm": {"causal": True},
    "xlm-roberta": _DECODER,
    "xlm-roberta-xl": _DECODER,
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "chunk_size": 64},
    "xmod": {**_DECODER, "default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 32,
        "attention_head_dim": 16,
        "num_hidden_layers": 5,
        "layers_block_type": [*["linear_attention"] * 2, "hybrid", "linear_attention", "hybrid"],
    },
    "zaya": {"num_experts_per_tok": 1},
}


def configuration(family: str) -> Any:
    """The tiny configuration of a family."""
    config_class: Any = CONFIG_MAPPING[family]
    if family.endswith("_assistant"):  # has no valid defaults
        return config_class(**SPECIAL[family])
    return shrunk(config_class, SPECIAL.get(family, {}))


def shrunk(config_class: type[PreTrainedConfig], special: dict[str, Any]) -> Any:
    """A configuration of a few thousand parameters; `special` has further fields, those of a part of it as a `dict`."""
    special, default, changes = dict(special), config_class(), dict[str, Any]()
    fields = inspect.signature(config_class.__init__).parameters
    for name, field in fields.items():
        try:
            value = getattr(default, name, field.default)
        except Exception:  # it differs between layers
            value = field.default
        if isinstance(value, PreTrainedConfig):
            changes[name] = shrunk(type(value), special.pop(name, {}))
        elif value is not None or re.fullmatch(OPTIONAL, name):
            small = small_value(name, value)
            if small is not value:
                changes[name] = small
    for name in KINDS_OF_LAYERS:
        kinds = list(dict.fromkeys(getattr(default, name, None) or ()))
        if kinds and name in fields and name not in special:
            changes[name] = (kinds * 2)[: max(2, len(kinds))]  # one layer of each kind
            changes |= {"num_hidden_layers": len(changes[name])} if "num_hidden_layers" in fields else {}
    return config_class(**{**changes, **special})


def small_value(name: str, default: Any) -> Any:
    """The value of a field in a tiny configuration: that of `SMALL`, if it is a number there."""
    number = isinstance(default, (int, float, type(None))) and not isinstance(default, bool)
    if not number and not (name == "eos_token_id" and isinstance(default, list)):
        return default
    found = next((value for pattern, value in SMALL if re.fullmatch(pattern, name)), default)
    return float(found) if isinstance(default, float) else found


def tiny_model(config: Any, seed: int = 0, **how: Any) -> Any:
    """A causal LM in fp32 and eval mode; biases and norms are drawn, too, and the embedding of padding is not 0."""
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config, **how)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif parameter.dim() == 1 and "norm" in name:
            parameter.data *= 1 + 0.3 * torch.randn_like(parameter)
    for module in model.modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(module, torch.nn.Embedding) and padding is not None:
            torch.nn.init.normal_(module.weight.data[padding], std=0.3)
    return model.eval()
