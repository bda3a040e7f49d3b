"""Decodes weights as other tools store them with torch, on any device: stored tensors in, float32 out.

Sources: bitsandbytes (functional.py, `QuantState`), AutoGPTQ and AutoAWQ (their Linear classes), compressed-tensors
(`pack_to_int32`, `NVFP4PackedCompressor`), LightX2V (lightx2v_kernel/csrc/gemm).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..errors import CheckpointError
from .nvfp4 import untiled_scales

Block = tuple[int, int]
"""Rows and columns that share a scale."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The numbers of FP4 by their code."""

SIGNED = tuple(float(code - (code & 8) * 2) for code in range(16))
"""The numbers of INT4 by their code."""

UNSIGNED = tuple(map(float, range(16)))
"""The numbers of a 4-bit code without a sign."""

_E3M2 = tuple(
    (-1.0 if code & 32 else 1.0)
    * ((code & 3) / 16 if code & 28 == 0 else (1 + (code & 3) / 4) * 2.0 ** ((code >> 2 & 7) - 3))
    for code in range(64)
)
"""The numbers of FP6 E3M2 by their code."""

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which of the eight codes in an int32 of AWQ is that of each column."""

_CHUNK = 4 << 20
"""Bytes looked up at a time: the index of one takes four."""

_SCB_UNIT = 127.0
"""What LLM.int8's `SCB`, the largest of each row, is stored as."""


def blockwise(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None, *, block: Block
) -> torch.Tensor:
    """A weight (rows, columns) of FP8 or INT8 codes with a scale, and a zero point, per block; the last may be smaller."""
    values = codes.float()
    if zero is not None:
        each_block(torch.Tensor.sub_, values, zero, block)
    return each_block(torch.Tensor.mul_, values, scale, block)


def each_block(
    operation: Callable[[torch.Tensor, torch.Tensor], object], values: torch.Tensor, table: torch.Tensor, block: Block
) -> torch.Tensor:
    """`values` (rows, columns), each block changed in place by its number in `table` (row blocks, column blocks)."""
    table = table.float()
    for row, row_block, rows, height in _runs(values.shape[0], block[0]):
        for column, column_block, columns, width in _runs(values.shape[1], block[1]):
            region = values[row : row + rows * height, column : column + columns * width]
            numbers = table[row_block : row_block + rows, column_block : column_block + columns]
            blocks = region.unflatten(1, (columns, width)).unflatten(0, (rows, height))
            operation(blocks, numbers[:, None, :, None])
    return values


def _runs(length: int, size: int) -> Iterator[tuple[int, int, int, int]]:
    """Whole blocks, then what is left of the last: where they begin, the number of the first, how many, and how long."""
    whole = length // size
    if whole:
        yield 0, 0, whole, size
    if length % size:
        yield whole * size, whole, 1, length % size


def nibbles(
    packed: torch.Tensor, numbers: torch.Tensor | tuple[float, ...], *, high_first: bool = False
) -> torch.Tensor:
    """Two numbers a byte: (..., n) of any integers to (..., 2 n bytes) float32, by the number of each 4-bit code."""
    table = torch.as_tensor(numbers, dtype=torch.float32, device=packed.device)
    codes = torch.arange(256, device=packed.device)
    pair = (codes >> 4, codes & 15) if high_first else (codes & 15, codes >> 4)
    pairs = torch.stack([table[code] for code in pair], 1)
    stored = _bytes(packed)
    values = torch.empty((stored.numel(), 2), dtype=torch.float32, device=packed.device)
    for some, chunk in zip(values.split(_CHUNK), stored.view(-1).split(_CHUNK), strict=True):
        torch.index_select(pairs, 0, chunk.int(), out=some)
    return values.view(*stored.shape[:-1], -1)


