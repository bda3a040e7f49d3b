"""Reads a comfy-kitchen QuantizedTensor into the StoredWeight that kernels take, without copying its codes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from ..errors import CheckpointError
from ..kernels.stored_weight import FP8, INT4, INT4_CODEBOOK, INT8, MXFP8, NVFP4, StoredWeight

FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def _flat_scale(scale: torch.Tensor, rows: int) -> torch.Tensor | None:
    """`scale` as contiguous float32 (1,) or (rows,); None when it has another number of elements."""
    # Spelled out: under torch.compile `in` does not compare symbolic sizes.
    if scale.numel() != 1 and scale.numel() != rows:
        return None
    if scale.dtype != torch.float32:
        scale = scale.float()
    return scale.reshape(-1).contiguous()


def _block_bytes(scale: torch.Tensor) -> torch.Tensor:
    return scale.contiguous().view(torch.uint8)


def _fp8(data: torch.Tensor, params, rows: int, columns: int) -> StoredWeight | None:
    scale = _flat_scale(params.scale, rows)
    if data.dtype not in FLOAT8_DTYPES or scale is None or tuple(data.shape) != (rows, columns):
        return None
    return StoredWeight(FP8, data, scale, rows, columns)


def _int8(data: torch.Tensor, params, rows: int, columns: int) -> StoredWeight | None:
    scale = _flat_scale(params.scale, rows)
    if scale is None or tuple(data.shape) != (rows, columns):
        return None
    rotation = params.convrot_groupsize if params.convrot else 0
    return StoredWeight(INT8, data, scale, rows, columns, rotation=rotation)


def _check_blocks(weight: StoredWeight) -> StoredWeight:
    """`weight`, whose codes and swizzled scales are as large as its sizes say: kernels read them without looking.

    Raises:
        CheckpointError: they are smaller.
    """
    data, per_byte = weight.data, 2 if weight.kind == NVFP4 else 1
    scales = -(-weight.rows // 128) * 128 * 4 * weight.scale_tiles_per_row
    if data.shape[0] < weight.rows or data.shape[1] * per_byte < weight.columns or weight.block_scale.numel() < scales:
        raise CheckpointError(
            f"A {weight.kind} weight of {weight.rows} x {weight.columns} is stored as {tuple(data.shape)} codes with "
            f"{weight.block_scale.numel()} block scales where {scales} are needed: the file is damaged, quantize it again."
        )
    return weight


def _mxfp8(data: torch.Tensor, params, rows: int, columns: int) -> StoredWeight | None:
    return _check_blocks(StoredWeight(MXFP8, data, None, rows, columns, _block_bytes(params.scale), group=32))


def _nvfp4(data: torch.Tensor, params, rows: int, columns: int) -> StoredWeight | None:
    if params.scale.numel() != 1:
        return None
    scale = _flat_scale(params.scale, rows)
    block_scale = _block_bytes(params.block_scale)
    return _check_blocks(StoredWeight(NVFP4, data, scale, rows, columns, block_scale, group=16))


def _int4(data: torch.Tensor, params, rows: int, columns: int) -> StoredWeight | None:
    scale = _flat_scale(params.scale, rows)
    if scale is None or tuple(data.shape) != (rows, columns // 2):
        return None
    rotation, linear_dtype = params.convrot_groupsize, params.linear_dtype
    return StoredWeight(INT4, data, scale, rows, columns, rotation=rotation, linear_dtype=linear_dtype)


def _int4_codebook(data: torch.Tensor, params, rows: int, columns: int) -> StoredWeight | None:
    # Newer comfy-kitchen releases keep other widths and packings under the same layout name.
    if data.dim() != 2 or tuple(data.shape) != (rows, columns // 2) or params.scale.dim() != 2:
        return None
    return StoredWeight(
        INT4_CODEBOOK,
        data,
        _flat_scale(params.s_channel, rows),
        rows,
        columns,
        params.scale.contiguous(),
        None if params.codebook is None else params.codebook.contiguous(),
        params.correction,
        params.group_size,
        params.convrot_groupsize,
    )


LAYOUT_KINDS: Mapping[str, str] = MappingProxyType(
    {
        "TensorCoreFP8Layout": FP8,
        "TensorCoreFP8E4M3Layout": FP8,
        "TensorCoreFP8E5M2Layout": FP8,
        "TensorWiseINT8Layout": INT8,
        "TensorCoreMXFP8Layout": MXFP8,
        "TensorCoreNVFP4Layout": NVFP4,
        "TensorCoreConvRotW4A4Layout": INT4,
        "AsymW4A8Int8Layout": INT4_CODEBOOK,
    }
)
"""comfy-kitchen's layout -> storage kind."""

_READERS = {FP8: _fp8, INT8: _int8, MXFP8: _mxfp8, NVFP4: _nvfp4, INT4: _int4, INT4_CODEBOOK: _int4_codebook}


def stored_weight(weight: Any) -> StoredWeight | None:
    """`weight`'s parts, or None where it is no quantized tensor of a kind the kernels know (or is transposed).

    Raises:
        CheckpointError: its codes or block scales are smaller than its shape needs.
    """
    # Reading takes microseconds, as long as a small product: remember it with the weight, as long as its parts stay.
    compiling = torch.compiler.is_compiling()
    known = None if compiling else getattr(weight, _ATTRIBUTE, None)
    if known is not None and known[0] is weight._qdata and known[1] is weight._params:
        return known[2]
    layout = getattr(weight, "_layout_cls", None)
    kind = LAYOUT_KINDS.get(layout) if isinstance(layout, str) else None
    if kind is None:
        return None
    data, params = weight._qdata, weight._params
    stored = _read(kind, data, params)
    if not compiling:
        setattr(weight, _ATTRIBUTE, (data, params, stored))
    return stored


_ATTRIBUTE = "_lowbit_stored_weight"


def _read(kind: str, data: torch.Tensor, params) -> StoredWeight | None:
    if getattr(params, "transposed", False) or len(params.orig_shape) != 2:
        return None
    rows, columns = params.orig_shape
    return _READERS[kind](data, params, rows, columns)
