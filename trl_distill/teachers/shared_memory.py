"""Weights in CPU memory that the processes of a node share, so that the node holds them once.

The node's main process has loaded the model; in the others it is on the meta device.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from ..models.properties import unwrap_adapter


logger = logging.getLogger(__name__)

FOLDERS = ("/dev/shm", tempfile.gettempdir())  # memory, and a disk whose pages are kept in memory


def is_shared(accelerator: Accelerator) -> bool:
    """Whether there are several processes on this node."""
    return accelerator.num_processes > 1 and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1


def device_map_before_sharing(accelerator: Accelerator) -> Any:
    """Where each process loads a model that is about to be shared, as `device_map` of `from_pretrained`."""
    return None if accelerator.is_local_main_process or not is_shared(accelerator) else "meta"


def share_weights(model: nn.Module, accelerator: Accelerator) -> None:
    """
    Move a model's parameters and buffers into memory that all processes of the node share, in place.

    Called on every process. The memory is freed when the last of them has exited, however they end.

    Raises:
        ValueError: no folder has room for the weights.
    """
    path, failure = "", ""
    if accelerator.is_local_main_process:
        try:
            path = _new_file(model)
        except (OSError, ValueError) as error:  # the others learn of it, instead of waiting
            failure = str(error)
    places: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(places, (socket.gethostname(), path, failure))
    if failures := [failure for *_, failure in places if failure]:
        raise ValueError(failures[0])
    own = next(path for host, path, _ in places if path and host == socket.gethostname())
    if not accelerator.is_local_main_process:
        model.to_empty(device="cpu")  # takes no memory: none of it is ever written
        unwrap_adapter(model).tie_weights()
    tensors = [*model.parameters(), *model.buffers()]
    try:
        block: Any = torch.UntypedStorage.from_file(own, shared=True, nbytes=_bytes_of(tensors))
        start = 0
        for tensor in tensors:
            view = torch.empty(0, dtype=tensor.dtype).set_(
                block,  # type: ignore[call-overload]
                start // tensor.element_size(),
                tensor.shape,
            )
            if accelerator.is_local_main_process:
                view.copy_(tensor.data)
            tensor.data = view
            start += _aligned(tensor)
        accelerator.wait_for_everyone()
    finally:
        if accelerator.is_local_main_process:
            os.unlink(own)  # the memory lives on in those who have mapped it
    if accelerator.device.type == "cuda":
        _pin(block)


def _new_file(model: nn.Module) -> str:
    """Path of a new file, in a folder that has room for the weights. Raises `ValueError` if there is none."""
    needed = _bytes_of([*model.parameters(), *model.buffers()])
    free = {folder: shutil.disk_usage(folder).free for folder in FOLDERS if os.path.isdir(folder)}
    for folder, room in free.items():
        if room > 1.02 * needed:
            handle, path = tempfile.mkstemp(prefix="trl_distill-teacher-", dir=folder)
            os.close(handle)
            return path
    rooms = ", ".join(f"{folder} has {room / 1e9:.1f} GB" for folder, room in free.items())
    raise ValueError(
        f"`teacher_offload=True` keeps the teacher in memory that the processes of a node share: {needed / 1e9:.1f} "
        f"GB, but {rooms}. Enlarge /dev/shm (in Docker: `--shm-size`), or set TMPDIR to a folder with room."
    )


def _aligned(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, rounded up so that the next one is aligned."""
    return -(-tensor.numel() * tensor.element_size() // 64) * 64


def _bytes_of(tensors: list[torch.Tensor]) -> int:
    return sum(map(_aligned, tensors))


def _pin(block: torch.UntypedStorage) -> None:
    """Page-lock the memory, which makes copies to a GPU faster."""
    status = torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes(), 0)
    if int(status) != 0:
        logger.warning(f"The teacher's memory could not be page-locked (status {status}): copies will be slower.")
