"""Quantised teachers and students on a CPU: losses and gradients are those of the dequantised model."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import make_model
from processes import succeeds
from torch import nn

from trl_distill.heads.lm_head import LMHead
from trl_distill.models.quantised import keep_differentiable


ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / ".venv-quantised"  # apart, since transformers and PEFT import what they find
EXACT = ("torchao, int8 weights", "torchao, int4 weights", "quanto, int8 weights", "quanto, int4 weights")
CLOSE = {  # activations are rounded to 8 bits, or (4 bits) products to bf16 where the CPU has AVX512-BF16
    "bitsandbytes, 8 bits": 0.06,
    "bitsandbytes, 4 bits (NF4)": 0.03,
    "bitsandbytes, 4 bits (FP4)": 0.03,
    "torchao, int8 weights and activations": 0.06,
}


@pytest.fixture(scope="module")
def results():
    if not (PACKAGES / "bitsandbytes").exists():
        pytest.skip("The quantisers are not installed: `make test-slow` does that")
    path = os.pathsep.join([str(PACKAGES), str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return json.loads(succeeds([sys.executable, Path(__file__).with_name("formats.py")], env=env).splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_a_teacher_with_quantised_weights_is_its_dequantised_model(results, name):
    found = results["teachers"][name]
    assert max(found["dequantised"].values()) < 1e-5
    assert found["original"]["gradient"] > 1e-2  # it was quantised


@pytest.mark.slow
@pytest.mark.parametrize("name", CLOSE)
def test_a_teacher_with_rounded_activations_is_close_to_its_dequantised_model(results, name):
    found = results["teachers"][name]
    assert max(found["dequantised"][key] for key in ("loss", "kl", "second")) < 0.01
    assert found["dequantised"]["gradient"] < CLOSE[name]
    assert found["original"]["gradient"] > 1.5 * found["dequantised"]["gradient"]


@pytest.mark.slow
def test_a_teacher_from_a_folder_with_only_a_gguf_file(results):
    assert max(results["gguf"]["dequantised"].values()) < 1e-5
    assert results["gguf"]["original"]["gradient"] > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bitsandbytes", "torchao"])
def test_a_quantised_head_is_refused_with_what_to_write(results, name):
    assert "The LM head is quantised" in results["heads"][name]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tolerance"), [("4 bits (NF4)", 0.03), ("8 bits", 0.1)])
def test_qlora_has_the_gradients_of_the_dequantised_student(results, name, tolerance):
    found = results["qlora"][f"bitsandbytes, {name}"]
    assert found["loss"] < 0.01
    assert found["gradient"] < tolerance
    assert found["trained"] == 28  # two matrices for each of 14 layers
    assert found["files"] == ["adapter_model.safetensors"]


@pytest.mark.slow
def test_a_4_bit_student_that_was_packed_for_inference_is_refused(results):
    if results["used_before"] is None:
        pytest.skip("This CPU lacks AVX512-BF16, for which bitsandbytes packs weights")
    assert "Load the student again" in results["used_before"]


def test_an_int8_head_is_refused():
    model = make_model("untied")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="The LM head is quantised"):
        LMHead(model)


@pytest.mark.parametrize("packed", [False, True])
def test_4_bit_layers_stay_differentiable(packed):
    student = nn.Sequential(nn.Linear(2, 2))
    student[0].support_avx512bf16_for_cpu = True
    student[0].weight.quant_state = SimpleNamespace(packing_format_for_cpu=packed)
    if packed:
        with pytest.raises(ValueError, match="'0' was packed for inference"):
            keep_differentiable(student)
    else:
        keep_differentiable(student)
        assert not student[0].support_avx512bf16_for_cpu
