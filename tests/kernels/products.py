"""A linear by a path of the test's choice, as `quantized_linear` would multiply it on a GPU of the test's choice."""

from __future__ import annotations

import torch

from lowbit.kernels.stored_weight import StoredWeight
from lowbit.ops.linear_paths import LINEAR_PATHS, LinearCall, Product
from lowbit.ops.linear_table import Gpu


def product_of(
    path: str,
    x: torch.Tensor,
    weight: StoredWeight,
    bias: torch.Tensor | None,
    activation: str | None,
    gpu: Gpu,
    shared: bool = False,
) -> Product:
    """What multiplies x, and all that are like it."""
    kind = None if bias is None else bias.dtype
    call = LinearCall(weight.traits, True, x.shape, x.stride(), x.dtype, x.device, kind, activation, shared, gpu)
    return LINEAR_PATHS[path](call)


def multiply(
    path: str,
    x: torch.Tensor,
    weight: StoredWeight,
    bias: torch.Tensor | None,
    activation: str | None,
    gpu: Gpu,
) -> torch.Tensor:
    """act(x) @ weight.T + bias."""
    return product_of(path, x, weight, bias, activation, gpu)(x, weight, bias)
