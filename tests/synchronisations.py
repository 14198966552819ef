"""Counts, on a CPU, the operations for which a process with a GPU would wait until the device has caught up.

Such an operation brings a number from the device to Python: `.item()` (also behind `bool`, `int`, `float`),
`.tolist()`, `.cpu()`, and everything whose result has a size that depends on values: `nonzero`, a boolean mask as an
index, `unique`. Copies to the device (`torch.tensor(..., device=...)`) wait for that copy alone and are not counted.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


BY_SIZE = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"}
INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}
TO_HOST = ("tolist", "cpu", "numpy")  # a CPU needs no operation for them


class Synchronisations(TorchDispatchMode):
    """
    Within this context, `found` counts them by the place in `packages` that asked for it: "file.py function: what".

    Args:
        packages (`tuple[str, ...]`): parts of paths; a place is the innermost frame whose file contains one of them.
    """

    def __init__(self, *packages: str):
        super().__init__()
        self.packages, self.found = packages, Counter[str]()

    def __enter__(self) -> Any:
        for name in TO_HOST:
            setattr(torch.Tensor, name, self._counting(name, getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name in TO_HOST:
            delattr(torch.Tensor, name)  # the method of its base class is found again

    def _counting(self, name: str, method: Any) -> Any:
        @functools.wraps(method)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count(name)
            return method(*args, **kwargs)

        return counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.count("item")
        elif name in BY_SIZE:
            self.count(name)
        elif name in INDEX:
            for _ in (i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)):
                self.count("boolean index")
        return func(*args, **(kwargs or {}))

    def count(self, what: str) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None and not any(package in frame.f_code.co_filename for package in self.packages):
            frame = frame.f_back
        place = (
            "elsewhere" if frame is None else f"{frame.f_code.co_filename.rpartition('/')[2]} {frame.f_code.co_name}"
        )
        self.found[f"{place}: {what}"] += 1
