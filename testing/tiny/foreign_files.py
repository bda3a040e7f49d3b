"""Weights as other tools store them, written from what those tools' sources say: a layer's tensors and its exact numbers.

Every function takes a weight (out, in) and gives tensors by suffix and the float64 weight that they stand for. Sources: as in
ops/foreign_decode.py and ops/nunchaku_decode.py; nothing here is shared with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from .tensors import Tensors

Stored = tuple[Tensors, torch.Tensor]

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_E3M2 = np.array(
    [
        sign * ((m / 4) * 2**-2 if e == 0 else (1 + m / 4) * 2.0 ** (e - 3))
        for sign in (1, -1)
        for e in range(8)
        for m in range(4)
    ]
)
_NF4 = np.array([
    -1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
    0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0,
], np.float32)  # fmt: skip
_FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / 12
_GELU_SHIFT = 0.171875


@dataclass(frozen=True)
class ForeignScheme:
    """A way of storing a layer.

    Attributes:
        store: see above.
        what: it is called in the sentence about it.
        rows, columns: what the sides of a weight have to be multiples of.
    """

    store: Callable[[torch.Tensor], Stored]
    what: str
    rows: int = 1
    columns: int = 1


def _double(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float64))


def _blocks(numbers: np.ndarray, height: int, width: int, shape: tuple[int, int]) -> np.ndarray:
    """One number for each element of a weight, of its block's."""
    rows, columns = np.arange(shape[0]) // height, np.arange(shape[1]) // width
    return numbers[rows][:, columns]


def _largest(weight: np.ndarray, height: int, width: int) -> np.ndarray:
    rows, columns = -(-weight.shape[0] // height), -(-weight.shape[1] // width)
    return np.array(
        [
            [
                np.abs(weight[r * height : (r + 1) * height, c * width : (c + 1) * width]).max() + 1e-6
                for c in range(columns)
            ]
            for r in range(rows)
        ],
        np.float32,
    )


def _nearest(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The code of the nearest of `numbers`, uint8."""
    return np.abs(values[..., None] - numbers).argmin(-1).astype(np.uint8)


def blocks(
    height: int,
    width: int,
    dtype: torch.dtype = torch.float8_e4m3fn,
    name: str = "weight_scale_inv",
    zero: bool = False,
) -> Callable[[torch.Tensor], Stored]:
    """FP8 or INT8 with a scale for each block of so many rows and columns; 0: all of them."""

    def store(weight: torch.Tensor) -> Stored:
        values = weight.double().numpy()
        down, across = height or values.shape[0], width or values.shape[1]
        limit = 448.0 if dtype == torch.float8_e4m3fn else 57344.0 if dtype == torch.float8_e5m2 else 100.0
        scale = _largest(values, down, across) / np.float32(limit)
        spread = _blocks(scale, down, across, values.shape)
        points = np.random.default_rng(1).integers(0, 20, scale.shape) if zero else np.zeros(scale.shape, int)
        if dtype == torch.uint8:
            points += 110
        moved = _blocks(points, down, across, values.shape)
        codes = torch.from_numpy(values / spread + moved)
        codes = codes.to(dtype) if dtype.is_floating_point else codes.round().to(dtype)
        tensors = {"weight": codes, name: torch.from_numpy(scale)}
        if zero:
            tensors["weight_zero_point"] = torch.from_numpy(points).to(dtype)
        return tensors, _double((codes.double().numpy() - moved) * spread.astype(np.float64))

    return store


def llm_int8(weight: torch.Tensor) -> Stored:
    """LLM.int8 of bitsandbytes."""
    values = weight.double().numpy()
    largest = _largest(values, 1, values.shape[1])
    codes = (values / largest * 127).round().astype(np.int8)
    tensors = {
        "weight": torch.from_numpy(codes),
        "SCB": torch.from_numpy(largest[:, 0]),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return tensors, _double(codes * largest.astype(np.float64) / 127)


def four_bit(kind: str, block: int = 64, nested: bool = True) -> Callable[[torch.Tensor], Stored]:
    """NF4 or FP4 of bitsandbytes, the largest of each block in 8 bits too where `nested`."""
    numbers = _NF4 if kind == "nf4" else _FP4

    def store(weight: torch.Tensor) -> Stored:
        flat = weight.double().numpy().reshape(1, -1)
        largest = _largest(flat, 1, block)[0]
        state: dict[str, object] = {
            "quant_type": kind,
            "blocksize": block,
            "dtype": "bfloat16",
            "shape": list(weight.shape),
        }
        tensors = {"weight.quant_map": torch.tensor(numbers)}
        if nested:
            offset = float(largest.mean())
            nested_map = np.sort(np.random.default_rng(2).uniform(-1, 1, 256)).astype(np.float32)
            nested_largest = _largest((largest - offset)[None], 1, 256)[0]
            spread = nested_largest[np.arange(len(largest)) // 256]
            codes = _nearest((largest - offset) / spread, nested_map)
            largest = nested_map[codes].astype(np.float64) * spread + offset
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            tensors |= {
                "weight.absmax": torch.from_numpy(codes),
                "weight.nested_absmax": torch.from_numpy(nested_largest),
                "weight.nested_quant_map": torch.from_numpy(nested_map),
            }
        else:
            tensors["weight.absmax"] = torch.from_numpy(largest)
        spread = largest.astype(np.float64)[np.arange(flat.size) // block]
        codes = _nearest(flat[0] / spread, numbers)
        even = np.append(codes, [0] * (codes.size % 2)).astype(np.uint8)
        tensors["weight"] = torch.from_numpy((even[::2] << 4) | even[1::2]).view(-1, 1)
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        )
        return tensors, _double((numbers[codes].astype(np.float64) * spread).reshape(weight.shape))

    return store


def _int32(codes: np.ndarray, bits: int, axis: int) -> torch.Tensor:
    """Codes packed into int32 along an axis, the first in the lowest bits; what is left over is zero."""
    each = 32 // bits
    codes = np.moveaxis(codes.astype(np.int64), axis, -1)
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % each)])
    codes = codes.reshape(*codes.shape[:-1], -1, each)
    packed = sum(codes[..., place] << (bits * place) for place in range(each))
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(packed, -1, axis)).astype(np.uint32).view(np.int32))


def _grouped(values: np.ndarray, group: int, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes without a sign (out, in), and scale and zero point (out, groups)."""
    top = 2**bits - 1
    count = -(-values.shape[1] // group)
    zero = np.random.default_rng(3).integers(top // 3, top // 2, (values.shape[0], count))
    scale = (_largest(values, 1, group) / (top // 3)).astype(np.float16).astype(np.float32)
    spread, moved = (_blocks(numbers, 1, group, values.shape) for numbers in (scale, zero))
    return np.clip((values / spread + moved).round(), 0, top).astype(np.int64), scale, zero


def _ungrouped(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, group: int) -> torch.Tensor:
    """The weight that `_grouped` gave codes, scales and zero points of."""
    spread, moved = (_blocks(numbers, 1, group, codes.shape) for numbers in (scale, zero))
    return _double((codes - moved) * spread.astype(np.float64))


def awq(weight: torch.Tensor, group: int = 32) -> Stored:
    """AutoAWQ's GEMM form, whose eight columns of an int32 come in the order 0 2 4 6 1 3 5 7."""
    values = weight.double().numpy()
    codes, scale, zero = _grouped(values, group, 4)
    order = np.arange(values.shape[0]).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)
    tensors = {
        "qweight": _int32(codes.T[:, order], 4, 1),
        "qzeros": _int32(zero.T[:, order], 4, 1),
        "scales": torch.from_numpy(scale.T.copy()).half(),
    }
    return tensors, _ungrouped(codes, scale, zero, group)


def gptq(bits: int, group: int = 32, less: int = 1, ordered: bool = True) -> Callable[[torch.Tensor], Stored]:
    """GPTQ with zero points in the middle, stored `less` by one or not; `ordered`: columns come in their groups' order."""

    def store(weight: torch.Tensor) -> Stored:
        values = weight.double().numpy()
        columns, middle = values.shape[1], 2 ** (bits - 1)
        group_of = np.arange(columns) // group
        if not ordered:
            group_of = np.random.default_rng(4).permutation(group_of)
        scale = np.stack([np.abs(values[:, group_of == g]).max(1) + 1e-6 for g in range(group_of.max() + 1)], 1)
        scale = (scale / (middle - 1)).astype(np.float16).astype(np.float64)
        codes = np.clip((values / scale[:, group_of]).round() + middle, 0, 2**bits - 1)
        zeros = np.full(scale.shape, middle - less)
        tensors = {
            "qweight": _int32(codes.T, bits, 0),
            "qzeros": _int32(zeros.T, bits, 1),
            "scales": torch.from_numpy(scale.T.copy()).half(),
            "g_idx": torch.from_numpy(group_of.astype(np.int32)),
        }
        return tensors, _double((codes - middle) * scale[:, group_of])

    return store


def packed_integers(bits: int, group: int, zero: bool) -> Callable[[torch.Tensor], Stored]:
    """compressed-tensors' `pack-quantized`; `zero`: asymmetric, with packed zero points."""

    def store(weight: torch.Tensor) -> Stored:
        values = weight.double().numpy()
        codes, scale, points = _grouped(values, group, bits)
        if not zero:
            points = np.full_like(points, 2 ** (bits - 1))
            codes = np.clip((values / _blocks(scale, 1, group, values.shape)).round() + points[0, 0], 0, 2**bits - 1)
        tensors = {
            "weight_packed": _int32(codes, bits, 1),
            "weight_scale": torch.from_numpy(scale),
            "weight_shape": torch.tensor(weight.shape),
        }
        if zero:
            tensors["weight_zero_point"] = _int32(points, bits, 0)
        return tensors, _ungrouped(codes, scale, points, group)

    return store


def _tiles(scales: torch.Tensor) -> torch.Tensor:
    """Block scales where a tensor core looks for them: see `ops.nvfp4.tiled_scales`."""
    rows, count = scales.shape
    down, across = -(-rows // 128), -(-count // 4)
    row, column = np.meshgrid(np.arange(rows), np.arange(count), indexing="ij")
    place = ((row // 128 * across + column // 4) * 32 + row % 32) * 16 + row % 128 // 32 * 4 + column % 4
    tiled = np.zeros(down * 128 * across * 4, np.uint8)
    tiled[place] = scales.view(torch.uint8).numpy()
    return torch.from_numpy(tiled).view(scales.dtype).view(down * 128, across * 4)


def nvfp4(tool: str) -> Callable[[torch.Tensor], Stored]:
    """NVFP4 of `compressed-tensors` and `lightx2v` (`lightx2v calibrated`: with the product's factor only)."""

    def store(weight: torch.Tensor) -> Stored:
        values = weight.double().numpy()
        whole = np.float32(np.abs(values).max() / (6 * 448))
        scale = torch.from_numpy(_largest(values, 1, 16) / 6 / whole).to(torch.float8_e4m3fn)
        spread = _blocks(scale.double().numpy(), 1, 16, values.shape) * np.float64(whole)
        codes = _nearest(values / spread, _E2M1)
        packed = torch.from_numpy(codes[:, ::2] | (codes[:, 1::2] << 4))
        exact = _double(_E2M1[codes] * spread)
        divided = torch.tensor([1 / whole])
        if tool == "compressed-tensors":
            return {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": divided}, exact
        tensors = {"weight": packed, "weight_scale": _tiles(scale)}
        if tool == "lightx2v":
            return tensors | {"weight_global_scale": divided}, exact
        return tensors | {"input_global_scale": torch.tensor([3.0]), "alpha": 1 / (divided * 3.0)}, exact

    return store


def microscaled(bits: int, tool: str) -> Callable[[torch.Tensor], Stored]:
    """MXFP8, MXFP6 (E3M2) and MXFP4 of `lightx2v`; MXFP4 of `compressed-tensors`."""

    def store(weight: torch.Tensor) -> Stored:
        values = weight.double().numpy()
        top = {8: 448.0, 6: 28.0, 4: 6.0}[bits]
        power = np.ceil(np.log2(_largest(values, 1, 32) / top)).astype(int)
        spread = _blocks(2.0**power, 1, 32, values.shape)
        scale = torch.from_numpy((power + 127).astype(np.uint8))
        if bits == 8:
            stored = torch.from_numpy(values / spread).to(torch.float8_e4m3fn)
            numbers, packed = stored.double().numpy(), stored.view(torch.uint8)
        elif bits == 4:
            codes = _nearest(values / spread, _E2M1)
            numbers, packed = _E2M1[codes], torch.from_numpy(codes[:, ::2] | (codes[:, 1::2] << 4))
        else:
            codes = _nearest(values / spread, _E3M2).astype(np.uint32)
            numbers = _E3M2[codes]
            word = sum(codes[:, place::4] << (6 * place) for place in range(4))
            packed = torch.from_numpy(np.stack([(word >> shift & 255).astype(np.uint8) for shift in (0, 8, 16)], 2))
            packed = packed.reshape(values.shape[0], -1)
        exact = _double(numbers * spread)
        if tool == "lightx2v":
            return {"weight": packed, "weight_scale": _tiles(scale.view(torch.float8_e8m0fnu))}, exact
        return {"weight_packed": packed, "weight_scale": scale}, exact

    return store


FP8, E5M2, INT8, UINT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8

SCHEMES: Mapping[str, ForeignScheme] = MappingProxyType(
    {
        "fp8 blocks": ForeignScheme(blocks(128, 128), "FP8 in 128 x 128 blocks"),
        "e5m2 blocks": ForeignScheme(blocks(128, 128, E5M2), "FP8 in 128 x 128 blocks"),
        "fp8 blocks by weight_scale": ForeignScheme(blocks(128, 128, FP8, "weight_scale"), "FP8 in 128 x 128 blocks"),
        "fp8 blocks of 64": ForeignScheme(blocks(64, 64), "FP8 in 64 x 64 blocks", 64, 64),
        "fp8 rows of 128": ForeignScheme(blocks(1, 128, FP8, "weight_scale"), "FP8 in 1 x 128 blocks"),
        "fp8 columns": ForeignScheme(blocks(0, 1, FP8, "weight_scale"), "FP8 with a scale per column"),
        "fp8 rows, inverse": ForeignScheme(blocks(1, 0), "FP8 with a scale per row"),
        "int8 columns": ForeignScheme(blocks(0, 1, INT8, "weight_scale"), "INT8 with a scale per column"),
        "int8 groups": ForeignScheme(blocks(1, 32, INT8, "weight_scale"), "INT8 in groups of 32", columns=32),
        "int8 groups, zeros": ForeignScheme(
            blocks(1, 32, INT8, "weight_scale", True), "INT8 in groups of 32 and zero points", columns=32
        ),
        "int8 rows, zeros": ForeignScheme(
            blocks(1, 0, INT8, "weight_scale", True), "INT8 with a scale per row and zero points"
        ),
        "uint8 groups, zeros": ForeignScheme(
            blocks(1, 64, UINT8, "weight_scale", True), "INT8 in groups of 64 and zero points", columns=64
        ),
        "llm.int8": ForeignScheme(llm_int8, "LLM.int8 of bitsandbytes"),
        "nf4": ForeignScheme(four_bit("nf4"), "NF4 of bitsandbytes"),
        "nf4, plain": ForeignScheme(four_bit("nf4", 128, nested=False), "NF4 of bitsandbytes"),
        "fp4": ForeignScheme(four_bit("fp4"), "FP4 of bitsandbytes"),
        "awq": ForeignScheme(awq, "AWQ", 8, 32),
        "gptq": ForeignScheme(gptq(4), "GPTQ in 4 bits", 8, 32),
        "gptq 8": ForeignScheme(gptq(8), "GPTQ in 8 bits", 4, 32),
        "gptq v2, act order": ForeignScheme(gptq(4, less=0, ordered=False), "GPTQ in 4 bits", 8, 32),
        "int4 packed": ForeignScheme(packed_integers(4, 32, False), "INT4 of compressed-tensors", columns=32),
        "int4 packed, zeros": ForeignScheme(packed_integers(4, 32, True), "INT4 of compressed-tensors", columns=32),
        "int8 packed": ForeignScheme(packed_integers(8, 64, False), "INT8 of compressed-tensors", columns=64),
        "nvfp4 packed": ForeignScheme(nvfp4("compressed-tensors"), "NVFP4 of compressed-tensors", columns=16),
        "nvfp4 lightx2v": ForeignScheme(nvfp4("lightx2v"), "NVFP4 of LightX2V", columns=16),
        "nvfp4 lightx2v, calibrated": ForeignScheme(nvfp4("lightx2v calibrated"), "NVFP4 of LightX2V", columns=16),
        "mxfp8": ForeignScheme(microscaled(8, "lightx2v"), "MXFP8 of LightX2V", columns=256),
        "mxfp6": ForeignScheme(microscaled(6, "lightx2v"), "MXFP6 of LightX2V", columns=512),
        "mxfp4": ForeignScheme(microscaled(4, "lightx2v"), "MXFP4 of LightX2V", columns=256),
        "mxfp4 packed": ForeignScheme(microscaled(4, "compressed-tensors"), "MXFP4 of compressed-tensors", columns=32),
    }
)
"""All but nunchaku's, which come with a model's names."""


def stored_as(tensors: Mapping[str, torch.Tensor], layers: list[str], scheme: ForeignScheme) -> tuple[Tensors, Tensors]:
    """A file with these layers stored in a scheme, and the same one with what they stand for in float32."""
    theirs, plain = dict(tensors), dict(tensors)
    for layer in layers:
        parts, exact = scheme.store(theirs.pop(f"{layer}.weight").float())
        theirs |= {f"{layer}.{suffix}": part for suffix, part in parts.items()}
        plain[f"{layer}.weight"] = exact.float()
    return theirs, plain