def _unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes without a sign, lowest bits first: (rows, n) int32 to (rows, n * 32 / bits) float32."""
    if bits == 4:
        return nibbles(packed, UNSIGNED)
    return _bytes(packed).float()


def _bytes(packed: torch.Tensor) -> torch.Tensor:
    """(..., n) of any integers as (..., bytes): flat in between, since a single row may have any strides."""
    return packed.reshape(-1).view(torch.uint8).view(*packed.shape[:-1], -1)


def four_bit(
    packed: torch.Tensor, numbers: torch.Tensor, largest: torch.Tensor, *, shape: tuple[int, ...], block: int
) -> torch.Tensor:
    """NF4 and FP4 of bitsandbytes.

    Args:
        packed: two codes a byte, the earlier in the high bits.
        numbers: (16,) the number of each code.
        largest: the largest of each block of the flattened weight.
        shape: of the weight.
        block: numbers in a block.
    """
    values = nibbles(packed.reshape(-1), numbers.reshape(-1), high_first=True)
    count = torch.Size(shape).numel()
    values = values[:count].view(1, count)
    return each_block(torch.Tensor.mul_, values, largest.view(1, -1), (1, block)).view(shape)


def nested_four_bit(
    packed: torch.Tensor,
    numbers: torch.Tensor,
    largest: torch.Tensor,
    nested_numbers: torch.Tensor,
    nested_largest: torch.Tensor,
    *,
    shape: tuple[int, ...],
    block: int,
    nested_block: int,
    offset: float,
) -> torch.Tensor:
    """`four_bit` with the largest of each block in 8 bits themselves, coded alike, less an offset."""
    decoded = nested_numbers.float().reshape(-1)[largest.reshape(1, -1).int()]
    each_block(torch.Tensor.mul_, decoded, nested_largest.view(1, -1), (1, nested_block))
    return four_bit(packed, numbers, decoded + offset, shape=shape, block=block)


def llm_int8(codes: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """LLM.int8 of bitsandbytes: (rows, columns) int8 with the largest of each row."""
    return codes.float() * (largest.float().view(-1, 1) / _SCB_UNIT)


def nvfp4_rows(packed: torch.Tensor, block_scale: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """FP4 with scales row by row; the earlier column in the low bits.

    Args:
        packed: (rows, columns / 2).
        block_scale: (rows, columns / 16).
        scale: of all, which the tool divides by.
    """
    values = nibbles(packed, E2M1)
    return each_block(torch.Tensor.mul_, values, block_scale, (1, 16)).mul_(1 / scale.float().view(()))


def nvfp4_tiles(packed: torch.Tensor, block_scale: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`nvfp4_rows` with block scales in tiles (`tiled_scales`)."""
    rows, columns = packed.shape
    return nvfp4_rows(packed, untiled_scales(block_scale, rows, columns // 8), scale)


def nvfp4_tiles_calibrated(
    packed: torch.Tensor, block_scale: torch.Tensor, alpha: torch.Tensor, input_scale: torch.Tensor
) -> torch.Tensor:
    """`nvfp4_tiles` of a file that has only the factor of the product: 1 / (input scale * weight scale)."""
    return nvfp4_tiles(packed, block_scale, 1 / (alpha.float() * input_scale.float()))


def microscaled(packed: torch.Tensor, block_scale: torch.Tensor, *, bits: int, tiled: bool) -> torch.Tensor:
    """MXFP8 (E4M3), MXFP6 (E3M2) and MXFP4: powers of two per 32 columns, in tiles or row by row.

    Args:
        packed: (rows, columns * bits / 8) bytes.
        block_scale: E8M0.
        bits: of a number.
        tiled: the scales lie in tiles (`tiled_scales`).
    """
    if bits == 8:
        values = packed.view(torch.float8_e4m3fn).float()
    else:
        values = nibbles(packed, E2M1) if bits == 4 else _six_bits(packed)
    rows, columns = values.shape
    scale = block_scale.view(torch.uint8)
    if tiled:
        scale = untiled_scales(scale, rows, -(-columns // 32))
    return each_block(torch.Tensor.mul_, values, scale.view(torch.float8_e8m0fnu), (1, 32))


def _six_bits(packed: torch.Tensor) -> torch.Tensor:
    """Four codes in three bytes, lowest bits first: (rows, 3 n) to (rows, 4 n)."""
    first, second, third = packed.view(torch.uint8).int().unflatten(1, (-1, 3)).unbind(2)
    whole = first | second << 8 | third << 16
    codes = torch.stack([whole >> shift & 63 for shift in (0, 6, 12, 18)], 2).flatten(1)
    return torch.tensor(_E3M2, device=packed.device)[codes]


def awq(codes: torch.Tensor, zeros: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """AWQ (GEMM) in 4 bits.

    Args:
        codes: (in, out / 8) int32.
        zeros: (groups, out / 8) int32.
        scale: (groups, out).

    Returns:
        (out, in).
    """
    values, points = (_awq_order(nibbles(packed, UNSIGNED)) for packed in (codes, zeros))
    return blockwise(values, scale, points, block=(values.shape[0] // scale.shape[0], 1)).t().contiguous()


def _awq_order(values: torch.Tensor) -> torch.Tensor:
    return values.unflatten(1, (-1, 8))[:, :, list(_AWQ_PLACES)].flatten(1)


def gptq(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor,
    group: torch.Tensor | None = None,
    *,
    bits: int,
    block: int,
    name: str,
) -> torch.Tensor:
    """GPTQ whose zero points are the middle of the codes' range.

    Args:
        codes: (in * bits / 32, out) int32.
        scale: (groups, out).
        zeros: (groups, out * bits / 32) int32, of which only that is looked at.
        group: (in,) of each column, where they are not in order.
        bits: of a code.
        block: columns of a group, where they are in order.
        name: of the layer, for errors.

    Returns:
        (out, in).

    Raises:
        CheckpointError: the zero points are others, or a column is of a group that is not there.
    """
    if not zeros_in_the_middle(zeros, bits):
        raise CheckpointError(other_zeros(name))
    values = _unpacked(codes.t().contiguous(), bits).sub_(2.0 ** (bits - 1))
    if group is not None:
        return values.mul_(scale.float().t()[:, _groups_of(group, scale.shape[0], name)])
    return each_block(torch.Tensor.mul_, values, scale.t(), (1, block))


def _groups_of(group: torch.Tensor, groups: int, name: str) -> torch.Tensor:
    """The group of each column, as an index."""
    if int(group.min()) < 0 or int(group.max()) >= groups:
        raise CheckpointError(
            f"the layer '{name}' has columns of a group that has no scale: the file is damaged, download it again."
        )
    return group.long()


def zeros_in_the_middle(zeros: torch.Tensor, bits: int) -> bool:
    """Whether all of GPTQ's zero points are the middle of the range, as its first format stores it (less 1) or its second."""
    codes = _unpacked(zeros, bits)
    middle = 2.0 ** (bits - 1)
    return bool((codes == middle).all()) or bool((codes == middle - 1).all())


def other_zeros(name: str) -> str:
    """The sentence about GPTQ's other zero points, whose two formats nothing in a file tells apart."""
    return (
        f"the layer '{name}' is GPTQ with zero points of its own, which the two formats of GPTQ store differently and the "
        "file does not say whose it is: use the 16-bit file."
    )


def packed_integers(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    group: torch.Tensor | None = None,
    *,
    shape: tuple[int, int],
    bits: int,
    block: int,
    name: str,
) -> torch.Tensor:
    """compressed-tensors' `pack-quantized`.

    Args:
        packed: (out, in * bits / 32 rounded up) int32, of codes moved up by half of their range.
        scale: (out, groups).
        zero: (out, groups) int8, or (out * bits / 32 rounded up, groups) int32 moved up alike.
        group: (in,) of each column, where they are not in order.
        shape: (out, in).
        bits: of a code.
        block: columns of a group, where they are in order.
        name: of the layer, for errors.

    Raises:
        CheckpointError: a column is of a group that is not there.
    """
    rows, columns = shape
    middle = 2.0 ** (bits - 1)
    values = _unpacked(packed, bits)[:, :columns].sub_(middle)
    if zero is not None:
        packed_zero = zero.dtype == torch.int32
        zero = _unpacked(zero.t().contiguous(), bits)[:, :rows].t() - middle if packed_zero else zero.float()
    if group is not None and int(group.max()) >= 0:
        columns_of = _groups_of(group, scale.shape[1], name)
        if zero is not None:
            values -= zero[:, columns_of]
        return values.mul_(scale.float()[:, columns_of])
    return blockwise(values, scale, zero, block=(1, block))
