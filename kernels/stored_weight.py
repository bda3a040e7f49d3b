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
    """All of a weight but its values and where they are: weights of the same traits are multiplied by the same launches.

    Attributes:
        alignment: the largest of 16, 8 and 1 bytes that every row of codes starts on a multiple of; 0: not stored row by
            row.
        scale_mode: 0: no scale beside the block scales, 1: one for the whole tensor, 2: one per row.
        dtype, shape, strides: of the codes.
        others: the dtypes of its other tensors, None for those that it lacks; the last is the correction's.
        devices: that its tensors are on.
    """

    kind: str
    rows: int
    columns: int
    group: int
    rotation: int
    alignment: int
    scale_mode: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    others: tuple[torch.dtype | None, ...]
    devices: frozenset[torch.device]

    @property
    def corrected(self) -> bool:
        """Whether there is a `correction`."""
        return self.others[-1] is not None


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
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def code_name(self) -> str:
        """Name of the element format as the kernels' KIND: e4m3, e5m2, e2m1, mxfp8, int8, int4, int4_codebook."""
        if self.kind == FP8:
            return "e5m2" if self.data.dtype == torch.float8_e5m2 else "e4m3"
        return "e2m1" if self.kind == NVFP4 else self.kind

    @functools.cached_property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those that it has, the codes first."""
        return tuple(part for part in self._parts if part is not None)

    @property
    def _parts(self) -> tuple[torch.Tensor | None, ...]:
        return self.data, self.scale, self.block_scale, self.codebook, self.correction

    @functools.cached_property
    def transposed(self) -> torch.Tensor:
        """The codes as (columns, rows)."""
        return self.data.t()

    @functools.cached_property
    def scale_row(self) -> torch.Tensor:
        """The scale as (1, rows) or (1, 1)."""
        return self.scale.view(1, -1)

    @functools.cached_property
    def traits(self) -> WeightTraits:
        """What its products' paths and launches depend on."""
        data = self.data
        return WeightTraits(
            self.kind,
            self.rows,
            self.columns,
            self.group,
            self.rotation,
            self._alignment(),
            self.scale_mode,
            data.dtype,
            tuple(data.shape),
            data.stride(),
            tuple(None if part is None else part.dtype for part in self._parts[1:]),
            frozenset(part.device for part in self.tensors),
        )

    def _alignment(self) -> int:
        data = self.data
        if data.stride(-1) != 1:
            return 0
        places = data.data_ptr() | (data.stride(0) * data.element_size())
        return next(nbytes for nbytes in (16, 8, 1) if places % nbytes == 0)

    @property
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
