"""What quantised students need before they are trained."""

from __future__ import annotations

from torch import nn


def keep_differentiable(student: nn.Module) -> None:
    """
    Keep bitsandbytes' 4-bit layers in the format that they can be trained in.

    On CPUs with AVX512-BF16 the first forward pass in eval mode, such as a rollout, packs their weights for a kernel
    that has no backward pass. Later passes take it in training mode, too, and adapters below such a layer would get no
    gradient from it; PyTorch only warns.

    Args:
        student (`torch.nn.Module`): with or without an adapter. Its 4-bit layers are changed in place.

    Raises:
        ValueError: such a forward pass was made already.
    """
    for name, layer in student.named_modules():
        if not hasattr(layer, "support_avx512bf16_for_cpu"):  # an attribute of `bitsandbytes.nn.Linear4bit`
            continue
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"The student's 4-bit layer {name!r} was packed for inference by a forward pass in eval mode, and "
                "bitsandbytes has no gradients for that format on a CPU. Load the student again and pass it unused."
            )
        layer.support_avx512bf16_for_cpu = False
