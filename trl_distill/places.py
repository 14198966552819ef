"""Where masks are set, so that Python need not ask the device.

`values[mask]` has as many rows as the mask has ones, so Python waits for a GPU until they are counted. Here they are
counted on the CPU, once for all masks of a generation batch ([`count`]), and found again by the tensor that is used
later. A mask that nobody has counted is counted when it is needed, which waits once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class Places:
    """
    Where a mask `(B, C)` is set.

    Attributes:
        at (`torch.Tensor` of shape `(N,)`, int64): indices of the flattened mask, on its device.
        counts (`list[int]`): number in each row.
        first, end (`int`): the first column that is set in some row, and one more than the last; C and 0 if none is.
    """

    at: torch.Tensor
    counts: list[int]
    first: int
    end: int

    @property
    def total(self) -> int:
        """N."""
        return len(self.at)


_counted = WeakTensorKeyDictionary()  # mask: its version when it was counted, and its places


def count(masks: Iterable[torch.Tensor]) -> None:
    """Count masks `(B, C)` of any dtype on one device: they are copied to the CPU together."""
    new = [mask for mask in masks if _found(mask) is None]
    if not new:
        return
    together = torch.cat([mask.bool().flatten() for mask in new])
    for mask, flat in zip(new, together.cpu().split([mask.numel() for mask in new]), strict=True):
        here = flat.view(mask.shape)
        columns = here.any(0).nonzero().flatten().tolist()
        first, end = (columns[0], columns[-1] + 1) if columns else (mask.shape[1], 0)
        at = flat.nonzero().flatten()
        if mask.is_cuda:  # from pinned memory a copy need not be waited for
            at = at.pin_memory().to(mask.device, non_blocking=True)
        found = Places(at.to(mask.device), here.sum(1).tolist(), first, end)
        _counted[mask] = (_version(mask), found)


def places(mask: torch.Tensor) -> Places:
    """Where a mask `(B, C)` is set."""
    found = _found(mask)
    if found is None:
        count([mask])
        found = _counted[mask][1]
    return found


def take(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`values[mask]`: from `(B, C, ...)` to `(N, ...)`."""
    return values.flatten(0, 1).index_select(0, places(mask).at.to(values.device))


def _found(mask: torch.Tensor) -> Places | None:
    version, found = _counted.get(mask, (None, None))
    return found if version == _version(mask) else None  # it may have been written to since


def _version(mask: torch.Tensor) -> int:
    return -1 if mask.is_inference() else mask._version
