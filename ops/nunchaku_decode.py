"""Decodes nunchaku's layers with torch: tensors packed for its kernels in, float32 in plain order out.

Sources: deepcompressor's deepcompressor/backend/nunchaku/utils.py and backend/tinychat/utils.py, which pack them, and
nunchaku's nunchaku/models/linear.py and src/kernels/zgemm/gemm_w4a4.cuh, which multiply with them.
"""

from __future__ import annotations

import torch

from .foreign_decode import E2M1, SIGNED, UNSIGNED, each_block, nibbles

ROWS = 128
"""Rows of a tile; a column of scales, a bias and a smoothing come in such tiles too."""

RANKS = 16
"""What the rank of the part in 16 bits is a multiple of."""

_GELU_SHIFT = 0.171875
"""What the kernel adds to the output of a GELU, so that INT4 needs no sign: the bias of the layer behind makes up for it."""


def svdquant(
    qweight: torch.Tensor,
    wscales: torch.Tensor,
    wcscales: torch.Tensor | None = None,
    wtscale: torch.Tensor | None = None,
    smooth: torch.Tensor | None = None,
    down: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weight of a layer of `svdquant`, its low rank and its smoothing in it.

    Args:
        qweight: (out, in / 2) codes of INT4, or of FP4 where the scales are FP8.
        wscales: (groups, out) scales.
        wcscales: (out,) scales of the rows.
        wtscale: scale of all.
        smooth: (in,) what the kernel divides the input by.
        down, up: (in, rank) and (out, rank), of the input as it is.

    Returns:
        (out, in).
    """
    values = _quantized_part(qweight, wscales, wcscales, wtscale, smooth)
    if down is not None and up is not None:
        values.addmm_(_low_rank(up, down=False), _low_rank(down, down=True))
    return values


def svdquant_bias(bias: torch.Tensor, **quantized: torch.Tensor) -> torch.Tensor:
    """Its bias in plain order.

    Args:
        bias: (out,).
        quantized: the tensors of the quantized weight, where the kernel shifted its input behind a GELU.
    """
    plain = _column(bias)
    return plain + _GELU_SHIFT * _quantized_part(**quantized).sum(1) if quantized else plain


def _quantized_part(
    qweight: torch.Tensor,
    wscales: torch.Tensor,
    wcscales: torch.Tensor | None = None,
    wtscale: torch.Tensor | None = None,
    smooth: torch.Tensor | None = None,
) -> torch.Tensor:
    fp4 = wscales.dtype == torch.float8_e4m3fn
    values = _codes(qweight, E2M1 if fp4 else SIGNED)
    rows, columns = values.shape
    scales = _small_groups(wscales) if fp4 else _groups(wscales)
    each_block(torch.Tensor.mul_, values, scales, (1, columns // scales.shape[1]))
    if wcscales is not None:
        values *= _column(wcscales).view(rows, 1)
    if wtscale is not None:
        values *= wtscale.float().view(())
    if smooth is not None:
        values /= _column(smooth)
    return values


def _codes(packed: torch.Tensor, numbers: tuple[float, ...]) -> torch.Tensor:
    """(out, in) of (out, in / 2) bytes in tiles of 128 x 64, each lane's registers together."""
    rows, half = packed.shape
    tiles = packed.view(torch.uint8).reshape(rows // ROWS, half // 32, 8, 8, 4, 2, 2, 4)
    return nibbles(tiles.permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(rows, half), numbers)


def _groups(scales: torch.Tensor) -> torch.Tensor:
    """(out, groups) of 16-bit scales (groups, out)."""
    groups, rows = scales.shape
    tiles = scales.float().reshape(rows // ROWS, groups, 8, 4, 2, 2)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(rows, groups)


def _small_groups(scales: torch.Tensor) -> torch.Tensor:
    """(out, groups) of FP8 scales (groups, out), four groups together."""
    groups, rows = scales.shape
    tiles = scales.float().reshape(rows // ROWS, groups // 4, 8, 4, 4, 4)
    return tiles.permute(0, 4, 3, 2, 1, 5).reshape(rows, groups)


def _column(packed: torch.Tensor) -> torch.Tensor:
    return _groups(packed.reshape(1, -1)).view(-1)


def _low_rank(packed: torch.Tensor, *, down: bool) -> torch.Tensor:
    """(rank, in) of the projection down and (out, rank) of the one up, both stored as (channels, rank)."""
    channels, rank = packed.shape
    tiles = packed.float().reshape(channels // RANKS, rank // RANKS, 8, 4, 2, 2, 2)
    if down:
        return tiles.permute(1, 4, 2, 0, 5, 3, 6).reshape(rank, channels)
    return tiles.permute(0, 4, 2, 1, 5, 3, 6).reshape(channels, rank)


def awq_four_rows(packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """A weight (out, in) of W4A16: rows in fours, 32 columns in eights.

    Args:
        packed: (out / 4, in) int16, or (out / 4, in / 2) int32.
        scales: (groups, out).
        zeros: (groups, out), times the scales already and added.
    """
    halves = packed.contiguous().view(torch.int16)
    quarter, columns = halves.shape
    tiles = halves.view(torch.uint8).reshape(quarter, columns // 64, 4, 2, 8, 2)
    codes = nibbles(tiles, UNSIGNED)
    values = codes.permute(0, 2, 1, 3, 5, 4).reshape(quarter * 4, columns)
    block = (1, columns // scales.shape[0])
    each_block(torch.Tensor.mul_, values, scales.t(), block)
    return each_block(torch.Tensor.add_, values, zeros.t(), block)
