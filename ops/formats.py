"""The weight formats by name: one row each, with what core calls them and what they can store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from ..errors import FormatError

AUTO = "auto"
"""Format name that stands for the choice of `ops.auto_format`."""

SMALLEST = "smallest"
"""Format name that stands for a mix of the bytes that the GPU's 4-bit format would take (`ops.auto_format`)."""

AS_STORED = "none"
"""Format name that leaves every weight as the file has it."""


@dataclass(frozen=True)
class Storage:
    """How one weight matrix is kept on disk and in memory: a row of ComfyUI's `QUANT_ALGOS`.

    Attributes:
        core_format: `format` in the layer's `comfy_quant` JSON.
        layout: comfy-kitchen layout name.
        dtype: dtype of the stored `weight`.
        bits: bits of one stored weight element, without scales.
        column_multiple: K (in_features) must be a multiple of this.
        pad: rows and columns are padded to a multiple of this by the layout (0: not padded).
        columns_per_scale: weights that share one scale along K (0: a whole row or the whole tensor).
        core_config: further entries of the `comfy_quant` JSON.
        quantize_options: keyword arguments for the layout's `quantize`, besides `core_config`.
    """

    core_format: str
    layout: str
    dtype: torch.dtype
    bits: int
    column_multiple: int = 1
    pad: int = 0
    columns_per_scale: int = 0
    core_config: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    quantize_options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class WeightFormat:
    """A format name of the nodes.

    Attributes:
        name: `<storage>[_scaled][_fast]`.
        storage: key into `STORAGES`.
        fast: activations are quantized too and the product runs on low-precision tensor cores where there are any.
        unit_scale: the tensor-wide scale is 1.0 (a plain cast, or block scales only) where the weight fits, instead of the
            absolute maximum.
        substitute: storage for a matrix whose K the storage cannot take.
        summary: one line for the documents.
    """

    name: str
    storage: str
    fast: bool
    unit_scale: bool
    substitute: str
    summary: str


CONVROT_GROUP = 256
_SCALE_PER_ROW = MappingProxyType({"per_channel": True})

STORAGES: Mapping[str, Storage] = MappingProxyType(
    {
        "float8_e4m3fn": Storage("float8_e4m3fn", "TensorCoreFP8E4M3Layout", torch.float8_e4m3fn, 8),
        "float8_e5m2": Storage("float8_e5m2", "TensorCoreFP8E5M2Layout", torch.float8_e5m2, 8),
        "mxfp8": Storage("mxfp8", "TensorCoreMXFP8Layout", torch.float8_e4m3fn, 8, pad=32, columns_per_scale=32),
        "nvfp4": Storage("nvfp4", "TensorCoreNVFP4Layout", torch.uint8, 4, pad=16, columns_per_scale=16),
        "int8": Storage("int8_tensorwise", "TensorWiseINT8Layout", torch.int8, 8, quantize_options=_SCALE_PER_ROW),
        "int8_convrot": Storage(
            "int8_tensorwise",
            "TensorWiseINT8Layout",
            torch.int8,
            8,
            column_multiple=CONVROT_GROUP,
            core_config=MappingProxyType({"convrot": True, "convrot_groupsize": CONVROT_GROUP}),
            quantize_options=_SCALE_PER_ROW,
        ),
        "int4_convrot": Storage(
            "convrot_w4a4",
            "TensorCoreConvRotW4A4Layout",
            torch.int8,
            4,
            column_multiple=CONVROT_GROUP,
            core_config=MappingProxyType({"convrot_groupsize": CONVROT_GROUP}),
        ),
        "int4_asym": Storage(
            "asym_w4a8_int8",
            "AsymW4A8Int8Layout",
            torch.int8,
            4,
            column_multiple=CONVROT_GROUP,
            columns_per_scale=16,
            core_config=MappingProxyType({"group_size": 16, "convrot_groupsize": CONVROT_GROUP}),
        ),
    }
)

_ROWS = (
    WeightFormat(
        "fp8_e4m3fn", "float8_e4m3fn", False, True, "float8_e4m3fn", "8-bit float, a plain cast; 16-bit product"
    ),
    WeightFormat(
        "fp8_e4m3fn_scaled", "float8_e4m3fn", False, False, "float8_e4m3fn", "8-bit float, scaled; 16-bit product"
    ),
    WeightFormat(
        "fp8_e4m3fn_scaled_fast", "float8_e4m3fn", True, False, "float8_e4m3fn", "8-bit float, scaled; 8-bit product"
    ),
    WeightFormat(
        "fp8_e5m2", "float8_e5m2", False, True, "float8_e5m2", "8-bit float, wide range, a plain cast; 16-bit product"
    ),
    WeightFormat(
        "fp8_e5m2_scaled", "float8_e5m2", False, False, "float8_e5m2", "8-bit float, wide range, scaled; 16-bit product"
    ),
    WeightFormat("mxfp8", "mxfp8", False, True, "mxfp8", "8-bit float, a scale per 32 weights; 16-bit product"),
    WeightFormat("mxfp8_fast", "mxfp8", True, True, "mxfp8", "8-bit float, a scale per 32 weights; 8-bit product"),
    WeightFormat("int8", "int8", False, False, "int8", "8-bit integer, a scale per row; 16-bit product"),
    WeightFormat("int8_fast", "int8", True, False, "int8", "8-bit integer, a scale per row; 8-bit product"),
    WeightFormat(
        "int8_convrot_fast",
        "int8_convrot",
        True,
        False,
        "int8",
        "8-bit integer after a Hadamard rotation; 8-bit product, the most accurate of the fast formats",
    ),
    WeightFormat("fp4", "nvfp4", False, True, "nvfp4", "4-bit float (NVFP4), block scales only; 16-bit product"),
    WeightFormat("fp4_scaled", "nvfp4", False, False, "nvfp4", "4-bit float (NVFP4), two scales; 16-bit product"),
    WeightFormat("fp4_scaled_fast", "nvfp4", True, False, "nvfp4", "4-bit float (NVFP4), two scales; 4-bit product"),
    WeightFormat(
        "int4_convrot_fast", "int4_convrot", True, False, "int8", "4-bit integer after a rotation; 4-bit product"
    ),
    WeightFormat(
        "int4_asym_fast", "int4_asym", True, False, "int8", "4-bit integer with a codebook; 8-bit integer product"
    ),
)

FORMATS: Mapping[str, WeightFormat] = MappingProxyType({row.name: row for row in _ROWS})

RECOMMENDED = ("int8_convrot_fast", "int8", "fp8_e4m3fn_scaled_fast", "int4_asym_fast", "fp4_scaled_fast")
"""Names of formats; the others are no better than one of these of the same size."""

FORMAT_CHOICES: tuple[str, ...] = tuple(dict.fromkeys((AUTO, SMALLEST, *RECOMMENDED, AS_STORED, *FORMATS)))
"""What the nodes offer: what chooses for itself, the recommended formats, the rest."""


def find_format(name: str) -> WeightFormat:
    """The row named `name`.

    Raises:
        FormatError: there is no such format.
    """
    row = FORMATS.get(name)
    if row is None:
        raise FormatError(f"There is no weight format '{name}': choose one of {', '.join(FORMAT_CHOICES)}.")
    return row


def storage_for(weight_format: WeightFormat, columns: int) -> str:
    """Key into `STORAGES` for a matrix of `columns` in_features: the format's own, or its substitute."""
    if columns % STORAGES[weight_format.storage].column_multiple == 0:
        return weight_format.storage
    return weight_format.substitute


def stored_shape(storage: Storage, rows: int, columns: int) -> tuple[int, int]:
    """Shape that the tensor of a (rows, columns) weight has in `storage`."""
    return _round_up(rows, storage.pad or 1), _round_up(columns, storage.pad or 1) * storage.bits // 8


def stored_fits(storage: Storage, rows: int, columns: int, stored: Sequence[int]) -> bool:
    """Whether a tensor of the shape `stored` can be a (rows, columns) weight in `storage`, padded or not.

    Kernels and comfy-kitchen cut what is larger to the size that is asked for.
    """
    sizes = zip((rows, columns * storage.bits // 8), stored, stored_shape(storage, rows, columns), strict=False)
    return len(stored) == 2 and all(least <= size <= most for least, size, most in sizes)


def stored_nbytes(storage: Storage, rows: int, columns: int) -> int:
    """Bytes that a (rows, columns) weight takes in `storage`, scales included, the `comfy_quant` JSON not."""
    stored_rows, stored_columns = stored_shape(storage, rows, columns)
    nbytes = stored_rows * stored_columns
    if storage.pad:
        blocks = _round_up(columns, storage.pad) // storage.columns_per_scale
        block_scales = _round_up(stored_rows, 128) * _round_up(blocks, 4)
        return nbytes + block_scales + (4 if storage.core_format == "nvfp4" else 0)
    if storage.core_format == "asym_w4a8_int8":
        codebook = 16 * 4
        return nbytes + rows * (columns // storage.columns_per_scale) + rows * 4 + codebook
    return nbytes + (4 if storage.core_format.startswith("float8") else rows * 4)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
