"""Where each process of a run loads a teacher, so that host memory does not hold it once for each."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from helpers import config, make_model
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from trl_distill.teachers import sharding, shared_memory, spec


MAIN, OTHER = True, False


@pytest.mark.parametrize(
    ("distributed", "device", "settings", "main", "expected"),
    [
        ("MULTI_GPU", "cuda:1", {}, OTHER, {"": torch.device("cuda:1")}),
        (
            "MULTI_GPU",
            "cuda:1",
            {"teacher_model_init_kwargs": {"device_map": "auto"}},
            OTHER,
            {"": torch.device("cuda:1")},
        ),
        ("MULTI_CPU", "cpu", {}, OTHER, None),
        ("DEEPSPEED", "cuda:1", {}, OTHER, {"": torch.device("cuda:1")}),  # ZeRO-2
        ("ZERO3", "cuda:1", {}, OTHER, None),  # transformers loads shards
        ("FSDP", "cuda:0", {}, MAIN, None),
        ("FSDP", "cuda:1", {}, OTHER, "meta"),
        ("MULTI_GPU", "cuda:0", {"teacher_offload": True}, MAIN, None),
        ("MULTI_GPU", "cuda:1", {"teacher_offload": True}, OTHER, "meta"),
        ("NO", "cuda:0", {"teacher_offload": True}, MAIN, None),
    ],
)
def test_where_a_teacher_is_loaded(tmp_path, monkeypatch, distributed, device, settings, main, expected):
    seen = {}

    def load_whole(load, name, whose, **kwargs):
        seen.update(kwargs)
        raise InterruptedError  # what follows needs a GPU

    monkeypatch.setattr(spec, "load_whole", load_whole)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1" if distributed == "NO" else "2")
    stage = 3 if distributed == "ZERO3" else 2
    accelerator = SimpleNamespace(
        distributed_type=DistributedType("DEEPSPEED" if distributed == "ZERO3" else distributed),
        device=torch.device(device),
        num_processes=1 if distributed == "NO" else 2,
        is_main_process=main,
        is_local_main_process=main,
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage)),
    )
    named = spec.NamedModel("teacher", config(tmp_path, **settings))
    with pytest.raises(InterruptedError):
        named.load(accelerator, None, 40)
    assert seen["device_map"] == expected


def test_a_teacher_for_which_no_memory_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr(shared_memory, "FOLDERS", (str(tmp_path),))
    monkeypatch.setattr(shared_memory.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"has 0\.0 GB.*--shm-size"):
        shared_memory._new_file(make_model())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("policy", "refused"), [(CPUOffloadPolicy(), True), (OffloadPolicy(), False)])
def test_fsdp2_must_not_keep_weights_in_cpu_memory(policy, refused):
    plugin = SimpleNamespace(fsdp_version=2, cpu_offload=policy)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), device="cpu", reduce=None)
    with pytest.raises(ValueError if refused else TypeError, match="fsdp_offload_params" if refused else "callable"):
        sharding.sharded(make_model(), accelerator)
