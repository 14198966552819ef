"""Quantised teachers and students in one process of its own; prints JSON. Started by `test_quantised.py`."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import bitsandbytes
import gguf
import numpy as np
import torch
from datasets import Dataset
from helpers import config, make_model, make_tokenizer, relative_error
from peft import LoraConfig, get_peft_model
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig, TrainerCallback

from trl_distill import OPDTrainer
from trl_distill.models.properties import unwrap_adapter


PROMPTS = Dataset.from_dict({"prompt": ["a b c", "d e", "f", "g h i j"] * 4})
HINTS = PROMPTS.add_column("teacher_prompt", ["z b c", "d z z e", "f z", "g h z j"] * 4)
INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
FORMATS: dict[str, Any] = {
    "bitsandbytes, 8 bits": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes, 4 bits (NF4)": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes, 4 bits (FP4)": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "torchao, int8 weights": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao, int8 weights and activations": lambda: TorchAoConfig(Int8DynamicActivationInt8WeightConfig()),
    "torchao, int4 weights": lambda: TorchAoConfig(INT4),
    "quanto, int8 weights": lambda: QuantoConfig(weights="int8"),
    "quanto, int4 weights": lambda: QuantoConfig(weights="int4"),
}


class FirstStep(TrainerCallback):
    """The trained parameters before the first step, and their gradients in it."""

    gradient: torch.Tensor | None = None
    trained: dict[str, torch.Tensor]

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.gradient is None:
            found = [p.grad for p in model.parameters() if p.requires_grad]
            self.gradient = torch.cat([gradient.flatten().double() for gradient in found])


def train(folder: Path, teacher: Any, student: Any = None, **changes: Any) -> dict[str, Any]:
    """Two greedy steps: losses and divergences of both, and the gradient of the first."""
    first = FirstStep()
    trainer_kwargs = {name: changes.pop(name) for name in ("peft_config", "quantization_config") if name in changes}
    trainer = OPDTrainer(
        model=make_model(seed=1) if student is None else student,
        teacher_model=teacher,
        args=config(folder / "run", max_grad_norm=0.0, log_level="error", **changes),
        train_dataset=HINTS if teacher == "adapter-off" else PROMPTS,
        processing_class=make_tokenizer(),
        callbacks=[first],
        **trainer_kwargs,
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "loss": steps[0]["loss"],
        "second": steps[1]["loss"],
        "kl": steps[0]["distill/reverse_kl"],
        "gradient": first.gradient,
        "trained": first.trained,
        "model": trainer.model,
        "trainer": trainer,
    }


def dequantised(quantised: Any, plain: Any) -> Any:
    """`plain`, of the same architecture, in fp32 with the weights that the layers of `quantised` multiply by."""
    plain.load_state_dict(
        {name: value for name, value in quantised.state_dict().items() if name in ("lm_head.weight",)}, strict=False
    )
    modules = dict(quantised.named_modules())
    with torch.no_grad():
        for name, layer in plain.model.layers.named_modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.copy_(modules[f"model.layers.{name}"](torch.eye(layer.in_features)).T)
    return plain


def compare(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    return {
        **{name: abs(found[name] - expected[name]) / abs(expected[name]) for name in ("loss", "kl", "second")},
        "gradient": relative_error(found["gradient"], expected["gradient"]),
    }


def teachers(folder: Path) -> dict[str, Any]:
    """Each format beside its dequantised model, and beside the original."""
    original = make_model("untied", seed=2, hidden_size=64, intermediate_size=128, head_dim=32)
    original.save_pretrained(folder / "teacher")
    make_tokenizer().save_pretrained(folder / "teacher")
    exact = train(folder, str(folder / "teacher"))
    results = {}
    for name, quantisation in FORMATS.items():
        kwargs = {"dtype": "float32", "quantization_config": quantisation()}
        found = train(folder, str(folder / "teacher"), teacher_model_init_kwargs=kwargs)
        again = AutoModelForCausalLM.from_pretrained(folder / "teacher", **kwargs)
        expected = train(folder, dequantised(again, AutoModelForCausalLM.from_pretrained(folder / "teacher")))
        results[name] = {"dequantised": compare(found, expected), "original": compare(found, exact)}
    return results


def write_gguf(path: Path, model: Any) -> Any:
    """A Llama of ours as GGUF's Q8_0; `model` is left with the weights that the file holds."""
    of, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(of.num_hidden_layers)
    writer.add_context_length(of.max_position_embeddings)
    writer.add_embedding_length(of.hidden_size)
    writer.add_feed_forward_length(of.intermediate_size)
    writer.add_head_count(of.num_attention_heads)
    writer.add_head_count_kv(of.num_key_value_heads)
    writer.add_layer_norm_rms_eps(of.rms_norm_eps)
    writer.add_rope_freq_base(of.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(of.head_dim)
    writer.add_vocab_size(of.vocab_size)
    writer.add_eos_token_id(of.eos_token_id)
    writer.add_pad_token_id(of.pad_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, of.num_hidden_layers)
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, parameter in model.state_dict().items():
        values = parameter.float().numpy()
        target = names.get_name(name, try_suffixes=(".weight",))
        if values.ndim == 1:
            writer.add_tensor(target, values)
            continue
        packed = gguf.quants.quantize(values, kind)
        parameter.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind)))
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp's order of rotary pairs
            rows = np.arange(len(values)).reshape(of.num_attention_heads, 2, -1).swapaxes(1, 2).reshape(-1)
            packed = packed[rows]
        writer.add_tensor(target, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def gguf_teacher(folder: Path) -> dict[str, Any]:
    """A folder that holds nothing but a GGUF file."""
    (folder / "gguf").mkdir()
    original = make_model("untied", seed=2, hidden_size=64, intermediate_size=128, head_dim=32)
    exact = train(folder, make_model("untied", seed=2, hidden_size=64, intermediate_size=128, head_dim=32))
    expected = train(folder, write_gguf(folder / "gguf" / "teacher.gguf", original))
    found = train(folder, str(folder / "gguf"), teacher_model_init_kwargs={"gguf_file": "teacher.gguf"})
    return {"dequantised": compare(found, expected), "original": compare(found, exact)}


def heads(folder: Path) -> dict[str, str]:
    """What is said of teachers whose LM head is quantised, too."""
    formats = {
        "bitsandbytes": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["none"]),
        "torchao": TorchAoConfig(Int8WeightOnlyConfig(), include_input_output_embeddings=True),
    }
    messages = {}
    for name, quantisation in formats.items():
        kwargs = {"dtype": "float32", "quantization_config": quantisation}
        try:
            train(folder, str(folder / "teacher"), teacher_model_init_kwargs=kwargs)
        except ValueError as error:
            messages[name] = str(error)
    return messages


