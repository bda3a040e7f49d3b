"""What a kernel needs to know of a quantized weight: plain tensors, sizes and a storage kind."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

FP8 = "fp8"
INT8 = "int8"
MXFP8 = "mxfp8"
NVFP4 = "nvfp4"
INT4 = "int4"
INT4_CODEBOOK = "int4_codebook"

KINDS = (FP8, INT8, MXFP8, NVFP4, INT4, INT4_CODEBOOK)
PACKED_KINDS = (NVFP4, INT4, INT4_CODEBOOK)
"""Two 4-bit codes a byte: nvfp4 has the even column in the high nibble, the integer kinds in the low one."""


class WeightTraits(NamedTuple):
    """What the choice of a product's path depends on, of a weight."""

    kind: str
    rows: int
    columns: int
    rotation: int
    corrected: bool


@dataclass(frozen=True)
class StoredWeight:
    """One weight matrix W (rows, columns) as it is stored.

    Attributes:
        kind: one of `KINDS`.
        data: 2-D codes: (>= rows, >= columns) of float8 or int8, or (>= rows, >= columns / 2) bytes for packed kinds.
        scale: float32, one element or (rows,): W = decoded codes x scale (float32; absent, `None`, for mxfp8).
        block_scale: uint8 view of the cuBLAS-swizzled scales (mxfp8: e8m0 per 32; nvfp4: e4m3 per 16), or for
            int4_codebook the row-major (rows, columns / group) relative scales in float8_e4m3fn or float32.
        codebook: int4_codebook's 16 float32 levels, or None for the plain grid code - 8.
        correction: int4_codebook's (columns / group, rows) offset per group, or None.
        rows: N, out_features, without padding.
        columns: K, in_features, without padding.
        group: columns per block scale (0: none).
        rotation: group size of the regular Hadamard rotation applied to the stored W along K (0: none).
        linear_dtype: int4 only: "int4" or "int8", what comfy-kitchen's kernel may quantize x to.
    """

    kind: str
    data: torch.Tensor
    scale: torch.Tensor | None
    rows: int
    columns: int
    block_scale: torch.Tensor | None = None
    codebook: torch.Tensor | None = None
    correction: torch.Tensor | None = None
    group: int = 0
    rotation: int = 0
    linear_dtype: str = "int4"

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales: what one product must read at least."""
        tensors = (self.data, self.scale, self.block_scale, self.codebook, self.correction)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    @property
    def code_name(self) -> str:
        """Name of the element format as the kernels' KIND: e4m3, e5m2, e2m1, mxfp8, int8, int4, int4_codebook."""
        if self.kind == FP8:
            return "e5m2" if self.data.dtype == torch.float8_e5m2 else "e4m3"
        return "e2m1" if self.kind == NVFP4 else self.kind

    @functools.cached_property
    def traits(self) -> WeightTraits:
        """What its products' paths are chosen by."""
        return WeightTraits(self.kind, self.rows, self.columns, self.rotation, self.correction is not None)

    @functools.cached_property
    def alignment(self) -> int:
        """The largest of 16, 8 and 1 bytes that every row of codes starts on a multiple of; 0: not stored row by row."""
        data = self.data
        if data.stride(-1) != 1:
            return 0
        places = data.data_ptr() | (data.stride(0) * data.element_size())
        return next(nbytes for nbytes in (16, 8, 1) if places % nbytes == 0)

    @functools.cached_property
    def scale_mode(self) -> int:
        """0: no scale beside the block scales, 1: one for the whole tensor, 2: one per row."""
        if self.scale is None:
            return 0
        return 1 if self.scale.numel() == 1 else 2

    @property
    def scale_tiles_per_row(self) -> int:
        """128 x 4 tiles side by side in the swizzled block scales (0: there are none)."""
        if self.kind not in (MXFP8, NVFP4):
            return 0
        padded = self.data.shape[1] * (2 if self.kind == NVFP4 else 1)
        return -(-padded // (4 * self.group))
