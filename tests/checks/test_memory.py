"""The estimate of memory: each part is what it says, and follows the settings that change it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import EOS, VOCAB, config, make_model
from peft import LoraConfig, get_peft_model
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, GPT2Config

from trl_distill import OPDTrainer
from trl_distill.checks import memory
from trl_distill.checks.memory import RunSizes, Shape, estimate, of_run, sizes_of, states_of
from trl_distill.checks.prompts import Prompts


RUN = RunSizes(rows=4, generated=8, prompt=100, teacher_prompt=150, completion=50, teacher_rows=4)


@pytest.fixture
def models():
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "intermediate_size": 160}
    return make_model("tied", **sizes), make_model("untied", hidden_size=32, num_hidden_layers=3)


def kept_by(model, rows: int, columns: int) -> int:
    """Bytes that a forward pass keeps for the backward pass, counted by PyTorch."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.ones(rows, columns, dtype=torch.long)
    attended = torch.ones_like(ids)
    attended[0, 0] = 0  # so that there is a mask, as with padding
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model.base_model(input_ids=ids, attention_mask=attended, use_cache=False).last_hidden_state.sum()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("family", ["untied", "tied"])
@pytest.mark.parametrize("sizes", [{}, {"intermediate_size": 400}, {"num_key_value_heads": 2}, {"head_dim": 32}])
def test_activations_are_those_that_pytorch_keeps(family, sizes):
    """Llama, and Qwen 3, which norms queries and keys. What is not a layer's own shows little in twelve of them."""
    given = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    model = make_model(family, num_hidden_layers=12, **{**given, "intermediate_size": 160, **sizes})
    shape = Shape.of(model)
    assert shape.normed is (family == "tied")
    assert kept_by(model, 3, 40) == pytest.approx(3 * 40 * shape.layers * shape.kept(4), rel=0.06)


def test_weights_gradients_and_optimizer(models):
    student, teacher = models
    found = estimate(student, [teacher], RUN)
    assert found.common["student"] == pytest.approx(sum(4 * p.numel() for p in student.parameters()), rel=0.01)
    assert found.common["teachers"] == pytest.approx(sum(4 * p.numel() for p in teacher.parameters()), rel=0.01)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = AdamW(student.parameters())
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if t.numel() > 1]
    assert found.common["optimizer"] == sum(4 * t.numel() for t in states)
    assert found.phases["end of the update"]["gradients"] == sum(4 * p.numel() for p in student.parameters())


def test_keys_and_values_are_those_of_a_cache(models):
    student, teacher = models
    found = estimate(student, [teacher], RUN).phases["generation"]["keys and values"]
    cache = student(input_ids=torch.ones(8, 150, dtype=torch.long), use_cache=True).past_key_values
    assert found == sum(t.numel() * 4 for layer in cache.layers for t in (layer.keys, layer.values))


@pytest.mark.parametrize(
    ("name", "values"),
    [("adamw_torch_fused", 2), ("adamw_bnb_8bit", 0.5), ("paged_adamw_8bit", 0.5), ("sgd", 0), ("lion_32bit", 1)],
)
def test_the_optimizers_state(name, values):
    assert states_of(name) == values


def test_what_settings_change(models):
    student, teacher = models
    before = estimate(student, [teacher], RUN)

    def after(**changes):
        return estimate(student, [teacher], replace(RUN, **changes))

    def grown(found, phase, part):
        return found.phases[phase][part] - before.phases[phase][part]

    trained = sum(4 * p.numel() for p in student.parameters())
    assert grown(after(accumulates=True), "update", "gradients") == trained
    assert grown(after(checkpointing=True), "update", "activations") < 0
    assert after(ahead=True).phases["update"]["signals"] == 2 * before.phases["update"]["signals"]  # 8 rows, not 4
    assert after(offloaded=True).common["teachers"] == 0
    assert after(offloaded=True).phases["teacher"]["weights"] == before.common["teachers"]
    assert "generation" not in after(generated=0).phases
    assert (
        after(computed_in=torch.bfloat16).phases["generation"]["keys and values"] * 2
        == (before.phases["generation"]["keys and values"])
    )
    assert estimate(student, [], RUN, averaged=True).common["teachers"] == trained
    assert "teacher" not in estimate(student, [], RUN).phases
    adapted = estimate(get_peft_model(student, LoraConfig(r=2, target_modules=["q_proj"])), [teacher], RUN)
    assert adapted.common["optimizer"] < before.common["optimizer"] / 10
    assert adapted.phases["update"]["gradients"] == 4 * 4 * 50 * 64  # hidden states alone: the head is frozen


def test_the_peak_is_the_largest_phase(models):
    found = estimate(models[0], [models[1]], RUN)
    assert found.peak == sum(found.common.values()) + max(sum(added.values()) for added in found.phases.values())
    shown = memory.finding(found)
    assert shown.level == "ok"
    assert f"in the {found.largest} phase" in shown.found


def test_a_run_is_read_from_its_trainer(tmp_path, tokenizer, prompts, student, teacher):
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 7,
        "teacher_batch_size": 3,
        "optim": "sgd",
    }
    trainer = OPDTrainer(
        model=student,
        teacher_model=teacher,
        args=config(tmp_path, **settings),
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    counted = [Prompts("a", "prompt", 1, 1, longest=30), Prompts("a", "teacher_prompt", 1, 1, longest=40)]
    assert sizes_of(trainer, counted) == RunSizes(
        rows=4,
        generated=8,
        prompt=30,
        teacher_prompt=40,
        completion=7,
        accumulates=True,
        optimizer="sgd",
        computed_in=torch.float32,
        teacher_rows=3,
        ahead=True,
    )
    assert of_run(trainer, counted).level == "ok"
    assert "not known" in of_run(trainer, []).found
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": None, "eos_token_id": EOS}
    trainer.model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=VOCAB, **sizes))  # names its MLP otherwise
    assert "does not say enough" in of_run(trainer, counted).found
