"""x @ W.T + bias for a quantized W: the one call the rest of the pack makes, and its torch.library op."""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F

from ..errors import FormatError
from ..kernels.operators import register_operator
from ..kernels.quantize_rows import ACTIVATIONS, apply_activation
from ..kernels.runtime import INTERPRETED, compute_capability, kernels_run_on
from ..kernels.stored_weight import StoredWeight, WeightTraits
from .linear_call import LinearCall, Product
from .linear_kitchen import kitchen_cuda_available
from .linear_paths import LINEAR_PATHS, kernels_take
from .linear_reference import linear_reference
from .linear_table import REFERENCE, Gpu, choose_path
from .linear_weight import stored_weight

_INTERPRETED_GPU = Gpu((9, 0))


def quantized_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    fast: bool = True,
    activation: str | None = None,
    input_group: str = "",
) -> torch.Tensor:
    """act(x) @ weight.T + bias, for x (..., K) of any rank, strides and alignment.

    Args:
        x: floating point, last dimension K.
        weight: (N, K) comfy-kitchen `QuantizedTensor` of any layout in `linear_weight.LAYOUT_KINDS`; any other
            tensor is multiplied by `torch.nn.functional.linear`.
        bias: (N,) or None.
        fast: quantize x too, row by row, and multiply on low-precision tensor cores where the GPU has them. False:
            only the weight is quantized and the product is 16-bit.
        activation: None, "gelu_tanh" or "silu", applied to x first.
        input_group: name of the linears that read this very tensor one after the other, and quantize it once; "": none.
            Not in a compiled graph: inductor puts other values into a tensor's memory, and the tensor is the same to see.

    Returns:
        (..., N) in x's dtype.

    Raises:
        FormatError: x's last dimension is not the weight's K, or the activation is unknown.
    """
    if activation not in ACTIVATIONS:
        raise FormatError(f"activation must be one of {ACTIVATIONS}, not '{activation}'.")
    stored = stored_weight(weight)
    if stored is None:
        return F.linear(apply_activation(x, activation), weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        # Gradients flow through the plain product; inference never comes here.
        _check_columns(x.shape, stored.rows, stored.columns)
        return linear_reference(x, stored, bias, fast=False, activation=activation)
    if torch.compiler.is_compiling() or type(x) not in _PLAIN:
        _check_columns(x.shape, stored.rows, stored.columns)
        return torch.ops.lowbit.linear(*_flatten(x, stored, bias, fast, activation))
    return linear_stored(x, stored, bias, fast, activation, input_group)


_PLAIN = torch.Tensor, torch.nn.Parameter


def _check_columns(shape: tuple[int, ...], rows: int, columns: int) -> None:
    if not shape or shape[-1] != columns:
        raise FormatError(
            f"An input of shape {tuple(shape)} cannot be multiplied by a weight of {rows} x {columns}: "
            f"its last dimension must be {columns}."
        )


@functools.lru_cache(maxsize=64)
def _gpu(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return _INTERPRETED_GPU if INTERPRETED else Gpu((0, 0), triton=False)
    triton = kernels_run_on(torch.empty(0, device=device))
    return Gpu(compute_capability(device.index), triton, kitchen_cuda_available())


@functools.lru_cache(maxsize=4096)
def _product(
    weight: WeightTraits,
    fast: bool,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    bias: tuple[torch.dtype, torch.device] | None,
    activation: str | None,
    shared: bool,
) -> Product:
    """What multiplies inputs of this shape, by the path that the table has for it."""
    gpu, sizes = _gpu(device), (weight.rows, weight.columns)
    _check_columns(shape, *sizes)
    call = LinearCall(weight, fast, shape, strides, dtype, device, bias and bias[0], activation, shared, gpu)
    path = REFERENCE
    if call.rows and kernels_take(weight.rotation):
        path = choose_path(weight.kind, fast, call.rows, *sizes, dtype, gpu, weight.corrected)
    if path != REFERENCE and weight.devices | ({bias[1]} if bias else set()) != {device}:
        raise FormatError(
            f"An input on {device} cannot be multiplied by a weight or bias on another device: move them there."
        )
    return LINEAR_PATHS[path](call)


def linear_stored(
    x: torch.Tensor,
    weight: StoredWeight,
    bias: torch.Tensor | None,
    fast: bool,
    activation: str | None,
    input_group: str = "",
) -> torch.Tensor:
    """`quantized_linear` for a weight already taken apart, without autograd."""
    device = x.device
    if x.is_cuda and device.index != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return linear_stored(x, weight, bias, fast, activation, input_group)
    kind = None
    if bias is not None:
        kind = bias.dtype, bias.device
        if not bias.is_contiguous():
            bias = bias.contiguous()
    shared = input_group != ""
    product = _product(weight.traits, fast, x.shape, x.stride(), x.dtype, device, kind, activation, shared)
    return product(x, weight, bias, input_group)


_FIELDS = tuple(field.name for field in dataclasses.fields(StoredWeight))


def _flatten(
    x: torch.Tensor, weight: StoredWeight, bias: torch.Tensor | None, fast: bool, activation: str | None
) -> tuple:
    return x, *[getattr(weight, name) for name in _FIELDS], bias, fast, activation or ""


def _linear_op(x, *arguments):
    *weight, bias, fast, activation = arguments
    return linear_stored(x, StoredWeight(*weight), bias, fast, activation or None)


def _linear_fake(x, kind, data, scale, rows, *_arguments):
    return x.new_empty((*x.shape[:-1], rows))


_SCHEMA = (
    "linear(Tensor x, str kind, Tensor data, Tensor? scale, int rows, int columns, Tensor? block_scale, "
    "Tensor? codebook, Tensor? correction, int group, int rotation, str linear_dtype, "
    "Tensor? bias, bool fast, str activation) -> Tensor"
)
"""Of the weight what `StoredWeight` is made of, in its order."""


register_operator("linear", _SCHEMA, _linear_op, _linear_fake)