def qlora(folder: Path) -> dict[str, Any]:
    """A 4-bit and an 8-bit student with an adapter and its base as the teacher, beside the dequantised student."""
    lora = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    results = {}
    for name in ("bitsandbytes, 4 bits (NF4)", "bitsandbytes, 8 bits"):
        quantisation, kwargs = FORMATS[name](), {"dtype": "float32"}
        how = {"peft_config": lora, "model_init_kwargs": kwargs, "learning_rate": 1e-3}
        found = train(folder, "adapter-off", str(folder / "teacher"), quantization_config=quantisation, **how)
        base = unwrap_adapter(found["model"])
        plain = AutoModelForCausalLM.from_pretrained(folder / "teacher")
        with found["model"].disable_adapter(), torch.no_grad():
            plain_layers = dict(plain.named_modules())
            for key, layer in base.named_modules():
                if key in plain_layers and hasattr(layer, "base_layer"):
                    inner = layer.base_layer
                    plain_layers[key].weight.copy_(inner(torch.eye(inner.in_features)).T)
        student = get_peft_model(plain, lora)
        student.load_state_dict({key: value.float() for key, value in found["trained"].items()}, strict=False)
        expected = train(folder, "adapter-off", student, learning_rate=1e-3)
        found["trainer"].save_model(str(folder / "adapter"))
        results[name] = {
            **compare(found, expected),
            "files": sorted(file.name for file in (folder / "adapter").glob("*.safetensors")),
            "trained": len(found["trained"]),
        }
    return results


def used_before(folder: Path) -> str | None:
    """What is said of a 4-bit student that was packed for inference; `None` where the CPU has no such format."""
    if not bitsandbytes.nn.modules.has_avx512bf16():
        return None
    quantisation = FORMATS["bitsandbytes, 4 bits (NF4)"]()
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher", quantization_config=quantisation).eval()
    with torch.no_grad():
        model(torch.tensor([[2, 3]]))
    try:
        train(folder, "adapter-off", model, peft_config=LoraConfig(target_modules="all-linear"))
    except ValueError as error:
        return str(error)
    return "no error"


if __name__ == "__main__":
    torch.set_num_threads(1)
    real, sys.stdout = sys.stdout, sys.stderr
    with tempfile.TemporaryDirectory() as name:
        results = {"teachers": teachers(Path(name)), "gguf": gguf_teacher(Path(name)), "heads": heads(Path(name))}
        results |= {"qlora": qlora(Path(name)), "used_before": used_before(Path(name))}
    print(json.dumps(results), file=real)
    real.flush()
