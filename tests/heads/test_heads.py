"""Value and gradient of the trainer's loss against naive autograd on full logits, for every kind of LM head."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import FAMILIES, VOCAB, batch, config, gradients, in_training, make_model, relative_error
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from trl_distill import OPDTrainer
from trl_distill.heads import few_ids, fused, lm_head, tiles
from trl_distill.models.hidden_states import add_teacher_forward
from trl_distill.objective.divergences import reverse_kl
from trl_distill.rollouts import Rollouts
from trl_distill.teachers.sharding import shard_layers


def make_trainer(tmp_path, tokenizer, prompts, student, teacher, **changes):
    trainer = OPDTrainer(
        model=student,
        teacher_model=teacher,
        args=config(tmp_path, **changes),
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    return in_training(trainer)


def naive_loss(student, teacher, inputs, temperature=1.0):
    """The mean reverse KL over the completion tokens, from full logits."""
    input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    length = inputs["completion_ids"].shape[1]
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    student_logits = student(input_ids=input_ids, attention_mask=attention_mask).logits.double()
    with torch.no_grad():
        teacher_logits = teacher(input_ids=input_ids, attention_mask=attention_mask).logits.double()
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    log_q = (student_logits[:, -length - 1 : -1, :shared] / temperature).log_softmax(-1)
    log_p = (teacher_logits[:, -length - 1 : -1, :shared] / temperature).log_softmax(-1)
    per_token = (log_q.exp() * (log_q - log_p)).sum(-1)
    torch.testing.assert_close(
        per_token.float(),
        reverse_kl(student_logits, teacher_logits, temperature)[:, -length - 1 : -1],
        atol=1e-5,
        rtol=1e-4,
    )
    return (per_token * mask).sum() / mask.sum()


def compare(trainer, naive_student, naive_teacher, inputs, temperature=1.0):
    loss = trainer.rollout_loss(trainer.model, inputs)
    loss.backward()
    expected = naive_loss(naive_student, naive_teacher, inputs, temperature)
    expected.backward()
    assert relative_error(loss.detach(), expected.detach()) < 1e-5
    assert expected.item() > 0.05  # the case has something to learn
    assert relative_error(gradients(trainer.model), gradients(naive_student)) < 1e-5


CASES = {
    "tied": {},
    "untied": {"student": {"family": "untied"}},
    "bias": {"student": {"family": "bias"}, "teacher": {"family": "bias"}},
    "softcap": {"student": {"family": "softcap"}, "teacher": {"family": "softcap"}},
    "scale": {"student": {"family": "scale"}, "teacher": {"family": "inverse_scale"}},
    "inverse scale": {"student": {"family": "inverse_scale"}, "teacher": {"family": "softcap"}},
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 2.0, "student": {"family": "softcap"}},
    "larger teacher vocabulary": {"teacher": {"vocab_size": VOCAB + 7}},
    "larger teacher vocabulary, bias": {"teacher": {"family": "bias", "vocab_size": VOCAB + 7}},
    "smaller teacher vocabulary": {"student": {"vocab_size": VOCAB + 5}},
    "smaller teacher vocabulary, untied, bias": {"student": {"family": "bias", "vocab_size": VOCAB + 5}},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradient_equals_naive_autograd(tmp_path, tokenizer, prompts, case):
    student = make_model(seed=1, **case.get("student", {}))
    teacher = make_model(seed=2, hidden_size=24, head_dim=12, **case.get("teacher", {}))
    naive_student, naive_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    temperature = case.get("temperature", 1.0)
    trainer = make_trainer(tmp_path, tokenizer, prompts, student, teacher, temperature=temperature)
    compare(trainer, naive_student, naive_teacher, batch(), temperature)


def test_cases_cover_every_family():
    assert {"tied", *(side["family"] for c in CASES.values() for side in c.values() if "family" in str(side))} == set(
        FAMILIES
    )


def test_kl_temperature_is_apart_from_the_sampling_temperature(tmp_path, tokenizer, prompts, student, teacher):
    naive = copy.deepcopy(student), copy.deepcopy(teacher)
    trainer = make_trainer(tmp_path, tokenizer, prompts, student, teacher, temperature=0.6, kl_temperature=1.5)
    compare(trainer, *naive, batch(), temperature=1.5)


def test_gradient_of_lora(tmp_path, tokenizer, prompts, student, teacher):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(student, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    naive_student, naive_teacher = copy.deepcopy(model), copy.deepcopy(teacher)
    trainer = make_trainer(tmp_path, tokenizer, prompts, model, teacher)
    compare(trainer, naive_student, naive_teacher, batch())
    assert all(p.grad is None for n, p in trainer.model.named_parameters() if "lora_" not in n)


def test_tool_tokens_and_truncated_completions_stay_out(tmp_path, tokenizer, prompts, student, teacher):
    naive = copy.deepcopy(student), copy.deepcopy(teacher)
    trainer = make_trainer(tmp_path, tokenizer, prompts, student, teacher)
    inputs = batch()
    inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
    inputs["tool_mask"][1, 1:3] = 0
    inputs["completion_mask"][2] = 0  # what `mask_truncated_completions` does to a truncated row
    inputs["num_items_in_batch"] = (inputs["completion_mask"] * inputs["tool_mask"]).sum()
    compare(trainer, *naive, inputs)


def test_all_masked_micro_batch_gives_a_zero_that_can_be_differentiated(tmp_path, tokenizer, prompts, student, teacher):
    trainer = make_trainer(tmp_path, tokenizer, prompts, student, teacher)
    inputs = batch()
    inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])
    loss = trainer.rollout_loss(trainer.model, inputs)
    loss.backward()
    assert loss.item() == 0
    assert gradients(trainer.model).abs().max() == 0


def test_student_equal_to_teacher_has_no_loss_and_no_gradient(tmp_path, tokenizer, prompts, student):
    trainer = make_trainer(tmp_path, tokenizer, prompts, student, copy.deepcopy(student), assume_different_teacher=True)
    loss = trainer.rollout_loss(trainer.model, batch())
    loss.backward()
    assert loss.abs().item() < 1e-6
    assert gradients(trainer.model).abs().max().item() < 1e-6


@pytest.mark.parametrize("fp32_head", [False, True])
def test_cast_lm_head_to_fp32_projects_both_models_in_fp32(tmp_path, tokenizer, prompts, monkeypatch, fp32_head):
    seen = {}

    def recorded(hidden, head, teacher_hidden, *rest):
        seen.update(dtypes={hidden.dtype, teacher_hidden.dtype}, autocast=torch.is_autocast_enabled("cpu"))
        return fused.fused_divergence(hidden, head, teacher_hidden, *rest)

    monkeypatch.setattr("trl_distill.estimators.full.fused_divergence", recorded)
    student, teacher = make_model("untied", seed=1), make_model("untied", seed=2)
    trainer = make_trainer(tmp_path, tokenizer, prompts, student, teacher, bf16=True, cast_lm_head_to_fp32=fp32_head)
    loss = trainer.rollout_loss(trainer.model, batch())
    assert loss.dtype == torch.float32
    assert seen["autocast"] is not fp32_head
    assert not fp32_head or seen["dtypes"] == {torch.float32}


def test_a_deep_copy_computes_with_its_own_weights(tmp_path, tokenizer, prompts, student, teacher):
    trainer = make_trainer(tmp_path, tokenizer, prompts, student, teacher)
    rollouts = Rollouts.from_inputs(batch())
    twin = copy.deepcopy(teacher)
    original = trainer.teacher.score(rollouts).hidden
    for parameter in twin.parameters():
        parameter.zero_()
    inputs = {"input_ids": rollouts.input_ids, "attention_mask": rollouts.attention_mask}
    assert twin(**inputs).logits.abs().max() == 0
    signal = twin(**inputs, rollouts=rollouts)
    assert signal.hidden.abs().max() == 0
    assert signal.head.parameters()[0].abs().max() == 0
    assert torch.equal(trainer.teacher.score(rollouts).hidden, original)


@pytest.mark.parametrize("family", ["tied", "bias", "softcap", "scale"])
@pytest.mark.parametrize("small", [False, True], ids=["whole", "small tiles"])
def test_log_probs_of_a_few_ids_and_the_likeliest(monkeypatch, family, small):
    """Values and gradients against the model's own logits; the likeliest ids against `torch.topk`."""
    if small:
        monkeypatch.setattr(few_ids, "TOKEN_TILE", 3)
        monkeypatch.setattr(few_ids, "VOCAB_TILE", 7)
        monkeypatch.setattr(tiles, "ON_CPU", tiles.TileSizes(tile=5 * VOCAB, part=2 * VOCAB, ids=7))
    model, size = make_model(family, seed=3), VOCAB - 3
    head, ids = lm_head.LMHead(model), torch.randint(0, size, (11, 4), generator=torch.Generator().manual_seed(0))
    ids[:, 3] = ids[:, 0]  # a sampled token may be among the others
    hidden = torch.randn(11, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found, entropy = few_ids.log_probs_of(hidden, head, ids, size, temperature=0.7)
    naive = (head.logits(hidden)[:, :size] / 0.7).log_softmax(-1)
    torch.testing.assert_close(found, naive.gather(1, ids))
    torch.testing.assert_close(entropy, -(naive.exp() * naive).sum(-1).detach())
    assert not entropy.requires_grad
    weights = torch.randn(11, 4, generator=torch.Generator().manual_seed(2))
    grads = []
    for values in (found, naive.gather(1, ids)):
        model.zero_grad()
        hidden.grad = None
        (values * weights).sum().backward()
        grads.append(torch.cat([hidden.grad.flatten().double(), gradients(model)]))
    assert relative_error(*grads) < 1e-5
    with torch.no_grad():
        assert torch.equal(few_ids.top_ids(hidden, head, 5), head.logits(hidden).topk(5).indices)


def test_sharded_teacher_head_is_gathered(tmp_path, tokenizer, prompts, student, teacher):
    """FSDP2's parameters are DTensors, and stay sharded outside the teacher's forward."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    trainer = make_trainer(tmp_path, tokenizer, prompts, student, teacher)
    expected = trainer.rollout_loss(trainer.model, batch())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = fully_shard(teacher, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=True)
        assert sharded is trainer.teacher.model
        torch.testing.assert_close(trainer.rollout_loss(trainer.model, batch()), expected)
    finally:
        dist.destroy_process_group()


def test_fsdp2_shards_the_teacher_layer_by_layer(teacher):
    """A forward gathers one layer at a time; the signal is that of the whole model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, OffloadPolicy, fully_shard

    inputs = batch()
    rollouts = Rollouts.from_inputs(inputs)
    add_teacher_forward(teacher)
    with torch.no_grad():
        expected = teacher(rollouts.input_ids, rollouts.attention_mask, rollouts=rollouts).hidden
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = {("shard",): init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))}
        plugin = SimpleNamespace(mixed_precision_policy=None, cpu_offload=OffloadPolicy())
        accelerator = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            torch_device_mesh=mesh,
            parallelism_config=SimpleNamespace(fsdp_dim_names=["shard"]),
        )
        shard_layers(teacher, accelerator)
        layers = list(teacher.model.layers)
        assert all(isinstance(layer, FSDPModule) for layer in layers)
        fully_shard(teacher, mesh=mesh[("shard",)])  # as TRL does with the rest
        whole = []
        for layer in layers:
            layer.register_forward_pre_hook(
                lambda *_: whole.append([not isinstance(other.mlp.up_proj.weight, DTensor) for other in layers])
            )
        with torch.no_grad():
            found = teacher(rollouts.input_ids, rollouts.attention_mask, rollouts=rollouts).hidden
        assert whole == [[layer is other for other in layers] for layer in layers]
        torch.testing.assert_close(found, expected)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("divergence", ["reverse_kl", "mixed"])
