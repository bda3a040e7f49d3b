"""The regular Hadamard rotation of convrot: groups of K are multiplied by an orthogonal, symmetric +-1 matrix."""

from __future__ import annotations

import functools
import math

import torch

from .runtime import made_to_keep


@functools.lru_cache(maxsize=32)
def hadamard(size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The (size, size) regular Hadamard matrix over sqrt(size): symmetric and its own inverse.

    It is the Kronecker power of [[1,1,1,-1],[1,1,-1,1],[1,-1,1,1],[-1,1,1,1]] (ConvRot), as comfy-kitchen builds it.

    Raises:
        ValueError: `size` is no power of four.
    """
    if size < 4 or round(math.log(size, 4)) != math.log(size, 4):
        raise ValueError(f"A regular Hadamard matrix needs a power of four as its size, not {size}.")
    kernel = torch.ones(4, 4, dtype=torch.float64) - 2.0 * torch.eye(4, dtype=torch.float64).flip(0)
    matrix = kernel
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, kernel)
    matrix = matrix / math.sqrt(size)
    return made_to_keep(lambda: matrix.to(device=device, dtype=dtype))


def rotate_reference(x: torch.Tensor, group: int) -> torch.Tensor:
    """x (..., K) with every `group` columns rotated, in float32 or x's wider dtype; rotating twice gives x back."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    grouped = wide.reshape(*x.shape[:-1], x.shape[-1] // group, group)
    return (grouped @ hadamard(group, x.device, wide.dtype)).reshape(x.shape)
