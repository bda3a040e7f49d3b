"""Recognises weights as other tools store them, and what each is decoded from: one row a scheme.

A row is found by the names of the tensors beside each other, then by their dtypes and shapes. Sources: as in
`foreign_decode` and `nunchaku_decode`; the names as the tools save them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..errors import CheckpointError
from . import foreign_decode
from .header import load_json
from .layer_tensors import Decode, Decoded, Found, LayerTensors, Shape
from .nunchaku_layers import find_four_rows, find_svdquant

_FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
_NUMBERS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e8m0fnu})
_BYTES = frozenset({torch.uint8, torch.float8_e8m0fnu})
_INDICES = frozenset({torch.int32, torch.int64})
_BITS = (4, 8)
_USUAL_BLOCK = 128
_SMALLEST_BLOCK = 16
_POWERS = tuple(2**power for power in range(4, 15))
_MICROSCALED_BLOCK = 32
_KIND = "weight.quant_state.bitsandbytes__"


@dataclass(frozen=True)
class Scheme:
    """How a tool stores a layer.

    Attributes:
        needs: suffixes that together are the sign of it.
        find: what the layer is decoded from; None where dtypes and shapes say that it is another scheme.
        drops: further ones that only the tool's own kernels have a use for.
    """

    needs: tuple[str, ...]
    find: Callable[[LayerTensors], Found | None]
    drops: tuple[str, ...] = ()


def _block_size(length: int, count: int) -> int | None:
    """The size of blocks of which `count` cover `length`, or None where no tool has such, or two sizes would fit."""
    if count in (1, length):
        return length // count
    fits = {size for size in _POWERS if -(-length // size) == count}
    if count and length % count == 0 and length // count >= _SMALLEST_BLOCK:
        fits.add(length // count)
    if _USUAL_BLOCK in fits:
        return _USUAL_BLOCK
    return fits.pop() if len(fits) == 1 else None


def _has_such(block: foreign_decode.Block, weight: Shape) -> bool:
    """Whether a tool scales in such blocks: in rows, columns or squares, which an edge may cut.

    Other ones are a table of scales in another order.
    """
    rows, columns = block
    if rows == 1 or rows == columns:
        return True
    whole_rows, whole_columns = rows >= weight[0], columns >= weight[1]
    return (whole_rows and (columns == 1 or rows <= columns)) or (whole_columns and columns <= rows)


def _in_blocks(layer: LayerTensors, scale: str) -> Found | None:
    """FP8 or INT8 with another scale than one per tensor or row, which core multiplies with, or with zero points."""
    if not layer.is_matrix("weight", *_FLOAT8, torch.int8, torch.uint8) or layer.dtype(scale) not in _NUMBERS:
        return None
    zero = layer.there(zero="weight_zero_point")
    weight, dtype, table = layer.shape("weight"), layer.dtype("weight"), layer.shape(scale)
    if math.prod(table) == 1 or table == weight[:1]:
        table = (math.prod(table), 1)
    as_core = table in ((1, 1), (weight[0], 1)) and not zero and scale != "weight_scale_inv"
    if as_core or len(table) != 2 or (dtype == torch.uint8 and not zero):
        return None
    rows, columns = (_block_size(length, count) for length, count in zip(weight, table, strict=True))
    if rows is None or columns is None or not _has_such((rows, columns), weight) or _is_microscaled(layer, scale):
        return None
    number = "FP8" if dtype in _FLOAT8 else "INT8"
    if zero:
        layer.need(f"{number} with zero points", {"weight_zero_point": math.prod(table)})
    decode = partial(_blockwise, table=table, block=(rows, columns))
    what = _blocks_in_words(number, weight, (rows, columns), bool(zero))
    either_axis = table == (1, weight[0]) == (1, weight[1]) and table != (1, 1)
    return Found(what, Decoded(weight, {"codes": "weight", "scale": scale, **zero}, decode), either_axis=either_axis)


def _is_microscaled(layer: LayerTensors, scale: str) -> bool:
    """Whether these are powers of two for 32 columns, row by row or in core's tiles, which nothing tells apart."""
    rows, columns = layer.shape("weight")
    blocks = -(-columns // _MICROSCALED_BLOCK)
    table = layer.shape(scale)
    fits = table == (rows, blocks) or math.prod(table) == _tiles(rows, blocks)
    return layer.dtype(scale) == torch.float8_e8m0fnu and fits


def _blockwise(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    *,
    table: Shape,
    block: foreign_decode.Block,
) -> torch.Tensor:
    points = None if zero is None else zero.view(table)
    return foreign_decode.blockwise(codes, scale.view(table), points, block=block)


def _blocks_in_words(number: str, weight: Shape, block: tuple[int, int], zero: bool) -> str:
    rows, columns = block
    if rows >= weight[0] and columns == 1:
        words = f"{number} with a scale per column"
    elif columns >= weight[1] and rows == 1:
        words = f"{number} with a scale per row"
    elif rows >= weight[0] and columns >= weight[1]:
        words = f"{number} with one scale"
    elif rows == 1 and number == "INT8":
        words = f"INT8 in groups of {columns}"
    else:
        words = f"{number} in {rows} x {columns} blocks"
    return f"{words} and zero points" if zero else words


def _llm_int8(layer: LayerTensors) -> Found | None:
    if not layer.is_matrix("weight", torch.int8):
        return None
    what, weight = "LLM.int8 of bitsandbytes", layer.shape("weight")
    layer.need(what, {"SCB": weight[0]})
    if "weight_format" in layer and bool((layer.value("weight_format") != 0).any()):
        raise CheckpointError(
            f"the layer '{layer.name}' is {what} in the tiles of one GPU, as old versions saved it: use the 16-bit file."
        )
    return Found(what, Decoded(weight, {"codes": "weight", "largest": "SCB"}, foreign_decode.llm_int8))


def _four_bit(layer: LayerTensors, kind: str) -> Found:
    what = f"{kind.upper()} of bitsandbytes"
    parts = {"packed": "weight", "numbers": "weight.quant_map", "largest": "weight.absmax"}
    try:
        state = load_json(bytes(layer.value(f"{_KIND}{kind}").reshape(-1).tolist()))
        shape = tuple(_count(number) for number in state["shape"])
        block = _count(state["blocksize"])
        nested_block = _count(state["nested_blocksize"]) if "nested_blocksize" in state else 0
        offset = float(state["nested_offset"]) if nested_block else 0.0
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the layer '{layer.name}' is {what}, and its quant_state cannot be read ({error}): download the file again."
        ) from None
    count = math.prod(shape)
    blocks = -(-count // block)
    # The bytes may be kept as numbers of another dtype.
    if layer.tensors["weight"].nbytes != (count + 1) // 2:
        raise layer.unfit(what, "weight")
    layer.need(what, {"weight.quant_map": 16, "weight.absmax": blocks})
    if (layer.dtype("weight.absmax") == torch.uint8) != (nested_block > 0):
        raise layer.unfit(what, "weight.absmax")
    if not nested_block:
        return Found(what, Decoded(shape, parts, partial(foreign_decode.four_bit, shape=shape, block=block)))
    nested_blocks = -(-blocks // nested_block)
    layer.need(what, {"weight.nested_absmax": nested_blocks, "weight.nested_quant_map": 256})
    nested = {"nested_numbers": "weight.nested_quant_map", "nested_largest": "weight.nested_absmax"}
    decode = partial(foreign_decode.nested_four_bit, shape=shape, block=block, nested_block=nested_block, offset=offset)
    return Found(what, Decoded(shape, {**parts, **nested}, decode))


def _count(value: Any) -> int:
    """A natural number of a description."""
    if type(value) is not int or not 0 < value < 2**40:
        raise ValueError(f"{value!r} is no number of elements")
    return value


def _packed_nvfp4(layer: LayerTensors) -> Found | None:
    """FP4 with block scales row by row."""
    fits = layer.is_matrix("weight_packed", torch.uint8, torch.int8)
    if not fits or layer.dtype("weight_scale") != torch.float8_e4m3fn:
        return None
    what = "NVFP4 of compressed-tensors"
    rows, half = layer.shape("weight_packed")
    layer.need(what, {"weight_scale": (rows, -(-half // 8)), "weight_global_scale": 1})
    parts = {"packed": "weight_packed", "block_scale": "weight_scale", "scale": "weight_global_scale"}
    return Found(what, Decoded((rows, half * 2), parts, foreign_decode.nvfp4_rows))


def _tiled_nvfp4(layer: LayerTensors, factors: Mapping[str, str], decode: Decode) -> Found | None:
    if not layer.is_matrix("weight", torch.uint8):
        return None
    what = "NVFP4 of LightX2V"
    rows, half = layer.shape("weight")
    layer.need(what, {"weight_scale": _tiles(rows, -(-half // 8)), **dict.fromkeys(factors.values(), 1)})
    parts = {"packed": "weight", "block_scale": "weight_scale", **factors}
    return Found(what, Decoded((rows, half * 2), parts, decode))


def _tiles(rows: int, blocks: int) -> int:
    """Elements of block scales in tiles."""
    return -(-rows // 128) * 128 * -(-blocks // 4) * 4


def _tiled_microscaled(layer: LayerTensors) -> Found | None:
    """LightX2V's MXFP8, MXFP6 or MXFP4: which, the number of scales tells."""
    if not layer.is_matrix("weight", torch.uint8) or layer.dtype("weight_scale") not in _BYTES:
        return None
    rows, width = layer.shape("weight")
    scales = math.prod(layer.shape("weight_scale"))
    fits = [bits for bits in (4, 6, 8) if width * 8 % bits == 0 and scales == _tiles(rows, -(-width * 8 // bits // 32))]
    if len(fits) != 1:
        return None
    return _microscaled(layer, "weight", fits[0], tiled=True, who="LightX2V")


def _packed_microscaled(layer: LayerTensors) -> Found | None:
    if not layer.is_matrix("weight_packed", torch.uint8) or layer.dtype("weight_scale") not in _BYTES:
        return None
    rows, half = layer.shape("weight_packed")
    layer.need("MXFP4 of compressed-tensors", {"weight_scale": (rows, -(-half // 16))})
    return _microscaled(layer, "weight_packed", 4, tiled=False, who="compressed-tensors")


def _microscaled(layer: LayerTensors, packed: str, bits: int, *, tiled: bool, who: str) -> Found:
    rows, width = layer.shape(packed)
    decode = partial(foreign_decode.microscaled, bits=bits, tiled=tiled)
    parts = {"packed": packed, "block_scale": "weight_scale"}
    return Found(f"MXFP{bits} of {who}", Decoded((rows, width * 8 // bits), parts, decode))


def _packed_integers(layer: LayerTensors) -> Found | None:
    if not layer.is_matrix("weight_packed", torch.int32):
        return None
    what = "INT4 or INT8 of compressed-tensors"
    rows, columns = layer.shape("weight_packed")
    layer.need(what, {"weight_shape": 2})
    if layer.dtype("weight_shape") not in _INDICES:
        raise layer.unfit(what, "weight_shape")
    first, second = layer.value("weight_shape").reshape(-1).tolist()
    shape = (int(first), int(second))
    fits = shape[0] == rows and shape[1] > 0
    bits = next((bits for bits in _BITS if fits and -(-shape[1] * bits // 32) == columns), None)
    if bits is None:
        raise layer.unfit(what, "weight_packed")
    what, table = f"INT{bits} of compressed-tensors", layer.shape("weight_scale")
    block = _block_size(shape[1], table[1]) if len(table) == 2 and table[0] == rows else None
    if block is None:
        raise layer.unfit(what, "weight_scale")
    zero = layer.there(zero="weight_zero_point")
    if zero:
        unpacked = layer.dtype("weight_zero_point") == torch.int8
        layer.need(what, {"weight_zero_point": (rows if unpacked else -(-rows * bits // 32), table[1])})
    group = _group_indices(layer, what, "weight_g_idx", shape[1])
    decode = partial(foreign_decode.packed_integers, shape=shape, bits=bits, block=block, name=layer.name)
    parts = {"packed": "weight_packed", "scale": "weight_scale", **zero, **group}
    return Found(what, Decoded(shape, parts, decode))


def _group_indices(layer: LayerTensors, what: str, suffix: str, columns: int) -> dict[str, str]:
    """Where there is an index of each column's group."""
    group = layer.there(group=suffix)
    if group:
        layer.need(what, {suffix: columns})
        if layer.dtype(suffix) not in _INDICES:
            raise layer.unfit(what, suffix)
    return group


def _gptq_or_awq(layer: LayerTensors) -> Found | None:
    """The dimension that is packed tells one from the other."""
    integers = all(layer.is_matrix(suffix, torch.int32) for suffix in ("qweight", "qzeros"))
    if not integers or not layer.is_matrix("scales", *_NUMBERS):
        return None
    (first, second), (groups, rows), zeros = (layer.shape(suffix) for suffix in ("qweight", "scales", "qzeros"))
    if zeros[0] != groups:
        return None
    parts = {"codes": "qweight", "zeros": "qzeros", "scale": "scales"}
    bits = next((bits for bits in _BITS if zeros[1] * 32 == rows * bits), None)
    if bits == 4 and second * 8 == rows and "g_idx" not in layer:
        size = _block_size(first, groups)
        # Its kernels take whole groups alone.
        whole = size is not None and size * groups == first
        return Found("AWQ", Decoded((rows, first), parts, foreign_decode.awq)) if whole else None
    if bits is None or second != rows:
        return None
    columns = first * 32 // bits
    group = _group_indices(layer, "GPTQ", "g_idx", columns)
    block = columns if group else _block_size(columns, groups)
    if block is None:
        return None
    entry = layer.tensors["qzeros"]
    some = layer.read(replace(entry, shape=(1, zeros[1]), nbytes=zeros[1] * entry.dtype.itemsize))
    if not foreign_decode.zeros_in_the_middle(some, bits):
        raise CheckpointError(foreign_decode.other_zeros(layer.name))
    decode = partial(foreign_decode.gptq, bits=bits, block=block, name=layer.name)
    return Found(f"GPTQ in {bits} bits", Decoded((rows, columns), {**parts, **group}, decode))


_INPUT = ("input_scale", "scale_input", "activation_scale")
_LIGHTX2V_INPUT = ("input_global_scale", "input_absmax", "alpha")
SCHEMES: tuple[Scheme, ...] = (
    Scheme(("weight", _KIND + "nf4"), partial(_four_bit, kind="nf4")),
    Scheme(("weight", _KIND + "fp4"), partial(_four_bit, kind="fp4")),
    Scheme(("weight", "SCB"), _llm_int8, ("weight_format",)),
    Scheme(("qweight", "wscales", "wzeros"), partial(find_four_rows, scales="wscales", zeros="wzeros", renamed=True)),
    Scheme(
        ("qweight", "wscales"),
        find_svdquant,
        ("smooth_factor_orig", "smooth_orig", "proj_down", "proj_up", "lora_down", "lora_up"),
    ),
    Scheme(
        ("qweight", "scaled_zeros", "scales"),
        partial(find_four_rows, scales="scales", zeros="scaled_zeros", renamed=False),
    ),
    Scheme(("qweight", "qzeros", "scales"), _gptq_or_awq),
    Scheme(
        ("weight_packed", "weight_scale", "weight_global_scale"),
        _packed_nvfp4,
        ("input_global_scale",),
    ),
    Scheme(("weight_packed", "weight_scale", "weight_shape"), _packed_integers),
    Scheme(("weight_packed", "weight_scale"), _packed_microscaled),
    Scheme(
        ("weight", "weight_scale", "weight_global_scale"),
        partial(_tiled_nvfp4, factors={"scale": "weight_global_scale"}, decode=foreign_decode.nvfp4_tiles),
        _LIGHTX2V_INPUT,
    ),
    Scheme(
        ("weight", "weight_scale", "alpha", "input_global_scale"),
        partial(
            _tiled_nvfp4,
            factors={"alpha": "alpha", "input_scale": "input_global_scale"},
            decode=foreign_decode.nvfp4_tiles_calibrated,
        ),
    ),
    Scheme(("weight", "weight_scale"), _tiled_microscaled),
    *(
        Scheme(("weight", scale), partial(_in_blocks, scale=scale), _INPUT)
        for scale in ("weight_scale_inv", "weight_scale", "scale_weight")
    ),
)
"""By what tells most; the first whose dtypes and shapes fit too is taken."""


def find_scheme(layer: LayerTensors) -> tuple[Found, frozenset[str]] | None:
    """How another tool stores a layer, and all suffixes that this takes; None where it is stored in no way known here.

    Raises:
        CheckpointError: it is of a scheme known here, and a tensor of it is missing or has a wrong shape.
    """
    for scheme in SCHEMES:
        if all(suffix in layer and 0 not in layer.shape(suffix) for suffix in scheme.needs):
            found = scheme.find(layer)
            if found is not None:
                read = {part for made in (found.weight, found.bias) if made is not None for part in made.parts.values()}
                return found, frozenset({*scheme.needs, *scheme.drops, *read})
    return None
