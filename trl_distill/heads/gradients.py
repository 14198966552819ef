"""Gradients of hidden states and a head, summed in fp32 over tiles of tokens."""

from __future__ import annotations

import torch


class Gradients:
    """Gradients of hidden states, weight and bias, summed in fp32 over tiles; `None` for those that need none."""

    def __init__(self, hidden: bool, weight: bool, bias: bool):
        self.wants = hidden, weight, bias
        self.hidden: torch.Tensor | None = None
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None

    @classmethod
    def wanted_by(cls, needs_input_grad: tuple[bool, ...]) -> Gradients:
        return cls(*needs_input_grad[:3])

    def begin(self, hidden: torch.Tensor, weight: torch.Tensor) -> None:
        """Allocate, once ZeRO-3 has gathered the weight and its shape is known."""
        if self.wants[0] and self.hidden is None:
            self.hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        if self.wants[2] and self.bias is None:
            self.bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=hidden.device)

    def add(self, rows: slice, found: torch.Tensor, states: torch.Tensor, weight: torch.Tensor) -> None:
        """Add a tile: derivatives by the projected logits `(n, V)`, fp32; hidden states and weight in their dtype."""
        rounded = found.to(states.dtype)
        if self.hidden is not None:
            add_product(self.hidden[rows], rounded, weight)
        if self.wants[1]:
            self.weight = add_product(self.weight, rounded.T, states)
        if self.bias is not None:
            self.bias += found.sum(0)

    @property
    def are_finite(self) -> bool:
        sums = [tensor.isfinite().all() for tensor in (self.hidden, self.weight, self.bias) if tensor is not None]
        return not sums or bool(torch.stack(sums).all())

    def scale(self, factor: float) -> None:
        for tensor in (self.hidden, self.weight, self.bias) if factor != 1.0 else ():
            if tensor is not None:
                tensor.mul_(factor)

    def as_given(self, *inputs: torch.Tensor | None) -> list[torch.Tensor | None]:
        """The gradients in the dtypes of the inputs."""
        sums = (self.hidden, self.weight, self.bias)
        return [None if s is None or i is None else s.to(i.dtype) for s, i in zip(sums, inputs, strict=True)]


def add_product(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`total += a @ b` in fp32, whatever the dtype of the factors; a new tensor if `total` is `None`."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return torch.mm(a.float(), b.float()) if total is None else total.addmm_(a.float(), b.float())
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
