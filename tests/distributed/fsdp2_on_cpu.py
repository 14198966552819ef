"""FSDP2 on processes without a GPU: accelerate uses it for devices only, so CPU processes are passed off as those.

    import fsdp2_on_cpu  # before an accelerator is made, in a process that torchrun has started

All that follows is accelerate's own: wrapping by layers, mixed precision, gathering of states for checkpoints.
"""

from __future__ import annotations

import os

from accelerate import PartialState
from accelerate.utils import DistributedType


SETTINGS = {  # what `accelerate launch` sets for `fsdp2.yaml`
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def pretend() -> None:
    os.environ.update(SETTINGS)
    original = PartialState.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


pretend()
