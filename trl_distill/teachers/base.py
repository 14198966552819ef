"""What a teacher is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from accelerate import Accelerator
from accelerate.utils import DistributedType

from ..rollouts import Rollouts
from ..signals import Signal


@runtime_checkable
class Teacher(Protocol):
    """
    Anything that can judge rollouts.

    A class may also say, where it differs from the default:

    - `gives`: the signal that `score` returns; [`HiddenStates`] unless said else.
    - `per_generation` (`bool`): whether it judges whole generation batches at once instead of each micro-batch.
    - `temperature` (`float`): the only softmax temperature at which it can judge.
    """

    def score(self, rollouts: Rollouts) -> Signal:
        """Judge the tokens that `rollouts.mask` marks. Called on every process."""
        ...


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether parameters are cut up among processes, so that every forward takes all of them: ZeRO-3 and FSDP."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP
