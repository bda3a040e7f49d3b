"""Products that comfy-kitchen's own kernels do best: INT8 off Hopper, block-scaled formats on Blackwell."""

from __future__ import annotations

import dataclasses
import functools

import comfy_kitchen as ck
import torch
from comfy_kitchen.registry import registry

from ..kernels.quantize_rows import apply_activation
from ..kernels.stored_weight import INT8, MXFP8, NVFP4, StoredWeight

NAN_E4M3 = 0x7F
NAN_E8M0 = 0xFF


@functools.lru_cache(maxsize=1)
def kitchen_cuda_available() -> bool:
    """Whether comfy-kitchen's compiled CUDA backend is loaded (it wants torch built for CUDA 13)."""
    return registry.is_available("cuda")


def kitchen_linear(
    x: torch.Tensor, weight: StoredWeight, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    """act(x) @ W.T + bias by comfy-kitchen, (..., K) -> (M, N) in x's dtype."""
    rows = _aligned(apply_activation(x.reshape(-1, weight.columns), activation))
    weight = dataclasses.replace(weight, data=_aligned(weight.data))
    bias = None if bias is None else bias.to(x.dtype)
    if weight.kind == INT8:
        rotated = weight.rotation > 0
        options = {"convrot": rotated, "convrot_groupsize": weight.rotation or 256}
        return ck.int8_linear(rows, weight.data, weight.scale, bias, x.dtype, **options)
    if weight.kind in (MXFP8, NVFP4):
        return _block_scaled(rows, weight, bias)
    return _int4(rows, weight, bias)


def _aligned(t: torch.Tensor) -> torch.Tensor:
    """`t` row by row on 16 bytes, which comfy-kitchen's kernels take for granted; copied only where it is not."""
    t = t.contiguous()
    return t.clone() if t.data_ptr() % 16 else t


def _int4(rows: torch.Tensor, weight: StoredWeight, bias: torch.Tensor | None) -> torch.Tensor:
    if weight.block_scale is None:
        from comfy_kitchen.tensor.convrot_w4a4 import convrot_w4a4_linear

        options = {"convrot_groupsize": weight.rotation, "linear_dtype": weight.linear_dtype}
        return convrot_w4a4_linear(rows, weight.data, weight.scale, bias, **options)
    from comfy_kitchen.tensor.w4a8_int8 import w4a8_int8_linear

    return w4a8_int8_linear(
        rows,
        weight.data,
        weight.block_scale,
        weight.scale,
        codebook=weight.codebook,
        correction=weight.correction,
        bias=bias,
        group_size=weight.group,
        convrot_groupsize=weight.rotation,
        out_dtype=rows.dtype,
    )


def _block_scaled(rows: torch.Tensor, weight: StoredWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """NVFP4 or MXFP8 on both sides. x's tensor-wide scale is found without a temporary of x's size."""
    nvfp4 = weight.kind == NVFP4
    multiple = 16 if nvfp4 else 32
    padded = any(size % multiple for size in rows.shape)
    low, high = torch.aminmax(rows, dim=1)
    largest = torch.maximum(-low, high).float()
    finite = largest.isfinite()
    if nvfp4:
        # A row that is not finite must not set the scale of the others.
        largest = torch.where(finite, largest, 0.0).amax()
        tensor_scale = (largest / (448.0 * 6.0)).clamp(min=2.0**-100)
        q, block_scale = ck.quantize_nvfp4(rows, tensor_scale, pad_16x=padded)
        _poison_rows(block_scale, finite, NAN_E4M3)
        out = ck.scaled_mm_nvfp4(
            q,
            weight.data,
            tensor_scale_a=tensor_scale,
            tensor_scale_b=weight.scale.reshape(()),
            block_scale_a=block_scale,
            block_scale_b=weight.block_scale.view(torch.float8_e4m3fn),
            bias=_padded_bias(bias, weight),
            out_dtype=rows.dtype,
        )
    else:
        q, block_scale = ck.quantize_mxfp8(rows, pad_32x=padded)
        _poison_rows(block_scale, finite, NAN_E8M0)
        out = ck.scaled_mm_mxfp8(
            q,
            weight.data,
            block_scale_a=block_scale,
            block_scale_b=weight.block_scale.view(torch.float8_e8m0fnu),
            bias=_padded_bias(bias, weight),
            out_dtype=rows.dtype,
        )
    return out[: rows.shape[0], : weight.rows].contiguous()


def _poison_rows(block_scale: torch.Tensor, finite: torch.Tensor, nan_code: int) -> None:
    """Make the first block scale of every row that held NaN or Inf a NaN, so that its outputs are not finite either.

    Args:
        block_scale: cuBLAS-swizzled scales, (128 x row tiles, 4 x block tiles) one-byte floats, written.
        finite: (M,) bool.
        nan_code: the dtype's NaN as a byte.
    """
    stored = block_scale.view(torch.uint8).view(-1)
    row = torch.arange(finite.shape[0], device=finite.device)
    position = row // 128 * (128 * block_scale.shape[1]) + row % 32 * 16 + row % 128 // 32 * 4
    stored[position] = torch.where(finite, stored[position], nan_code)


def _padded_bias(bias: torch.Tensor | None, weight: StoredWeight) -> torch.Tensor | None:
    missing = weight.data.shape[0] - weight.rows
    return bias if bias is None or not missing else torch.nn.functional.pad(bias, (0, missing))