def test_heads_are_gathered_once_not_for_each_tile(
    tmp_path, tokenizer, prompts, student, teacher, monkeypatch, divergence
):
    """What ZeRO-3 would have to gather: the two heads in the forward pass, where the gradient is formed too."""
    whole, gathered = [], []

    @contextmanager
    def gathering(*tensors):
        """As TRL's: what is whole already is not gathered again."""
        new = [t for t in tensors if t is not None and t.data_ptr() not in whole]
        gathered.extend(new)
        whole.extend(t.data_ptr() for t in new)
        yield
        for tensor in new:
            whole.remove(tensor.data_ptr())

    for module in (lm_head, few_ids, fused):
        monkeypatch.setattr(module, "gathered_head", gathering)
    monkeypatch.setattr(tiles, "ON_CPU", replace(tiles.ON_CPU, tile=2 * VOCAB))
    trainer = make_trainer(tmp_path, tokenizer, prompts, student, teacher, divergence=divergence)
    gathered.clear()
    trainer.rollout_loss(trainer.model, batch()).backward()
    assert [tuple(t.shape) for t in gathered] == [(VOCAB, 16), (VOCAB, 24)]


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any operation put out, in forward and backward."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize(
    "rewards", [None, [lambda completions, **_: [1.0] * len(completions)]], ids=["pure", "rewards"]
)
@pytest.mark.parametrize("estimator", ["full", "topk", "sampled"])
def test_no_tensor_of_the_size_of_the_logits(tmp_path, tokenizer, prompts, monkeypatch, rewards, estimator):
    import trl.kernels.chunked_divergence as divergence_kernel
    import trl.kernels.chunked_logprob as logprob_kernel
    import trl.trainer.utils as trl_utils

    monkeypatch.setattr(divergence_kernel, "TOKEN_CHUNK_SIZE", 8)
    monkeypatch.setattr(divergence_kernel, "VOCAB_CHUNK_SIZE", 64)
    monkeypatch.setattr(logprob_kernel, "TOKEN_CHUNK_SIZE", 8)
    monkeypatch.setattr(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 64)
    for name, value in (("TOKEN_TILE", 8), ("VOCAB_TILE", 64)):
        monkeypatch.setattr(few_ids, name, value)
    monkeypatch.setattr(tiles, "ON_CPU", replace(tiles.ON_CPU, tile=8 * 2000))
    student, teacher = (make_model(seed=seed, vocab_size=2000) for seed in (1, 2))
    inputs = batch(rows=16, prompt=4, completion=48)  # many more tokens than the log compares the models at
    judged = int(inputs["completion_mask"].sum())
    limit = judged * 2000
    naive = copy.deepcopy(student), copy.deepcopy(teacher)
    trainer = OPDTrainer(
        model=student,
        teacher_model=teacher,
        reward_funcs=rewards,
        args=config(
            tmp_path,
            per_device_train_batch_size=8,
            num_generations=2 if rewards else 1,
            kl_estimator=estimator,
            kl_top_k=4,
        ),
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    in_training(trainer)
    assert max(p.numel() for p in student.parameters()) < limit

    with LargestTensor() as ours:
        trainer.rollout_loss(trainer.model, inputs).backward()
    with LargestTensor() as theirs:
        naive_loss(*naive, inputs).backward()
    assert ours.numel < limit
    assert theirs.numel >= limit  # the measurement sees such a tensor where there is one
