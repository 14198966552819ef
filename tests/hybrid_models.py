"""Tiny models with layers that keep a state over time."""

from __future__ import annotations

from helpers import SIZES
from transformers import AutoModelForCausalLM, Lfm2Config, Qwen3NextConfig, set_seed


def hybrid(name: str):
    """A convolution ("lfm2") or linear attention ("qwen3_next"), and a layer of full attention."""
    set_seed(0)
    if name == "lfm2":
        return AutoModelForCausalLM.from_config(Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])).eval()
    special = {"layer_types": ["linear_attention", "full_attention"], "num_experts": 0, "linear_num_value_heads": 2}
    special |= {
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "mlp_only_layers": [0, 1],
    }
    return AutoModelForCausalLM.from_config(Qwen3NextConfig(**SIZES, **special)).eval()
