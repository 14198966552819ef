"""A frozen model under FSDP2: sharded layer by layer, from weights that the main process alone has loaded."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy

from .._trl import prepare_fsdp
from ..models.properties import unwrap_adapter


def sharded(model: nn.Module, accelerator: Accelerator) -> Any:
    """
    Shard a frozen model, so that a forward pass gathers one layer at a time.

    TRL shards its reference model at the root alone, so that all of it is gathered at once. Processes in which the
    model is on the meta device (see [`device_map_before_sharding`]) get the main process's weights, tensor by tensor.

    Raises:
        ValueError: FSDP version 1 is used, or weights are kept in CPU memory.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version == 1:
        raise ValueError(
            "FSDP version 1 flattens the teacher's LM head, which the divergence needs as a matrix. Set "
            "`fsdp_version: 2` in the accelerate configuration."
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):  # without offloading it is another policy
        raise ValueError(
            "FSDP2 is asked to keep weights in CPU memory (`fsdp_offload_params`), where the LM heads, which are used "
            "outside of their own forward pass, would stay. Set `fsdp_offload_params: false`; to save memory use "
            "ZeRO-3 with offload (`zero3_offload`) or a served teacher."
        )
    on_meta = torch.tensor(float(any(p.is_meta for p in model.parameters())), device=accelerator.device)
    if accelerator.reduce(on_meta, reduction="sum") == 0:
        shard_layers(model, accelerator)
        return prepare_fsdp(model, accelerator)
    weights = model.state_dict() if accelerator.is_main_process else {}
    buffers = _buffers_of_main(model, accelerator)
    model.to("meta")
    base = unwrap_adapter(model)
    base.tie_weights()  # the move has made two parameters of one
    shard_layers(model, accelerator)
    prepared = prepare_fsdp(model, accelerator)
    model.to_empty(device=accelerator.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, weights, options=options)
    for name, value in buffers.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, value)
    return prepared


def device_map_before_sharding(accelerator: Accelerator) -> Any:
    """
    Where each process loads a model that is about to be sharded, as `device_map` of `from_pretrained`: the main process
    into CPU memory, the others nowhere, so that the host holds it once and not once for each process.
    """
    return None if accelerator.is_main_process else "meta"


def shard_layers(model: nn.Module, accelerator: Accelerator) -> None:
    """Shard each of a model's layers."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    plugin, mesh = accelerator.state.fsdp_plugin, getattr(accelerator, "torch_device_mesh", None)
    layers = set(getattr(unwrap_adapter(model), "_no_split_modules", None) or ())
    for module in [module for module in model.modules() if type(module).__name__ in layers]:
        fully_shard(
            module,
            mesh=None if mesh is None else mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)],
            reshard_after_forward=True,
            mp_policy=plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        )


def _buffers_of_main(model: nn.Module, accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Buffers are not sharded, and some are in no state dict, such as a rotary embedding's frequencies."""
    found = {}
    for name, buffer in model.named_buffers():
        found[name] = torch.empty_like(buffer, device=accelerator.device)
        if accelerator.is_main_process:
            found[name].copy_(buffer)
        dist.broadcast(found[name], src=0)
    return found
