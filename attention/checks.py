"""What an attention call's tensors are checked for: alignment before the call, numbers and error after it."""

from __future__ import annotations

import torch

from .backends import INT32_ELEMENTS

ALIGNMENT = 16
SAMPLED_HEADS = 4


def prepared(x: torch.Tensor, contiguous: bool = False) -> torch.Tensor:
    """`x`, or a copy where a kernel could not read it: four dimensions, last stride 1, rows on 16-byte addresses.

    Copies at most once and only when needed. contiguous: also demand (batch, heads, length, head_dim) order in memory.
    A view that repeats elements, or whose largest offset leaves 32 bits, is copied too: kernels compute in int32.
    """
    batch, heads, row, last = x.stride()
    shape = x.shape
    size = x.element_size()
    reach = (shape[0] - 1) * batch + (shape[1] - 1) * heads + (shape[2] - 1) * row
    if (
        last == 1
        and batch
        and heads
        and row
        and not (x.data_ptr() | batch * size | heads * size | row * size) & (ALIGNMENT - 1)
        and reach < INT32_ELEMENTS
        and (not contiguous or x.is_contiguous())
    ):
        return x
    return x if _readable(x, contiguous) else x.clone(memory_format=torch.contiguous_format)


def _readable(x: torch.Tensor, contiguous: bool) -> bool:
    """The same question with the strides of dimensions of size 1 left out, which mean nothing."""
    dimensions = [(n, stride) for n, stride in zip(x.shape, x.stride(), strict=True) if n > 1]
    if x.numel() == 0 or (contiguous and not x.is_contiguous()) or x.data_ptr() % ALIGNMENT:
        return False
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return False
    rows = dimensions[:-1] if x.shape[-1] > 1 else dimensions
    if any(stride == 0 or stride * x.element_size() % ALIGNMENT for _, stride in rows):
        return False
    return sum((n - 1) * stride for n, stride in dimensions) < INT32_ELEMENTS


def is_finite(x: torch.Tensor) -> bool:
    """Whether every element is a finite number; waits for the GPU. The sum is cheap and carries NaN and Inf along."""
    return bool(torch.isfinite(x.sum(dtype=torch.float32))) or bool(torch.isfinite(x).all())


def some_heads(x: torch.Tensor) -> torch.Tensor:
    """A view of a few heads spread across (batch, heads, length, head_dim)."""
    return x[:, :: max(x.shape[1] // SAMPLED_HEADS, 1)]


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """||out - reference|| / ||reference|| in float32 over a few heads spread across the layer.

    out, reference: (batch, heads, length, head_dim). Waits for the GPU.
    """
    a, b = some_heads(out).float(), some_heads(reference).float()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))
